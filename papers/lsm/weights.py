"""Random conductances of a liquid: Gaussian statistics, or cells formed by dielectric breakdown, on a grid of 1/64 µS.

The grid makes every current a sum of integers times 1/64 µS, exact in float32 in any order of summation, so that all back ends of the
encoder agree bit for bit. Conductances are in microsiemens; a weight is a conductance, or a difference of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError

STEPS_PER_MICROSIEMENS = 64
LIMIT_MICROSIEMENS = 32.0  # 2,048 grid steps: the largest integer up to which float16 holds all, for the tensor cores
SHORT_STEPS, SHORT_MAX = 4095, 32767  # eight such weights add up within 16 bits
COLUMN_PAD = 32  # of the event-driven kernel's vectors, and the inputs of a packed word
MAX_STEPS = 2**24  # integers that float32 holds exactly

# Software simulation of the laboratory's code (mean, s.d. in µS); which chip they describe is not certain.
GAUSSIAN_INPUT = (0.00156, 6.61329)
GAUSSIAN_RECURRENT = (0.00606, 6.67268)
# Formed cells of the laboratory's 40 nm array, and the voltage at which pristine cells break down.
FORMED_MEAN, FORMED_SD = 12.27, 1.74
FORMING_MEAN_V, FORMING_SD_V = 3.433, 0.114


@dataclass(frozen=True)
class EventRows:
    """What the event-driven kernel reads: rows one after another, each ``width`` columns of ``1 / steps_per_us`` µS.

    ``groups`` of eight rows add up within 16 bits, whatever the rows.
    """

    rows: NDArray[Any]
    width: int
    steps_per_us: int
    groups: int


@dataclass(frozen=True)
class Weights:
    """One array: rows are word lines (inputs, then neurons), columns are neurons.

    Attributes:
        input: (n_in, N) weights in µS, on the grid.
        recurrent: (N, N); row j is what a spike of neuron j adds.
        input_power: (n_in, N), sum of the squared conductances of a weight's cells in µS²; read noise grows with it.
        recurrent_power: (N, N), the same.
    """

    input: Tensor
    recurrent: Tensor
    input_power: Tensor
    recurrent_power: Tensor

    @property
    def num_inputs(self) -> int:
        return self.input.shape[0]

    @property
    def num_neurons(self) -> int:
        return self.input.shape[1]

    def stacked(self) -> Tensor:
        """(n_in + N, N): inputs above neurons, as the array holds them."""
        return torch.cat([self.input, self.recurrent])

    @cached_property
    def event_rows(self) -> EventRows:
        """The stacked array for the event-driven kernel: 16-bit integers of the grid where the weights allow it, else float32."""
        inputs, neurons = (-(-n // COLUMN_PAD) * COLUMN_PAD for n in (self.num_inputs, self.num_neurons))
        stacked = torch.zeros(inputs + neurons + 1, neurons)  # the last row pads lists of rows
        stacked[: self.num_inputs, : self.num_neurons] = self.input
        stacked[inputs : inputs + self.num_neurons, : self.num_neurons] = self.recurrent
        steps = stacked * STEPS_PER_MICROSIEMENS
        largest = float(steps.abs().max())
        if torch.equal(steps, steps.round()) and largest <= SHORT_STEPS:
            groups = int(SHORT_MAX // (8 * max(largest, 1.0)))
            return EventRows(steps.to(torch.int16).flatten().numpy(), neurons, STEPS_PER_MICROSIEMENS, groups)
        return EventRows(stacked.float().flatten().numpy(), neurons, 1, 1)

    def without_recurrence(self) -> Weights:
        """The control: independent neurons."""
        zero = torch.zeros_like(self.recurrent)
        return Weights(self.input, zero, self.input_power, zero)

    def to(self, device: torch.device | str) -> Weights:
        return Weights(*(t.to(device) for t in (self.input, self.recurrent, self.input_power, self.recurrent_power)))

    def check_exact(self) -> None:
        """Refuse weights whose currents may not be exact.

        Raises:
            UserError: a weight lies off the grid, or all rows together exceed 2**24 grid steps.
        """
        steps = self.stacked() * STEPS_PER_MICROSIEMENS
        if not torch.equal(steps, steps.round()):
            raise UserError(
                "weights must be multiples of 1/64 µS for exact currents; pass them through papers.lsm.weights.on_grid"
            )
        largest = float(steps.abs().double().sum(0).max()) if steps.numel() else 0.0
        if largest >= MAX_STEPS:
            raise UserError(
                f"a neuron's weights sum to {largest:.3g} grid steps, above 2**24: scale the conductances down"
            )


def on_grid(microsiemens: Tensor) -> Tensor:
    """Nearest multiples of 1/64 µS."""
    return (microsiemens * STEPS_PER_MICROSIEMENS).round() / STEPS_PER_MICROSIEMENS


def gaussian(
    num_inputs: int,
    num_neurons: int,
    seed: int,
    *,
    input_stats: tuple[float, float] = GAUSSIAN_INPUT,
    recurrent_stats: tuple[float, float] = GAUSSIAN_RECURRENT,
) -> Weights:
    """Dense i.i.d. normal weights with (mean, s.d.) in µS, rounded to the grid and clipped to ±32 µS (1 in 10**6 at 6.67 µS)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, stats: tuple[float, float]) -> Tensor:
        values = torch.randn(rows, num_neurons, generator=generator) * stats[1] + stats[0]
        return on_grid(values).clamp(-LIMIT_MICROSIEMENS, LIMIT_MICROSIEMENS)

    w_in, w_rec = draw(num_inputs, input_stats), draw(num_neurons, recurrent_stats)
    return Weights(w_in, w_rec, w_in.square(), w_rec.square())


