"""The card's table of GPU speeds says what the committed run measured."""

from __future__ import annotations

import json

from papers.moepp.shape import SHAPES
from shared.runner.paths import PAPERS, ROOT


def test_the_card_holds_the_speeds_of_the_committed_run() -> None:
    run = json.loads((ROOT / "results" / "moepp" / "h200-full.json").read_text(encoding="utf-8"))
    rows = next(table["rows"] for table in run["measurements"] if table["name"] == "gpu_speed")
    card = (PAPERS / "moepp" / "README.md").read_text(encoding="utf-8")
    for name in SHAPES:
        vanilla, *taus = sorted((row for row in rows if row["model"] == name), key=lambda row: row["tau"] or 0.0)
        assert [row["tau"] for row in taus] == [0.1, 0.25, 0.5, 0.75, 1.0]
        cells = [f"{row['speedup']:.2f}× ({100 * row['of_bound']:.0f} %)" for row in taus]
        assert f"| {name} | {1e3 * vanilla['median_s']:.2f} ms | {' | '.join(cells)} |" in card
