"""What a run shows while it goes on and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from shared.report.progress import Progress
from shared.report.terminal import claim_line, emit, print_results, summary_line


class TerminalDisplay:
    """Bars, and above them one line per claim as it is settled."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(self.console)
        self._shown: list[str] = []

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, value, trace)

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Callable[[float], None]]:
        return self._progress.task(description, total)

    def claim(self, row: Mapping[str, Any]) -> None:
        self._shown.append(str(row["id"]))
        self._progress.print(claim_line(row))

    def note(self, text: str) -> None:
        self._progress.print(Text(f"note: {text}"))

    def finish(self, document: Mapping[str, Any]) -> None:
        """The whole table on a terminal; elsewhere only what the lines so far did not say."""
        if self.console.is_terminal:
            print_results(document, self.console)
            return
        for row in document["claims"]:
            control_passed = (row.get("control") or {}).get("ok") is False
            if row["id"] not in self._shown or control_passed:
                emit(self.console, claim_line(row))
        for note in document["notes"]:
            emit(self.console, Text(f"note: {note}"))
        emit(self.console, summary_line(document))
