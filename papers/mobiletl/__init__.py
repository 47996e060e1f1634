"""MobileTL (Chiang, Frumkin, Liang, Marculescu, AAAI 2023): transfer learning on a device for networks of inverted residual blocks.

>>> from papers.mobiletl import mobiletl
>>> model = mobiletl(timm.create_model("mobilenetv3_small_100", pretrained=True, num_classes=10), blocks=5)
>>> optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papers.mobiletl.convert import adapt, adapted_state_dict, load_adapted, mobiletl, parameter_groups
    from papers.mobiletl.graphs import graphed

__all__ = ["adapt", "adapted_state_dict", "graphed", "load_adapted", "mobiletl", "parameter_groups"]


def __getattr__(name: str) -> Any:
    """The library, imported when first used: listing the paper needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from papers.mobiletl import convert, graphs

    return getattr(graphs if name == "graphed" else convert, name)
