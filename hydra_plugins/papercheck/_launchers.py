"""``hydra/launcher=joblib`` and ``hydra/launcher=slurm``: the engines are joblib and submitit, under Hydra's own launchers for them.

What these add: cores are divided so that runs x workers x threads fit; the lines of a run are shown when it ends; a run that dies
leaves an ``error`` row for each of its claims, and the others finish.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_joblib_launcher._core import execute_job
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig

Overrides = Sequence[Sequence[str]]


class CoresLauncher(JoblibLauncher):
    """Runs side by side on one machine; config in ``conf/hydra/launcher/joblib.yaml``."""

    def launch(self, job_overrides: Overrides, initial_job_idx: int) -> Sequence[JobReturn]:
        from joblib import Parallel, delayed, effective_n_jobs
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        from shared.runner.environment import CORES, num_cores

        jobs = min(effective_n_jobs(self.joblib["n_jobs"]), len(job_overrides))
        os.environ[CORES] = str(max(1, num_cores() // jobs))  # the workers inherit it
        state, tail = Singleton.get_state(), (self.hydra_context, self.config, self.task_function)
        numbers = [initial_job_idx + index for index in range(len(job_overrides))]
        runs = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered", pre_dispatch="all", batch_size=1)(
            delayed(_numbered)(number, overrides, *tail, state)
            for number, overrides in zip(numbers, job_overrides, strict=True)
        )
        returns: dict[int, JobReturn] = {}
        try:
            for number, result in runs:
                returns[number] = result
                _ended(self, job_overrides[number - initial_job_idx], number, None)
        except TerminatedWorkerError as error:
            for number in set(numbers) - returns.keys():
                returns[number] = _ended(self, job_overrides[number - initial_job_idx], number, error)
        return [returns[number] for number in numbers]


class ClusterLauncher(SlurmLauncher):
    """One Slurm job array for the sweep; config in ``conf/hydra/launcher/slurm.yaml``."""

    def launch(self, job_overrides: Overrides, initial_job_idx: int) -> Sequence[JobReturn]:
        import submitit

        from shared.runner.paths import ROOT

        assert self.config is not None
        # A job finds this project wherever the sweep was started from.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        parameters = {key: value for key, value in self.params.items() if value is not None}
        executor = submitit.AutoExecutor(
            cluster="slurm",
            folder=parameters.pop("submitit_folder"),
            slurm_max_num_timeout=parameters.pop("max_num_timeout"),
        )
        general = {"name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min"}
        general |= {"stderr_to_stdout"}
        executor.update_parameters(
            **{key if key in general else f"slurm_{key}": value for key, value in parameters.items()}
        )
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        numbers = [initial_job_idx + index for index in range(len(job_overrides))]
        state = Singleton.get_state()
        jobs = executor.map_array(
            self,
            [list(overrides) for overrides in job_overrides],
            ["hydra.sweep.dir"] * len(numbers),
            numbers,
            [f"job_id_for_{number}" for number in numbers],
            [state] * len(numbers),
        )
        returns: dict[int, JobReturn] = {}
        for position, result in _as_completed(jobs):
            error = result if isinstance(result, BaseException) else None
            made = _ended(self, job_overrides[position], numbers[position], error)
            returns[position] = made if isinstance(result, BaseException) else result
        return [returns[position] for position in range(len(jobs))]


def _numbered(number: int, overrides: Sequence[str], context: Any, config: Any, function: Any, state: Any) -> Any:
    return number, execute_job(number, overrides, context, config, function, state)


def _as_completed(jobs: Sequence[Any], poll_s: float = 1.0) -> Iterator[tuple[int, Any]]:
    """Position and result of each job as it ends; of a job that died, the error."""
    pending = dict(enumerate(jobs))
    while pending:
        for position, job in list(pending.items()):
            if job.done():
                del pending[position]
                try:
                    yield position, job.results()[0]
                except Exception as error:
                    yield position, error
        time.sleep(poll_s if pending else 0)


def _ended(launcher: Any, overrides: Sequence[str], number: int, error: BaseException | None) -> JobReturn:
    """Show what the run left; where it died, write error rows in its place."""
    from shared.runner.launch import run_ended

    load: Callable[..., DictConfig] = launcher.hydra_context.config_loader.load_sweep_config
    config = load(launcher.config, list(overrides))
    config.hydra.job.num = number
    folder = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
    run_ended(config, folder.absolute(), error)
    return JobReturn(overrides=list(overrides), cfg=config, _return_value=1, status=JobStatus.COMPLETED)
