"""Throughput, stage overhead and memory on a CUDA device, written as one JSON file.

``python -m papers.zero_tprune.gpu --out FILE.json [--only check,throughput,stages,memory,compiled] [--budget-s 400]``; on a machine
without CUDA, ``--smoke`` runs every line on a tiny model. Random weights: shapes and counts decide the time, not values. Every row of a
table is timed in alternation with the others of its table; ratios are paired by round. Needs torch, timm and triton only.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from papers.zero_tprune import counts
from papers.zero_tprune.importance import start_vector
from papers.zero_tprune.plans import ATS, Plan, Rule, Schedule, family
from papers.zero_tprune.pruner import Pruner, prune
from papers.zero_tprune.shape import Shape, shape_of
from papers.zero_tprune.solve import solve, solve_tome
from shared.measure import Ratio, Timings, measure, peak_allocated_bytes

BUDGETS = {"a": 2.97 / 4.55, "b": 2.50 / 4.55}  # Zero-TP-a and -b: shares of the blocks' FLOPs
SECTIONS = ("check", "throughput", "stages", "memory", "compiled")
BATCHES = {
    "deit_small_patch16_224": (1, 16, 64, 128, 256, 1024),
    "deit_tiny_patch16_224": (1, 16, 64, 256, 1024),
    "deit_base_patch16_224": (1, 64, 256, 1024),
}
PRECISIONS = ("fp32", "tf32", "bf16")
SLOW = {("deit_base_patch16_224", "fp32", 1024)}  # seconds per call, and no different from batch 256


class Bench:
    """One run: device, time limit, results so far."""

    def __init__(self, out: Path, budget_s: float, smoke: bool, unpruned: bool = False) -> None:
        self.device = "cpu" if smoke else "cuda"
        self.smoke, self.out, self.unpruned = smoke, out, unpruned
        self.end = time.monotonic() + budget_s
        self.results: dict[str, Any] = {"environment": environment(self.device)}

    def late(self) -> bool:
        """Whether the time limit has passed: what is left is left out, and said so."""
        return time.monotonic() > self.end

    def plans(self, found: dict[str, Plan]) -> dict[str, Plan]:
        """The plans as they are, or all of them unpruned."""
        return {key: Schedule(()) for key in found} if self.unpruned else found

    def model(self, name: str, precision: str) -> tuple[nn.Module, Shape]:
        import timm

        torch.manual_seed(0)
        model = timm.create_model("test_vit" if self.smoke else name).eval().to(self.device)
        shape = shape_of(model, name)
        return model.to(torch.bfloat16) if precision == "bf16" else model, shape

    def images(self, model: Any, batch: int) -> Tensor:
        size = model.patch_embed.img_size
        dtype = next(model.parameters()).dtype
        return torch.randn(2 if self.smoke else batch, 3, *size, device=self.device, dtype=dtype)

    def measure(self, functions: Mapping[str, Callable[[], object]], warmup: int = 2) -> Timings:
        return measure(functions, device=self.device, rounds=6, min_round_s=0.0 if self.smoke else 0.03, warmup=warmup)

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")


def environment(device: str) -> dict[str, Any]:
    """Machine and versions behind the numbers."""
    import timm

    gpu = (
        {"gpu": torch.cuda.get_device_name(), "driver_cuda": torch.version.cuda}
        if device == "cuda"
        else {"gpu": "none"}
    )
    triton = sys.modules.get("triton")
    return {
        **gpu, "torch": torch.__version__, "timm": timm.__version__, "triton": getattr(triton, "__version__", "none"),
        "python": platform.python_version(),
    }  # fmt: skip


@contextmanager
def float32_mode(precision: str) -> Iterator[None]:
    """TF32 products for ``tf32``, none for ``fp32``."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def plans_for(shape: Shape, share: float) -> dict[str, Plan]:
    """All methods at one share of the unpruned blocks' FLOPs; the three that rank only reuse Zero-TPrune's token counts."""
    schedule = solve(shape, share)
    return {
        "unpruned": Schedule(()),
        "ceiling": schedule.with_rule(method="truncate"),
        "random": schedule.with_rule(method="random"),
        "topk": schedule.with_rule(method="cls"),
        "zero_tprune": schedule,
        "tome": solve_tome(shape, share),
        "ats": ats_for(shape, share),
    }


def ats_for(shape: Shape, share: float) -> ATS:
    """ATS with the number of samples whose upper bound of FLOPs comes closest to the share."""
    target = share * counts.flops(shape).total("blocks")
    first = max(1, round(shape.depth / 3))

    def miss(samples: int) -> float:
        bound = ATS(samples, first).most_patches(shape.depth, shape.patches)
        return abs(counts.flops_of_counts(shape, bound, inside=True).total("blocks") - target)

    return ATS(min(range(1, shape.patches), key=miss), first)


