"""Which figure, moved by how much, changes a verdict: one-at-a-time sweeps and a Latin hypercube over a vectorised model.

A model is a function from named samples, each (n,), to values (n,); a predicate turns values (n,) into booleans (the verdict).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.hardware.figure import Figure

Array = npt.NDArray[np.float64]
Model = Callable[[Mapping[str, Array]], npt.ArrayLike]
Predicate = Callable[[Array], npt.NDArray[np.bool_]]

REACH = 100.0  # how far a figure is moved, up and down
GRID = 193  # points of the log grid over [1/REACH, REACH]: steps of 4.9 %; a verdict that flips twice within a step is missed
RANGE_POINTS = 17  # points over a figure's uncertainty; more than the two ends because the model need not be monotone
BISECTIONS = 40


@dataclass(frozen=True)
class Uncertain:
    """A positive figure with its uncertainty, and the value that it can never exceed (1 for an achieved fraction)."""

    value: float
    lo: float
    hi: float
    maximum: float = np.inf

    def __post_init__(self) -> None:
        if not (0 < self.lo <= self.value <= self.hi and self.value <= self.maximum):
            raise ValueError(f"needs 0 < lo <= value <= hi and value <= maximum, got {self}")

    @classmethod
    def of(cls, figure: Figure) -> Uncertain:
        """From a device's figure. A ratio is an achieved fraction, which cannot exceed 1."""
        maximum = 1.0 if figure.unit == "ratio" else np.inf
        return cls(figure.value, figure.low, min(figure.high, maximum), maximum)


@dataclass(frozen=True)
class Sensitivity:
    """How one figure moves the model. ``flip_factor`` multiplies the figure: the smallest move, up or down, that flips the verdict."""

    figure: str
    value: float  # of the figure
    low: float  # least value of the model over the figure's uncertainty
    high: float  # greatest
    flips_within_uncertainty: bool
    flip_factor: float | None  # None: not within 100x

    @property
    def verdict(self) -> str:
        """The flip in words."""
        if self.flip_factor is None:
            return f"never within {REACH:g}x"
        return f"flips at x{self.flip_factor:.3g} ({self.figure} = {self.value * self.flip_factor:.4g})"


def one_at_a_time(
    model: Model,
    figures: Mapping[str, Uncertain],
    predicate: Predicate,
    *,
    grid_points: int = GRID,
    range_points: int = RANGE_POINTS,
    bisections: int = BISECTIONS,
) -> list[Sensitivity]:
    """Move each figure alone, all others at their values; the strongest (smallest flip) comes first.

    The model is called with samples of **all** figures, 1 + range_points + grid_points of them per figure at once, then once per bisection.
    The reported factor is on the flipped side, found to better than 1e-9 with all bisections; fewer points and bisections serve a model
    that takes long. ``grid_points`` must be odd.
    """
    names = list(figures)
    base_value = _evaluate(model, figures, {})
    base = bool(predicate(base_value)[0])

    ranges = {name: np.linspace(figures[name].lo, figures[name].hi, range_points) for name in names}
    over_range = _alone(model, figures, ranges)

    factors = np.geomspace(1 / REACH, REACH, grid_points)
    centre = grid_points // 2
    factors[centre] = 1.0
    caps = np.array([[figures[name].maximum / figures[name].value] for name in names])
    grid = np.minimum(factors, caps)  # beyond a maximum the figure stays there
    flipped = predicate(_alone(model, figures, {n: figures[n].value * grid[i] for i, n in enumerate(names)})) != base

    inner, outer = np.ones((len(names), 2)), np.full((len(names), 2), np.nan)  # columns: downwards, upwards
    for i in range(len(names)):
        for side, indices in enumerate((range(centre - 1, -1, -1), range(centre + 1, grid_points))):
            hit = next((j for j in indices if flipped[i, j]), None)
            if hit is not None:
                inner[i, side], outer[i, side] = grid[i, hit + (1 if side == 0 else -1)], grid[i, hit]
    found = ~np.isnan(outer)
    for _ in range(bisections if found.any() else 0):
        middle = np.where(found, np.sqrt(inner * np.where(found, outer, 1.0)), 1.0)
        values = _alone(model, figures, {name: figures[name].value * middle[i] for i, name in enumerate(names)})
        beyond = predicate(values) != base
        outer = np.where(found & beyond, middle, outer)
        inner = np.where(found & ~beyond, middle, inner)

    rows = []
    for i, name in enumerate(names):
        values = over_range[i]
        candidates = outer[i][found[i]]
        factor = float(candidates[np.abs(np.log(candidates)).argmin()]) if candidates.size else None
        inside = bool((predicate(values) != base).any())
        rows.append(Sensitivity(name, figures[name].value, float(values.min()), float(values.max()), inside, factor))
    return sorted(rows, key=lambda row: abs(np.log(row.flip_factor)) if row.flip_factor else np.inf)


@dataclass(frozen=True)
class Spread:
    """The model over all figures at once."""

    low: float  # 2.5th percentile
    median: float
    high: float  # 97.5th percentile
    holds: float  # share of the samples in which the verdict is that of the figures' values
    n: int


def latin_hypercube(
    model: Model, figures: Mapping[str, Uncertain], predicate: Predicate, *, n: int = 1024, seed: int = 0
) -> Spread:
    """Draw all figures at once, log-uniform over their uncertainty (exact figures stay), by a Latin hypercube of ``n`` samples."""
    from scipy.stats import qmc  # half a second that a run from the cache need not pay

    names = list(figures)
    unit = qmc.LatinHypercube(d=len(names), rng=np.random.default_rng(seed)).random(n)
    samples = {
        name: figures[name].lo * (figures[name].hi / figures[name].lo) ** unit[:, i] for i, name in enumerate(names)
    }
    base = bool(predicate(_evaluate(model, figures, {}))[0])
    values = _evaluate(model, figures, samples)
    low, median, high = np.percentile(values, [2.5, 50, 97.5])
    return Spread(float(low), float(median), float(high), float((predicate(values) == base).mean()), n)


def _alone(model: Model, figures: Mapping[str, Uncertain], moved: Mapping[str, Array]) -> Array:
    """Model values (n_figures, k) where row i has figure i at ``moved[name_i]`` (k,) and the others at their values."""
    names = list(figures)
    k = len(next(iter(moved.values())))
    samples = {}
    for i, name in enumerate(names):
        column = np.full((len(names), k), figures[name].value)
        column[i] = moved[name]
        samples[name] = column.reshape(-1)
    return _evaluate(model, figures, samples).reshape(len(names), k)


def _evaluate(model: Model, figures: Mapping[str, Uncertain], samples: Mapping[str, Array]) -> Array:
    filled = samples or {name: np.array([figure.value]) for name, figure in figures.items()}
    n = len(next(iter(filled.values())))
    values = np.asarray(model(filled), dtype=np.float64)
    if values.shape != (n,):
        raise ValueError(f"the model must return one value per sample, shape ({n},), got {values.shape}")
    return values
