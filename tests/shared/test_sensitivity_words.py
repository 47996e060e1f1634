"""Which figures a modelled number rests on is found by moving them, and said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from shared.experiment import Experiment, Measurement, Result, Table
from shared.runner.sensitivity import _device_figures, _influential, _Sampler, sentence


def row(figure: str, flip: float | None, total: float | None, low: float = 1.0, high: float = 2.0) -> dict[str, Any]:
    return {"figure": figure, "flip_factor": flip, "total_index": total, "value_low": low, "value_high": high}


def test_the_sentence_names_the_widest_and_the_nearest_flip() -> None:
    rows = [row("device.memory.dram.bandwidth", 0.6, 0.2), row("device.peak.fp32", 4.0, 0.8)]
    assert sentence("speedup", rows) == (
        "speedup: peak.fp32 matters most (80% of the variance); flips if memory.dram.bandwidth falls under 0.6x"
    )
    without = [row("hardware.width", None, None, 1.0, 1.1), row("device.peak.fp32", None, None, 1.0, 3.0)]
    assert sentence("speedup", without) == (
        "speedup: peak.fp32 matters most; no figure moved alone within 100x flips the verdict"
    )


def test_uncertain_figures_of_a_device_by_path() -> None:
    exact = {"value": 4.0, "unit": "count", "rel_unc": 0.0}
    wide = {"value": 4.0, "unit": "W", "lo": 2.0, "hi": 8.0}
    known = {"value": 1e9, "unit": "op/s", "rel_unc": 0.1}
    device = {"id": "x", "compute": {"cores": exact}, "power": {"limit": wide}, "peak": {"fp32": known}}
    assert list(_device_figures(device)) == ["device.power.limit", "device.peak.fp32"]


def test_few_evaluations_find_the_figures_that_move_a_number() -> None:
    paths = [f"device.figure{i}" for i in range(64)]
    config = {"device": {f"figure{i}": {"value": 2.0, "unit": "W", "rel_unc": 0.1} for i in range(64)}}
    calls = []

    def sampler(moved: Mapping[str, float]) -> dict[str, float]:
        calls.append(dict(moved))
        return {"speedup": moved.get("device.figure9", 2.0) / moved.get("device.figure40", 2.0) ** 2}

    assert _influential(paths, config, "speedup", sampler) == ["device.figure9", "device.figure40"]  # type: ignore[arg-type]
    assert len(calls) < 30


def test_an_experiment_is_run_until_it_has_a_number_for_each_of_its_claims() -> None:
    drawn: list[float] = []

    def function(cfg: Any, ctx: Any) -> Iterator[Result]:
        yield Measurement("speed", 2.0 * cfg.model.width)
        yield Table("first", "drawn up before the last number", [])
        yield Measurement("size", 3.0 * cfg.model.width)
        drawn.append(cfg.model.width)
        yield Table("second", "drawn up after it", [])

    config = OmegaConf.create({"model": {"width": 10.0}})
    both = Experiment("both", function, ("speed", "size"), ("model",), False, __name__)
    sampler = _Sampler(config, both, None)
    assert sampler({"model.width": 5.0}) == {"speed": 10.0, "size": 15.0}
    assert sampler({}) == {"speed": 20.0, "size": 30.0}
    assert drawn == []
    unsettled = replace(both, claims=("speed", "size", "energy"))
    assert _Sampler(config, unsettled, None)({}) == {"speed": 20.0, "size": 30.0}
    assert drawn == [10.0]  # to the end, where a number is missing
