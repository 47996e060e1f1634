"""The command line from end to end on a toy paper: verdicts, cache, resume, failures, controls, bad input, exit codes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.shared.conftest import Project, claim

QUIET = ("paper=toy", "tracking=none")


def judged(document: dict[str, Any]) -> dict[str, str]:
    return {row["id"]: row["verdict"] for row in document["claims"]}


def timeless(document: dict[str, Any]) -> str:
    """The claims without their times, as bytes would compare them."""
    return json.dumps([{key: value for key, value in row.items() if key != "seconds"} for row in document["claims"]])


def test_a_run_from_end_to_end(project: Project) -> None:
    done = project.run(*QUIET, "out=first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].endswith("first/results.json")
    document = project.results(done)
    assert judged(document) == {
        "speedup": "replicated",
        "accuracy": "replicated",
        "broken": "replicated",
        "far_away": "not tested",
    }
    row = claim(document, "accuracy")
    assert row["values"] == [1.0, 1.1, 1.2]
    assert row["n_seeds"] == 3
    assert row["ci_low"] < 1.1 < row["ci_high"]
    assert document["measurements"][0]["rows"][1] == {"n": 2, "t": 0.5}
    for name in ("report.html", "checkpoints/seed0.txt", "checkpoints/seed2.txt"):
        assert (project.folder / "first" / name).is_file()
    assert {"commit", "dirty", "versions", "cpu", "gpu", "python"} <= set(document["environment"])


def test_a_second_run_comes_from_the_cache_with_identical_claims(project: Project) -> None:
    calls = project.folder / "calls.txt"
    first = project.results(project.run(*QUIET, f"train.calls={calls}"))
    lines = calls.read_text()
    assert len(lines.splitlines()) == 9  # 3 seeds x 3 steps
    second = project.results(project.run(*QUIET, f"train.calls={calls}"))
    assert calls.read_text() == lines
    assert all(entry["from_cache"] for entry in second["experiments"])
    assert timeless(first) == timeless(second)
    forced = project.results(project.run(*QUIET, f"train.calls={calls}", "force=true"))
    assert len(calls.read_text().splitlines()) == 18
    assert timeless(first) == timeless(forced)


def test_the_cache_sees_config_code_and_seed(project: Project) -> None:
    project.run(*QUIET)
    changed = project.results(project.run(*QUIET, "method.factor=3.0"))
    fresh = {entry["name"]: not entry["from_cache"] for entry in changed["experiments"]}
    assert fresh == {"speed": True, "fragile": False, "training": False}  # only what reads `method`
    assert claim(changed, "speedup")["value"] == pytest.approx(3.0)
    reseeded = project.results(project.run(*QUIET, "seed=1"))
    assert [entry["from_cache"] for entry in reseeded["experiments"]] == [False, False, False]
    source = project.folder / "papers" / "toy" / "experiments.py"
    source.write_text(source.read_text().replace('Measurement("broken", 1.0)', 'Measurement("broken", 5.0)'))
    edited = project.results(project.run(*QUIET))
    assert claim(edited, "broken")["value"] == 5.0
    assert not any(entry["from_cache"] for entry in edited["experiments"])


def test_one_broken_experiment_does_not_stop_the_others(project: Project) -> None:
    done = project.run(*QUIET, "fault.raises=true")
    document = project.results(done)
    assert done.returncode == 1  # not everything asked for ran
    assert judged(document)["broken"] == "error"
    assert "made to break" in claim(document, "broken")["reason"]
    assert judged(document)["accuracy"] == "replicated"
    assert "ValueError: made to break" in done.stderr


def test_what_the_user_can_mend_is_one_sentence_without_a_traceback(project: Project) -> None:
    done = project.run(*QUIET, "fault.raises='for the user'")
    assert done.returncode == 1
    assert claim(project.results(done), "broken")["reason"] == "no images in 'here': give data.root=FOLDER"
    assert "experiment 'fragile': no images in 'here': give data.root=FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
    again = project.results(project.run(*QUIET, "fault.raises='for the user'"))
    assert {entry["name"]: entry["from_cache"] for entry in again["experiments"]}["fragile"] is False


def test_claims_are_chosen_by_id_and_only_their_experiments_run(project: Project) -> None:
    document = project.results(project.run(*QUIET, "claims=[speedup]"))
    assert [row["id"] for row in document["claims"]] == ["speedup"]
    assert [entry["name"] for entry in document["experiments"]] == ["speed"]


def test_controls_switch_the_idea_off(project: Project) -> None:
    document = project.results(project.run(*QUIET, "control=true"))
    control = claim(document, "speedup")["control"]
    assert control["value"] == 1.0
    assert (control["verdict"], control["ok"]) == ("not replicated", True)
    assert claim(document, "accuracy")["control"]["ok"] is True


def test_a_control_that_passes_is_a_red_line(project: Project) -> None:
    source = project.folder / "papers" / "toy" / "experiments.py"
    source.write_text(source.read_text().replace("cfg.method.factor if cfg.method.enabled else 1.0", "2.0"))
    done = project.run(*QUIET, "control=true")
    assert claim(project.results(done), "speedup")["control"]["ok"] is False
    assert "control passed" in done.stdout.lower()


def test_a_control_that_its_experiment_does_not_read_is_refused(project: Project) -> None:
    path = project.folder / "papers" / "toy" / "claims.yaml"
    path.write_text(path.read_text().replace("method.enabled: false", "train.gain: 0.0"))
    done = project.run(*QUIET)
    assert done.returncode == 2
    assert "does not read" in done.stderr


def test_sensitivity_says_what_flips_a_verdict(project: Project) -> None:
    """The toy's speed-up is its factor: 2.0 within 1 % is replicated, so a move of 1 % flips the verdict."""
    document = project.results(project.run(*QUIET, "sensitivity=true", "claims=[speedup,accuracy]"))
    (row,) = claim(document, "speedup")["sensitivity"]
    assert row["figure"] == "method.factor"
    assert row["nominal"] == 2.0
    assert (row["value_low"], row["value_high"]) == pytest.approx((1.8, 2.2))
    assert row["flip_factor"] == pytest.approx(0.99, abs=1e-6) or row["flip_factor"] == pytest.approx(1.01, abs=1e-6)
    assert claim(document, "accuracy")["sensitivity"] is None


