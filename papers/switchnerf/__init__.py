"""Switch-NeRF++ (HMoHE) and its baseline Switch-NeRF as a library: fields, renderers, hash encodings, city, real scenes."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CONFIG_A": "hmohe",
    "CONFIG_S": "hmohe",
    "Camera": "rays",
    "GridSpec": "hashgrid",
    "HMoHE": "hmohe",
    "HMoHEConfig": "hmohe",
    "HMoHERenderer": "render",
    "HashEncoding": "hashgrid",
    "Proposal": "hmohe",
    "ProposalSampling": "render",
    "Rays": "rays",
    "SwitchConfig": "switch",
    "SwitchNeRF": "switch",
    "SwitchRenderer": "render",
    "build_city": "city",
    "expert_map": "render",
    "load_colmap": "colmap",
    "load_scene": "megadata",
    "render_image": "render",
    "render_path": "render",
    "train_renderer": "train",
    "write_chunks": "megadata",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
