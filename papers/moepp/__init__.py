"""MoE++ (Jin, Zhu, Yuan, Yan; ICLR 2025): mixture of experts with zero-computation experts.

``from papers.moepp import MoEPlusPlus, MoE`` are drop-in torch layers; names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Experts": "routing",
    "MoE": "layer",
    "MoEPlusPlus": "layer",
    "Output": "layer",
    "exact_routing": "synthetic",
    "load_released": "checkpoint",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
