"""Timings: both full-size networks and the hash encode on this CPU, and everything on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, Result, Table, experiment

ROUNDS = 7


@experiment(claims=["cpu_render_speedup"], config=["speed"])
def cpu_rendering(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Rays per second of full-size Switch-NeRF (foreground only) and config A, float32, random weights, camera rays, in alternation."""
    import torch

    from papers.switchnerf.speed import cpu_renderers
    from shared.measure import measure

    s = cfg.speed
    calls = cpu_renderers(s.switch_rays, s.hmohe_rays)
    with torch.no_grad():
        timings = measure(calls, rounds=ROUNDS, min_round_s=0.0, warmup=1)
    scale = s.hmohe_rays / s.switch_rays
    ratio = timings.ratio("switch", "switch" if s.method == "switch" else "hmohe")
    scale = 1.0 if s.method == "switch" else scale
    yield Measurement(
        "cpu_render_speedup", scale * ratio.median, scale * ratio.low, scale * ratio.high,
        note=f"{timings.device}, {ctx.threads} thread(s), float32, without Switch-NeRF's background",
    )  # fmt: skip
    rays = {"switch": s.switch_rays, "hmohe": s.hmohe_rays}
    rows = [{"network": n, "rays_per_s": rays[n] / t.median_s} for n, t in timings.by_name.items()]
    yield Table("cpu_rendering", f"Full-size networks on {timings.device}", rows)


@experiment(claims=["cpu_encode_speedup"], config=["speed"])
def cpu_encode(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Hash encode, forward and backward, compiled loops against vectorised torch; config S's grids, on two threads."""
    from papers.switchnerf.speed import encode_calls
    from shared.measure import measure

    calls, restore = encode_calls(cfg.speed.encode_points)
    try:
        timings = measure(calls, rounds=ROUNDS, min_round_s=0.0, warmup=1)
    finally:
        restore()
    ratio = timings.ratio("reference", cfg.speed.encode)
    note = f"{timings.device}, two threads, {cfg.speed.encode_points} points, 4 experts of 4 levels"
    yield Measurement("cpu_encode_speedup", ratio.median, ratio.low, ratio.high, note=note)
    rows = [
        {"form": n, "ns_per_corner": 1e9 * t.median_s / (cfg.speed.encode_points * 32)}
        for n, t in timings.by_name.items()
    ]
    yield Table("cpu_encode", f"Hash encode, forward and backward, on {timings.device}", rows)


@experiment(
    claims=["gpu_train_speedup", "gpu_render_speedup", "gpu_encode_forward", "gpu_encode_both"],
    config=["gpu"],
    gpu=True,
)
def gpu_speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The claims' part of :mod:`papers.switchnerf.gpu`, at full size."""
    import tempfile
    from pathlib import Path

    from papers.switchnerf.gpu import encode, render, train
    from papers.switchnerf.gpu_bench import Bench, gpu_settings

    with tempfile.TemporaryDirectory() as folder, gpu_settings():
        bench = Bench(Path(folder) / "speed.json", smoke=False, claims_only=True)
        for run in (encode, render, train):
            run(bench)
    result, name = bench.results, bench.results["environment"]["gpu"]
    yield from measurements(result, cfg.gpu.method, cfg.gpu.encode)
    for section in ("render", "train"):
        rows = [{"network": n, "rays_per_s": v} for n, v in result[section]["rays_per_s"].items()]
        yield Table(f"gpu_{section}", f"Rays per second on {name}: {section}", rows)


def measurements(result: dict[str, Any], method: str, form: str) -> Iterator[Result]:
    """The claims' numbers from the file of :mod:`papers.switchnerf.gpu`: each network in its fastest form, background on no ray."""
    name = result["environment"]["gpu"]
    for claim, section in (("gpu_train_speedup", "train"), ("gpu_render_speedup", "render")):
        base, ours = (fastest(result[section], network) for network in ("switch", "hmohe"))
        value = result[section]["speedups"][f"{base if method == 'switch' else ours}/{base}"]
        lost = ", ".join(entry for entry in result.get("failed", {}) if entry.startswith(section))
        note = f"{name}, bfloat16, random weights, '{ours}' against '{base}' without background"
        yield Measurement(claim, value[0], value[1], value[2], note=note + (f"; failed: {lost}" if lost else ""))
    rows = {row["what"]: row for row in result["encode"] if row["order"] == "camera rays"}
    for claim, what in (("gpu_encode_forward", "forward"), ("gpu_encode_both", "forward and backward")):
        value = rows[what]["speedup_of_ours"]["reference"] if form == "ours" else [1.0, 1.0, 1.0]
        yield Measurement(claim, value[0], value[1], value[2], note=name)


FORMS = ("", " compiled", " captured")


def fastest(section: dict[str, Any], network: str) -> str:
    """The fastest form of a network, the same work in each: a speed-up over a slow baseline is none."""
    speeds = {form: section["rays_per_s"].get(network + form, 0.0) for form in FORMS}
    return network + max(FORMS, key=lambda form: speeds[form])
