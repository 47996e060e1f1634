"""Zero-TPrune (Wang, Dedhia, Jha; CVPR 2024): training-free token pruning for plain vision transformers.

``from papers.zero_tprune import prune, solve`` prunes any timm ViT at run time; names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ATS": "plans",
    "EViT": "plans",
    "Layer": "plans",
    "Pruner": "pruner",
    "Rule": "plans",
    "Schedule": "plans",
    "ToMe": "plans",
    "family": "plans",
    "prune": "pruner",
    "shape_of": "shape",
    "solve": "budget",
    "solve_latency": "budget",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
