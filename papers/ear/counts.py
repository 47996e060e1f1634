"""Counts of an encoder with its hyperdimensional head and an adaptor, traced on the meta device at full size: no weights, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from papers.ear.adaptors import Architecture
from papers.ear.encoder import FrozenEncoder, timm_encoder
from shared.workload import Workload, meta_model, trace


@dataclass(frozen=True)
class EncoderCounts:
    """One encoder at 224 x 224, batch 1. ``macs`` and ``params`` are of the whole classifier, as tables print them."""

    name: str
    params: int
    headless_params: int
    macs: int
    tap_shapes: tuple[tuple[int, int, int], ...]  # (c, h, w), not pooled

    @property
    def channels(self) -> tuple[int, ...]:
        """c of each tap."""
        return tuple(c for c, _, _ in self.tap_shapes)

    def positions(self, side: int | None = 7) -> tuple[int, ...]:
        """h w of each tap, pooled to at most ``side``."""
        cap = side or 10**9
        return tuple(min(h, cap) * min(w, cap) for _, h, w in self.tap_shapes)


@lru_cache(maxsize=16)
def encoder_counts(name: str, image_size: int = 224) -> EncoderCounts:
    """Counts of a timm encoder from its traced workload."""
    import timm
    import torch

    image = torch.empty(1, 3, image_size, image_size, device="meta")
    model = meta_model(timm.create_model, name)
    work = trace(model, image)
    head = sum(p.numel() for p in model.get_classifier().parameters())
    taps = meta_model(_native_taps, name, image_size)(image)
    return EncoderCounts(
        name, work.num_parameters, work.num_parameters - head, work.macs, tuple(tuple(t.shape[1:]) for t in taps)
    )


def _native_taps(name: str, image_size: int) -> FrozenEncoder:
    return timm_encoder(name, side=None, image_size=image_size)


def adaptor_work(architecture: Architecture, counts: EncoderCounts, side: int | None = 7) -> Workload:
    """The traced workload of an adaptor on the taps of one image."""
    import torch

    from papers.ear.adaptors import Adaptor

    taps = [torch.empty(1, c, min(h, side or h), min(w, side or w), device="meta") for c, h, w in counts.tap_shapes]
    return trace(meta_model(_in_evaluation, Adaptor, architecture, counts.channels), taps)


def _in_evaluation(factory: Any, *args: Any) -> Any:
    return factory(*args).eval()


def projection_entries(channels: Sequence[int], dim: int, grid: int = 1) -> int:
    """Entries of all P_l, and multiply-accumulates of one image's projection."""
    return dim * sum(c * grid**2 for c in channels)


def projection_work(counts: EncoderCounts, dim: int, grid: int = 1) -> Workload:
    """The traced workload of the dense projection of one image."""
    import torch

    width = sum(c * grid**2 for c in counts.channels)
    return trace(torch.mm, torch.empty(1, width, device="meta"), torch.empty(width, dim, device="meta"))


def mahalanobis_entries(channels: Sequence[int]) -> int:
    """Entries of one shared covariance per tap: the rival detector's memory, without class means."""
    return sum(c * c for c in channels)
