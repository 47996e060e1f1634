"""Which uncertain figure the spread of a number comes from: Sobol indices over all figures at once.

The total index of a figure is the share of the number's variance that would be left if all others were known: the figures are drawn
log-uniform over their uncertainty, thousands of times. Where one evaluation of the model is slow, a quadratic response surface in the
logarithms of the figures takes its place, fitted to a few hundred evaluations; its error on evaluations that it was not fitted to is
published with the indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shared.hardware.sensitivity import Array, Model, Uncertain

SAMPLES = 1024  # of the base design; d figures need d + 2 times as many
HELD_OUT = 0.25  # of the evaluations of a surface
LARGEST_ERROR = 0.25  # of a surface, as share of the number's spread, up to which indices are given


@dataclass(frozen=True)
class Indices:
    """Per figure, first-order and total index; how many samples; and the surface's error as share of the standard deviation (0: none)."""

    first: Mapping[str, float]
    total: Mapping[str, float]
    samples: int
    surface_error: float


def sobol_indices(
    model: Model, figures: Mapping[str, Uncertain], *, surface: bool = False, samples: int = SAMPLES, seed: int = 0
) -> Indices | None:
    """First and total Sobol indices by SALib. ``None`` where nothing varies, or where the surface is too crude.

    Args:
        model: named samples, each (n,), to values (n,).
        figures: those with a range are drawn, the others stay.
        surface: fit a response surface instead of evaluating the model on every sample.
        samples: of the base design, a power of two.
    """
    from SALib.analyze import sobol as analysis
    from SALib.sample import sobol as design

    names = [name for name, figure in figures.items() if figure.lo < figure.hi]
    if not names:
        return None
    fixed = {name: figure.value for name, figure in figures.items() if name not in names}
    low = np.log([figures[name].lo for name in names])
    high = np.log([figures[name].hi for name in names])

    def at(unit: Array) -> Array:
        """Values at points of the unit cube (n, d)."""
        drawn = np.exp(low + unit * (high - low))
        moved = {name: drawn[:, i] for i, name in enumerate(names)}
        return np.asarray(
            model(moved | {name: np.full(len(unit), value) for name, value in fixed.items()}), dtype=np.float64
        )

    evaluate, error = _surface(at, len(names), seed) if surface else (at, 0.0)
    if not error <= LARGEST_ERROR:
        return None
    if len(names) == 1:
        return Indices({names[0]: 1.0}, {names[0]: 1.0}, samples, error)
    problem = {"num_vars": len(names), "names": names, "bounds": [[0.0, 1.0]] * len(names)}
    values = evaluate(design.sample(problem, samples, calc_second_order=False, seed=seed))
    if not np.isfinite(values).all() or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    found = analysis.analyze(problem, values, calc_second_order=False, seed=seed)
    return Indices(
        dict(zip(names, map(float, found["S1"]), strict=True)),
        dict(zip(names, map(float, found["ST"]), strict=True)),
        len(values),
        error,
    )


def _surface(at: Callable[[Array], Array], d: int, seed: int) -> tuple[Callable[[Array], Array], float]:
    """A quadratic surface over the unit cube, and its RMS error on the evaluations left out over the standard deviation of all."""
    from scipy.stats import qmc

    terms = 1 + 2 * d + d * (d - 1) // 2
    left_out = max(4, round(HELD_OUT * 2 * terms))
    points = qmc.LatinHypercube(d=d, rng=np.random.default_rng(seed)).random(2 * terms + left_out)
    values = at(points)
    if not np.isfinite(values).all():
        return at, np.inf
    kept = slice(left_out, None)
    coefficients, *_ = np.linalg.lstsq(_features(points[kept]), values[kept], rcond=None)

    def surface(unit: Array) -> Array:
        return np.asarray(_features(unit) @ coefficients)

    error = np.sqrt(np.mean((surface(points[:left_out]) - values[:left_out]) ** 2))
    spread = values.std()
    return surface, float(error / spread) if spread > 0 else 0.0


def _features(unit: Array) -> Array:
    """1, z, z^2 and products of z = 2 u - 1, (n, terms)."""
    z = 2.0 * unit - 1.0
    columns = [np.ones(len(z)), *z.T, *(z**2).T]
    columns += [z[:, i] * z[:, j] for i, j in combinations(range(z.shape[1]), 2)]
    return np.stack(columns, axis=1)
