"""Our vanilla layer, router included, against transformers' Mixtral block and bare matrix products, on a GPU and on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from papers.moepp.bench import Bench
from papers.moepp.layer import MoE
from shared.measure import measure

PEER_SHAPES = ((768, 2048, 8), (768, 2048, 16), (1536, 4096, 16))


def peers(bench: Bench) -> None:
    """The whole vanilla layer, router included and launched eagerly, against transformers' Mixtral block and bare dense products."""
    table: list[dict[str, Any]] = []
    bench.results["peers"] = table
    for tokens in (32_768, 4096):
        for d, h, e in PEER_SHAPES:
            if bench.late():
                return
            t = bench.tokens(tokens)
            width, inner = (32, 32) if bench.smoke else (d, h)
            x = torch.randn(1, t, width, device=bench.device, dtype=bench.dtype)
            calls, differences = peer_calls(x, width, inner, e, bench.device, bench.dtype)
            calls["dense products"] = dense_call(x.expand(2, -1, -1).reshape(2 * t, width), inner)
            timings = bench.measure(calls, graph=False)
            for name, timing in timings.by_name.items():
                ratio = timings.ratio(name, "ours")
                table.append(
                    {"d": d, "h": h, "experts": e, "tokens": tokens, "name": name, "median_s": timing.median_s, "q1_s": timing.q1_s,
                     "q3_s": timing.q3_s, "over_ours": [ratio.median, ratio.low, ratio.high], "difference": differences.get(name)}
                )  # fmt: skip
            bench.save()


def dense_call(rows: Tensor, inner: int) -> Callable[[], object]:
    """The two products of a layer as dense ones: what no grouping can beat by much."""
    w1, w2 = rows.new_empty(rows.shape[1], 2 * inner).normal_(), rows.new_empty(inner, rows.shape[1]).normal_()
    hidden = rows.new_empty(rows.shape[0], inner).normal_()

    def run() -> object:
        return rows @ w1, hidden @ w2

    return run


def peer_calls(
    x: Tensor, d: int, h: int, e: int, device: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Our vanilla layer and transformers' Mixtral block on the same weights, and how far their outputs differ (relative norm)."""
    torch.manual_seed(0)
    ours = MoE(d, h, e, gating="mixtral").to(device, dtype)
    ours.router.weight.data = ours.router.weight.data.float()
    calls: dict[str, Callable[[], object]] = {"ours": lambda: ours(x).y}
    differences: dict[str, float] = {}
    try:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return calls, differences
    want = ours(x).y.float()
    for way in ("eager", "grouped_mm"):  # the block's own loop, and torch's grouped product
        config = MixtralConfig(hidden_size=d, intermediate_size=h, num_local_experts=e, num_experts_per_tok=2)
        config._experts_implementation = way
        block = MixtralSparseMoeBlock(config).to(device, dtype).eval()
        with torch.no_grad():
            block.experts.gate_up_proj.copy_(ours.w_in)
            block.experts.down_proj.copy_(ours.w_out)
            block.gate.weight.copy_(ours.router.weight)
        calls[f"transformers {way}"] = partial(block, x)
        got = block(x)
        got = (got[0] if isinstance(got, tuple) else got).float().view_as(want)
        differences[f"transformers {way}"] = float((got - want).norm() / want.norm())
    return calls, differences


def products_call(rows: int, d: int, h: int, e: int) -> Callable[[], object]:
    """The two products of every expert on evenly shared rows, into memory that is there: the floor of any implementation."""
    n = max(1, rows // e)
    x, both, inner, out = (torch.randn(n, width) for width in (d, 2 * h, h, d))
    w1, w2 = torch.randn(e, d, 2 * h).unbind(), torch.randn(e, h, d).unbind()

    def run() -> object:
        for a, b in zip(w1, w2, strict=True):
            torch.mm(x, a, out=both)
            torch.mm(inner, b, out=out)
        return out

    return run


def cpu(bench: Bench) -> None:
    """One CPU thread, fp32: the whole vanilla layer against transformers' block, and the share of the bare products of its experts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    table: list[dict[str, Any]] = []
    bench.results["cpu"] = table
    for d, h, e, tokens in ((64, 128, 16, 2048), (64, 128, 16, 256), (256, 512, 16, 1024)):
        x = torch.randn(1, bench.tokens(tokens), d)
        calls, differences = peer_calls(x, d, h, e, "cpu", torch.float32)
        calls["products alone"] = products_call(bench.tokens(tokens) * 2, d, h, e)
        timings = measure(calls, rounds=15, min_round_s=0.0 if bench.smoke else 0.05, warmup=2)
        for name, timing in timings.by_name.items():
            ratio = timings.ratio(name, "ours")
            table.append({"d": d, "h": h, "experts": e, "tokens": tokens, "name": name, "median_s": timing.median_s, "cpu": timings.device,
                          "over_ours": [ratio.median, ratio.low, ratio.high], "difference": differences.get(name)})  # fmt: skip
    torch.set_num_threads(before)
    bench.save()
