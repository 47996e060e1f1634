"""What a run shows while it goes on and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from shared.report.progress import Progress
from shared.report.terminal import claim_line, print_results, summary_line


class TerminalDisplay:
    """Bars, and above them one line per claim as it is settled.

    Args:
        console: where to; standard output if not given.
        progress: the bars of a sweep, which outlive this run; of its own if not given.
        label: which run of a sweep this is; lines begin with it, and the whole table is left to the reports.
        background: starts a report that is made while the next run of a sweep computes; reports are made at once if not given.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        progress: Progress | None = None,
        label: str = "",
        background: Callable[..., Future[list[str]]] | None = None,
    ) -> None:
        self.console = console or Console()
        self._progress = progress or Progress(self.console)
        self._owns_bars = progress is None
        self._label = label
        self._background = background
        self._shown: list[str] = []

    def __enter__(self) -> Self:
        if self._owns_bars:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owns_bars:
            self._progress.__exit__(kind, value, trace)

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Callable[[float], None]]:
        return self._progress.task(description, total)

    def claim(self, row: Mapping[str, Any]) -> None:
        self._shown.append(str(row["id"]))
        self._progress.print(claim_line(row, self._label))

    def note(self, text: str) -> None:
        self._progress.print(Text(f"{self._label and self._label + ': '}note: {text}"))

    def sink(self, function: Callable[..., list[str]], *arguments: Any) -> None:
        if self._background is None:
            self._notes(function(*arguments))
            return

        def made(future: Future[list[str]]) -> None:
            if future.cancelled():  # the sweep was interrupted
                return
            error = future.exception()
            self._notes([f"the report could not be made ({error})"] if error else future.result())

        self._background(function, *arguments).add_done_callback(made)

    def _notes(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.note(text)

    def finish(self, document: Mapping[str, Any]) -> None:
        """The whole table on a terminal; elsewhere only what the lines so far did not say."""
        if self.console.is_terminal and not self._label:
            print_results(document, self.console)
            return
        for row in document["claims"]:
            control_passed = (row.get("control") or {}).get("ok") is False
            if row["id"] not in self._shown or control_passed:
                self._progress.print(claim_line(row, self._label))
        self._notes(document["notes"])
        self._progress.print(summary_line(document, self._label))