def caller(model: nn.Module, x: Tensor, pruner: Pruner, plan: Plan) -> Callable[[], object]:
    """A forward pass under ``plan``; setting it costs microseconds."""

    def call() -> object:
        if pruner.plan is not plan:
            pruner.plan = plan
        return model(x)

    return call


def rows_of(timings: Timings, batch: int, base: str, ceiling: str | None = None) -> dict[str, Any]:
    """Images per second, speed-up over ``base`` and share of the ceiling, with intervals."""
    rows = {}
    for name, timing in timings.by_name.items():
        row: dict[str, Any] = {"images_per_s": batch / timing.median_s}
        row |= {"median_s": timing.median_s, "q1_s": timing.q1_s, "q3_s": timing.q3_s}
        row["speedup"] = _triple(timings.ratio(base, name))
        if ceiling is not None and ceiling in timings.by_name:
            row["of_ceiling"] = _triple(timings.ratio(ceiling, name))
        rows[name] = row
    return rows


def _triple(ratio: Ratio) -> list[float]:
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


def throughput(bench: Bench) -> None:
    """Images per second of all methods at the paper's first budget, DeiT-S at its second, too; CUDA graphs at small batches."""
    table: list[dict[str, Any]] = []
    bench.results["throughput"] = table
    for name in BATCHES:
        for precision in PRECISIONS:
            with float32_mode(precision):
                model, shape = bench.model(name, precision)
                for batch in BATCHES[name]:
                    if bench.late():
                        bench.results["cut_short"] = True
                        return
                    if (name, precision, batch) not in SLOW:
                        _throughput_cell(bench, table, model, shape, name, precision, batch)
                        bench.save()


