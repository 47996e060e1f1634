"""What people look at: the domains, the scores with their threshold, accuracy over time, who is routed where."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def domain_grid(images: dict[str, Tensor]) -> bytes:
    """A row of images (N, 1, H, W) per domain."""
    plt = _pyplot()
    columns = min(len(v) for v in images.values())
    figure, axes = plt.subplots(len(images), columns, figsize=(0.8 * columns, 0.85 * len(images)), squeeze=False)
    for row, (name, values) in zip(axes, images.items(), strict=True):
        for axis, image in zip(row, values, strict=False):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return _png(figure)


def histograms(scores: dict[str, Sequence[float]], threshold: float) -> bytes:
    """Familiarity s(x) of each domain's images to the first domain, and its threshold."""
    plt = _pyplot()
    figure, axes = plt.subplots(len(scores), 1, figsize=(6.5, 1.1 * len(scores)), sharex=True, squeeze=False)
    low, high = min(min(v) for v in scores.values()), max(max(v) for v in scores.values())
    for axis, (name, values) in zip(axes[:, 0], scores.items(), strict=True):
        axis.hist(values, bins=60, range=(low, high), color="#3b6ea5")
        axis.axvline(threshold, color="#b3372f", linewidth=1.2)
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("largest cosine to a class exemplar of the first domain (red: threshold)")
    return _png(figure)


def heatmap(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], xlabel: str, ylabel: str
) -> bytes:
    """A matrix of shares with its numbers."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(0.9 * len(columns) + 1.5, 0.6 * len(rows) + 1.2))
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black", fontsize=8
            )
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    return _png(figure)