def breakdown(
    num_inputs: int,
    num_neurons: int,
    seed: int,
    *,
    formed: float = 0.85,
    mean: float = FORMED_MEAN,
    sd: float = FORMED_SD,
    differential: bool = True,
) -> Weights:
    """Weights from cells of which a share ``formed`` conducts N(mean, sd) µS and the others nothing.

    A weight is the difference of two cells, or one cell less the mean of all cells (a shared reference column) if not ``differential``.

    Raises:
        UserError: ``formed`` is no probability.
    """
    if not 0.0 <= formed <= 1.0:
        raise UserError(f"the share of formed cells is {formed}, it must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)

    def cells(rows: int) -> Tensor:
        exists = torch.rand(rows, num_neurons, generator=generator) < formed
        conductance = (torch.randn(rows, num_neurons, generator=generator) * sd + mean).clamp(0.0, LIMIT_MICROSIEMENS)
        return on_grid(conductance * exists)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        plus = cells(rows)
        if differential:
            minus = cells(rows)
            return plus - minus, plus.square() + minus.square()
        return plus - float(on_grid(torch.tensor(formed * mean))), plus.square()

    (w_in, p_in), (w_rec, p_rec) = draw(num_inputs), draw(num_neurons)
    return Weights(w_in, w_rec, p_in, p_rec)


GENERATORS: dict[str, Callable[..., Weights]] = {"gaussian": gaussian, "breakdown": breakdown}


def formed_fraction(forming_v: float, mean_v: float = FORMING_MEAN_V, sd_v: float = FORMING_SD_V) -> float:
    """Share of cells that a forming voltage breaks down: Phi((V - mean)/sd)."""
    return 0.5 * (1.0 + math.erf((forming_v - mean_v) / (sd_v * math.sqrt(2.0))))


def forming_voltage(formed: float, mean_v: float = FORMING_MEAN_V, sd_v: float = FORMING_SD_V) -> float:
    """The voltage that forms this share of the cells."""
    from statistics import NormalDist

    return mean_v + sd_v * NormalDist().inv_cdf(formed)


def weight_sd(formed: float, mean: float = FORMED_MEAN, sd: float = FORMED_SD, *, differential: bool = True) -> float:
    """Standard deviation of a weight in µS: sqrt(q(mu² + sigma²) - q² mu²) for a cell, times sqrt(2) for a difference."""
    variance = formed * (mean**2 + sd**2) - (formed * mean) ** 2
    return math.sqrt(2.0 * variance if differential else variance)
