"""What the runner hands to an experiment: seeds, published inputs, and cached parallel jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.runner.cache import Cache, experiment_key
from shared.runner.pool import run_jobs


class ProgressDisplay(Protocol):
    """The progress bars of a run (:mod:`shared.report.progress` draws them)."""

    def task(self, description: str, total: float | None = None) -> AbstractContextManager[Callable[[float], None]]:
        """A bar for as long as the context lasts; call what it gives with how much is done."""


@dataclass(frozen=True)
class RunContext:
    """See :class:`shared.experiment.Context`."""

    paper: str
    seed: int
    seeds: tuple[int, ...]
    scale: str
    published: Mapping[str, Any]
    threads: int
    workers: int
    cache: Cache
    display: ProgressDisplay

    def map(
        self, name: str, function: Callable[..., Any], jobs: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Any, Path]]:
        """Run a module-level function over jobs in worker processes, each job cached. See :meth:`shared.experiment.Context.map`."""
        job_list = [dict(job) for job in jobs]
        target = f"{function.__module__}:{function.__qualname__}"
        keys = [experiment_key(self.paper, target, {"job": job, "threads": self.threads}) for job in job_list]
        missing = []
        for index, key in enumerate(keys):
            value = self.cache.get(key)
            if value is None:
                missing.append(index)
            else:
                yield job_list[index], value["result"], self.cache.folder / key
        if not missing:
            return
        if self.cache.force:
            for index in missing:
                self.cache.forget(keys[index])
        work = [(job_list[index], self.cache.workdir(keys[index])) for index in missing]
        share = [0.0] * len(work)
        with self.display.task(name, total=len(work)) as task:

            def progress(index: int, done: int, total: int) -> None:
                share[index] = done / total if total else 0.0
                task(sum(share))

            for position, result in run_jobs(
                target, work, workers=self.workers, threads=self.threads, progress=progress
            ):
                result = json.loads(json.dumps(result))  # what a later run will read from the cache, bit for bit
                self.cache.put(keys[missing[position]], {"result": result})
                share[position] = 1.0
                task(sum(share))
                yield job_list[missing[position]], result, work[position][1]
