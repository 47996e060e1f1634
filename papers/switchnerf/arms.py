"""The fields that are compared at reduced scale, by name: config S and what it is set against.

``router`` says who picks the expert: ``learned`` by the gate, ``district`` by the district that a point lies in (a fixed 2 x 2
partition: Mega-NeRF's idea, and for hash experts an oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from papers.switchnerf.hmohe import CONFIG_S, HMoHE, HMoHEConfig, heterogeneous, homogeneous
from papers.switchnerf.switch import FieldOutput, SwitchConfig, SwitchNeRF
from shared.errors import unknown

ORDERED = ((8, 32), (8, 64), (8, 128), (8, 256))  # by the districts' texture frequency
# Switch-NeRF at this scale: 4 experts of 4 layers of 64, 10 frequencies, the same head width as config S.
SWITCH_S = SwitchConfig(4, 64, 4, 1, 10, 2, 32, 0, density_noise=0.0)


@dataclass(frozen=True)
class Arm:
    """How to build a field, and who routes its points."""

    build: Callable[[], nn.Module]
    router: Literal["learned", "district"] = "learned"


class Centred(nn.Module):
    """A frequency-encoded field for points in [0, 1]^3: its own input runs from -1 to 1."""

    def __init__(self, field: SwitchNeRF) -> None:
        super().__init__()
        self.field = field

    def forward(
        self, x: Tensor, direction: Tensor, image: Tensor | None = None, expert: Tensor | None = None
    ) -> FieldOutput:
        """As the field's own."""
        result: FieldOutput = self.field(2.0 * x - 1.0, direction, image, expert)
        return result

    def probabilities(self, x: Tensor) -> Tensor:
        """The gate's softmax (S, E)."""
        return self.field.probabilities(2.0 * x - 1.0)


def _hash(config: HMoHEConfig, router: Literal["learned", "district"] = "learned") -> Arm:
    return Arm(lambda: HMoHE(config), router)


def _table(config: HMoHEConfig, log2_size: int) -> HMoHEConfig:
    return replace(config, experts=tuple(replace(grid, log2_size=log2_size) for grid in config.experts))


_OPEN = replace(CONFIG_S, capacity_factor=None)
_SMALL = 11  # table size of the oracle arms, 2^11: small enough that ranges matter
ARMS: dict[str, Arm] = {
    "single": _hash(homogeneous(CONFIG_S, 16, 512, 1)),
    "single_equal": _hash(_table(homogeneous(CONFIG_S, 16, 512, 1), 14)),
    "hetero": _hash(CONFIG_S),
    "hetero_open": _hash(_OPEN),
    "hetero_mlp_gate": _hash(replace(CONFIG_S, gate_kind="mlp")),
    "homo_128": _hash(homogeneous(CONFIG_S, 16, 128)),
    "homo_256": _hash(homogeneous(CONFIG_S, 16, 256)),
    "homo_512": _hash(homogeneous(CONFIG_S, 16, 512)),
    "homo_512_8": _hash(homogeneous(CONFIG_S, 16, 512, 8)),
    "oracle_128": _hash(_table(homogeneous(CONFIG_S, 8, 128), _SMALL), "district"),
    "oracle_256": _hash(_table(homogeneous(CONFIG_S, 8, 256), _SMALL), "district"),
    "oracle_ordered": _hash(replace(CONFIG_S, experts=heterogeneous(ORDERED, 4, _SMALL)), "district"),
    "oracle_reversed": _hash(replace(CONFIG_S, experts=heterogeneous(ORDERED[::-1], 4, _SMALL)), "district"),
    "mlp": Arm(lambda: Centred(SwitchNeRF(SWITCH_S))),
    "mlp_districts": Arm(lambda: Centred(SwitchNeRF(SWITCH_S)), "district"),
}


def arm(name: str) -> Arm:
    """The arm of that name. Raises UserError for an unknown one."""
    if name not in ARMS:
        raise unknown("arm", name, ARMS)
    return ARMS[name]


def num_parameters(name: str) -> int:
    """Trainable numbers of an arm."""
    with torch.device("meta"):
        return sum(p.numel() for p in arm(name).build().parameters())
