"""The card's table of GPU speeds, made from the committed measurements: ``python -m papers.switchnerf.card`` writes it into README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from papers.switchnerf.experiments.measured import fastest

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
PHASES = {"render": "Rendering", "train": "Training step with Adam"}
NETWORKS = {
    "switch": "Switch-NeRF, eager",
    "switch compiled": "Switch-NeRF, compiled",
    "switch captured": "Switch-NeRF, compiled, one CUDA graph",
    "switch with background": "Switch-NeRF with background, eager",
    "switch compiled with background": "Switch-NeRF with background, compiled",
    "hmohe": "HMoHE config A",
    "hmohe captured": "HMoHE config A, one CUDA graph",
    "hmohe half tables": "HMoHE config A, tables in half precision",
    "hmohe proposals fixed": "HMoHE config A, step that leaves the proposals alone",
    "hmohe plain torch": "HMoHE config A, plain torch encode",
}


def measured_files() -> dict[str, dict[str, Any]]:
    """What :mod:`papers.switchnerf.gpu` measured, by machine (the name of its device file)."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "measured").glob("*.json"))}


def gpu_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of rays per second by machine, and how many times Switch-NeRF's: its fastest form without and with background."""
    lines = ["| | rays/s | of Switch-NeRF | of it with background | memory above its states |", "|:--|--:|--:|--:|--:|"]
    for result in results.values():
        phases = {phase: title for phase, title in PHASES.items() if phase in result}
        if phases:
            lines.append(f"| **{result['environment']['gpu']}** | | | | |")
        for phase, title in phases.items():
            lines.append(f"| *{title}* | | | | |")
            lines += _rows(result[phase])
    return "\n".join(lines)


def _rows(section: Mapping[str, Any]) -> Iterator[str]:
    speed = section["rays_per_s"]
    base = speed[fastest(dict(section), "switch")]
    behind = max(value for name, value in speed.items() if name.endswith("with background"))
    for name, title in NETWORKS.items():
        if name in speed:
            size = section.get("peak_bytes_above_states", {}).get(name)
            memory = "" if size is None else f"{size / 1e9:.1f} GB"
            over = "" if name.endswith("with background") else _times(speed[name] / base)
            yield f"| {title} | {_digits(speed[name])} | {over} | {_times(speed[name] / behind)} | {memory} |"


def _digits(value: float) -> str:
    """Three digits, thousands apart."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}"


def _times(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}×"


def with_table(card: str, table: str) -> str:
    """The card with the table between its markers."""
    before, _, rest = card.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    readme = FOLDER / "README.md"
    readme.write_text(with_table(readme.read_text(), gpu_table(measured_files())))
