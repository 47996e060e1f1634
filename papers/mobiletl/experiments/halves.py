"""Half of CIFAR-10's classes to the other half at 224 pixels: run on a GPU, and as committed from one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shared.experiment import (
    Artifact,
    Context,
    NotTested,
    Plot,
    Result,
    Table,
    asset,
    experiment,
    seed_measurement,
)

_CLAIMS = ["half_cifar10_loss", "half_cifar10_equal_blocks", "half_cifar10_grows", "half_cifar10_over_shifts"]


@experiment(claims=_CLAIMS, config=["cifar", "data"], gpu=True)
def half_cifar10(cfg: Any, ctx: Context) -> Iterator[Result]:
    """MobileNetV3-Small, pre-trained here on five classes, transferred to the other five in every way; see papers.mobiletl.cifar."""
    if not cfg.data.root:
        for claim in _CLAIMS:
            yield NotTested(claim, "needs CIFAR-10: data.root=FOLDER with FOLDER/cifar10-jpeg")
        return
    from omegaconf import OmegaConf

    from papers.mobiletl.cifar import RESULT, accuracies, job

    options: Any = OmegaConf.to_container(cfg.cifar)
    jobs = [{"seed": ctx.seed, "root": str(cfg.data.root), "seeds": list(ctx.seeds), "options": options}]
    (_, result, workdir), *_ = ctx.map("transfer between halves of CIFAR-10", job, jobs)

    def difference(ours: tuple[str, int], theirs: tuple[str, int]) -> list[float]:
        pairs = zip(accuracies(result, *ours, ctx.seeds), accuracies(result, *theirs, ctx.seeds), strict=True)
        return [a - b for a, b in pairs]

    note = f"{result['machine']}, {len(ctx.seeds)} seeds that share the pre-trained weights"
    yield seed_measurement("half_cifar10_loss", difference(("ft_all", 0), ("mobiletl", 5)), note)
    columns = zip(*(difference(("mobiletl", k), ("ft_blocks", k)) for k in (3, 5)), strict=True)
    yield seed_measurement("half_cifar10_equal_blocks", [sum(column) / len(column) for column in columns], note)
    yield seed_measurement("half_cifar10_grows", difference(("mobiletl", 3), ("mobiletl", 1)), note)
    yield seed_measurement("half_cifar10_over_shifts", difference(("mobiletl", 3), ("bias", 0)), note)
    yield _table("half_cifar10", "This GPU", result)
    yield Artifact(RESULT, workdir / RESULT)


@experiment(claims=[])
def reference_transfer(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The committed run of ``python -m papers.mobiletl.cifar``."""
    result = json.loads(asset(__file__, "../reference/cifar10_h200_sxm.json").read_text())
    yield _table("reference_cifar10", "Committed reference", result)


def _table(name: str, title: str, result: Mapping[str, Any]) -> Table:
    rows = []
    for method, blocks in dict.fromkeys((run["method"], run["blocks"]) for run in result["runs"]):
        runs = [run for run in result["runs"] if (run["method"], run["blocks"]) == (method, blocks)]
        for rate in sorted({run["lr"] for run in runs}):
            values = [run["accuracy"] for run in runs if run["lr"] == rate]
            label = f"{method}-{blocks}" if method in ("ft_blocks", "mobiletl") else method
            rows.append(
                {"method": label, "rate": f"{rate:g}", "top-1 %": sum(values) / len(values), "runs": len(values)}
            )
    return Table(
        name, f"{title}: MobileNetV3-Small, five classes of CIFAR-10 to the other five", rows,
        Plot("bar", x="method", y="top-1 %", series="rate", ylabel="top-1 % on the target"),
        note=f"{result['machine']}, {result['date']}; pre-trained here for {result['pretrain_epochs']} epochs to "
        f"{result['source_accuracy']:.1f} % on the source; {result['images']} target images, {result['epochs']} epochs, "
        f"batch {result['batch']}. Means over the runs of a row; where it has one run, the first seed tried the rate."
        + ("" if result.get("complete") else " The run was stopped before all ways of transfer were done."),
    )  # fmt: skip
