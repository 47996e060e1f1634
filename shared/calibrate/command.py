"""``python run.py calibrate=cpu|cuda|table``: measure this machine, fit, validate, and write the device file and the table.

``cpu`` and ``cuda`` measure and then do what ``table`` does: fit anew every machine measured so far (``results/calibration/<id>.json``),
write their device files, and the table of errors in ``results/calibration/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.errors import UserError, unknown
from shared.runner.paths import CONF

RESULTS = CONF.parent / "results" / "calibration"
KEYS = {
    "calibrate": "cpu, cuda or table",
    "base": "id of the board's data sheet in conf/device, where units and memory do not tell",
    "id": "id of the device file to write",
    "out": "folder of the measurements and the table",
    "threads": "torch threads on a CPU; one, as the suite's own processes have, if not given",
}
TARGETS = ("cpu", "cuda", "table")


def run(arguments: Sequence[str]) -> Path:
    """Run the command; returns the path of the table.

    Raises:
        UserError: an unknown key or target, no such hardware, a machine too noisy, an ambiguous board.
    """
    options = _options(arguments)
    target, folder = options["calibrate"], Path(options.get("out", RESULTS))
    if target == "table" and (extra := {"base", "id", "threads"} & options.keys()):
        raise UserError(f"calibrate=table takes no {' and no '.join(sorted(extra))}: it regenerates what was measured")
    with _progress() as progress:
        if target != "table":
            _measure(target, options, folder, progress)
        return write_all(folder, CONF / "device", progress)


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in KEYS:
            raise unknown("key of calibrate", key, KEYS)
        options[key] = value
    if options["calibrate"] not in TARGETS:
        raise unknown("calibrate", options["calibrate"], TARGETS)
    return options


def _measure(target: str, options: Mapping[str, str], folder: Path, progress: Any) -> None:
    import torch

    from shared.calibrate.devicefile import draft
    from shared.calibrate.fit import samples_of
    from shared.calibrate.measure import measure, save_json
    from shared.runner.environment import num_cores

    if target == "cuda" and not torch.cuda.is_available():
        raise UserError("calibrate=cuda needs a CUDA device, and torch sees none on this machine; use calibrate=cpu")
    threads = options.get("threads", "1")
    if not threads.isdigit() or not 1 <= int(threads) <= num_cores():
        raise UserError(f"threads={threads} must be a whole number from 1 to {num_cores()}, the cores of this machine")
    torch.set_num_threads(int(threads))
    measured = measure(target, progress=progress)
    identity = options.get("id") or draft(measured, samples_of(measured.points), options.get("base"))["id"]
    measured = replace(measured, machine={**measured.machine, "base": options.get("base")})
    save_json(measured, folder / f"{identity}.json")


def write_all(folder: Path, devices: Path, progress: Any) -> Path:
    """Fit and validate every machine in ``folder``; write device files and the table."""
    from shared.calibrate.results import calibrated
    from shared.calibrate.table import write_table
    from shared.hardware import list_devices, load_device

    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"nothing was measured in {folder}: run python run.py calibrate=cpu or calibrate=cuda first")
    results = []
    for number, path in enumerate(files):
        results.append(calibrated(path, devices))
        progress("fit and validation", number + 1, len(files))
    ours = {result.data["id"] for result in results}
    others = [load_device(name) for name in list_devices() if name not in ours]
    return write_table(results, folder / "README.md", others)


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.console import Console

    from shared.report.progress import Progress

    with Progress(Console(stderr=True)) as progress, ExitStack() as stack:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = stack.enter_context(progress.task(what, total))
            tasks[what](done)

        yield show
