"""Which files are read, which are skipped, and what tells two configurations apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.compare.load import differences, load_runs
from shared.errors import UserError
from tests.compare.runs import exact, write_run


def test_runs_are_found_at_any_depth_once_and_by_time(tmp_path: Path) -> None:
    late = write_run(tmp_path / "sweep" / "1-m3vit", [exact()], minute=9)
    early = write_run(tmp_path / "other machine", [exact()], minute=3)
    for copied in ("wandb/offline-run-1/artifact", ".cache/x", "again"):  # W&B's copies, the cache, and a copy of a run
        shutil.copytree(late.parent, tmp_path / copied)
    (tmp_path / "notes.json").write_text('{"schema_version": 7, "points": []}')
    shutil.copy(early, tmp_path / "laptop.json")
    runs, problems = load_runs([tmp_path, late])
    assert [run.started[11:16] for run in runs] == ["00:03", "00:09"]
    assert problems == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 0'),
            "has schema_version 0, this version reads 1",
        ),
        (lambda text: "[]", "is not a result"),
        (
            lambda text: text.replace('"value": 9.2344', '"value": "9.2"'),
            "'value' of the claim 'memory' is not a number",
        ),
        (lambda text: text.replace('"replicated"', '"fine"'), "needs an id and a verdict"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, damage, sentence: str) -> None:  # type: ignore[no-untyped-def]
    write_run(tmp_path / "good", [exact()])
    bad = write_run(tmp_path / "bad", [exact()], minute=1)
    changed = damage(bad.read_text())
    assert changed != bad.read_text()
    bad.write_text(changed)
    runs, (problem,) = load_runs([tmp_path])
    assert len(runs) == 1
    assert problem.path == bad
    assert str(bad) in problem.sentence
    assert sentence in problem.sentence


def test_a_reference_result_that_was_cut_off_is_named_too(tmp_path: Path) -> None:
    path = write_run(tmp_path, [exact()]).rename(tmp_path / "xeon.json")
    path.write_text(path.read_text()[:500])
    assert [problem.path for problem in load_runs([tmp_path])[1]] == [path]


def test_nothing_to_compare_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        load_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=r"no results\.json in"):
        load_runs([tmp_path])


def test_only_what_an_experiment_reads_tells_its_configurations_apart(tmp_path: Path) -> None:
    base = {"model": {"top_k": 4}, "train": {"steps": 10}, "scale": {"name": "reduced"}, "seed": 0, "workers": 1}
    experiments = [{"name": "counts", "reads": ["model"]}, {"name": "training", "reads": ["model", "train"]}]
    changed = base | {"train": {"steps": 20}, "seed": 1, "workers": 8}
    write_run(tmp_path / "a", [exact()], config=base, experiments=experiments)
    write_run(tmp_path / "b", [exact()], config=changed, experiments=experiments, minute=1)
    one, other = load_runs([tmp_path])[0]
    assert one.configuration("counts") == other.configuration("counts")
    assert one.configuration("training") != other.configuration("training")
    assert one.configuration() != other.configuration()
    assert one.configuration("unknown") != other.configuration("unknown")  # where it is not known, everything counts
    assert differences(one.config, other.config) == {"train.steps": (10, 20)}


def test_a_document_of_the_runner_is_read(tmp_path: Path) -> None:
    document = json.loads(write_run(tmp_path, [exact()]).read_text())
    (run,) = load_runs([tmp_path])[0]
    assert (run.paper, run.device, run.scale, run.seed) == tuple(
        document[key] for key in ("paper", "device", "scale", "seed")
    )
    assert run.commit == "a" * 10
    assert run.machine == "Laptop, 2 cores"
