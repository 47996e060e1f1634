"""What a paper's ``experiments.py`` is written with.

An experiment is a plain generator function ``(cfg, ctx) -> Iterator[Measurement | Table | Picture]``, decorated with
:func:`experiment`. ``cfg`` holds only the config sections that the experiment names, so the cache key (those sections, the code, the
seed) is complete by construction. It yields a :class:`Measurement` per claim, and tables or pictures for the report.
This module imports neither torch nor hydra: papers must be listed in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Measurement:
    """Our number for one claim, in the claim's unit."""

    claim: str
    value: float
    ci_low: float | None = None  # 95 % interval, None where the number is exact
    ci_high: float | None = None
    n_seeds: int = 1
    values: tuple[float, ...] = ()  # the number of each seed
    model_error_rel: float | None = None  # held-out relative error of the model behind a `modelled` number
    note: str = ""  # one sentence on how the number came about


@dataclass(frozen=True)
class NotTested:
    """The experiment cannot settle the claim here; ``reason`` goes into the table (needs a GPU, a data set, another scale)."""

    claim: str
    reason: str


@dataclass(frozen=True)
class Plot:
    """How the report draws a table. ``x``, ``y``, ``series`` and ``error`` name columns.

    kind: ``bar`` (grouped by ``series``), ``stacked`` (bars of ``x`` stacked over ``series``), ``line``, ``scatter``.
    ``error`` is either the name of a half-width column or a pair of names (low, high).
    """

    kind: str
    x: str
    y: str
    series: str | None = None
    xlabel: str = ""
    ylabel: str = ""
    log_x: bool = False
    log_y: bool = False
    error: str | tuple[str, str] | None = None
    hline: float | None = None


@dataclass(frozen=True)
class Table:
    """What is not a claim: rows of plain values (the curve behind a plot, a breakdown)."""

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    plot: Plot | None = None
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG for the report."""

    name: str
    title: str
    png: bytes = field(repr=False)
    note: str = ""


@dataclass(frozen=True)
class Artifact:
    """A file to hand over with the results (a checkpoint, say); the runner copies it to ``checkpoints/<name>`` of the run's folder."""

    name: str
    path: Path


Result = Measurement | NotTested | Table | Picture | Artifact


class Context(Protocol):
    """What the runner hands to an experiment."""

    @property
    def seed(self) -> int:
        """Base seed of the run."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of trained experiments, disjoint between base seeds."""

    @property
    def scale(self) -> str:
        """``smoke``, ``reduced`` or ``full``."""

    @property
    def published(self) -> Mapping[str, Any]:
        """The ``published`` section of claims.yaml: numbers of the paper that serve as inputs."""

    @property
    def threads(self) -> int:
        """Torch threads of each process."""

    def map(
        self, name: str, function: Callable[..., Any], jobs: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Any, Path]]:
        """Run ``function(**job, progress=…, workdir=…)`` for every job in worker processes, each cached by its arguments and the code.

        ``function`` is a module-level function; job values and results are JSON-like (numbers, strings, lists, dicts). Yields
        ``(job, result, workdir)`` as jobs finish. ``workdir`` keeps the checkpoints that a killed job resumes from and the files that
        later experiments read; ``progress(done, total)`` feeds the progress bar. Results do not depend on the number of workers.
        """
        ...


ExperimentFunction = Callable[[Any, Context], Iterator[Result]]


@dataclass(frozen=True)
class Experiment:
    """A registered experiment: which claims it settles and which config sections it reads."""

    name: str
    function: ExperimentFunction
    claims: tuple[str, ...]
    config: tuple[str, ...]  # top-level config sections handed over, and hashed
    gpu: bool  # needs a CUDA device
    module: str


def experiment(
    *, claims: Sequence[str], config: Sequence[str] = (), gpu: bool = False
) -> Callable[[ExperimentFunction], ExperimentFunction]:
    """Mark a function as an experiment that settles ``claims`` and reads the config sections ``config``."""

    def mark(function: ExperimentFunction) -> ExperimentFunction:
        function.__experiment__ = Experiment(  # type: ignore[attr-defined]
            function.__name__, function, tuple(claims), tuple(config), gpu, function.__module__
        )
        return function

    return mark


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student-t confidence interval of independent seeds. One value gives an infinite interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, -math.inf, math.inf
    from scipy.stats import t

    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return mean, mean - half, mean + half


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of :func:`mean_interval`, None for a single value: the error bar of a table."""
    if len(values) < 2:
        return None
    mean, _, high = mean_interval(values)
    return high - mean


def seed_measurement(claim: str, values: Sequence[float], note: str = "") -> Measurement:
    """A :class:`Measurement` from one value per seed."""
    mean, low, high = mean_interval(values)
    return Measurement(claim, mean, low, high, len(values), tuple(values), note=note)


def asset(module_file: str, name: str) -> Path:
    """A file that ships beside a paper's module."""
    return Path(module_file).parent / name
