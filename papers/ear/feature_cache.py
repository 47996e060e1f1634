"""The taps of a domain are computed once and kept while its adaptor is trained: what that takes, and what to do when it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from shared.errors import UserError

Shape = Sequence[int]
SIDES = (7, 4, 2, 1)  # pooled sizes that are tried, largest first
FLOAT_BYTES = 4


@dataclass(frozen=True)
class CachePlan:
    """``side``: taps are pooled to at most this; ``None``: kept as they are."""

    side: int | None
    image_bytes: int
    total_bytes: int


def image_bytes(shapes: Sequence[Shape], side: int | None = None, element_bytes: int = FLOAT_BYTES) -> int:
    """Bytes of the taps (c, h, w) of one image, pooled to at most ``side``."""
    if side is not None:
        shapes = [(c, min(h, side), min(w, side)) for c, h, w in shapes]
    return element_bytes * sum(prod(shape) for shape in shapes)


def plan_cache(images: int, shapes: Sequence[Shape], memory_bytes: float) -> CachePlan:
    """The finest cache that fits: native taps, else pooled to 7, 4, 2, 1.

    Raises:
        UserError: not even one value per channel fits; says how many images would.
    """
    for side in (None, *SIDES):
        each = image_bytes(shapes, side)
        if images * each <= memory_bytes:
            return CachePlan(side, each, images * each)
    least = image_bytes(shapes, 1)
    raise UserError(
        f"the taps of {images} images need {images * least:,} bytes even pooled to 1 x 1, the memory is {memory_bytes:,.0f}: "
        f"use at most {int(memory_bytes // least)} images"
    )


def check_fits(images: int, shapes: Sequence[Shape], memory_bytes: float | None) -> None:
    """Refuse a cache that does not fit.

    Raises:
        UserError: says which pooling would.
    """
    if memory_bytes is None or images * image_bytes(shapes) <= memory_bytes:
        return
    plan = plan_cache(images, shapes, memory_bytes)
    raise UserError(
        f"the taps of {images} images take {images * image_bytes(shapes):,} bytes, the memory is {memory_bytes:,.0f}: "
        f"build the encoder with side={plan.side}"
    )
