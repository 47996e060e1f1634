"""The hybrid system: liquid in a resistive-memory array, heads in digital logic. Energy in mechanism terms, mapping, latency.

    R = (S + P) e_d / (C e_c + P e_d)

with S, P, C from :mod:`papers.lsm.counts`, e_d the energy of a digital MAC and e_c that of one neuron and step in the array: two analogue
to digital conversions, sampling, cell reads of the active rows and their drivers. kappa = e_c / e_d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from papers.lsm.counts import CELLS_PER_WEIGHT, Encoder, Task
from shared.errors import UserError
from shared.hardware import Device

OPS_PER_MAC = 2


@dataclass(frozen=True)
class Macro:
    """Energies and times of the array. The fields are config values; their reasons stand there."""

    adc_j: float  # one conversion of one column
    sample_hold_j: float  # of one neuron and step
    driver_j: float  # of one active row and step
    read_v: float
    read_s: float
    conductance_s: float  # mean of a formed cell, siemens
    drive_s: float
    conversion_s: float
    neuron_s: float
    adcs: int

    @property
    def cell_read_j(self) -> float:
        """V² G t of one cell."""
        return self.read_v**2 * self.conductance_s * self.read_s

    def neuron_step_j(self, active_rows: float, neurons: int) -> dict[str, float]:
        """Energy of one neuron and step by mechanism; drivers are shared by the neurons of a row."""
        return {
            "ADC": CELLS_PER_WEIGHT * self.adc_j,
            "sample and hold": self.sample_hold_j,
            "array": CELLS_PER_WEIGHT * active_rows * self.cell_read_j,
            "row drivers": active_rows * self.driver_j / neurons,
        }

    def step_s(self, neurons: int) -> float:
        """Time of a step: drive, read, convert all columns with the shared converters, update the neurons."""
        passes = math.ceil(CELLS_PER_WEIGHT * neurons / self.adcs)
        return self.drive_s + self.read_s + passes * self.conversion_s + self.neuron_s

    def sample_s(self, encoder: Encoder) -> float:
        """Latency of one sample through one array."""
        return encoder.steps * self.step_s(encoder.neurons)


def digital_mac_j(device: Device, dtype: str = "int8") -> float:
    """Energy of a MAC as the sister work's data sheet counts it: power limit over peak rate, two operations a MAC.

    Raises:
        UserError: the device has no power limit or no such peak.
    """
    return OPS_PER_MAC * device.power_w("limit") / device.op_per_s(dtype)


def energy_ratio(work: Task, kappa: float, *, digital_macs: float | None = None, per_weight: bool = False) -> float:
    """R for e_c = kappa e_d. ``digital_macs`` replaces S on the digital side (event-driven accounting).

    ``per_weight`` is the control: one conversion per weight instead of one per neuron, no summation in the array.
    """
    digital = work.encoder_macs if digital_macs is None else digital_macs
    conversions = work.encoder_macs if per_weight else work.conversions
    return (digital + work.head_macs) / (kappa * conversions + work.head_macs)


def solve_kappa(work: Task, ratio: float) -> float:
    """The kappa with which the task has this ratio.

    Raises:
        UserError: no positive kappa gives so large a ratio.
    """
    s, p = work.encoder_macs, work.head_macs
    kappa = ((s + p) / ratio - p) / work.conversions
    if kappa < 0:
        raise UserError(f"a ratio of {ratio:g} is above the limit {1 + s / p:g} that free conversions would give")
    return kappa


def mean_neuron_step_j(
    work: Task, macro: Macro, input_densities: tuple[float, ...], firing_rate: float
) -> dict[str, float]:
    """Energy per neuron and step by mechanism, averaged over the task's conversions."""
    total: dict[str, float] = {}
    for encoder, density in zip(work.encoders, input_densities, strict=True):
        rows = encoder.inputs * density + encoder.neurons * firing_rate
        for name, energy in macro.neuron_step_j(rows, encoder.neurons).items():
            total[name] = total.get(name, 0.0) + energy * encoder.conversions / work.conversions
    return total


@dataclass(frozen=True)
class Mapping:
    """How an encoder lies in 512 x 512 arrays at once: blocks of rows times blocks of columns."""

    row_blocks: int
    column_blocks: int

    @property
    def arrays(self) -> int:
        return self.row_blocks * self.column_blocks


def map_encoder(encoder: Encoder, rows: int = 512, columns: int = 512) -> Mapping:
    """Input and recurrent weights stacked along the rows, two columns per neuron."""
    return Mapping(
        math.ceil((encoder.inputs + encoder.neurons) / rows), math.ceil(CELLS_PER_WEIGHT * encoder.neurons / columns)
    )


def multiplexed_sample_s(macro: Macro, encoder: Encoder, arrays: int = 1) -> float:
    """Latency of a sample when an encoder of several blocks shares ``arrays``: passes times the step of a block's neurons."""
    blocks = map_encoder(encoder)
    passes = math.ceil(blocks.arrays / arrays)
    neurons = math.ceil(encoder.neurons / blocks.column_blocks)
    return encoder.steps * passes * macro.step_s(neurons)
