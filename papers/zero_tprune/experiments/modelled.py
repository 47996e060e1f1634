"""The device model: throughput gains and overhead on the paper's A100, the model's own error on an H100, and a sweep of devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

if TYPE_CHECKING:
    from papers.zero_tprune.hardware import Assumed

MEASURED = "measured/h100_sxm5_80gb.json"
MEASURED_DEVICE = "h100_sxm5_80gb"
DTYPES = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}


@experiment(claims=["throughput_gain_a", "throughput_gain_b", "overhead", "tome_faster"], config=["hardware", "device"])
def device_model(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Ratios of modelled latencies. Nothing is fitted to the paper; the model's error comes from our own H100 measurements."""
    from papers.zero_tprune.experiments.options import assumed_of
    from papers.zero_tprune.hardware import latency_function
    from papers.zero_tprune.shape import DEIT_S
    from shared.hardware import load_device

    h, assumed = cfg.hardware, assumed_of(cfg.hardware)
    seconds = latency_function(DEIT_S, load_device(cfg.device), h.batch, h.dtype, assumed, h.scoring)
    plans, error = _plans(ctx, h.prunes), _error(assumed)
    for claim, key in (("throughput_gain_a", "a"), ("throughput_gain_b", "b")):
        note = f"{h.dtype}, batch {h.batch}, scores {h.scoring}"
        yield Measurement(claim, seconds(None) / seconds(plans[key]), model_error_rel=error, note=note)
    full = plans["ablation"] if h.stages else plans["ablation"].with_rule(method="random")
    bare = seconds(plans["ablation"].with_rule(method="random"))
    yield Measurement("overhead", 100 * (seconds(full) / bare - 1), model_error_rel=error)
    ratio = seconds(plans["a"]) / seconds(plans["tome"])
    low, high = (ratio * (1 - error), ratio * (1 + error)) if h.prunes else (ratio, ratio)
    yield Measurement("tome_faster", ratio, low, high, note="interval: the model's error on the H100")


