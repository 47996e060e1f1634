"""Adaptors: shallow networks on the taps of a frozen encoder, and the search space that zero-shot NAS draws from (Sec. 3 headings).

An architecture is one :class:`Op` per tap: ``skip`` leaves the tap out, ``id`` is a batch normalisation alone, the others add a
bottleneck g to it, relu(n + g(n)) with n = BN(tap): ``lin`` 1x1-1x1, ``dw`` with a depthwise 3x3 between, ``conv`` 3x3-3x3. The paper's
own space could not be read; this one is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError, unknown

KINDS = ("skip", "id", "lin", "dw", "conv")


@dataclass(frozen=True)
class Op:
    """What an adaptor does to one tap; ``reduction`` r sets the bottleneck b = max(2, floor(r c))."""

    kind: str
    reduction: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("adaptor op", self.kind, KINDS)
        if (self.reduction > 0) != (self.kind in ("lin", "dw", "conv")):
            raise UserError(
                f"adaptor op '{self.kind}' with reduction {self.reduction}: bottlenecks need one above 0, others 0"
            )

    def bottleneck(self, channels: int) -> int:
        """Channels inside the bottleneck."""
        return max(2, int(self.reduction * channels))

    def params(self, channels: int) -> int:
        """Parameters, affine ones of batch normalisation included."""
        c, b = channels, self.bottleneck(channels)
        return {
            "skip": 0,
            "id": 2 * c,
            "lin": 2 * c * b + 2 * b + 4 * c,
            "dw": 2 * c * b + 9 * b + 4 * b + 4 * c,
            "conv": 18 * c * b + 2 * b + 4 * c,
        }[self.kind]

    def macs_per_position(self, channels: int) -> int:
        """Multiply-accumulates of the convolutions at one position of the tap."""
        c, b = channels, self.bottleneck(channels)
        return {"skip": 0, "id": 0, "lin": 2 * c * b, "dw": 2 * c * b + 9 * b, "conv": 18 * c * b}[self.kind]

    def __str__(self) -> str:
        return self.kind if not self.reduction else f"{self.kind}/{round(1 / self.reduction)}"


@dataclass(frozen=True)
class Architecture:
    """One op per tap."""

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        if all(op.kind == "skip" for op in self.ops):
            raise UserError("an adaptor that skips every tap sees nothing: use at least one")

    @staticmethod
    def uniform(kind: str, taps: int, reduction: float = 0.0) -> Architecture:
        """The same op at every tap."""
        return Architecture((Op(kind, reduction),) * taps)

    @staticmethod
    def parse(text: str) -> Architecture:
        """The inverse of ``str``: ``conv/8-skip-id-lin/2``."""
        ops = []
        for word in text.split("-"):
            kind, _, divisor = word.partition("/")
            ops.append(Op(kind, 1 / int(divisor) if divisor else 0.0))
        return Architecture(tuple(ops))

    def params(self, channels: Sequence[int]) -> int:
        """Parameters of the adaptor."""
        return sum(op.params(c) for op, c in zip(self.ops, channels, strict=True))

    def macs(self, channels: Sequence[int], positions: Sequence[int]) -> int:
        """Multiply-accumulates for one image whose taps have ``positions`` = h w each."""
        return sum(op.macs_per_position(c) * p for op, c, p in zip(self.ops, channels, positions, strict=True))

    def __str__(self) -> str:
        return "-".join(map(str, self.ops))


def search_space(taps: int, reductions: Sequence[float]) -> list[Architecture]:
    """All architectures: (2 + 3 per reduction) ops a tap, without the one that skips every tap (4,095 for 4 taps, 2 reductions)."""
    ops = [Op("skip"), Op("id")] + [Op(kind, r) for kind in ("lin", "dw", "conv") for r in reductions]
    return [
        Architecture(choice)
        for choice in itertools.product(ops, repeat=taps)
        if any(op.kind != "skip" for op in choice)
    ]


class _TapAdaptor(nn.Module):
    """BN, and for a bottleneck relu(n + g(n))."""

    def __init__(self, op: Op, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.body: nn.Sequential | None = None
        if op.kind != "id":
            b = op.bottleneck(channels)
            size, pad = (3, 1) if op.kind == "conv" else (1, 0)
            layers: list[nn.Module] = [
                nn.Conv2d(channels, b, size, padding=pad, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
            if op.kind == "dw":
                layers += [nn.Conv2d(b, b, 3, padding=1, groups=b, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.Conv2d(b, channels, size, padding=pad, bias=False), nn.BatchNorm2d(channels)]
            self.body = nn.Sequential(*layers)

    def forward(self, tap: Tensor) -> Tensor:
        n = self.norm(tap)
        return n if self.body is None else F.relu(n + self.body(n))


class Adaptor(nn.Module):
    """Taps -> adapted taps, ``None`` where a tap is skipped."""

    def __init__(self, architecture: Architecture, channels: Sequence[int]) -> None:
        super().__init__()
        if len(architecture.ops) != len(channels):
            raise UserError(
                f"the adaptor '{architecture}' is for {len(architecture.ops)} taps, the encoder has {len(channels)}"
            )
        self.architecture = architecture
        self.taps = nn.ModuleList(
            nn.Identity() if op.kind == "skip" else _TapAdaptor(op, c)
            for op, c in zip(architecture.ops, channels, strict=True)
        )

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor | None]:
        return [
            None if op.kind == "skip" else module(tap)
            for op, module, tap in zip(self.architecture.ops, self.taps, taps, strict=True)
        ]
