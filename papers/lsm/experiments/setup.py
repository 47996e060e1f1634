"""What the learnt experiments share: data once per seed, results in the order of the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.experiment import Context


def plain(section: Any) -> Any:
    """A config section as plain dicts and lists."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(section) if OmegaConf.is_config(section) else section


def data_of(ctx: Context, cfg: Any, name: str, size: int) -> dict[int, str]:
    """Key of each seed's set; digits are MNIST where the run has a data root."""
    from papers.lsm.jobs import data_job

    root = str(cfg.data.root) if name == "digits" and cfg.data.root else None
    jobs = [{"seed": seed, "name": name, "size": int(size), "root": root} for seed in ctx.seeds]
    return {job["seed"]: result["data"] for job, result, _ in ctx.map(f"data: {name}", data_job, jobs)}


def digit_sizes(cfg: Any, *, limited: bool = False) -> tuple[int, list[int]]:
    """How many digits are drawn (0: all); training, validation and test parts; ``limited`` ones for sweeps and trained networks."""
    if cfg.data.root:
        sizes = [int(n) for n in cfg.supervised.sizes_mnist]
        drawn = 0 if sum(sizes) == 70_000 else sizes[0] + sizes[1]
        if limited:
            sizes = [min(n, int(most)) for n, most in zip(sizes, cfg.supervised.sizes_limited, strict=True)]
        return drawn, sizes
    return int(cfg.supervised.digits.size), [int(n) for n in cfg.supervised.digits.sizes]


def by_seed(ctx: Context, name: str, function: Any, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Results in the order of the jobs, which is that of the seeds."""
    found = {str(sorted(job.items(), key=lambda kv: kv[0])): result for job, result, _ in ctx.map(name, function, jobs)}
    return [found[str(sorted(job.items(), key=lambda kv: kv[0]))] for job in jobs]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
