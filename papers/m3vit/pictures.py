"""Pictures for the report: scenes, labels and predictions side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papers.m3vit.dataset import IMAGE_MEAN, IMAGE_STD


def prediction_sheet(path: Path, tasks: Sequence[str]) -> bytes:
    """A PNG with one row per image (its label above its prediction) and one column per task, from a file of ``jobs.train_job``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    count = len(content["image"])
    figure = Figure(figsize=(1.55 * (len(tasks) + 1), 3.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * count, len(tasks) + 1, squeeze=False)
    for row in range(count):
        photo = np.clip(content["image"][row].transpose(1, 2, 0) * IMAGE_STD + IMAGE_MEAN, 0.0, 1.0)
        axes[2 * row][0].imshow(photo)
        axes[2 * row][0].set_ylabel("label")
        axes[2 * row + 1][0].set_ylabel("predicted")
        axes[2 * row + 1][0].imshow(np.ones_like(photo))
        for column, task in enumerate(tasks, start=1):
            target, predicted = content[f"target_{task}"][row], content[f"predicted_{task}"][row]
            for axis, image in zip(
                axes[2 * row : 2 * row + 2, column], _as_images(task, target, predicted), strict=True
            ):
                axis.imshow(image, **_style(task))
            if row == 0:
                axes[0][column].set_title(task, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _as_images(task: str, target: NDArray[Any], predicted: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Label and prediction as 2-D maps or RGB; a prediction is (C, H, W) of logits, normals or depth."""
    if task == "normals":
        channels_first = target if target.shape[0] == 3 else target.transpose(2, 0, 1)
        unit = predicted / np.maximum(np.linalg.norm(predicted, axis=0, keepdims=True), 1e-12)
        return tuple(np.clip(0.5 * (n.transpose(1, 2, 0) + 1.0), 0.0, 1.0) for n in (channels_first, unit))  # type: ignore[return-value]
    flat = np.squeeze(target)
    if task in ("sal", "edge"):
        return flat, 1.0 / (1.0 + np.exp(-predicted[0]))
    if task == "depth":
        return flat, predicted[0]
    return flat, predicted.argmax(0)


def _style(task: str) -> dict[str, Any]:
    if task in ("semseg", "parts"):
        return {"cmap": "tab10", "vmin": 0, "vmax": 9, "interpolation": "nearest"}
    if task in ("sal", "edge"):
        return {"cmap": "gray", "vmin": 0, "vmax": 1}
    return {"cmap": "viridis"}
