"""The six procedural domains of the stand-in: what a sensor, a lamp or the weather does to grey images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import unknown

BLUR_SIGMA_SHARE = 2.0 / 28.0  # sigma 2 at 28 pixels; smaller images are blurred alike


def _texture(x: Tensor, generator: torch.Generator) -> Tensor:
    """|x - T| with a smooth random background T of one node per 4 pixels (7 x 7 at 28 pixels)."""
    nodes = max(2, x.shape[-1] // 4)
    coarse = torch.rand(len(x), 1, nodes, nodes, generator=generator)
    background = F.interpolate(coarse, size=x.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return (x - background).abs()


def _blur(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur and noise."""
    sigma = BLUR_SIGMA_SHARE * x.shape[-1]
    radius = max(1, round(3 * sigma))
    at = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    smooth = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return (smooth + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def _edge(x: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitude of the Sobel gradient."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = torch.stack((kernel, kernel.T)).unsqueeze(1)
    gradient = F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), both)
    return gradient.norm(dim=1, keepdim=True).clamp(0, 1)


DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda x, generator: x,
    "invert": lambda x, generator: 1 - x,
    "rot": lambda x, generator: x.rot90(1, (2, 3)),
    "texture": _texture,
    "blur": _blur,
    "edge": _edge,
}


def shift(images: Tensor, domain: str, seed: int) -> Tensor:
    """Grey images (N, 1, H, W) in [0, 1] as the domain shows them; the same seed gives the same bits.

    Raises:
        UserError: no such domain.
    """
    if domain not in DOMAINS:
        raise unknown("domain", domain, DOMAINS)
    return DOMAINS[domain](images, torch.Generator().manual_seed(seed))
