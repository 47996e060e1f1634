"""Timings on a CUDA device, written as one JSON file.

``python -m papers.moepp.gpu --out FILE.json [--only check,speedup,parts,peers,backends,cpu] [--budget-s 300]``; ``--smoke`` runs every line
at toy size on a CPU (with TRITON_INTERPRET=1). Routing is exact and synthetic, weights and tokens are random. "Expert time" is what the
paper times: FFN and zero-computation experts with sort, gather and combine, without the router; both arms run the same kernels, each
call a CUDA graph. Ratios are paired by round. Needs torch, triton, numpy and scipy; transformers for the peers.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.moepp import kernels, paths
from papers.moepp.bench import Bench, graphed, relative
from papers.moepp.layer import MoEPlusPlus
from papers.moepp.peers import cpu, peers
from papers.moepp.shape import SHAPES, TAUS, Shape
from papers.moepp.synthetic import exact_routing

SECTIONS = ("check", "speedup", "parts", "peers", "backends", "cpu")
TOKENS = (256, 1024, 4096, 16_384, 65_536, 131_072)


@dataclass(frozen=True)
class Weights:
    """Random weights of one layer; the vanilla layer of the same size has the FFN experts alone."""

    w_in: Tensor
    w_out: Tensor
    w_const: Tensor | None
    v_const: Tensor | None


def weights(shape: Shape, bench: Bench) -> Weights:
    """Weights of a layer of this shape."""
    torch.manual_seed(0)
    d, h, e, constants = shape.d_model, shape.d_expert, shape.experts.ffn, shape.experts.constant
    if bench.smoke:
        d = h = 32
    make = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    pair = (make(constants, 2, d) / d**0.5, make(constants, d)) if constants else (None, None)
    return Weights(make(e, 2 * h, d) / d**0.5, make(e, d, h) / h**0.5, *pair)


def expert_call(
    shape: Shape,
    tau: float | None,
    tokens: int,
    bench: Bench,
    how: kernels.Plan | None = None,
    held: Weights | None = None,
) -> Callable[[], Tensor]:
    """The experts of one layer on ``tokens`` random tokens with exact routing; ``tau`` None is the vanilla layer."""
    s = shape.vanilla() if tau is None else shape
    held = held or weights(shape, bench)
    torch.manual_seed(1)
    x = torch.randn(tokens, held.w_out.shape[1], device=bench.device, dtype=bench.dtype)
    ids = exact_routing(tokens, s.k, s.experts, 1.0 if tau is None else tau).int().to(bench.device)
    gates = torch.rand(tokens, s.k, device=bench.device)
    pair = (None, None) if tau is None else (held.w_const, held.v_const)
    share = 1.0 if tau is None else s.rho(tau)
    return partial(kernels.forward, x, ids, gates, held.w_in, held.w_out, *pair, s.experts.copy, share, how=how)


def speedup(
    bench: Bench,
    names: Sequence[str] = tuple(SHAPES),
    tokens: Sequence[int] = TOKENS,
    taus: Sequence[float | None] = TAUS,
) -> None:
    """Expert time of MoE++ at every tau against the vanilla layer, and against the bound 1/rho."""
    table: list[dict[str, Any]] = []
    bench.results["speedup"] = table
    for name in names:
        s = SHAPES[name]
        held = weights(s, bench)
        for count in sorted(tokens, reverse=True):
            if bench.late():
                return
            t = bench.tokens(count)
            calls: dict[str, Callable[[], object]] = {"vanilla": expert_call(s, None, t, bench, held=held)}
            calls |= {
                str(tau): expert_call(s, tau, t, bench, held=held) for tau in (taus if not bench.smoke else (0.25,))
            }
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


def parts(bench: Bench) -> None:
    """Where a layer's time goes: sort, the two products and the combine, each alone."""
    table: list[dict[str, Any]] = []
    bench.results["parts"] = table
    for name, tau in (("7B", None), ("7B", 0.1), ("1B", None), ("1B", 0.1)):
        if bench.late():
            return
        s, t = SHAPES[name], bench.tokens(65_536)
        held = weights(s, bench)
        x, ids, gates, w_in, w_out, w_const, v_const, copies, share = expert_call(s, tau, t, bench, held=held).args  # type: ignore[attr-defined]
        how = kernels.plan(t, s.k, s.experts.ffn, x.shape[1], w_out.shape[2], bench.dtype, share)
        place = kernels.sort_assignments(ids, s.experts.ffn, how.first.bm)
        hidden = kernels.gemm(x, w_in, place, how.first, gated=True)
        rows = kernels.gemm(hidden, w_out, place, how.second, gated=False)
        timings = bench.measure(
            {
                "sort": partial(kernels.sort_assignments, ids, s.experts.ffn, how.first.bm),
                "first product": partial(kernels.gemm, x, w_in, place, how.first, gated=True),
                "second product": partial(kernels.gemm, hidden, w_out, place, how.second, gated=False),
                "combine": partial(
                    kernels.combine, rows, place, ids, gates, x, s.experts.ffn, w_const, v_const, copies
                ),
            }
        )
        for part, timing in timings.by_name.items():
            table.append({"model": name, "tau": tau, "part": part, "median_s": timing.median_s, "q1_s": timing.q1_s, "q3_s": timing.q3_s,
                          "filled_rows": int((ids < s.experts.ffn).sum()), "tile_rows": int(place.tile_count) * how.first.bm})  # fmt: skip
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
        "parts": parts,
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
