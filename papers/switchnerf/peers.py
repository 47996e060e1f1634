"""nerfstudio's torch hash encoding (nerfstudio 1.1.5, ``HashEncoding``, implementation "torch"), rewritten from its published algorithm.

One grid per call, always hashed, corners by ceil and floor, trilinear interpolation axis by axis: the peer for kernel speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papers.switchnerf.hashgrid import PRIMES, GridSpec


def scalings(spec: GridSpec, device: torch.device | str) -> Tensor:
    """Resolution of each level (L,)."""
    return torch.tensor([level.scale for level in spec.level_table()], device=device)


def nerfstudio_encode(x: Tensor, table: Tensor, scale: Tensor, log2_size: int) -> Tensor:
    """Features (S, L·F) of points (S, 3) in [0, 1]; ``table`` is (L·2^log2_size, F), ``scale`` (L,)."""
    size = 1 << log2_size
    scaled = x[:, None, :] * scale[:, None]
    upper, lower = torch.ceil(scaled).to(torch.int64), torch.floor(scaled).to(torch.int64)
    offset = scaled - lower
    starts = torch.arange(len(scale), device=x.device) * size

    def entry(ix: Tensor, iy: Tensor, iz: Tensor) -> Tensor:
        index = (ix[..., 0] * PRIMES[0]) ^ (iy[..., 1] * PRIMES[1]) ^ (iz[..., 2] * PRIMES[2])
        return table[index % size + starts]

    a, b = upper, lower
    f0, f1, f2, f3 = entry(a, a, a), entry(a, b, a), entry(b, b, a), entry(b, a, a)
    f4, f5, f6, f7 = entry(a, a, b), entry(a, b, b), entry(b, b, b), entry(b, a, b)
    ox, oy, oz = (offset[..., axis : axis + 1] for axis in range(3))
    f03, f12 = f0 * ox + f3 * (1 - ox), f1 * ox + f2 * (1 - ox)
    f56, f47 = f5 * ox + f6 * (1 - ox), f4 * ox + f7 * (1 - ox)
    near, far = f03 * oy + f12 * (1 - oy), f47 * oy + f56 * (1 - oy)
    return (near * oz + far * (1 - oz)).flatten(1)
