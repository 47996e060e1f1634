"""What is put together and what is kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.compare.changes import changes
from shared.compare.load import load_runs
from shared.compare.merge import compare
from shared.compare.model import Comparison
from shared.experiment import mean_interval
from tests.compare.runs import environment, exact, todays, trained, write_run


def compared(folder: Path) -> Comparison:
    return compare(*load_runs([folder]), claims=todays)


def test_seeds_of_several_runs_are_pooled_and_judged_again(tmp_path: Path) -> None:
    """Each run alone cannot exclude zero; nine seeds together can. By hand: mean 1.0, sd 0.9014, t(8) = 2.306."""
    for seed, values in enumerate(([0.1, 0.2, 2.1], [2.0, 0.3, 2.2], [0.2, 1.9, 0.0])):
        write_run(
            tmp_path / str(seed),
            [trained(values, verdict="not replicated", reason="no effect")],
            seed=seed,
            minute=seed,
        )
    (cell,) = compared(tmp_path).cells
    assert cell.row["n_seeds"] == 9
    assert cell.row["value"] == pytest.approx(1.0)
    deviations = [value - 1.0 for value in (0.1, 0.2, 2.1, 2.0, 0.3, 2.2, 0.2, 1.9, 0.0)]
    half = 2.306 * (sum(d * d for d in deviations) / 8) ** 0.5 / 3
    assert cell.row["ci_low"] == pytest.approx(1.0 - half, rel=1e-3)
    assert (cell.verdict, cell.row["reason"]) == ("replicated", "")
    assert cell.seeds == (0, 1, 2)
    assert cell.note == "3 runs, seeds pooled"


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=5))
@settings(max_examples=15, deadline=None)
def test_pooling_is_the_interval_of_all_values(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    for seed, values in enumerate(groups):
        write_run(folder / str(seed), [trained(values)], seed=seed, minute=seed)
    everything = [value for values in groups for value in values]
    pooled = [cell for cell in compared(folder).cells if cell.row["n_seeds"] == len(everything)]
    assert len(pooled) == 1
    assert (pooled[0].row["value"], pooled[0].row["ci_low"], pooled[0].row["ci_high"]) == pytest.approx(
        mean_interval(everything)
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"config": {"model": {"num_experts": 64}}}, "model.num_experts=16 instead of 64"),
        ({"environment": environment(commit="b" * 40, cpu="Server")}, "different commits"),
    ],
)
def test_runs_that_disagree_are_never_averaged_and_it_is_said(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    write_run(tmp_path / "a", [trained([1.0, 2.0, 3.0])], config={"model": {"num_experts": 16}})
    other = {"config": {"model": {"num_experts": 16}}, **changes}
    write_run(tmp_path / "b", [trained([5.0, 6.0, 7.0])], seed=1, minute=1, **other)
    comparison = compared(tmp_path)
    assert sorted(cell.row["value"] for cell in comparison.cells) == [2.0, 6.0]
    (found,) = comparison.disagreements
    assert word in found.reason
    assert found.claims == ("gain",)


def test_data_of_ones_own_are_another_experiment_and_no_changed_verdict(tmp_path: Path) -> None:
    """The counts do not read the data, so both runs say the same there."""
    experiments = [{"name": "counts", "reads": ["model"]}, {"name": "training", "reads": ["model", "data"]}]
    for minute, (root, gain) in enumerate([(None, "replicated"), ("mnist", "not replicated")]):
        write_run(
            tmp_path / str(minute),
            [exact(), trained([1.0, 2.0, 3.0], verdict=gain)],
            minute=minute,
            config={"model": {"num_experts": 16}, "data": {"root": root}},
            experiments=experiments,
            environment=environment(commit=str(minute) * 40),
        )
    comparison = compared(tmp_path)
    assert changes(comparison) == []
    found = {(cell.claim, cell.scale, cell.verdict) for cell in comparison.shown if cell.claim == "gain"}
    assert found == {("gain", "reduced", "replicated"), ("gain", "reduced on data.root", "not replicated")}
    assert comparison.best["m3vit", "gain"].scale == "reduced"
    assert [cell.scale for cell in comparison.shown if cell.claim == "memory"] == ["reduced"]


def test_the_same_seed_twice_with_other_numbers_is_a_disagreement(tmp_path: Path) -> None:
    for minute, values in enumerate(([1.0, 2.0, 3.0], [1.5, 2.0, 3.0])):
        write_run(tmp_path / str(minute), [trained(values)], minute=minute)
    comparison = compared(tmp_path)
    assert len(comparison.cells) == 2
    assert "different numbers for the same configuration" in comparison.disagreements[0].reason


def test_a_seed_that_was_run_again_with_the_same_numbers_counts_once(tmp_path: Path) -> None:
    for minute, (seed, values) in enumerate(((0, [1.0, 2.0, 3.0]), (1, [2.0, 3.0, 4.0]), (0, [1.0, 2.0, 3.0]))):
        write_run(tmp_path / str(minute), [trained(values)], seed=seed, minute=minute)
    (cell,) = compared(tmp_path).cells
    assert cell.row["values"] == [1.0, 2.0, 3.0, 2.0, 3.0, 4.0]
    assert len(cell.runs) == 3


def test_machines_that_round_otherwise_are_pooled_each_for_itself(tmp_path: Path) -> None:
    for minute, (cpu, seed) in enumerate((("A", 0), ("A", 1), ("B", 0), ("B", 1))):
        shift = 0.001 if cpu == "B" else 0.0
        row = trained([1.0 + seed + shift, 2.0, 3.0])
        write_run(tmp_path / str(minute), [row], seed=seed, minute=minute, environment=environment(cpu=cpu))
    comparison = compared(tmp_path)
    assert [(cell.row["n_seeds"], len(cell.machines)) for cell in comparison.cells] == [(6, 1), (6, 1)]
    assert "different numbers for the same configuration" in comparison.disagreements[0].reason


def test_another_number_of_seeds_is_not_pooled(tmp_path: Path) -> None:
    """Base seed 0 of five and base seed 1 of three share the seeds 3 and 4."""
    write_run(tmp_path / "a", [trained([1.0, 2.0, 3.0, 4.0, 5.0])])
    write_run(tmp_path / "b", [trained([4.0, 5.0, 6.0])], seed=1, minute=1)
    assert sorted(cell.row["n_seeds"] for cell in compared(tmp_path).cells) == [3, 5]


def test_seeds_judged_by_another_claim_are_not_pooled(tmp_path: Path) -> None:
    """The rows say that no effect is 1, today's claim says 0: the pooled number would be judged by neither run's claim."""
    for seed in range(2):
        write_run(tmp_path / str(seed), [trained([1.0, 2.0, 3.0 + seed], neutral=1.0)], seed=seed, minute=seed)
    assert {cell.row["n_seeds"] for cell in compared(tmp_path).cells} == {3}


def test_equal_outcomes_of_machines_and_configurations_are_one_row(tmp_path: Path) -> None:
    server, longer = environment(cpu="Server"), {"train": {"steps": 2}}
    write_run(tmp_path / "a", [exact()], config={"train": {"steps": 1}})
    write_run(tmp_path / "b", [exact(), trained([1.0, 2.0, 3.0])], config=longer, minute=1, environment=server)
    write_run(tmp_path / "c", [trained([1.0, 2.0, 3.0])], config=longer, minute=2)
    comparison = compared(tmp_path)
    assert sorted(cell.claim for cell in comparison.cells) == ["gain", "memory"]
    for cell in comparison.cells:
        assert set(cell.machines) == {"Laptop, 2 cores", "Server, 2 cores"}
        assert cell.note == "2 runs agree"
    assert comparison.disagreements == ()


def test_of_repeated_measurements_the_newest_stands_with_the_range(tmp_path: Path) -> None:
    for minute, value in enumerate((1.1, 1.4, 1.25)):
        row = exact("speed", value=value) | {"evidence": "measured"}
        write_run(tmp_path / str(minute), [row], minute=minute)
    (cell,) = compared(tmp_path).cells
    assert cell.row["value"] == 1.25
    assert cell.note == "newest of 3 runs, 1.10× to 1.40×"


def test_a_newer_commit_supersedes_an_older_one_of_the_same_machine_only(tmp_path: Path) -> None:
    server = environment(cpu="Server")
    write_run(tmp_path / "a", [exact(value=1.0)])
    write_run(tmp_path / "b", [exact(value=2.0)], environment=server, minute=1)
    write_run(tmp_path / "c", [exact(value=3.0)], environment=environment(commit="b" * 40), minute=2)
    comparison = compared(tmp_path)
    assert sorted(cell.row["value"] for cell in comparison.cells) == [2.0, 3.0]
    assert len(comparison.every) == 3


def test_what_a_machine_could_not_test_is_filled_in_by_another(tmp_path: Path) -> None:
    untested = exact("gpu", value=None, verdict="not tested", reason="needs an NVIDIA GPU")
    write_run(tmp_path / "a", [untested, exact("other", value=None, verdict="not tested", reason="needs data")])
    write_run(tmp_path / "b", [exact("gpu")], minute=1, scale="full", environment=environment(gpu="NVIDIA H200"))
    comparison = compared(tmp_path)
    assert [(cell.claim, cell.verdict) for cell in comparison.shown] == [("gpu", "replicated"), ("other", "not tested")]
    assert comparison.best["m3vit", "gpu"].scale == "full"
    assert len(comparison.cells) == 3


def test_devices_stand_side_by_side(tmp_path: Path) -> None:
    from shared.compare.tables import device_rows

    write_run(tmp_path / "a", [exact(), exact("only_here")])
    write_run(tmp_path / "b", [exact(value=2.0, verdict="not replicated")], device="a100", minute=1)
    assert device_rows(compared(tmp_path)) == [
        {"paper": "m3vit", "claim": "memory", "a100": "✗ 2.00×", "zcu104": "✓ 9.23×"},
        {"paper": "m3vit", "claim": "only_here", "zcu104": "✓ 9.23×"},
    ]
