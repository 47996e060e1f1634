"""A text coloured by the number of FFN experts that each of its bytes used."""

from __future__ import annotations

import io
from collections.abc import Sequence


def coloured_text(text: str, values: Sequence[float], limits: tuple[float, float], columns: int = 84) -> bytes:
    """A PNG of ``text`` (ASCII) in a fixed-width font, each byte on a colour between ``limits`` of ``values``.

    Lines longer than ``columns`` are wrapped; a newline takes a cell of its own, shown as a pilcrow.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cells, row, column = [], 0, 0
    for character, value in zip(text, values, strict=True):
        if column == columns:
            row, column = row + 1, 0
        cells.append((row, column, character, value))
        column += 1
        if character == "\n":
            row, column = row + 1, 0
    rows = cells[-1][0] + 1
    figure = Figure(figsize=(0.095 * columns + 0.3, 0.19 * rows + 0.85))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.02, 0.98, 1 - 0.75 / (0.19 * rows + 0.85)))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    low, high = limits
    colours = colormaps["YlOrRd"]
    for r, c, character, value in cells:
        shade = 0.75 * (value - low) / max(high - low, 1e-9)
        axes.add_patch(Rectangle((c, r), 1, 1, facecolor=colours(shade), linewidth=0))
        shown = {"\n": "¶", "\t": "→", "\x00": "∅"}.get(character, character)
        axes.text(c + 0.5, r + 0.72, shown, ha="center", va="baseline", fontsize=8, family="monospace",
                  color="#999999" if character in "\n\t\x00" else "black", parse_math=False)  # fmt: skip
    legend = figure.add_axes((0.02, 1 - 0.32 / (0.19 * rows + 0.85), 0.3, 0.12 / (0.19 * rows + 0.85)))
    legend.imshow(
        [[i / 99 * 0.75 for i in range(100)]], aspect="auto", cmap=colours, vmin=0, vmax=1, extent=(low, high, 0, 1)
    )
    legend.set_yticks([])
    legend.tick_params(labelsize=7)
    figure.text(0.33, 1 - 0.32 / (0.19 * rows + 0.85), "FFN experts used by the byte, mean over layers", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
