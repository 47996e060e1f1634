"""Jobs in worker processes, with progress, each cached: the unit that survives a kill.

Every job runs with the same number of torch threads whether it runs in a worker or in the main process, so its bits do not depend on
the number of workers.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

ProgressFunction = Callable[[int, int], None]
_progress_queue: Any = None


def set_threads(threads: int) -> None:
    """Fix torch's thread count: oversubscribed OpenMP threads on a busy machine cost a factor of ten, and change the bits."""
    import torch

    torch.set_num_threads(threads)


def run_one(target: str, job: Mapping[str, Any], workdir: Path, progress: ProgressFunction) -> Any:
    """Call ``module:function`` with the job's arguments."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)(**job, workdir=workdir, progress=progress)


def run_jobs(
    target: str,
    jobs: Sequence[tuple[Mapping[str, Any], Path]],
    *,
    workers: int,
    threads: int,
    progress: Callable[[int, int, int], None],
) -> Iterator[tuple[int, Any]]:
    """Run every job; yield ``(index, result)`` as they finish.

    Args:
        target: ``module:function``.
        jobs: arguments and working folder of each job.
        workers: number of processes; 1 runs the jobs here.
        threads: torch threads of each.
        progress: called with ``(index, done, total)``.

    Raises:
        JobErrors: after all the others have finished, with what the failing jobs raised.
    """
    if min(workers, len(jobs)) <= 1:
        yield from _run_here(target, jobs, threads, progress)
        return
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_start, initargs=(threads, messages)
    )
    failures: list[tuple[int, BaseException]] = []
    try:
        with uninterrupted():
            futures = {
                pool.submit(_work, target, index, job, workdir): index for index, (job, workdir) in enumerate(jobs)
            }
        pending: set[Future[Any]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(messages, progress)
            for future in done:
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                else:
                    failures.append((futures[future], error))
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    if failures:
        raise JobErrors(failures)


class JobErrors(RuntimeError):
    """Some jobs failed; the others finished and are cached."""

    def __init__(self, failures: list[tuple[int, BaseException]]) -> None:
        self.failures = failures
        first = failures[0][1]
        super().__init__(f"{len(failures)} of the jobs failed, first: {type(first).__name__}: {first}")


def _run_here(
    target: str, jobs: Sequence[tuple[Mapping[str, Any], Path]], threads: int, progress: Callable[[int, int, int], None]
) -> Iterator[tuple[int, Any]]:
    set_threads(threads)
    failures: list[tuple[int, BaseException]] = []
    for index, (job, workdir) in enumerate(jobs):

        def report(done: int, total: int, index: int = index) -> None:
            progress(index, done, total)

        try:
            result = run_one(target, job, workdir, report)
        except Exception as error:
            failures.append((index, error))
        else:
            yield index, result
    if failures:
        raise JobErrors(failures)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Start children that ignore Ctrl-C from their first instruction: it is handled once, by the main process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _start(threads: int, messages: Any) -> None:
    global _progress_queue
    _progress_queue = messages
    threading.Thread(target=exit_with_parent, daemon=True).start()
    set_threads(threads)


def exit_with_parent() -> None:
    """A killed main process must not leave workers behind that go on burning cores."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(target: str, index: int, job: Mapping[str, Any], workdir: Path) -> Any:
    return run_one(target, job, workdir, lambda done, total: _progress_queue.put((index, done, total)))


def _drain(messages: Any, progress: Callable[[int, int, int], None]) -> None:
    while True:
        try:
            progress(*messages.get_nowait())
        except queue.Empty:
            return
