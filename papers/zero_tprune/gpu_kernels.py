"""The kernels by themselves on a CUDA device: correctness, memory and time against a stored attention matrix, tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from papers.zero_tprune.importance import start_vector
from papers.zero_tprune.plans import Rule, family
from shared.calibrate.clock import graph_of
from shared.measure import Ratio, peak_allocated_bytes

if TYPE_CHECKING:
    from papers.zero_tprune.gpu import Bench

TUNE_TOKENS = (
    (197, 1),
    (187, 1),
    (156, 1),
    (112, 1),
    (67, 1),
    (177, 5),
    (146, 5),
    (197, 5),
)  # Zero-TP-a on DeiT-S, and unpruned


def triple(ratio: Ratio) -> list[float]:
    """Median and interval of a ratio, for JSON."""
    return [ratio.median, ratio.low, ratio.high]


def check(bench: Bench) -> None:
    """The kernels against the reference in float64-free plain torch: scores, and the share of equal survivors."""
    if bench.smoke:
        return
    from papers.zero_tprune import importance, kernels, selection

    rows = []
    for dtype, tokens, votes in ((torch.float32, 197, 5), (torch.float32, 187, 1), (torch.bfloat16, 177, 5), (torch.bfloat16, 119, 1),
                                 (torch.float32, 577, 5), (torch.bfloat16, 1370, 5)):  # fmt: skip
        torch.manual_seed(tokens)
        qkv = torch.randn(8, tokens, 3, 6, 64, device="cuda").mul_(1.5).to(dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        reference = importance.wpr(importance.attention(q, k, 0.125), start_vector(tokens, 1, "cuda"), votes)
        s = kernels.votes(q, k, None, 0.125, 1, votes)
        seen = selection.Tokens(q, k, v, torch.randn(8, tokens, 384, device="cuda"), 0.125, 1, 1)
        layer = family(12, tokens - 1, 0.1).layers[2]
        rule = Rule()
        from papers.zero_tprune.pruner import _triton_select

        flat = (
            _triton_select(seen, layer, rule, layer.kept(tokens - 1)) - torch.arange(8, device="cuda")[:, None] * tokens
        )
        index = selection.select(seen, layer, rule)
        same = sum(len(set(a) & set(b)) for a, b in zip(flat.tolist(), index.tolist(), strict=True)) / index.numel()
        error = float((s - reference).norm() / (reference - 1).norm())
        rows.append(
            {"dtype": str(dtype), "tokens": tokens, "votes": votes, "score_error_rel": error, "same_survivors": same}
        )
    bench.results["check"] = rows


def memory(bench: Bench) -> None:
    """Five votes at 224, 384 and 518 pixels: streamed from Q and K against a stored attention matrix, time and peak memory."""
    table: list[dict[str, Any]] = []
    bench.results["memory"] = table
    if bench.smoke:
        return
    from papers.zero_tprune import kernels

    batch, scale = 32, 0.125

    def stored(q: Tensor, k: Tensor, start: Tensor) -> Tensor:
        a = ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        s = start.expand(batch, 6, 1, -1)
        for _ in range(5):
            s = s @ a
        return s

    for pixels, tokens in ((224, 197), (384, 577), (518, 1370)):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            q, k, _ = torch.randn(batch, tokens, 3, 6, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
            calls = {
                "streamed": partial(kernels.votes, q, k, None, scale, 1, 5),
                "stored": partial(stored, q, k, start_vector(tokens, 1, "cuda").to(dtype)),
            }
            timings = bench.measure(calls)
            table.append({
                "pixels": pixels, "tokens": tokens, "precision": precision, "batch": batch,
                "streamed_s": timings.by_name["streamed"].median_s, "stored_s": timings.by_name["stored"].median_s,
                "speedup": triple(timings.ratio("stored", "streamed")),
                "streamed_bytes": peak_allocated_bytes(calls["streamed"]), "stored_bytes": peak_allocated_bytes(calls["stored"]),
            })  # fmt: skip


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` as a CUDA graph: no launch cost."""
    return graph_of(function, 1).replay


def tune(bench: Bench) -> None:
    """Microseconds of each kernel on 256 images of DeiT-S at the token counts of Zero-TP-a, voting in several ways.

    The fastest ways belong into :data:`papers.zero_tprune.kernels.TUNED`.
    """
    table: list[dict[str, Any]] = []
    bench.results["tune"] = table
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for tokens, iterations in TUNE_TOKENS:
            calls = {
                str(way): graphed(call) for way, call in tune_calls(dtype, tokens, iterations).items() if _runs(call)
            }
            for name, timing in bench.measure(calls, 0.005).by_name.items():
                us = 1e6 * timing.median_s
                table.append({"precision": precision, "tokens": tokens, "votes": iterations, "way": name, "us": us})
            bench.save()


def _runs(call: Callable[[], object]) -> bool:
    """Whether the compiler takes this tile: some need more registers or shared memory than there are."""
    try:
        call()
    except Exception:
        return False
    return True


def tune_calls(dtype: torch.dtype, tokens: int, iterations: int) -> dict[object, Callable[[], object]]:
    """Votes in every way that fits, and the other kernels where there is one vote."""
    from papers.zero_tprune import kernels

    q, k, _ = torch.randn(256, tokens, 3, 6, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    blocks = (
        ((64, 4), (64, 8), (64, 16), (128, 8), (128, 16)) if iterations > 1 else ((64, 4), (32, 4), (32, 2), (16, 4))
    )
    ways = [
        (rows, warps, stages, held) for rows, warps in blocks for stages in ((1,) if iterations > 1 else (1, 3)) for held in (True, False)
        if held or iterations == 1
    ]  # fmt: skip
    calls: dict[object, Callable[[], object]] = {
        way: partial(kernels.votes, q, k, None, 0.125, 1, iterations, tuning=way) for way in ways
    }
    if iterations == 1:
        s = kernels.votes(q, k, None, 0.125, 1, 1)
        bounds = (0.01, 0.7)
        calls["select_top"] = partial(kernels.select_top, s, None, tokens - 30, tokens, 1, bounds, True)
        calls["select_unique"] = partial(kernels.select_unique, s, k, 10, 1, bounds, True, unimportant=True)
    return calls