def test_strict_and_smoke(project: Project) -> None:
    assert project.run(*QUIET, "method.factor=0.5").returncode == 0
    assert project.run(*QUIET, "method.factor=0.5", "strict=true").returncode == 1
    smoke = project.results(project.run(*QUIET, "scale=smoke"))
    assert judged(smoke)["accuracy"] == "not tested"
    assert smoke["config"]["train"]["steps"] == 1


def test_another_workers_count_gives_the_same_claims(project: Project) -> None:
    one = project.results(project.run(*QUIET, "workers=1", "cache=c1"))
    two = project.results(project.run(*QUIET, "workers=2", "cache=c2"))
    assert timeless(one) == timeless(two)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_where_it_stopped(project: Project, how: signal.Signals) -> None:
    calls = project.folder / "calls.txt"
    arguments = (*QUIET, f"train.calls={calls}", "train.sleep_s=0.3", "train.steps=8", "workers=2", "claims=[accuracy]")
    process = project.popen(*arguments)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not calls.exists() or len(calls.read_text().splitlines()) < 5):
        time.sleep(0.05)
    process.send_signal(how)
    _out, err = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130, err
        assert "same command goes on" in err
        assert "Traceback" not in err
    time.sleep(1.0)
    before = calls.read_text().splitlines()
    time.sleep(0.7)
    assert calls.read_text().splitlines() == before, "workers outlived the main process"
    document = project.results(project.run(*arguments))
    after = calls.read_text().splitlines()
    assert judged(document) == {"accuracy": "replicated"}
    # A step may be repeated only where the kill fell between its work and its checkpoint.
    assert len(after) <= 24 + 2
    assert set(after) == {f"{seed} {step}" for seed in range(3) for step in range(8)}


def test_a_corrupt_cache_is_set_aside_and_said(project: Project) -> None:
    project.run(*QUIET)
    for path in (project.folder / ".cache").glob("*/value.json"):
        path.write_text(path.read_text()[:-20])
    done = project.run(*QUIET)
    assert done.returncode == 0
    document = project.results(done)
    assert any("corrupt" in note and "recomputed" in note for note in document["notes"])
    assert judged(document)["accuracy"] == "replicated"
    assert list((project.folder / ".cache").glob("*/value.corrupt"))


def test_a_flipped_number_in_the_cache_is_noticed(project: Project) -> None:
    project.run(*QUIET)
    for path in (project.folder / ".cache").glob("*/value.json"):
        path.write_text(path.read_text().replace('"value": 2.0', '"value": 9.0'))
    document = project.results(project.run(*QUIET))
    assert claim(document, "speedup")["value"] == 2.0


