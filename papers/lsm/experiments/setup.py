"""What the learnt experiments share: data once per seed, results in the order of the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.experiment import Context


def plain(section: Any) -> Any:
    """A config section as plain dicts and lists."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(section) if OmegaConf.is_config(section) else section


def data_of(ctx: Context, cfg: Any, sizes: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Key of each seed's set of every name; digits are MNIST where the run has a data root."""
    from papers.lsm.jobs import data_job

    jobs = [
        {"seed": seed, "name": name, "size": int(size), "root": str(cfg.data.root) if name == "digits" and cfg.data.root else None}
        for name, size in sizes.items()
        for seed in ctx.seeds
    ]  # fmt: skip
    keys: dict[str, dict[int, str]] = {name: {} for name in sizes}
    for job, result, _ in ctx.map("data", data_job, jobs):
        keys[job["name"]][job["seed"]] = result["data"]
    return keys


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


def by_group(
    ctx: Context, name: str, function: Any, groups: Mapping[Any, Sequence[Mapping[str, Any]]]
) -> dict[Any, list[Any]]:
    """Several groups of jobs at once, so that the workers start once and none waits for the end of a group."""
    results = iter(by_seed(ctx, name, function, [job for jobs in groups.values() for job in jobs]))
    return {key: [next(results) for _ in jobs] for key, jobs in groups.items()}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
