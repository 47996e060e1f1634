"""Survivors drawn on images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from papers.zero_tprune import digits
from papers.zero_tprune.plans import Layer, Schedule
from papers.zero_tprune.pruner import prune
from papers.zero_tprune.standin import PLAIN, TEST_SEED, load_model

IMAGES = 4


def survivors(seed: int, checkpoint: Path, layers: list[list[Any]], source: str, root: str | None) -> bytes:
    """A PNG: one row per test image, one column per pruning layer; dropped patches are darkened."""
    from matplotlib.figure import Figure

    model = load_model(seed, checkpoint)
    images, labels = digits.load(source, root, train=False).canvases(IMAGES, torch.Generator().manual_seed(TEST_SEED))
    plan = Schedule(tuple(Layer(*layer) for layer in layers), PLAIN)
    with torch.inference_mode(), prune(model, plan) as pruner, pruner.record() as record:
        answers = model(images).argmax(dim=-1)
    columns = [
        ("image", None),
        *((f"after block {after}", kept) for after, kept in zip(record.after, record.tokens, strict=True)),
    ]
    figure = Figure(figsize=(1.5 * len(columns), 1.6 * IMAGES), layout="constrained")
    axes = figure.subplots(IMAGES, len(columns), squeeze=False)
    side = digits.SIZE // 5
    for row in range(IMAGES):
        for column, (title, kept) in enumerate(columns):
            shade = (
                torch.ones(side * side)
                if kept is None
                else torch.full((side * side,), 0.15).index_fill(0, kept[row], 1.0)
            )
            mask = shade.view(side, side).repeat_interleave(5, 0).repeat_interleave(5, 1)
            picture = (images[row, 0] * digits.SCALE + digits.MEAN).clamp(0, 1) * mask
            axes[row, column].imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes[row, column].set_axis_off()
            name = (
                f"{title}: {int(labels[row])}, seen as {int(answers[row])}"
                if kept is None
                else f"{title}: {kept.shape[1]}"
            )
            axes[row, column].set_title(name, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
