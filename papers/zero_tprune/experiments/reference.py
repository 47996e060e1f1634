"""The two networks on real images that were trained on a GPU: every method at the same FLOPs, intervals over test images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, NotTested, Plot, Result, Table, experiment

NAMES = ("mnist", "cifar10")


@experiment(
    claims=[f"{name}_{claim}" for name in NAMES for claim in ("beats_random", "beats_class_row", "beats_tome")],
    config=["reference", "data"],
)
def references(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Schedules chosen on training images, accuracies on test images of ``data.root``; nothing is trained."""
    from papers.zero_tprune.reference import evaluate, missing

    r, root = cfg.reference, cfg.data.root
    jobs = []
    for name in NAMES:
        if reason := missing(name, root):
            for claim in ("beats_random", "beats_class_row", "beats_tome"):
                yield NotTested(f"{name}_{claim}", reason)
            continue
        jobs.append({"name": name, "root": str(root), "test_images": r.test_images, "calibration_images": r.calibration_images,
                     "draws_per_method": r.draws, "shares": list(r.shares), "scorer": r.scorer})  # fmt: skip
    for job, found, _ in ctx.map("compare", evaluate, jobs) if jobs else ():
        name, count, hardest = job["name"], job["test_images"], found["shares"][f"{min(job['shares']):g}"]
        accuracy = hardest["accuracy"]
        tome = max(("tome constant", "tome searched"), key=lambda method: accuracy[method])
        for claim, other in (("beats_random", "random"), ("beats_class_row", "class row"), ("beats_tome", tome)):
            ours, theirs = hardest["discordant"][other]
            value, half = gap(ours, theirs, count)
            note = f"against {other} on {count} test images of {name}, interval over images; unpruned {found['base']:.2f} %"
            yield Measurement(f"{name}_{claim}", value, value - half, value + half, note=note)
        rows = [
            {"flops_share": float(share), "method": method, "accuracy_percent": value}
            for share, part in found["shares"].items() for method, value in part["accuracy"].items()
        ]  # fmt: skip
        title = f"{name}: accuracy at equal FLOPs on {count} test images (unpruned {found['base']:.2f} %)"
        yield Table(
            f"reference_{name}",
            title,
            rows,
            Plot("line", "flops_share", "accuracy_percent", "method", hline=found["base"]),
        )


def gap(ours: int, theirs: int, count: int) -> tuple[float, float]:
    """Difference of two accuracies on the same images in points, and half of its 95 % interval.

    ``ours``, ``theirs``: images that only one of the two gets right; ``count``: all images.
    """
    difference = (ours - theirs) / count
    return 100 * difference, 196 * ((ours + theirs) / count - difference**2) ** 0.5 / count**0.5
