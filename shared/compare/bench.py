"""Benchmarks as ratios: each gate is a committed ratio with the noise that was measured over many runs. Absolute times never gate.

``python -m shared.compare.bench``                  run tests/benchmarks and hold every ratio against their baseline.json
``python -m shared.compare.bench record runs=12``   run them so often and keep what they gave; repeat it at other hours, other loads
``python -m shared.compare.bench baseline``         median and noise of each ratio over what was kept become the baseline

A benchmark records ``benchmark.extra_info["ratio: ours / other"]``, measured in alternation in its own process: smaller is better.
A share of what is possible, such as of the roofline, is ``"share: ..."``: larger is better. A value is a number or
``[low, median, high]``. Further words (files, pytest options) go to pytest.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from shared.errors import UserError
from shared.report import format as fmt
from shared.report.document import write_atomic
from shared.report.terminal import emit
from shared.runner.environment import cpu_name, version
from shared.runner.paths import ROOT

FOLDER = ROOT / "tests" / "benchmarks"
BASELINE = FOLDER / "baseline.json"
KINDS = {"ratio": 1, "share": -1}  # +1: smaller is better, -1: larger
RECORD = ROOT / "outputs" / "benchmarks.jsonl"
MIN_RUNS = 5  # fewer say too little of the noise
# A gate lies this many standard deviations of the logarithm away, so that chance passes it about once in thirty thousand runs ...
SIGMAS = 4.0
# ... but never closer than this, since a dozen runs of one day do not show what other days bring.
MIN_MARGIN = 0.10
CONFIRMATIONS = 2  # further runs of what lies beyond its gate; the median of all decides

Ratios = dict[str, float]


@dataclass(frozen=True)
class Reference:
    """The committed ratio of one benchmark: median and noise (standard deviation of the logarithm) over ``runs`` runs."""

    ratio: float
    noise: float
    runs: int

    def gate(self, name: str) -> float:
        """The ratio beyond which the benchmark has got worse."""
        margin = max(SIGMAS * self.noise, math.log1p(MIN_MARGIN))
        return self.ratio * math.exp(_sign(name) * margin)


@dataclass(frozen=True)
class Finding:
    """One ratio held against its reference."""

    name: str
    new: float | None
    reference: Reference | None

    @property
    def state(self) -> str:
        """``ok``, ``worse``, ``better``, ``new`` (no reference yet) or ``gone`` (not measured)."""
        if self.reference is None:
            return "new"
        if self.new is None:
            return "gone"
        moved = _sign(self.name) * math.log(self.new / self.reference.ratio)
        margin = _sign(self.name) * math.log(self.reference.gate(self.name) / self.reference.ratio)
        return "worse" if moved > margin else "better" if moved < -margin else "ok"


def read_ratios(benchmarks: Mapping[str, Any]) -> Ratios:
    """Ratios by ``file::test ratio: ours / other`` from what pytest-benchmark wrote.

    Raises:
        UserError: a ratio that is not a positive number.
    """
    found: Ratios = {}
    for entry in benchmarks["benchmarks"]:
        test = entry["fullname"].rsplit("/", 1)[-1]
        for key, value in entry["extra_info"].items():
            if key.partition(":")[0] not in KINDS:
                continue
            median = value[1] if isinstance(value, list) and len(value) == 3 else value
            if isinstance(median, bool) or not isinstance(median, int | float) or not 0 < median < math.inf:
                raise UserError(
                    f"{test} records {value!r} as '{key}': a positive number or [low, median, high] is needed"
                )
            found[f"{test} {key}"] = float(median)
    return found


def references(runs: Sequence[Ratios]) -> dict[str, Reference]:
    """Median and noise of each ratio over the runs that measured it; one that fewer than ``MIN_RUNS`` did is left out."""
    found = {}
    for name in sorted(set().union(*runs)):
        values = [run[name] for run in runs if name in run]
        if len(values) >= MIN_RUNS:
            noise = statistics.stdev(math.log(value) for value in values)
            found[name] = Reference(statistics.median(values), noise, len(values))
    return found


def judge(new: Ratios, baseline: Mapping[str, Reference], whole: bool) -> list[Finding]:
    """Every ratio against its reference. ``whole``: all benchmarks were run, so that a reference without a ratio is ``gone``."""
    names = sorted(new.keys() | (baseline.keys() if whole else set()))
    return [Finding(name, new.get(name), baseline.get(name)) for name in names]


def read_baseline(path: Path = BASELINE) -> tuple[str, dict[str, Reference]]:
    """The processor and the references of a baseline; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return "", {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["cpu"]), {name: Reference(**entry) for name, entry in content["ratios"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): write it anew with python -m shared.compare.bench baseline"
        ) from None


