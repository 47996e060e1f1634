"""Sobol indices against closed forms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from shared.hardware.indices import sobol_indices
from shared.hardware.sensitivity import Array, Uncertain

RANGES = {"a": Uncertain(1.0, 0.5, 2.0), "b": Uncertain(1.0, 0.5, 2.0), "exact": Uncertain(3.0, 3.0, 3.0)}


def additive(samples: Mapping[str, Array]) -> Array:
    """3 log a + log b + constant: variances 9 : 1, no interaction."""
    return 3.0 * np.log(samples["a"]) + np.log(samples["b"]) + samples["exact"]


def interaction(samples: Mapping[str, Array]) -> Array:
    """log a x log b with both symmetric about 0: all variance is in the interaction."""
    return np.log(samples["a"]) * np.log(samples["b"])


@pytest.mark.parametrize("surface", [False, True])
def test_additive_variances_by_hand(surface: bool) -> None:
    found = sobol_indices(additive, RANGES, surface=surface)
    assert found is not None
    assert found.first == pytest.approx({"a": 0.9, "b": 0.1}, abs=0.03)
    assert found.total == pytest.approx({"a": 0.9, "b": 0.1}, abs=0.03)
    assert found.samples == 4 * 1024


@pytest.mark.parametrize("surface", [False, True])
def test_an_interaction_is_total_and_not_first(surface: bool) -> None:
    found = sobol_indices(interaction, RANGES, surface=surface)
    assert found is not None
    assert found.first == pytest.approx({"a": 0.0, "b": 0.0}, abs=0.05)
    assert found.total == pytest.approx({"a": 1.0, "b": 1.0}, abs=0.05)


def test_a_surface_needs_few_evaluations_and_says_when_it_is_too_crude() -> None:
    calls = []

    def jumps(samples: Mapping[str, Array]) -> Array:
        calls.append(len(samples["a"]))
        return np.sign(np.sin(20 * np.log(samples["a"]))) + 0.0 * samples["b"]

    assert sobol_indices(jumps, RANGES, surface=True) is None
    assert sum(calls) < 30


def test_nothing_uncertain_has_no_indices() -> None:
    assert sobol_indices(additive, {"a": RANGES["exact"], "b": RANGES["exact"], "exact": RANGES["exact"]}) is None