@experiment(claims=["bf16_gain_is_smaller"], config=["hardware", "device"])
def device_tables(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Where the time goes, how good the model is, what was measured, and where pruning stops paying."""
    from papers.zero_tprune.experiments.options import assumed_of
    from papers.zero_tprune.hardware import breakdown, latency, latency_function
    from papers.zero_tprune.shape import DEIT_S
    from shared.hardware import load_device

    h, assumed, device = cfg.hardware, assumed_of(cfg.hardware), load_device(cfg.device)
    plan = _plans(ctx, h.prunes)["a"]
    gain = {}
    for dtype in ("float32", "bfloat16"):
        seconds = latency_function(DEIT_S, device, h.batch, dtype, assumed, h.scoring)
        gain[dtype] = seconds(None) / seconds(plan)
    note = f"gain {gain['float32']:.3f} in FP32, {gain['bfloat16']:.3f} in BF16"
    ratio, error = gain["float32"] / gain["bfloat16"], _error(assumed, "bf16", ("zero_tprune",))
    yield Measurement("bf16_gain_is_smaller", ratio, model_error_rel=error, note=note)
    parts = []
    for name, chosen in (("unpruned", None), ("Zero-TP-a", plan)):
        cost = latency(DEIT_S, chosen, device, h.batch, h.dtype, assumed, h.scoring)
        parts += [
            {"plan": name, "operation": part, "us_per_image": us} for part, us in breakdown(cost, h.batch).items()
        ]
    plot = Plot("stacked", "plan", "us_per_image", "operation", ylabel="µs")
    yield Table("breakdown", f"Modelled time per image on {device.title}", parts, plot)
    title = "Speed-ups: the device model against our H100 measurements (scores streamed)"
    yield Table("validation", title, list(validation(assumed)), Plot("scatter", "measured", "modelled", "precision"))
    yield from measured_tables()
    yield from sweep(cfg, assumed)


def _plans(ctx: Context, prunes: bool) -> dict[str, Any]:
    """Zero-TP-a and -b, the ablation's schedule and ToMe at the paper's FLOPs; all empty for the control."""
    p = ctx.published
    return _solved(p["flops_a"], p["flops_b"], p["flops_ablation"], p["flops_tome"] / p["flops_baseline"], prunes)


@cache
def _solved(a: float, b: float, ablation: float, tome_share: float, prunes: bool) -> dict[str, Any]:
    from papers.zero_tprune.budget import solve, solve_tome
    from papers.zero_tprune.plans import Schedule
    from papers.zero_tprune.shape import DEIT_S

    if not prunes:
        return dict.fromkeys(("a", "b", "ablation", "tome"), Schedule(()))
    plans: dict[str, Any] = {
        key: solve(DEIT_S, flops * 1e9) for key, flops in (("a", a), ("b", b), ("ablation", ablation))
    }
    return {**plans, "tome": solve_tome(DEIT_S, tome_share)}


METHODS = ("ceiling", "zero_tprune", "tome")


@cache
def _error(assumed: Assumed, precision: str = "fp32", methods: tuple[str, ...] = METHODS) -> float:
    """Largest relative error of a modelled speed-up."""
    rows = [row for row in validation(assumed) if row["precision"] == precision and row["method"] in methods]
    return max(abs(row["modelled"] / row["measured"] - 1) for row in rows)


def validation(assumed: Assumed) -> Iterator[dict[str, Any]]:
    """Speed-ups of DeiT-S on the H100, measured and modelled with that device's own calibration.

    At batch 128 and more, 256 in BF16: below, an eager run waits for its host, which the model knows nothing of.
    """
    from papers.zero_tprune.gpu import plans_for
    from papers.zero_tprune.hardware import latency_function
    from papers.zero_tprune.shape import DEIT_S
    from shared.hardware import load_device

    device = load_device(MEASURED_DEVICE)
    shares = {"a": 2.97 / 4.55, "b": 2.50 / 4.55}
    for cell in _measured()["throughput"]:
        if (
            "small" not in cell["model"]
            or cell["precision"] == "tf32"
            or cell["batch"] < (256 if cell["precision"] == "bf16" else 128)
            or cell["mode"] != "eager"
        ):
            continue
        plans = plans_for(DEIT_S, shares[cell["budget"]])
        seconds = latency_function(DEIT_S, device, cell["batch"], DTYPES[cell["precision"]], assumed, "streamed")
        for method in METHODS:
            yield {
                "precision": cell["precision"], "batch": cell["batch"], "budget": cell["budget"], "method": method,
                "measured": cell["rows"][method]["speedup"][0], "modelled": float(seconds(None) / seconds(plans[method])),
            }  # fmt: skip


def measured_tables() -> Iterator[Table]:
    """The committed H100 measurements."""
    data = _measured()
    gpu = data["environment"]["gpu"]
    rows = [
        {"model": cell["model"].split("_")[1], "precision": cell["precision"], "batch": cell["batch"], "budget": cell["budget"],
         "mode": cell["mode"], "run": cell.get("run", 1), "method": method, "images_per_s": row["images_per_s"],
         "speedup": row["speedup"][0], "of_ceiling": row["of_ceiling"][0]}
        for cell in data["throughput"] for method, row in cell["rows"].items()
    ]  # fmt: skip
    title = f"Measured on {gpu} (committed): all methods at the FLOPs of Zero-TP-a and -b"
    yield Table("measured_throughput", title, rows)
    stages = [
        {"precision": cell["precision"], "batch": cell["batch"], "row": name, "images_per_s": row["images_per_s"],
         "of_random": row["images_per_s"] / cell["rows"]["random"]["images_per_s"]}
        for cell in data["stages"] for name, row in cell["rows"].items()
    ]  # fmt: skip
    plot = Plot("bar", "row", "of_random", "precision")
    yield Table("measured_stages", f"Measured on {gpu} (committed): stages at 3.08 GFLOPs", stages, plot)
    compiled = [
        {"precision": cell["precision"], "batch": cell["batch"], "plan": name, "images_per_s": row["images_per_s"],
         "speedup": row["speedup"][0], "of_ceiling": row["of_ceiling"][0]}
        for cell in data.get("compiled", ()) for name, row in cell["rows"].items()
    ]  # fmt: skip
    yield Table("measured_compiled", f"Measured on {gpu} (committed): torch.compile, DeiT-S at 2.97 GFLOPs", compiled)
    memory = [{key: value for key, value in row.items() if key != "speedup"} for row in data["memory"]]
    yield Table(
        "measured_memory",
        f"Measured on {gpu} (committed): five votes, streamed from Q and K or on a stored matrix",
        memory,
    )


def sweep(cfg: Any, assumed: Assumed) -> Iterator[Table]:
    """Speed-up of the Zero-TP-a schedule on other devices, types and batches, scores streamed; where it falls below 1, it does not pay."""
    from papers.zero_tprune.budget import solve
    from papers.zero_tprune.hardware import latency_function
    from papers.zero_tprune.shape import DEIT_S
    from shared.errors import UserError
    from shared.hardware import load_device

    plan = solve(DEIT_S, 2.97e9)
    rows, missing = [], []
    for name in cfg.hardware.sweep.devices:
        device = load_device(name)
        for dtype in cfg.hardware.sweep.dtypes:
            try:
                device.op_per_s(dtype)
            except UserError:
                missing.append(f"{name} has no {dtype} rate")
                continue
            for batch in cfg.hardware.sweep.batches:
                seconds = latency_function(DEIT_S, device, batch, dtype, assumed)
                speed = {"images_per_s": float(batch / seconds(None)), "speedup": float(seconds(None) / seconds(plan))}
                rows.append({"device": name, "dtype": dtype, "batch": batch, "series": f"{name} {dtype}", **speed})
    note = "Only devices with a published calibration use one; the others the assumed shares. " + "; ".join(missing)
    plot = Plot("line", "batch", "speedup", "series", log_x=True, hline=1.0)
    yield Table("sweep", "Where pruning pays: modelled speed-up at 2.97 GFLOPs", rows, plot, note)


def _measured() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(__file__).parents[1] / MEASURED).read_text())
    return result
