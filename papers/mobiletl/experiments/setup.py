"""What the experiments share: the traced network of the config, and the roles of its layers."""

from __future__ import annotations

from typing import Any

MB = 1e6
MILLION = 1e6


def traced(cfg: Any) -> tuple[Any, Any]:
    """The network of ``cfg.model`` on the meta device, and its layers."""
    import torch

    from papers.mobiletl.counts import trace_layers
    from papers.mobiletl.models import create

    with torch.device("meta"):
        model = create(cfg.model.name, cfg.model.classes)
    return model, trace_layers(model, (cfg.model.batch, 3, cfg.model.resolution, cfg.model.resolution))


def switches(cfg: Any) -> dict[str, str]:
    """The two parts of the idea, as keyword arguments."""
    return {"act_backward": cfg.method.act_backward, "inner_norm": cfg.method.inner_norm}