def _throughput_cell(
    bench: Bench, table: list[dict[str, Any]], model: nn.Module, shape: Shape, name: str, precision: str, batch: int
) -> None:
    x = bench.images(model, batch)
    budgets = BUDGETS if name == "deit_small_patch16_224" else {"a": BUDGETS["a"]}
    for budget, share in budgets.items():
        plans = bench.plans(plans_for(shape, share))
        if budget == "b":
            plans = {key: plans[key] for key in ("unpruned", "ceiling", "zero_tprune", "tome")}
        with prune(model, Schedule(())) as pruner:
            timings = bench.measure({key: caller(model, x, pruner, plan) for key, plan in plans.items()})
            head = {"model": name, "precision": precision, "batch": batch, "budget": budget}
            flops = {k: counts.flops(shape, p).total("blocks") for k, p in plans.items() if not isinstance(p, ATS)}
            table.append(
                {
                    **head,
                    "mode": "eager",
                    "rows": rows_of(timings, x.shape[0], "unpruned", "ceiling"),
                    "flops_blocks": flops,
                }
            )
            if not bench.smoke:  # without launch costs, which decide small batches
                replays = {
                    key: graphed(caller(model, x, pruner, plan))
                    for key, plan in plans.items()
                    if key not in ("ats", "random")
                }
                timings = bench.measure(replays)
                table.append(
                    {
                        **head,
                        "mode": "graph",
                        "rows": rows_of(timings, batch, "unpruned", "ceiling"),
                        "flops_blocks": flops,
                    }
                )


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` as a CUDA graph: no launch cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def stages(bench: Bench) -> None:
    """The stages one by one at fixed 3.08 GFLOPs, DeiT-S (the paper's ablation): random, WPR, EIR, VHF, then with the S-stage."""
    table: list[dict[str, Any]] = []
    bench.results["stages"] = table
    for precision, batches in (("fp32", (128, 256)), ("bf16", (256,))):
        for batch in batches:
            if bench.late():
                bench.results["cut_short"] = True
                return
            with float32_mode(precision):
                model, shape = bench.model("deit_small_patch16_224", precision)
                x = bench.images(model, batch)
                plans = bench.plans(stage_plans(shape, 3.08 / 4.55))
                with prune(model, Schedule(())) as pruner:
                    timings = bench.measure({key: caller(model, x, pruner, plan) for key, plan in plans.items()})
                table.append(
                    {
                        "precision": precision,
                        "batch": batch,
                        "rows": rows_of(timings, x.shape[0], "ceiling i", "ceiling i"),
                    }
                )


def stage_plans(shape: Shape, share: float) -> dict[str, Plan]:
    """The ablation's rows: I-stage alone at its own schedule of the same FLOPs, then the full method; each with its ceiling."""
    full, only_i = solve(shape, share), solve(shape, share, drop=0)
    return {
        "unpruned": Schedule(()),
        "ceiling i": only_i.with_rule(method="truncate"),
        "random": only_i.with_rule(method="random"),
        "wpr": only_i.with_rule(order="i", heads="mean", vhf=None),
        "wpr+eir": only_i.with_rule(order="i", vhf=None),
        "wpr+eir+vhf": only_i.with_rule(order="i"),
        "full": full,
        "ceiling full": full.with_rule(method="truncate"),
    }


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
                "speedup": _triple(timings.ratio("stored", "streamed")),
                "streamed_bytes": peak_allocated_bytes(calls["streamed"]), "stored_bytes": peak_allocated_bytes(calls["stored"]),
            })  # fmt: skip


def compiled(bench: Bench) -> None:
    """torch.compile of unpruned, ceiling and Zero-TPrune: DeiT-S, BF16, batch 256 and 1024."""
    table: list[dict[str, Any]] = []
    bench.results["compiled"] = table
    for batch in (256, 1024):
        if bench.late():
            bench.results["cut_short"] = True
            return
        torch._dynamo.reset()
        model, shape = bench.model("deit_small_patch16_224", "bf16")
        x = bench.images(model, batch)
        plans = {
            key: plan
            for key, plan in plans_for(shape, BUDGETS["a"]).items()
            if key in ("unpruned", "ceiling", "zero_tprune")
        }
        with prune(model, Schedule(())) as pruner:
            fast: Any = torch.compile(model, dynamic=False, backend="eager" if bench.smoke else "inductor")
            started = time.monotonic()
            timings = bench.measure({key: caller(fast, x, pruner, plan) for key, plan in plans.items()})
        table.append({"batch": batch, "precision": "bf16", "with_compilation_s": time.monotonic() - started,
                      "rows": rows_of(timings, x.shape[0], "unpruned", "ceiling")})  # fmt: skip
        bench.save()


def tune(bench: Bench) -> None:
    """Microseconds of each kernel on 256 images of DeiT-S; the fastest way of voting is used for the rest of this run.

    What it finds belongs into :data:`papers.zero_tprune.kernels.TUNED`.
    """
    from papers.zero_tprune import kernels

    table: list[dict[str, Any]] = []
    bench.results["tune"] = table
    bounds = (0.01, 0.7)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for tokens, iterations in ((197, 1), (187, 1), (119, 1), (197, 5), (177, 5)):
            q, k, _ = torch.randn(256, tokens, 3, 6, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
            ways = [(64, 8, 1), (128, 8, 1)] if iterations > 1 else [(64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 1)]
            calls: dict[str, Callable[[], object]] = {
                str(way): partial(kernels.votes, q, k, None, 0.125, 1, iterations, tuning=way) for way in ways
            }
            times = bench.measure({key: graphed(call) for key, call in calls.items()}).by_name
            best = min(ways, key=lambda way: times[str(way)].median_s)
            kernels.TUNED[-(-tokens // 64), iterations > 1, dtype.itemsize] = best
            if iterations == 1:
                x = torch.randn(256, tokens, 384, device="cuda", dtype=dtype)
                s = kernels.votes(q, k, None, 0.125, 1, 1)
                flat = kernels.select_top(s, None, tokens - 30, tokens, 1, bounds, True)[1].view(-1)
                others: dict[str, Callable[[], object]] = {
                    "select_top": partial(kernels.select_top, s, None, tokens - 30, tokens, 1, bounds, True),
                    "select_unique": partial(kernels.select_unique, s, k, 10, 1, bounds, True, unimportant=True),
                    "gather": partial(x.view(-1, 384).index_select, 0, flat),
                }
                times = {**times, **bench.measure({key: graphed(call) for key, call in others.items()}).by_name}
            for name, timing in times.items():
                table.append(
                    {
                        "precision": precision,
                        "tokens": tokens,
                        "votes": iterations,
                        "way": name,
                        "us": 1e6 * timing.median_s,
                    }
                )


def main(arguments: list[str] | None = None) -> None:
    """The entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=400.0)
    parser.add_argument("--unpruned", action="store_true", help="the control: every schedule removes nothing")
    parser.add_argument("--smoke", action="store_true", help="every line on a tiny model, on the CPU")
    options = parser.parse_args(arguments)
    bench = Bench(options.out, options.budget_s, options.smoke, options.unpruned)
    sections = {
        "check": check,
        "throughput": throughput,
        "stages": stages,
        "memory": memory,
        "compiled": compiled,
        "tune": tune,
    }
    for name in options.only.split(","):
        started = time.monotonic()
        with torch.inference_mode():
            sections[name](bench)
        bench.results.setdefault("seconds", {})[name] = time.monotonic() - started
        bench.save()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
