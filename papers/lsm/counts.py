"""Counts at the paper's full sizes: multiply-accumulates, conversions, cells, parameters, and four ways to count a training cost.

1 MAC = 2 FLOPs. The sizes are those of the official scripts; what the paper counted is not known, so every rule says what it counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import unknown

CELLS_PER_WEIGHT = 2  # differential pair
MACRO_ROWS = MACRO_COLUMNS = 512
MACRO_CELLS = MACRO_ROWS * MACRO_COLUMNS  # 262,144 cells of one bit: "256 Kb"


@dataclass(frozen=True)
class Encoder:
    """A liquid of ``neurons`` with ``inputs`` spike trains, run for ``steps``."""

    inputs: int
    neurons: int
    steps: int

    @property
    def weights(self) -> int:
        """Random weights: W_in and W_rec."""
        return self.neurons * (self.inputs + self.neurons)

    @property
    def macs(self) -> int:
        """Dense: every weight at every step."""
        return self.steps * self.weights

    @property
    def conversions(self) -> int:
        """One differential read per neuron and step, whatever the fan-in."""
        return self.steps * self.neurons

    @property
    def cells(self) -> int:
        return CELLS_PER_WEIGHT * self.weights

    def event_macs(self, input_density: float, firing_rate: float) -> float:
        """Event-driven: N additions per active input and per spike."""
        return self.neurons * self.steps * (self.inputs * input_density + self.neurons * firing_rate)

    def fits_array(self) -> bool:
        """Inputs and neurons as rows, two columns per neuron, in one 512 x 512 array."""
        return self.inputs + self.neurons <= MACRO_ROWS and CELLS_PER_WEIGHT * self.neurons <= MACRO_COLUMNS


@dataclass(frozen=True)
class Task:
    """Encoders, each with one trained linear head of ``outputs``."""

    encoders: tuple[Encoder, ...]
    outputs: int

    @property
    def encoder_macs(self) -> int:
        """S: dense MACs of all encoders for one sample (pair)."""
        return sum(e.macs for e in self.encoders)

    @property
    def head_macs(self) -> int:
        """P: MACs of the heads, and their weights without bias."""
        return sum(e.neurons * self.outputs for e in self.encoders)

    @property
    def head_parameters(self) -> int:
        return self.head_macs + len(self.encoders) * self.outputs

    @property
    def conversions(self) -> int:
        """C."""
        return sum(e.conversions for e in self.encoders)

    @property
    def random_weights(self) -> int:
        return sum(e.weights for e in self.encoders)

    @property
    def cells(self) -> int:
        return sum(e.cells for e in self.encoders)

    @property
    def macros(self) -> float:
        """256 Kb macros that hold all cells at once."""
        return self.cells / MACRO_CELLS

    def event_macs(self, input_densities: tuple[float, ...], firing_rate: float) -> float:
        """S_ev with one input density per encoder."""
        return sum(e.event_macs(d, firing_rate) for e, d in zip(self.encoders, input_densities, strict=True))


NMNIST = Encoder(256, 200, 50)
NTIDIGITS = Encoder(64, 200, 129)
TASKS = {
    "nmnist": Task((NMNIST,), 10),
    "ntidigits": Task((NTIDIGITS,), 11),
    "atv": Task((NMNIST, NTIDIGITS), 64),  # image, audio
    "btv": Task((Encoder(192, 2048, 201), Encoder(784, 2048, 49)), 256),  # brain, image
}


def task(name: str) -> Task:
    """A task by name.

    Raises:
        UserError: unknown name.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


RULES = {
    "A": "full back-propagation through time over training the heads: 3(S+P) / 3P",
    "B": "trained parameters: (random weights + heads) / heads",
    "C": "forward of the recurrent part over forward and backward of the heads: S / 3P",
    "D": "as A, with the forward of the frozen encoder charged too: 3(S+P) / (S+3P)",
}


def training_cost_ratio(work: Task, rule: str, *, frozen: bool = True) -> float:
    """How many times the training of a fully trained network costs that of the heads alone. ``frozen=False`` trains everything.

    Raises:
        UserError: unknown rule.
    """
    if rule not in RULES:
        raise unknown("training rule", rule, RULES)
    s, p = work.encoder_macs, work.head_macs
    if not frozen:
        return 1.0
    if rule == "A":
        return (s + p) / p
    if rule == "B":
        return (work.random_weights + work.head_parameters) / work.head_parameters
    if rule == "C":
        return s / (3 * p)
    return 3 * (s + p) / (s + 3 * p)


def activation_memory_ratio(encoder: Encoder) -> int:
    """Values that back-propagation through time keeps (u and s at every step) over the counts that a frozen liquid leaves: 2 T."""
    return 2 * encoder.steps
