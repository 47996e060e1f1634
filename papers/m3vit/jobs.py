"""One trained network per worker process: trains an arm, evaluates it, and keeps what later experiments look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PREDICTIONS_FILE = "predictions.npz"
CHECKPOINT_FILE = "model.pt"


def train_job(
    *,
    arm: str,
    tasks: Sequence[str],
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    data: Mapping[str, Any],
    trace_images: int,
    show_images: int,
    workdir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Train one arm (:func:`papers.m3vit.train.train_run`).

    The scenes are rendered once and shared by all jobs of a cache folder. With ``trace_images`` the result holds ``trace``, the experts
    chosen for so many validation images: task -> (MoE layers, images, tokens, K). With ``show_images`` the predictions for so many
    images are left in ``predictions.npz``.
    """
    from papers.m3vit import train as training

    source = {**data, "cache": str(workdir.parent / "synthroom")}
    result = training.train_run(
        arm=arm,
        tasks=tasks,
        seed=seed,
        model=model,
        train=train,
        data=source,
        workdir=workdir,
        progress=progress,
        save=True,
    )
    if trace_images or show_images:
        net = training.load_model(workdir / CHECKPOINT_FILE)
        images, targets = _validation(source, max(trace_images, show_images), seed)
        if trace_images and arm != "dense":
            result["trace"] = {
                task: training.routing_trace(net, images[:trace_images], task).tolist() for task in tasks
            }
        if show_images:
            _keep_predictions(net, images[:show_images], targets, show_images, workdir / PREDICTIONS_FILE)
    return result


def _validation(source: Mapping[str, Any], count: int, seed: int) -> tuple[Any, Any]:
    """The first validation scenes as the model sees them."""
    from papers.m3vit.dataset import Batches
    from papers.m3vit.options import DataOptions, parse
    from papers.m3vit.train import load_data

    _, validation = load_data(parse(DataOptions, "data", dict(source)))
    return next(iter(Batches(validation, count, seed)))


def _keep_predictions(net: Any, images: Any, targets: Any, count: int, path: Path) -> None:
    import numpy as np
    import torch

    with torch.no_grad():
        predicted = net(images)
    arrays = {"image": images.numpy()}
    for task, output in predicted.items():
        arrays[f"predicted_{task}"] = output.numpy()
        arrays[f"target_{task}"] = targets[task][:count].numpy()
    np.savez_compressed(path, **arrays)