def write_baseline(measured: Mapping[str, Reference], path: Path = BASELINE) -> None:
    """Write references, those of an older baseline kept where they were not measured anew on the same processor."""
    cpu, old = read_baseline(path)
    kept = {**(old if cpu == cpu_name() else {}), **measured}
    content = {
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "ratios": {name: _rounded(kept[name]) for name in sorted(kept)},
    }
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def run_benchmarks(arguments: Sequence[str]) -> tuple[int, Ratios]:
    """One pytest process over the benchmarks; its exit status and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(arguments or [str(FOLDER)]),
            "--benchmark-enable",
            "--benchmark-only",
        ]
        # The absolute times that pytest-benchmark adds are for the eye, so few rounds of them do.
        command += ["--benchmark-min-rounds=3", "--benchmark-max-time=0.2", f"--benchmark-json={path}", "--quiet"]
        status = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if status.returncode:
            print(status.stdout, file=sys.stderr)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return status.returncode, read_ratios(json.loads(text)) if text else {}


def check(arguments: Sequence[str], console: Console) -> int:
    """Run the benchmarks and hold them against the baseline; 1 when a ratio is worse, is gone, or a benchmark failed."""
    cpu, baseline = read_baseline()
    status, new = run_benchmarks(arguments)
    if baseline and cpu != cpu_name():
        emit(
            console,
            Text(
                f"the baseline is of another processor ({cpu}): ratios are shown and gate nothing; CONTRIBUTING.md says how to make one"
            ),
        )
        baseline = {}
    findings = judge(new, baseline, whole=not arguments)
    doubtful = {finding.name: [finding.new] for finding in findings if finding.state == "worse" and finding.new}
    if doubtful and not status:
        tests = sorted({f"{FOLDER}/{_parts(name)[0]}" for name in doubtful})
        for _ in range(CONFIRMATIONS):
            again = run_benchmarks(tests)[1]
            for name, seen in doubtful.items():
                seen += [again[name]] if name in again else []
        new = {**new, **{name: statistics.median(seen) for name, seen in doubtful.items()}}
        findings = judge(new, baseline, whole=not arguments)
    for line in lines(findings):
        emit(console, line)
    return int(bool(status) or any(finding.state in ("worse", "gone") for finding in findings))


def record(runs: int, arguments: Sequence[str], console: Console) -> int:
    """Run the benchmarks ``runs`` times and keep the ratios of each run; 1 when a benchmark failed."""
    for index in range(runs):
        status, ratios = run_benchmarks(arguments)
        if status:
            return 1
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        with RECORD.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cpu": cpu_name(), "ratios": ratios}) + "\n")
        emit(console, Text(f"run {index + 1} of {runs}: {len(ratios)} ratios"))
    return 0


def make_baseline(console: Console) -> int:
    """Write the baseline from all runs kept on this processor, and forget them unless some ratio still has too few.

    Raises:
        UserError: no ratio was measured often enough.
    """
    kept = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()] if RECORD.is_file() else []
    runs = [entry["ratios"] for entry in kept if entry["cpu"] == cpu_name()]
    found = references(runs)
    if not found:
        raise UserError(f"no benchmark was run {MIN_RUNS} times: python -m shared.compare.bench record runs=12")
    write_baseline(found)
    for name, reference in found.items():
        gate = fmt.number(reference.gate(name))
        text = f"{name}: {fmt.number(reference.ratio)}, noise {reference.noise:.1%}, {reference.runs} runs, gate {gate}"
        emit(console, Text(text))
    too_few = sorted(set().union(*runs) - found.keys())
    for name in too_few:
        emit(console, Text(f"{name}: left out, it needs {MIN_RUNS} runs", "yellow"))
    if not too_few:
        RECORD.unlink()
    return 0


def lines(findings: Sequence[Finding]) -> Iterator[Text]:
    """One line a ratio: its state, name, the old and the new ratio, and the gate."""
    styles = {"worse": "bold red", "gone": "bold red", "better": "bold green", "new": "yellow", "ok": "dim"}
    for finding in findings:
        line = Text(f"{finding.state:<6} ", styles[finding.state])
        line.append(f"{finding.name}: ", "not bold not dim")
        if finding.reference:
            gate = finding.reference.gate(finding.name)
            line.append(
                f"{fmt.number(finding.reference.ratio)} → {fmt.number(finding.new)} (gate {fmt.number(gate)})",
                "not dim",
            )
        else:
            line.append(f"{fmt.number(finding.new)}, no reference yet", "not dim")
        yield line


def main(arguments: Sequence[str]) -> int:
    """Status 0: no ratio got worse. 1: one did, or a benchmark failed. 2: bad input."""
    console = Console()
    try:
        if arguments[:1] == ["baseline"]:
            return make_baseline(console)
        if arguments[:1] == ["record"]:
            match = re.fullmatch(r"runs=(\d+)", arguments[1]) if len(arguments) > 1 else None
            return record(int(match[1]) if match else 1, arguments[2 if match else 1 :], console)
        return check(arguments, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parts(name: str) -> tuple[str, str]:
    """The test and the kind of a ratio's name."""
    match = re.match(rf"(.*?) ({'|'.join(KINDS)}): ", name)
    if match is None:
        raise UserError(
            f"'{name}' in the baseline names no ratio: write it anew with python -m shared.compare.bench baseline"
        )
    return match[1], match[2]


def _sign(name: str) -> int:
    return KINDS[_parts(name)[1]]


def _rounded(reference: Reference) -> dict[str, Any]:
    return asdict(Reference(float(f"{reference.ratio:.4g}"), float(f"{reference.noise:.2g}"), reference.runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
