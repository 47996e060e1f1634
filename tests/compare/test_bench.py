"""Gates of the benchmarks: what counts as worse, where a gate comes from, and what is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shared.compare import bench
from shared.compare.bench import Ratios, Reference, judge, read_ratios, references
from shared.errors import UserError

SPEED, SHARE = "test_a.py::test_a ratio: ours / theirs", "test_a.py::test_a share: of the roofline"


def written(**extra_info: object) -> dict[str, object]:
    """What pytest-benchmark writes of one benchmark."""
    return {"benchmarks": [{"fullname": "tests/benchmarks/test_a.py::test_a", "extra_info": extra_info}]}


def test_ratios_are_read_and_other_notes_are_not() -> None:
    content = written(
        **{"ratio: ours / theirs": [0.4, 0.5, 0.7], "share: of the roofline": 0.8, "device": "cpu", "speed": 3.0}
    )
    assert read_ratios(content) == {SPEED: 0.5, SHARE: 0.8}


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "0.5", [1, 2], None, True])
def test_a_ratio_that_is_not_a_positive_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"test_a\.py::test_a records .* a positive number"):
        read_ratios(written(**{"ratio: ours / theirs": value}))


def test_a_gate_lies_four_deviations_away_and_at_least_a_tenth() -> None:
    """By hand: exp(4 x 0.05) = 1.2214028; a quiet benchmark gets 1.1; a share is gated from below."""
    assert Reference(0.5, 0.05, 12).gate(SPEED) == pytest.approx(0.5 * 1.2214028)
    assert Reference(0.5, 0.001, 12).gate(SPEED) == pytest.approx(0.55)
    assert Reference(0.5, 0.05, 12).gate(SHARE) == pytest.approx(0.5 / 1.2214028)


@pytest.mark.parametrize(
    ("name", "new", "state"),
    [
        (SPEED, 0.5, "ok"), (SPEED, 0.60, "ok"), (SPEED, 0.62, "worse"), (SPEED, 0.40, "better"), (SPEED, None, "gone"),
        (SHARE, 0.5, "ok"), (SHARE, 0.42, "ok"), (SHARE, 0.40, "worse"), (SHARE, 0.62, "better"),
        ("test_b.py::test_b ratio: x / y", 3.0, "new"),
    ],
)  # fmt: skip
def test_states(name: str, new: float | None, state: str) -> None:
    baseline = {SPEED: Reference(0.5, 0.05, 12), SHARE: Reference(0.5, 0.05, 12)}
    measured = dict.fromkeys(baseline, 0.5) | ({} if new is None else {name: new})
    if new is None:
        del measured[name]
    found = {finding.name: finding.state for finding in judge(measured, baseline, whole=True)}
    assert found.pop(name) == state
    assert set(found.values()) <= {"ok"}


def test_part_of_the_benchmarks_loses_nothing() -> None:
    assert judge({}, {SPEED: Reference(0.5, 0.05, 12)}, whole=False) == []


def test_noise_is_the_deviation_of_the_logarithm() -> None:
    """By hand: logs 0, ln 2, 2 ln 2, 0, 0 have the mean 0.6 ln 2 and the sum of squares 3.2 (ln 2)^2; over four, 0.8 (ln 2)^2."""
    runs = [{SPEED: value} for value in (1.0, 2.0, 4.0, 1.0, 1.0)]
    found = references([*runs, {SHARE: 0.5}, *({SHARE: 0.5} for _ in range(4))])
    assert found[SPEED] == Reference(1.0, pytest.approx(math.sqrt(0.8) * math.log(2)), 5)
    assert found[SHARE] == Reference(0.5, 0.0, 5)
    assert references([*runs, {SHARE: 0.5}]).keys() == {SPEED}  # one run says nothing of its noise


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks of its own, with its baseline and its kept runs."""
    for name, path in (
        ("FOLDER", tmp_path),
        ("BASELINE", tmp_path / "baseline.json"),
        ("RECORD", tmp_path / "kept.jsonl"),
    ):
        monkeypatch.setattr(bench, name, path)
    for function in (bench.read_baseline, bench.write_baseline):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "baseline.json",))
    return tmp_path


@pytest.fixture
def give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the next runs of the benchmarks give these ratios, None for a benchmark that fails."""

    def prepare(*values: float | None) -> None:
        left = list(values)

        def run(arguments: Sequence[str]) -> tuple[int, Ratios]:
            value = left.pop(0)
            return (1, {}) if value is None else (0, {SPEED: value})

        monkeypatch.setattr(bench, "run_benchmarks", run)

    return prepare


def test_recorded_noise_becomes_a_gate_that_fails_by_name(
    folder: Path, give: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    give(0.50, 0.52, 0.48, 0.51, 0.49)
    assert bench.main(["record", "runs=3"]) == 0
    assert bench.main(["record", "runs=2"]) == 0
    assert bench.main(["baseline"]) == 0
    (entry,) = json.loads((folder / "baseline.json").read_text())["ratios"].values()
    assert (entry["ratio"], entry["runs"]) == (0.5, 5)
    assert entry["noise"] == pytest.approx(0.0316, rel=0.02)
    give(0.53)
    assert bench.main([]) == 0
    capsys.readouterr()
    give(0.9, 0.9, 0.8)
    assert bench.main([]) == 1
    assert f"worse  {SPEED}: 0.500 → 0.900 (gate 0.568)" in capsys.readouterr().out
    give(0.9, 0.5, 0.51)  # chance: two of three runs are as they were
    assert bench.main([]) == 0
    assert f"ok     {SPEED}: 0.500 → 0.510" in capsys.readouterr().out


def test_a_failing_benchmark_and_one_that_went_fail_too(
    folder: Path, give: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write_baseline({"test_b.py::test_b ratio: x / y": Reference(0.5, 0.01, 12)})
    give(0.5)
    assert bench.main([]) == 1
    assert "gone   test_b.py::test_b ratio: x / y: 0.500 → –" in capsys.readouterr().out
    give(None, None)
    assert bench.main(["record"]) == 1
    assert bench.main(["test_a.py"]) == 1


def test_another_processor_gates_nothing_and_says_so(
    folder: Path, give: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write_baseline({SPEED: Reference(0.1, 0.01, 12)})
    text = (folder / "baseline.json").read_text()
    (folder / "baseline.json").write_text(text.replace(json.loads(text)["cpu"], "Another"))
    give(0.5)
    assert bench.main([]) == 0
    assert "the baseline is of another processor (Another)" in capsys.readouterr().out


def test_benchmarks_run_in_a_process_of_their_own(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "test_a.py").write_text(
        "def test_a(benchmark):\n    benchmark.extra_info['ratio: ours / theirs'] = 0.25\n    benchmark(lambda: None)\n"
    )
    assert bench.main(["record"]) == 0
    assert json.loads((folder / "kept.jsonl").read_text())["ratios"] == {SPEED: 0.25}
    (folder / "test_a.py").write_text("def test_a(benchmark):\n    assert benchmark(lambda: 1) == 2\n")
    assert bench.main([]) == 1
    assert "assert 1 == 2" in capfd.readouterr().err


def test_a_damaged_baseline_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "baseline.json").write_text("{")
    assert bench.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert bench.main(["baseline"]) == 2


def test_the_committed_baseline_can_be_read() -> None:
    cpu, found = bench.read_baseline()
    assert cpu
    for name, reference in found.items():
        assert (bench.FOLDER / name.partition("::")[0]).is_file(), f"the baseline names {name}, which no benchmark is"
        assert reference.runs >= bench.MIN_RUNS
        assert reference.gate(name) != reference.ratio
