"""Progress of nested tasks: bars on a terminal, an occasional plain line elsewhere.

with Progress() as progress:
    with progress.task("multi_task", total=3) as seeds:
        for seed in range(3):
            with seeds.task(f"seed {seed}", total=1000) as steps:
                ...
                steps(done)          # also the ``progress(done, total)`` callback of a job
            seeds.advance()
        progress.print(claim_line(row))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from shared.report import format as fmt
from shared.report.terminal import emit

_QUIET_S = 15.0  # between two plain lines of one task: enough to see life, few enough for a log


class Progress:
    """Context manager that owns the bars. ``print`` writes above them."""

    def __init__(
        self, console: Console | None = None, *, quiet_s: float = _QUIET_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.quiet_s = quiet_s
        self.clock = clock
        self._lock = threading.RLock()
        self.bars: Bars | None = None
        if self.console.is_terminal:
            self.bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def print(self, renderable: RenderableType) -> None:
        """Print above the bars, from any thread."""
        with self._lock:
            emit(self.console, renderable)

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """A task that lasts as long as the ``with`` block; without ``total`` its bar only shows that it lives."""
        task = Task(self, description, total, parents=())
        try:
            yield task
        finally:
            task.close()


class Task:
    """One task. Call it with ``(done, total)``, or :meth:`advance` it; :meth:`task` opens a task inside it. Safe from any thread."""

    def __init__(self, owner: Progress, description: str, total: float | None, parents: tuple[str, ...]) -> None:
        self.path = (*parents, description)
        self.done = 0.0
        self.total = total
        self._owner = owner
        self._lock = threading.Lock()
        self._started = self._printed = owner.clock()
        self._bar = None
        if owner.bars is not None:
            self._bar = owner.bars.add_task("  " * len(parents) + description, total=total)

    def __call__(self, done: float, total: float | None = None) -> None:
        """Set how much is done, and the total where it has become known."""
        with self._lock:
            self.done = done
            self.total = self.total if total is None else total
            self._show()

    def advance(self, amount: float = 1) -> None:
        """Add to what is done."""
        with self._lock:
            self.done += amount
            self._show()

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """A task inside this one."""
        task = Task(self._owner, description, total, self.path)
        try:
            yield task
        finally:
            task.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.remove_task(self._bar)

    def _show(self) -> None:
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.update(self._bar, completed=self.done, total=self.total)
            return
        now = self._owner.clock()
        if now - self._printed < self._owner.quiet_s:
            return
        self._printed = now
        share = (
            f"{fmt.number(self.done)} of {fmt.number(self.total)} ({self.done / self.total:.0%})"
            if self.total
            else fmt.number(self.done)
        )
        self._owner.print(Text(f"{': '.join(self.path)}: {share}, {fmt.duration(now - self._started)}"))
