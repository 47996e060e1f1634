"""Options of a reduced-scale training run, as a user writes them in the config."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from shared.errors import UserError


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelOptions(_Options):
    """The micro model; the same for all arms."""

    dim: PositiveInt = 64
    depth: PositiveInt = 6
    heads: PositiveInt = 4
    patch: PositiveInt = 8
    decoder_width: PositiveInt = 32
    num_experts: PositiveInt = 16
    top_k: PositiveInt = 4
    noise: NonNegativeFloat = 0.0  # σ of the router noise
    scale_experts: bool = (
        False  # start W2, b2 of the experts N/K times larger, so that a flat router (gates 1/N) halves no signal
    )


class TrainOptions(_Options):
    """Optimisation; the same for all arms."""

    steps: PositiveInt
    batch: PositiveInt = 16
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    warmup_steps: NonNegativeInt = 50
    clip_norm: PositiveFloat = 5.0
    balance_weight: NonNegativeFloat = 0.01
    loss_weights: dict[str, NonNegativeFloat] = {}  # replaces the paper's weight of the tasks that it names
    pretrain_steps: NonNegativeInt = 0  # encoder only, on which kinds of object are visible
    distillation: tuple[NonNegativeInt, ...] = ()  # TAM levels
    augment: bool = True


class DataOptions(_Options):
    """SynthRoom scenes; ``panels`` (fewest, most) is the conflict knob."""

    image: PositiveInt = 64  # side
    num_train: PositiveInt = 1000
    num_val: PositiveInt = 200
    panels: tuple[NonNegativeInt, NonNegativeInt] = (1, 3)
    cache: str | None = None  # folder that keeps the scenes


OptionsT = TypeVar("OptionsT", bound=_Options)


def parse(kind: type[OptionsT], name: str, values: dict[str, Any]) -> OptionsT:
    """Validate ``values``; UserError names the key and what is wrong with it."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (name, *first["loc"]))
        allowed = f"; keys: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}{allowed}") from None
