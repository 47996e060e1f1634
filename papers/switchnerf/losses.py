"""Losses of the proposal pipeline (mip-NeRF 360, as nerfacto has them) and image metrics."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def interlevel_loss(edges: Tensor, weights: Tensor, proposal_edges: Tensor, proposal_weights: Tensor) -> Tensor:
    """How far the field's weights exceed what the proposal allows: mean of max(0, w - bound)²/(w + 1e-7).

    ``bound`` of an interval is the sum of the proposal's weights that overlap it. Gradients reach the proposal only.
    """
    w, t, s = weights.detach(), edges.detach().contiguous(), proposal_edges.detach().contiguous()
    total = F.pad(proposal_weights.cumsum(-1), (1, 0))
    last = s.shape[-1] - 1
    low = (torch.searchsorted(s, t[:, :-1].contiguous(), right=True) - 1).clamp(0, last)
    high = torch.searchsorted(s, t[:, 1:].contiguous(), right=False).clamp(0, last)
    bound = total.gather(-1, high) - total.gather(-1, torch.minimum(low, high))
    return ((w - bound).clamp(min=0.0).square() / (w + 1e-7)).mean()


def distortion_loss(edges: Tensor, weights: Tensor) -> Tensor:
    """Σ_ij w_i w_j |m_i - m_j| + ⅓ Σ_i w_i² d_i over normalised depths, mean over rays: weights gather in few, short intervals."""
    middle, width = (edges[:, 1:] + edges[:, :-1]) / 2, edges[:, 1:] - edges[:, :-1]
    # Mid-points are sorted, so Σ_ij collapses into running sums.
    before = F.pad(weights.cumsum(-1), (1, 0))[:, :-1]
    moment = F.pad((weights * middle).cumsum(-1), (1, 0))[:, :-1]
    between = 2.0 * (weights * (middle * before - moment)).sum(-1)
    return (between + (weights.square() * width).sum(-1) / 3.0).mean()


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [0, 1], dB."""
    error = (image.double() - target.double()).square().mean().item()
    return math.inf if error == 0 else -10.0 * math.log10(error)


def ssim(image: Tensor, target: Tensor) -> float:
    """Mean structural similarity of two (H, W, 3) images in [0, 1]: 11 x 11 Gaussian window of deviation 1.5, zero padding."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum().square()
    kernel = window.expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=5, groups=3)

    a, b = (x.double().permute(2, 0, 1)[None] for x in (image, target))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())
