"""A hash-grid field among the models that no calibration has seen (:mod:`shared.calibrate.models`): one grid and head of config A.

Its encoding is the reference in plain torch, as operators are what a device model knows; the compiled forms are one kernel.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import CONFIG_A, HMoHE
from shared.calibrate.models import Built, HeldOut

POINTS = 1024


def _build(batch: int, dtype: torch.dtype, device: str) -> Built:
    config = replace(CONFIG_A, experts=(GridSpec(16, 16, 2048, 19),), appearance=0)
    with torch.device(device):
        field = HMoHE(config, backend="reference").to(dtype).eval()
        points, directions = torch.rand(POINTS * batch, 3, dtype=dtype), torch.randn(POINTS * batch, 3, dtype=dtype)
        return field, (points, directions)


def held_out_models() -> list[HeldOut]:
    """Positions need single precision."""
    return [HeldOut("hash_grid_field", _build, gpu_batches=(16, 64), dtypes=("fp32",))]
