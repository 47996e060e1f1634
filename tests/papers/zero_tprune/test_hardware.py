"""The operation list adds up to the exact counts, and the model behaves where its answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from papers.zero_tprune import counts
from papers.zero_tprune.budget import solve, solve_latency
from papers.zero_tprune.hardware import Assumed, arrays, breakdown, forward_rows, latency, latency_function
from papers.zero_tprune.plans import ATS, EViT, Rule, Schedule, ToMe, family
from papers.zero_tprune.shape import DEIT_S, DEIT_T
from shared.errors import UserError
from shared.hardware import load_device

ASSUMED = Assumed(0.7, 0.8, 5e-6)


@pytest.mark.parametrize("plan", [None, family(12, 196, 0.1).with_rule(method="truncate"), EViT(0.7, (4, 7, 10))])
def test_matrix_operations_are_twice_the_exact_macs(plan: Schedule | EViT | None) -> None:
    """Per image and for a batch of three; LayerNorm, five per element in the authors' convention, runs on the vector units here."""
    exact = counts.flops(DEIT_S, plan)
    patches = plan.patches(12, 196) if plan else (196,) * 13
    inside = isinstance(plan, EViT)
    norms = (
        5
        * 384
        * (
            sum(1 + n for n in patches[:12])
            + sum(1 + n for n in (patches[1:] if inside else patches[:12]))
            + 1
            + patches[-1]
        )
    )
    rows = forward_rows(DEIT_S, plan, 3, "float32")
    matrix = sum(row["flops"] * row["count"] for row in rows if row["name"] != "class attention")
    assert matrix == pytest.approx(3 * 2 * (exact.total("model") - norms), rel=1e-12)


def test_weights_are_read_once_per_batch() -> None:
    def read(batch: int) -> float:
        return arrays(DEIT_S, None, batch, "float32").total("bytes_read")

    per_image = read(2) - read(1)
    assert read(1) - per_image == pytest.approx(4 * (12 * (4 + 8) * 384**2 + 768 * 384 + 384 * 1000))


def test_stored_scores_move_the_matrix_and_streamed_ones_do_not() -> None:
    plan = family(12, 196, 0.1)

    def moved(scoring: str) -> float:
        return float(arrays(DEIT_S, plan, 1, "float32", scoring).total("bytes_moved"))  # type: ignore[arg-type]

    tokens = (197, 187, 159, 119, 76)  # of the five pruning blocks
    written_and_read = 4 * 4 * 6 * sum(n * n for n in tokens)  # scores out, softmax in and out, a·v in
    assert moved("stored") - moved("streamed") > written_and_read


def test_overheads_shrink_with_the_batch_and_compute_decides_large_ones() -> None:
    device, plan = load_device("a100_sxm4_80gb"), family(12, 196, 0.1)
    gains = []
    for batch in (1, 16, 128, 4096):
        seconds = latency_function(DEIT_S, device, batch, "float32", ASSUMED)
        gains.append(float(seconds(None) / seconds(plan)))
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(1 / counts.share(DEIT_S, plan, "model"), rel=0.04)


def test_the_solver_meets_a_latency_on_a_device() -> None:
    seconds = latency_function(DEIT_T, load_device("a100_sxm4_80gb"), 256, "float32", ASSUMED)
    plan = solve_latency(DEIT_T, 0.75, seconds)
    assert seconds(plan) / seconds(None) == pytest.approx(0.75, rel=0.02)
    slow = latency_function(DEIT_T, load_device("a100_sxm4_80gb"), 1, "float32", ASSUMED, "stored")
    with pytest.raises(UserError, match="cannot be reached"):
        solve_latency(DEIT_T, 0.5, slow)  # at batch 1 launches decide, and pruning adds some
    with pytest.raises(UserError, match="share of the unpruned"):
        solve_latency(DEIT_T, 2.0, seconds)


def test_breakdown_adds_up() -> None:
    found = latency(DEIT_S, family(12, 196, 0.1), load_device("a100_sxm4_80gb"), 8, "float32", ASSUMED)
    assert sum(breakdown(found, 8).values()) == pytest.approx(1e6 * found.latency_s / 8)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no fixed latency"):
        forward_rows(DEIT_S, ATS(100), 1, "float32")
    with pytest.raises(UserError, match="unknown dtype 'fp33'"):
        forward_rows(DEIT_S, None, 1, "fp33")
    with pytest.raises(UserError, match="has no peak rate for bfloat16"):
        latency(DEIT_S, None, load_device("raspberry_pi_4b"), 1, "bfloat16", ASSUMED)


def test_the_committed_measurements_are_whole() -> None:
    """What the card and the model's validation rest on: every method in every cell, kernels equal to the reference."""
    data = json.loads((Path(__file__).parents[3] / "papers/zero_tprune/measured/h100_sxm5_80gb.json").read_text())
    assert data["environment"]["gpu"].startswith("NVIDIA")
    assert all(row["same_survivors"] == 1.0 and row["score_error_rel"] < 1e-3 for row in data["check"])
    cells = {
        (c["precision"], c["batch"])
        for c in data["throughput"]
        if "small" in c["model"] and c["budget"] == "a" and c["mode"] == "eager"
    }
    assert {(p, b) for p in ("fp32", "tf32", "bf16") for b in (1, 16, 64, 128, 256, 1024)} == cells
    for cell in data["throughput"]:
        assert {"unpruned", "ceiling", "zero_tprune", "tome"} <= set(cell["rows"])
        assert cell["rows"]["zero_tprune"]["images_per_s"] > 0


def test_tome_and_zero_tprune_have_rows() -> None:
    plans = (ToMe((8,) * 12), solve(DEIT_S, 0.65), solve(DEIT_S, 0.65, rule=Rule(method="cls")))
    for plan in plans:
        assert len(forward_rows(DEIT_S, plan, 1, "float32")) > len(forward_rows(DEIT_S, None, 1, "float32"))
