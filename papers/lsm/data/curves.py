"""Shared kinematics (stand-in C): 26 pen curves, seen once by 192 electrodes as the hand moves and once as a drawn image.

Both sides share the trajectory, as imagined handwriting and the letter do, and nothing else: every instance is perturbed and drawn anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES, HARMONICS = 26, 3
ELECTRODES, NEURAL_BINS = 192, 201
SIDE, IMAGE_STEPS = 28, 49
PEN_PX, RATE = 0.8, 0.4
PERTURBATION = 0.08


@dataclass(frozen=True)
class Curves:
    """``neural`` (26 n, 201, 192) and ``images`` (26 n, 49, 784) as uint8, ``drawn`` (26 n, 28, 28), class and instance of every row."""

    neural: Tensor
    images: Tensor
    drawn: Tensor
    labels: Tensor
    instances: Tensor


def _positions(coefficients: Tensor, u: Tensor) -> Tensor:
    """(N, S, 2) points of curves with coefficients (N, 2 axes, K, 2) at (N, S) parameters."""
    k = torch.arange(1, HARMONICS + 1)
    phase = math.pi * u.unsqueeze(-1) * k  # (N, S, K)
    return torch.einsum("nsk,nak->nsa", phase.cos(), coefficients[..., 0]) + torch.einsum(
        "nsk,nak->nsa", phase.sin(), coefficients[..., 1]
    )


def _normalised(points: Tensor) -> Tensor:
    centred = points - points.mean(1, keepdim=True)
    return centred / centred.std((1, 2), keepdim=True)


def shared_kinematics(instances: int, seed: int, classes: int = CLASSES) -> Curves:
    """Draw ``instances`` of each class for both sides."""
    g = torch.Generator().manual_seed(seed)
    k = torch.arange(1, HARMONICS + 1).float()
    prototypes = torch.randn(classes, 2, HARMONICS, 2, generator=g) / k[None, None, :, None]
    labels = torch.arange(classes).repeat(instances)
    n = len(labels)

    def perturbed() -> Tensor:
        return prototypes[labels] * (1 + PERTURBATION * torch.randn(n, 2, HARMONICS, 2, generator=g))

    # Neural side: position and velocity set the rates of electrodes whose tuning all classes share.
    time = torch.linspace(0, 1, NEURAL_BINS)
    warp = 0.8 + 0.45 * torch.rand(n, 1, generator=g)
    position = _normalised(_positions(perturbed(), time[None] ** warp))
    velocity = torch.gradient(position, dim=1)[0]
    velocity = velocity * 0.5 / velocity.norm(dim=2).mean(1)[:, None, None]
    bias = -2.5 + 2.0 * torch.rand(ELECTRODES, generator=g)
    to_velocity = 0.9 * torch.randn(2, ELECTRODES, generator=g)
    to_position = 0.6 * torch.randn(2, ELECTRODES, generator=g)
    rate = (bias + velocity @ to_velocity + position @ to_position).clamp(-6, 2).exp()
    neural = torch.rand(rate.shape, generator=g) < 1 - (-rate).exp()  # at least one Poisson event

    # Image side: a second instance, drawn with a Gaussian pen.
    points = _positions(perturbed(), torch.linspace(0, 1, 120).expand(n, -1))
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    scale = (SIDE - 9) / (high - low).amax(2, keepdim=True)
    pixels = (points - (low + high) / 2) * scale + (SIDE - 1) / 2
    grid = torch.arange(SIDE).float()
    drawn = torch.zeros(n, SIDE, SIDE)
    for start in range(0, n, 64):
        part = pixels[start : start + 64]
        dx = (grid - part[..., 0:1]).square().mul(-0.5 / PEN_PX**2).exp()  # (n, S, 28)
        dy = (grid - part[..., 1:2]).square().mul(-0.5 / PEN_PX**2).exp()
        drawn[start : start + 64] = (dy.unsqueeze(3) * dx.unsqueeze(2)).amax(1)
    images = torch.rand(n, IMAGE_STEPS, SIDE * SIDE, generator=g) < RATE * drawn.reshape(n, 1, -1)
    instance = torch.arange(instances).repeat_interleave(classes)
    return Curves(neural.to(torch.uint8), images.to(torch.uint8), drawn, labels, instance)
