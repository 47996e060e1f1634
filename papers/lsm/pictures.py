"""What people look at: event frames, a raster of the liquid, confusion matrices, retrieval of every pair."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch

from papers.lsm.encoder import Liquid
from papers.lsm.weights import Weights


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _one_digit(seed: int) -> torch.Tensor:
    from papers.lsm.data.camera import place
    from shared.data.digits import load_digits

    return place(load_digits()[0][3:4, 0], torch.Generator().manual_seed(seed))


def event_frames(seed: int) -> bytes:
    """ON and OFF events of the whole view in six bins, two of each saccade."""
    from papers.lsm.data.camera import events

    on, off = (e[0] for e in events(_one_digit(seed), torch.Generator().manual_seed(seed), crop=None))
    plt = _pyplot()
    figure, axes = plt.subplots(1, 6, figsize=(9, 1.8))
    for axis, index in zip(axes, (4, 12, 20, 28, 36, 46), strict=True):
        frame = torch.ones(*on.shape[1:], 3)
        frame[on[index]] = torch.tensor([0.75, 0.15, 0.15])
        frame[off[index]] = torch.tensor([0.2, 0.4, 0.7])
        axis.imshow(frame.numpy())
        axis.add_patch(plt.Rectangle((8.5, 8.5), 16, 16, fill=False, edgecolor="0.6"))
        axis.set_title(f"bin {index}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    return _png(figure)


def raster(weights: Weights, *, decay: float, v_th: float, const: float, seed: int) -> bytes:
    """Input events above, spikes of all neurons below, over the bins of one digit."""
    from papers.lsm.data.camera import spike_trains

    spikes = spike_trains(_one_digit(seed), seed)
    fired = Liquid.of(weights, decay=decay, v_th=v_th, const=const).trace(spikes).spikes[0]
    plt = _pyplot()
    figure, axes = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
    for axis, data, name in ((axes[0], spikes[0], "input pixel"), (axes[1], fired, "neuron")):
        time, index = data.nonzero(as_tuple=True)
        axis.scatter(time.numpy(), index.numpy(), s=1.5, color="#222222", linewidths=0)
        axis.set_ylabel(name)
        axis.set_ylim(-1, data.shape[1])
    axes[1].set_xlabel("bin")
    return _png(figure)


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    """True classes in rows, predictions in columns."""
    shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
    return _heatmap(shares, labels, labels, "predicted", "true")


def pair_grid(pairs: Sequence[Sequence[int]], values: Sequence[float]) -> bytes:
    """Accuracy of each pair of unseen classes; the lower triangle is empty."""
    classes = sorted({k for pair in pairs for k in pair})
    grid = [[float("nan")] * len(classes) for _ in classes]
    for (a, b), value in zip(pairs, values, strict=True):
        grid[classes.index(a)][classes.index(b)] = value
    names = [str(k) for k in classes]
    return _heatmap(grid, names, names, "second unseen digit", "first unseen digit")


def _heatmap(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], xlabel: str, ylabel: str
) -> bytes:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(0.55 * len(columns) + 1.5, 0.42 * len(rows) + 1.2))
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value and value >= 0.005:
                axis.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color="white" if value > 0.6 else "black",
                    fontsize=7,
                )
    axis.set_xticks(range(len(columns)), columns, rotation=45 if max(map(len, columns)) > 2 else 0)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    return _png(figure)
