"""Timings on a CUDA device, written as one JSON file.

``python -m papers.moepp.gpu --out FILE.json [--only check,speedup,peers,backends,cpu] [--budget-s 300]``; ``--smoke`` runs every line
at toy size on a CPU (with TRITON_INTERPRET=1). Routing is exact and synthetic, weights and tokens are random. "Expert time" is what the
paper times: FFN and zero-computation experts with sort, gather and combine, without the router; both arms run the same kernels, each
call a CUDA graph. Ratios are paired by round. Needs torch, triton, numpy and scipy; transformers for the peers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.moepp import kernels, paths
from papers.moepp.layer import MoE, MoEPlusPlus
from papers.moepp.shape import SHAPES, TAUS, Shape
from papers.moepp.synthetic import exact_routing
from shared.measure import Timings, measure

SECTIONS = ("check", "speedup", "peers", "backends", "cpu")
TOKENS = (256, 1024, 4096, 16_384, 65_536, 131_072)
PEER_SHAPES = ((768, 2048, 8), (768, 2048, 16), (1536, 4096, 16))


class Bench:
    """One run: device, time limit, results so far."""

    def __init__(self, out: Path, budget_s: float, smoke: bool) -> None:
        self.device, self.smoke, self.out = "cpu" if smoke else "cuda", smoke, out
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.end = time.monotonic() + budget_s
        self.results: dict[str, Any] = {"environment": environment(self.device)}

    def late(self) -> bool:
        """Whether the time limit has passed: what is left is left out."""
        return time.monotonic() > self.end

    def measure(
        self, functions: Mapping[str, Callable[[], object]], *, graph: bool = True, round_s: float = 0.025
    ) -> Timings:
        calls = {name: graphed(call) if graph and not self.smoke else call for name, call in functions.items()}
        return measure(
            calls,
            device=self.device,
            rounds=6,
            min_round_s=0.0 if self.smoke else round_s,
            warmup=1 if self.smoke else 2,
        )

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def tokens(self, count: int) -> int:
        return 16 if self.smoke else count


def environment(device: str) -> dict[str, Any]:
    """Machine and versions behind the numbers."""
    import triton

    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {"gpu": "none"}
    return {**gpu, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def expert_call(
    shape: Shape, tau: float | None, tokens: int, bench: Bench, how: kernels.Plan | None = None
) -> Callable[[], Tensor]:
    """The experts of one layer on ``tokens`` random tokens with exact routing; ``tau`` None is the vanilla layer."""
    s = shape.vanilla() if tau is None else shape
    torch.manual_seed(0)
    d, h, e = (32, 32, s.experts.ffn) if bench.smoke else (s.d_model, s.d_expert, s.experts.ffn)
    make = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    x, w_in, w_out = make(tokens, d), make(e, 2 * h, d) / d**0.5, make(e, d, h) / h**0.5
    constants = s.experts.constant
    pair = (make(constants, 2, d) / d**0.5, make(constants, d)) if constants else (None, None)
    ids = exact_routing(tokens, s.k, s.experts, 1.0 if tau is None else tau).int().to(bench.device)
    gates = torch.rand(tokens, s.k, device=bench.device)
    w_const, v_const = pair
    share = 1.0 if tau is None else s.rho(tau)
    return partial(kernels.forward, x, ids, gates, w_in, w_out, w_const, v_const, s.experts.copy, share, how=how)


def speedup(
    bench: Bench,
    names: Sequence[str] = tuple(SHAPES),
    tokens: Sequence[int] = TOKENS,
    taus: Sequence[float | None] = TAUS,
) -> None:
    """Expert time of MoE++ at every tau against the vanilla layer, and against the bound 1/rho."""
    table: list[dict[str, Any]] = []
    bench.results["speedup"] = table
    for count in sorted(tokens, reverse=True):
        for name in names:
            if bench.late():
                return
            s, t = SHAPES[name], bench.tokens(count)
            calls: dict[str, Callable[[], object]] = {"vanilla": expert_call(s, None, t, bench)}
            calls |= {str(tau): expert_call(s, tau, t, bench) for tau in (taus if not bench.smoke else (0.25,))}
            timings = bench.measure(calls)
            for key, timing in timings.by_name.items():
                tau = None if key in ("vanilla", "None") else float(key)
                rho = 1.0 if tau is None else s.rho(tau)
                ratio = timings.ratio("vanilla", key)
                flops = 6.0 * s.d_model * s.d_expert * s.k * count * rho
                table.append(
                    {"model": name, "tokens": count, "tau": tau, "rho": rho, "median_s": timing.median_s, "q1_s": timing.q1_s,
                     "q3_s": timing.q3_s, "flop_per_s": flops / timing.median_s, "speedup": [ratio.median, ratio.low, ratio.high],
                     "bound": 1 / rho, "of_bound": ratio.median * rho}
                )  # fmt: skip
            bench.save()


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


def backends(bench: Bench) -> None:
    """The two ways to run the products (our kernels, torch's grouped product), same sort and combine."""
    table: list[dict[str, Any]] = []
    bench.results["backends"] = table
    for name, tau in (("1B", None), ("1B", 0.25), ("7B", None), ("7B", 0.75)):
        for tokens in (65_536, 4096, 256):
            if bench.late():
                return
            s, t = SHAPES[name], bench.tokens(tokens)
            chosen = kernels.plan(t, s.k, s.experts.ffn, s.d_model, s.d_expert, bench.dtype)
            ways = {way: replace(chosen, backend=way) for way in ("fused", "grouped_mm")}
            timings = bench.measure({way: expert_call(s, tau, t, bench, how) for way, how in ways.items()})
            ratio = timings.ratio("grouped_mm", "fused")
            table.append({"model": name, "tau": tau, "tokens": tokens, "chosen": chosen.backend,
                          **{f"{way}_s": timing.median_s for way, timing in timings.by_name.items()},
                          "grouped_mm_over_fused": [ratio.median, ratio.low, ratio.high]})  # fmt: skip
            bench.save()


def cpu(bench: Bench) -> None:
    """One CPU thread, fp32: the whole vanilla layer against transformers' block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    table: list[dict[str, Any]] = []
    bench.results["cpu"] = table
    for d, h, e, tokens in ((64, 128, 16, 2048), (64, 128, 16, 256), (256, 512, 16, 1024)):
        x = torch.randn(1, bench.tokens(tokens), d)
        calls, differences = peer_calls(x, d, h, e, "cpu", torch.float32)
        timings = measure(calls, rounds=9, min_round_s=0.0 if bench.smoke else 0.05, warmup=2)
        for name, timing in timings.by_name.items():
            ratio = timings.ratio(name, "ours")
            table.append({"d": d, "h": h, "experts": e, "tokens": tokens, "name": name, "median_s": timing.median_s, "cpu": timings.device,
                          "over_ours": [ratio.median, ratio.low, ratio.high], "difference": differences.get(name)})  # fmt: skip
    torch.set_num_threads(before)
    bench.save()


def check(bench: Bench) -> None:
    """The fused path against the loop; twice the same bits; no synchronisation; a CUDA graph; torch.compile; gradients."""
    rows: list[dict[str, Any]] = []
    bench.results["check"] = rows
    sizes = ((40, 32, 48, 4),) if bench.smoke else ((4096, 768, 2048, 16), (1000, 256, 512, 5), (96, 1536, 512, 8))
    for tokens, d, h, e in sizes:
        for dtype in (torch.float32,) if bench.smoke else (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            layer = MoEPlusPlus(d, h, e, path="fused").to(bench.device, dtype)
            layer.router.weight.data = torch.randn_like(layer.router.weight, dtype=torch.float32) * d**-0.5
            x = torch.randn(tokens, d, device=bench.device, dtype=dtype)
            first = layer(x)
            layer.path = "loop"
            gates = torch.softmax(first.logits, -1).gather(-1, first.ids.long())
            want = layer.compute(x, first.ids.long(), gates)
            exact = x.double() @ layer.router.weight.double().t()
            layer.path = "fused"
            row: dict[str, Any] = {"tokens": tokens, "d": d, "dtype": str(dtype), "error": relative(first.y, want),
                                   "router_error": float((first.logits - exact).abs().max()),
                                   "same_bits": bool(torch.equal(first.y, layer(x).y))}  # fmt: skip
            if not bench.smoke:
                row |= _cuda_checks(layer, x, first.y, compiles=d == 768)
            rows.append(row)
            print(row, flush=True)
            bench.save()


def _cuda_checks(layer: MoEPlusPlus, x: Tensor, want: Tensor, *, compiles: bool) -> dict[str, Any]:
    torch.cuda.set_sync_debug_mode("error")
    layer(x)
    torch.cuda.set_sync_debug_mode("default")
    held: list[Tensor] = []
    replay = graphed(lambda: held.append(layer(x).y))
    replay()
    row: dict[str, Any] = {"without_sync": True, "graph_bits": bool(torch.equal(held[-1], want))}
    if compiles:
        row["compiled"] = relative(torch.compile(layer, fullgraph=True)(x).y, want)
    grads: list[list[Any]] = []
    constants: Any = layer.constants
    with torch.enable_grad():
        ways: tuple[paths.Path, ...] = ("fused", "sorted")
        for path in ways:
            layer.path = path
            layer.zero_grad()
            value = x.clone().requires_grad_()
            layer(value).y.float().square().sum().backward()
            grads.append(
                [value.grad, layer.w_in.grad, layer.w_out.grad, layer.router.weight.grad, constants.weight.grad]
            )
    layer.path = "fused"
    row["gradients"] = max(relative(a, b) for a, b in zip(*grads, strict=True))
    layer.zero_grad(set_to_none=True)
    return row


def relative(a: Tensor, b: Tensor) -> float:
    """Relative distance in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def main(arguments: list[str] | None = None) -> None:
    """The entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--budget-s", type=float, default=300.0)
    parser.add_argument("--smoke", action="store_true", help="every line at toy size, on the CPU")
    options = parser.parse_args(arguments)
    bench = Bench(options.out, options.budget_s, options.smoke)
    some = partial(speedup, names=options.models.split(","), tokens=[int(t) for t in options.tokens.split(",")])
    sections: dict[str, Callable[[Bench], None]] = {
        "check": check,
        "speedup": some,
        "peers": peers,
        "backends": backends,
        "cpu": cpu,
    }
    for name in options.only.split(","):
        started = time.monotonic()
        try:
            with torch.no_grad():
                sections[name](bench)
        except Exception:  # one section's failure is recorded, the others still run
            bench.results.setdefault("errors", {})[name] = traceback.format_exc()
            print(bench.results["errors"][name], flush=True)
        bench.results.setdefault("seconds", {})[name] = time.monotonic() - started
        bench.save()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
