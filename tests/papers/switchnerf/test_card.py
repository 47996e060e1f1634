"""The card says what the committed measurements say."""

from __future__ import annotations

from typing import Any

from papers.switchnerf.card import BEGIN, END, FOLDER, gpu_table, measured_files, with_table


def test_the_card_holds_the_table_of_the_committed_measurements() -> None:
    card = (FOLDER / "README.md").read_text()
    assert card.count(BEGIN) == card.count(END) == 1
    assert with_table(card, gpu_table(measured_files())) == card, "run python -m papers.switchnerf.card"


def test_speeds_are_set_against_the_fastest_baseline() -> None:
    def section(captured: float) -> dict[str, Any]:
        speed = {
            "switch": 100.0,
            "switch compiled": 200.0,
            "switch captured": captured,
            "switch with background": 50.0,
            "hmohe": 12_345.0,
        }
        return {"rays_per_s": speed, "peak_bytes_above_states": {"hmohe": 6.04e8}}

    result = {"environment": {"gpu": "card"}, "render": section(400.0), "train": section(20.0)}
    lines = gpu_table({"machine": result}).splitlines()
    found = [line for line in lines if line.startswith("| HMoHE")]
    assert found[0] == "| HMoHE config A | 12,300 | 31× | 250× | 0.6 GB |"  # 12,345 / 400 and / 50
    assert found[1] == "| HMoHE config A | 12,300 | 62× | 250× | 0.6 GB |"  # 12,345 / 200
    assert "| Switch-NeRF with background, eager | 50 |  | 1× |  |" in lines
