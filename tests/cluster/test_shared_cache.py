"""Many processes in one cache folder, killed at random: nothing is lost and nothing wrong is computed."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from tests.cluster.jobs import train_all

PROCESSES, KILLS, SEEDS = 8, 20, range(4)


@pytest.mark.slow
def test_eight_processes_and_random_kills_share_one_cache(tmp_path: Path) -> None:
    alone = train_all(tmp_path / "alone", SEEDS, 0.0, None)
    shared, random_source = tmp_path / "shared", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cluster.jobs"])

    def start(order: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=train_all, args=(shared, SEEDS, 0.01, order))
        process.start()
        return process

    running, kills = [start(order) for order in range(PROCESSES)], 0
    while kills < KILLS:
        time.sleep(random_source.uniform(0.02, 0.3))
        victim = random_source.randrange(PROCESSES)
        if running[victim].is_alive():
            running[victim].kill()
            kills += 1
        running[victim].join()
        running[victim] = start(100 + kills)
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * PROCESSES
    # What a later run reads: the same bits as alone, from the cache, with no checkpoint found damaged on the way.
    assert train_all(shared, SEEDS, 0.01, None) == alone
    assert not [path for path in shared.rglob("*") if path.suffix in {".corrupt", ".other"}]


def test_a_job_that_another_process_has_finished_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_all(tmp_path, [3], 0.0, None)
    monkeypatch.setattr("shared.runner.context.run_jobs", lambda *_, **__: pytest.fail("computed again"))
    assert train_all(tmp_path, [3], 0.0, None) == first
