"""Throughput, stage overhead and memory on a CUDA device, written as one JSON file.

``python -m papers.zero_tprune.gpu --out FILE.json [--only check,throughput,stages,memory,compiled] [--budget-s 400]``; on a machine
without CUDA, ``--smoke`` runs every line on a tiny model. An existing FILE of the same machine is continued. Random weights: shapes and
counts decide the time, not values. Every row of a table is timed in alternation with the others of its table; ratios are paired by
round. Needs torch, timm and triton only.
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
from papers.zero_tprune.budget import solve, solve_tome
from papers.zero_tprune.gpu_kernels import check, graphed, memory, triple, tune
from papers.zero_tprune.plans import ATS, Plan, Schedule
from papers.zero_tprune.pruner import Pruner, prune
from papers.zero_tprune.shape import Shape, shape_of
from shared.measure import Timings, measure

BUDGETS = {"a": 2.97 / 4.55, "b": 2.50 / 4.55}  # Zero-TP-a and -b: shares of the blocks' FLOPs
SECTIONS = ("check", "throughput", "stages", "memory", "compiled")
SMALL, TINY, BASE = (f"deit_{size}_patch16_224" for size in ("small", "tiny", "base"))
CELLS = (  # what matters most first: a time limit may end the list anywhere
    (SMALL, "bf16", (256, 1024)), (SMALL, "fp32", (128, 256)), (SMALL, "tf32", (256,)),
    (BASE, "bf16", (256, 1024)), (BASE, "fp32", (64, 256)), (BASE, "tf32", (256, 1024)),
    (TINY, "bf16", (256, 1024)), (TINY, "fp32", (256, 1024)), (TINY, "tf32", (256, 1024)),
    (SMALL, "fp32", (1024, 1, 16, 64)), (SMALL, "tf32", (1024, 1, 16, 64, 128)), (SMALL, "bf16", (1, 16, 64, 128)),
    (TINY, "bf16", (1, 16, 64)), (TINY, "fp32", (1, 16, 64)), (TINY, "tf32", (1, 16, 64)),
    (BASE, "bf16", (1, 64)), (BASE, "tf32", (1, 64)), (BASE, "fp32", (1,)),
)  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16")
GRAPH_BELOW_S = 0.05  # a longer pass does not notice its launches


class Bench:
    """One run: device, time limit, results so far."""

    def __init__(self, out: Path, budget_s: float, smoke: bool, unpruned: bool = False) -> None:
        self.device = "cpu" if smoke else "cuda"
        self.smoke, self.out, self.unpruned = smoke, out, unpruned
        self.end = time.monotonic() + budget_s
        self.results: dict[str, Any] = {"environment": environment(self.device)}
        before = json.loads(out.read_text()) if out.exists() else {}
        if before.get("environment") == self.results["environment"]:  # go on where a run on this machine ended
            self.results = before

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

    def measure(self, functions: Mapping[str, Callable[[], object]], min_round_s: float = 0.03) -> Timings:
        return measure(
            functions, device=self.device, rounds=6, min_round_s=0.0 if self.smoke else min_round_s, warmup=2
        )

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
        row["speedup"] = triple(timings.ratio(base, name))
        if ceiling is not None and ceiling in timings.by_name:
            row["of_ceiling"] = triple(timings.ratio(ceiling, name))
        rows[name] = row
    return rows


def throughput(bench: Bench, models: str = "", precisions: str = "", batches: str = "") -> None:
    """Images per second of all methods at the paper's first budget, DeiT-S at its second, too; CUDA graphs where a pass is short.

    ``models``, ``precisions``, ``batches``: comma-separated; only these (all where empty).
    """
    table: list[dict[str, Any]] = bench.results.setdefault("throughput", [])
    bench.results.pop("cut_short", None)
    done = {(cell["model"], cell["precision"], cell["batch"]) for cell in table}
    for name, precision, sizes in CELLS:
        todo = [batch for batch in sizes if (name, precision, batch) not in done and _wanted(str(batch), batches)]
        if not todo or not _wanted(name, models) or not _wanted(precision, precisions):
            continue
        with float32_mode(precision):
            model, shape = bench.model(name, precision)
            for batch in todo:
                if bench.late():
                    bench.results["cut_short"] = True
                    return
                _throughput_cell(bench, table, model, shape, name, precision, batch)
                bench.save()


def _wanted(name: str, choice: str) -> bool:
    return not choice or name in choice.split(",")


def _throughput_cell(
    bench: Bench, table: list[dict[str, Any]], model: nn.Module, shape: Shape, name: str, precision: str, batch: int
) -> None:
    x = bench.images(model, batch)
    budgets = BUDGETS if name == SMALL else {"a": BUDGETS["a"]}
    for budget, share in budgets.items():
        plans = bench.plans(plans_for(shape, share))
        if budget == "b":
            plans = {key: plans[key] for key in ("unpruned", "ceiling", "zero_tprune", "tome")}
        flops = {k: counts.flops(shape, p).total("blocks") for k, p in plans.items() if not isinstance(p, ATS)}
        head = {"model": name, "precision": precision, "batch": batch, "budget": budget, "flops_blocks": flops}
        with prune(model, Schedule(())) as pruner:
            calls = {key: caller(model, x, pruner, plan) for key, plan in plans.items()}
            timings = bench.measure(calls)
            table.append({**head, "mode": "eager", "rows": rows_of(timings, x.shape[0], "unpruned", "ceiling")})
            if not bench.smoke and timings.by_name["unpruned"].median_s < GRAPH_BELOW_S:
                replays = {key: graphed(call) for key, call in calls.items() if key not in ("ats", "random")}
                timings = bench.measure(replays)
                table.append({**head, "mode": "graph", "rows": rows_of(timings, batch, "unpruned", "ceiling")})


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


def compiled(bench: Bench, batches: str = "") -> None:
    """torch.compile of unpruned, ceiling and Zero-TPrune: DeiT-S, BF16, batch 256 and 1024; what it computes against eager."""
    table: list[dict[str, Any]] = bench.results.setdefault("compiled", [])
    done = {row["batch"] for row in table}
    for batch in (256, 1024):
        if batch in done or not _wanted(str(batch), batches):
            continue
        if bench.late():
            bench.results["cut_short"] = True
            return
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, shape = bench.model(SMALL, "bf16")
        x = bench.images(model, batch)
        found = plans_for(shape, BUDGETS["a"])
        plans = bench.plans({key: found[key] for key in ("unpruned", "ceiling", "zero_tprune")})
        with prune(model, Schedule(())) as pruner:
            fast: Any = torch.compile(model, dynamic=False, backend="eager" if bench.smoke else "inductor")
            started = time.monotonic()
            calls = {key: caller(fast, x, pruner, plan) for key, plan in plans.items()}
            outputs = {key: call() for key, call in calls.items()}
            seconds = time.monotonic() - started
            apart = {}
            for key, plan in plans.items():
                pruner.plan = plan
                want, got = model(x).float(), outputs[key].float()  # type: ignore[attr-defined]
                apart[key] = float((got - want).norm() / want.norm())
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            timings = bench.measure(calls)
        table.append({"batch": batch, "precision": "bf16", "compilation_s": seconds, "graph_breaks": breaks, "error_rel": apart,
                      "rows": rows_of(timings, x.shape[0], "unpruned", "ceiling")})  # fmt: skip
        bench.save()


def main(arguments: list[str] | None = None) -> None:
    """The entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=400.0)
    parser.add_argument("--models", default="", help="throughput: only these timm names, comma-separated")
    parser.add_argument("--precisions", default="", help="throughput: only these of fp32,tf32,bf16")
    parser.add_argument("--batches", default="", help="throughput and compiled: only these batch sizes")
    parser.add_argument("--unpruned", action="store_true", help="the control: every schedule removes nothing")
    parser.add_argument("--smoke", action="store_true", help="every line on a tiny model, on the CPU")
    options = parser.parse_args(arguments)
    bench = Bench(options.out, options.budget_s, options.smoke, options.unpruned)
    sections: dict[str, Callable[[Bench], None]] = {
        "check": check,
        "throughput": partial(
            throughput, models=options.models, precisions=options.precisions, batches=options.batches
        ),
        "stages": stages,
        "memory": memory,
        "compiled": partial(compiled, batches=options.batches),
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