BAD_INPUT = [
    (("paper=toi",), ["paper", "toi", "did you mean 'toy'"]),
    ((), ["say which paper", "toy"]),
    (("paper=toy", "device=zcu105"), ["device", "zcu104"]),
    (("paper=toy", "scale=huge"), ["scale", "smoke", "reduced", "full"]),
    (("paper=toy", "claims=[speedupp]"), ["claim", "speedup"]),
    (("paper=toy", "sede=1"), ["key", "'seed'"]),
    (("paper=toy", "train.stepz=1"), ["key", "'train.steps'"]),
    (("paper=toy", "seed=-1"), ["seed=-1", "at least 0"]),
    (("paper=toy", "threads=two"), ["threads", "at least 1"]),
    (("paper=toy", "force=maybe"), ["force", "true or false"]),
    (("paper=toy", "seed=["), ["command line"]),
    (("paper=toy", "tracking=mlflow"), ["tracking", "offline", "wandb", "none"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_bad_input_is_one_sentence_and_status_2(project: Project, arguments: tuple[str, ...], words: list[str]) -> None:
    done = project.run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_broken_files_are_one_sentence_and_status_2(project: Project) -> None:
    device = project.folder / "conf" / "device" / "zcu104.yaml"
    good = device.read_text()
    for path, text in (
        (project.folder / "papers" / "toy" / "conf" / "paper" / "toy.yaml", "paper: {name: [toy"),
        (project.folder / "papers" / "toy" / "claims.yaml", "claims: {"),
        (device, "id: [zcu104"),
        (device, good.replace("unit: B/s", "unit: GB/s", 1)),
        (device, good.replace("value: 1.92e+10", "value: -1.92e+10", 1)),
    ):
        before = path.read_text()
        assert text != before
        path.write_text(text)
        done = project.run(*QUIET)
        path.write_text(before)
        assert done.returncode == 2, (path, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr


def test_the_same_config_option_in_two_places_is_refused(project: Project) -> None:
    (project.folder / "conf" / "paper").mkdir()
    (project.folder / "conf" / "paper" / "toy.yaml").write_text("paper: {name: toy}\n")
    done = project.run(*QUIET)
    assert done.returncode == 2
    assert "exists twice" in done.stderr


def test_an_output_folder_that_cannot_be_written(project: Project) -> None:
    (project.folder / "taken").write_text("a file where a folder should be")
    done = project.run(*QUIET, "out=taken")
    assert done.returncode == 2
    assert "out=FOLDER" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_a_note_only(project: Project) -> None:
    (project.folder / "taken").write_text("a file where a folder should be")
    done = project.run(*QUIET, "cache=taken")
    assert done.returncode == 0, done.stderr
    assert any("cannot be written" in note for note in project.results(done)["notes"])


def test_help_is_quick_and_imports_no_torch(project: Project) -> None:
    start = time.monotonic()
    done = project.run("--help")
    assert time.monotonic() - start < 3
    assert "toy" in done.stdout
    assert "zcu104" in done.stdout
    (project.folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    assert project.run("--help").returncode == 0
    # A paper's experiments are listed and judged from the cache without torch too.
    (project.folder / "torch.py").unlink()
    project.run(*QUIET)
    (project.folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    assert project.run(*QUIET).returncode == 0


def test_a_sweep_runs_every_paper_and_seed(project: Project) -> None:
    done = project.run("-m", "paper=glob(*)", "seed=0,1", "tracking=none", "scale=smoke", "out=sweep")
    assert done.returncode == 0, done.stderr
    found = sorted(path.parent.name for path in (project.folder / "sweep").glob("*/results.json"))
    assert found == ["0-toy-zcu104-smoke-seed0", "1-toy-zcu104-smoke-seed1"]


def test_papers_never_import_each_other_and_shared_imports_no_paper() -> None:
    import ast

    from tests.shared.conftest import ROOT

    for path in [*(ROOT / "papers").rglob("*.py"), *(ROOT / "shared").rglob("*.py")]:
        own = path.relative_to(ROOT).parts[1] if path.is_relative_to(ROOT / "papers") else None
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            for name in names:
                if name.startswith("papers."):
                    assert own is not None, f"{path} imports {name}"
                    assert name.split(".")[1] == own, f"{path} imports {name}"


def test_the_suites_own_configs_do_not_clash() -> None:
    from shared.runner.papers import register_search_path

    register_search_path()


def test_out_folder_holds_nothing_temporary(project: Project, tmp_path: Path) -> None:
    project.run(*QUIET, "out=first")
    assert not list((project.folder / "first").rglob(".*"))


def test_old_numbers_are_judged_by_todays_claims(project: Project) -> None:
    """The numbers of a finished run stay, the verdicts follow claims.yaml; without a change nothing changes."""
    from shared.claims import load_claims
    from shared.runner.document import rejudge

    document = project.results(project.run(*QUIET, "method.factor=2.03"))
    path = project.folder / "papers" / "toy" / "claims.yaml"
    same = rejudge(document, load_claims(path).by_id())
    assert same == document
    path.write_text(path.read_text().replace("{rel: 0.01,", "{rel: 0.02,"))
    wider = rejudge(document, load_claims(path).by_id())
    assert claim(document, "speedup")["verdict"] == "direction only"
    assert claim(wider, "speedup")["verdict"] == "replicated"
    assert claim(wider, "speedup")["value"] == claim(document, "speedup")["value"]
