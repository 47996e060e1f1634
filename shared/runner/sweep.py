"""A sweep (``run.py -m``): one progress display over all its runs, and a summary with the time of each paper when it ends.

Hydra calls :class:`SweepCallback` (named in ``conf/config.yaml``) around the whole sweep in the process that was started. With Hydra's own
launcher the runs share that process and its display; with joblib or Slurm each prints its own plain lines, and the summary is read from
the files that the runs left.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.text import Text

from shared.runner.display import TerminalDisplay

_REPORT_PROCESSES = 2  # a report takes a second or two, about as long as a run from the cache


class Sweep:
    """One sweep: how many runs it has, where they go, and the progress display that they share."""

    def __init__(self, folder: Path, total: int) -> None:
        from shared.report.progress import Progress

        self.folder, self.total = folder, total
        self.started = time.time()
        self._clock = time.perf_counter()
        self._open = ExitStack()
        self.progress = self._open.enter_context(Progress())
        self._runs = self._open.enter_context(self.progress.task("runs", total))
        # Processes that start when the first run ends; spawned, for a fork would copy the threads of the bars.
        self._reports = ProcessPoolExecutor(
            _REPORT_PROCESSES, multiprocessing.get_context("spawn"), initializer=_start_reporter
        )

    def display(self, label: str) -> TerminalDisplay:
        """The display of one run inside the sweep's."""
        return TerminalDisplay(self.progress.console, progress=self.progress, label=label, background=self._submit)

    def _submit(self, function: Callable[..., list[str]], *arguments: Any) -> Future[list[str]]:
        from shared.runner.pool import uninterrupted

        with uninterrupted():  # a report that was begun is finished, whatever the terminal sends
            return self._reports.submit(function, *arguments)

    def advance(self) -> None:
        """One more run ended, well or not."""
        self._runs.advance()

    def close(self, *, at_once: bool = False) -> None:
        """Wait for the reports (``at_once``: for those begun) and take the bars away."""
        self._reports.shutdown(cancel_futures=at_once)
        self._open.close()

    def summarise(self) -> int:
        """Print one line a paper, the total and the folder; return the highest status that the runs' files tell."""
        from shared.report.terminal import emit, sweep_lines

        documents, missing = self._results()
        for line in sweep_lines(documents, missing, time.perf_counter() - self._clock):
            emit(self.progress.console, line)
        emit(self.progress.console, Text(str(self.folder)))
        broken = any(_failed(document) for document in documents)
        return 2 if missing else int(broken)

    def _results(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Result documents that this sweep wrote, and the folders of the runs that wrote none."""
        from shared.errors import UserError
        from shared.report.document import load_results

        documents, missing = [], []
        for index in range(self.total):
            folders = [path for path in self.folder.glob(f"{index}-*") if path.is_dir()]
            found = [path for folder in folders if _is_fresh(path := folder / "results.json", self.started)]
            try:
                documents.append(load_results(found[0]))
            except (UserError, IndexError):
                missing.append(folders[0].name if folders else f"run {index}")
        return documents, missing


class SweepCallback(Callback):
    """Opens the sweep before its first run and sums it up after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _current
        _current = Sweep(Path(config.hydra.sweep.dir).absolute(), count_runs(config.hydra.overrides.task))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        sweep = current_sweep()
        if sweep is not None:
            sweep.close()
            statuses.append(sweep.summarise())


_current: Sweep | None = None
statuses: list[int] = []  # of all runs of this process; a sweep adds what runs in other processes came to


def current_sweep() -> Sweep | None:
    """The sweep of this process, None for a single run and in the worker of a launcher."""
    return _current


def end_sweep() -> None:
    """Take the bars away, whatever happened."""
    if _current is not None:
        _current.close(at_once=True)


def run_label(config: DictConfig) -> str:
    """How the lines of one run are told from another's in a sweep; empty for a single run."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    swept = {part.split("=", 1)[0] for part in HydraConfig.get().overrides.task}
    parts = [str(config.paper.name)]
    parts += [str(config.device.id)] if "device" in swept else []
    parts += [str(config.scale.name)] if "scale" in swept else []
    return " ".join([*parts, f"seed {config.seed}"])


def count_runs(overrides: Sequence[str]) -> int:
    """How many runs Hydra's basic sweeper makes of these overrides."""
    loader = GlobalHydra.instance().config_loader()
    total = 1
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        if override.is_discrete_sweep():
            total *= len(list(override.sweep_string_iterator()))
    return total


def _start_reporter() -> None:
    from shared.runner.pool import exit_with_parent

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _failed(document: dict[str, Any]) -> bool:
    verdicts = {row["verdict"] for row in document["claims"]}
    return "error" in verdicts or (bool(document["config"].get("strict")) and "not replicated" in verdicts)


def _is_fresh(path: Path, started: float) -> bool:
    """Whether this sweep wrote the file: a second sweep into the same folder must not count the first one's."""
    return path.is_file() and path.stat().st_mtime >= started - 1.0
