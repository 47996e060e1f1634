"""Claims with a clock: expert time of our kernels, peers, and two GPUs over NCCL. All need NVIDIA GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from papers.moepp.experiments.rows import MODELS, ROWS, TAUS, claims
from shared.experiment import Context, Measurement, NotTested, Plot, Result, Table, experiment


def _bench(folder: str) -> Any:
    from papers.moepp.bench import Bench

    return Bench(Path(folder) / "bench.json", 3600.0, smoke=False)


def _ratio(claim: str, ratio: Sequence[float], note: str = "") -> Measurement:
    """A median with its interval."""
    value, low, high = ratio
    return Measurement(claim, value, low, high, note=note)


OF_BOUND = {  # the worst of these rows is judged
    "of_bound_1b_large_tau": ("1B", (0.5, 0.75, 1.0)),
    "of_bound_1b_small_tau": ("1B", (0.1, 0.25)),
    "of_bound_7b": ("7B", tuple(TAUS.values())),
}


@experiment(claims=[*claims("speedup"), "speed_monotone", *OF_BOUND], config=["gpu"], gpu=True)
def gpu_speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Expert time of MoE++ over the vanilla layer's, exact routing, the same kernels, each a CUDA graph."""
    import torch

    from papers.moepp.gpu import speedup
    from papers.moepp.shape import SHAPES

    on = cfg.gpu.zero_computation
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bench = _bench(folder)
        speedup(bench, tuple(SHAPES) if on else ("1B",), (cfg.gpu.tokens,), tuple(TAUS.values()) if on else (None,))
    rows = bench.results["speedup"]
    gpu = bench.results["environment"]["gpu"]
    if not on:
        ratio = rows[1]["speedup"]
        for claim in (*claims("speedup"), "speed_monotone"):
            yield _ratio(claim, ratio)
        for claim, (name, taus) in OF_BOUND.items():
            yield Measurement(claim, 100 * ratio[0] * min(SHAPES[name].rho(tau) for tau in taus))
        return
    found = {(row["model"], row["tau"]): row for row in rows}
    for model, tau in ROWS:
        ratio = found[MODELS[model], TAUS[tau]]["speedup"]
        yield _ratio(f"speedup_{model}_{tau}", ratio, f"{gpu}, bf16, {cfg.gpu.tokens:,} tokens")
    steps = [
        found[name, slow]["median_s"] / found[name, fast]["median_s"]
        for name in SHAPES
        for fast, slow in zip(TAUS.values(), [*list(TAUS.values())[1:], None], strict=True)
    ]
    yield Measurement(
        "speed_monotone", min(steps), note=f"smallest of {len(steps)} steps, up to the vanilla layer; {gpu}"
    )
    for claim, (name, taus) in OF_BOUND.items():
        worst = min((found[name, tau] for tau in taus), key=lambda row: row["of_bound"])
        low, high = (100 * worst["rho"] * value for value in worst["speedup"][1:])
        note = f"{name}, tau {worst['tau']}; {gpu}, bf16, {cfg.gpu.tokens:,} tokens"
        yield Measurement(claim, 100 * worst["of_bound"], low, high, note=note)
    keys = ("model", "tau", "rho", "median_s", "bound", "of_bound")
    shown = [{key: row[key] for key in keys} | {"speedup": row["speedup"][0]} for row in rows]
    plot = Plot("scatter", "bound", "speedup", "model", xlabel="1/rho", ylabel="speed-up")
    yield Table("gpu_speed", f"Expert time measured on {gpu}", shown, plot)


@experiment(
    claims=["over_transformers_small", "over_transformers_large", "dense_share_small", "dense_share_large", "over_transformers_cpu"],
    config=["gpu"], gpu=True,
)  # fmt: skip
def gpu_peers(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Our vanilla layer, router included, against transformers' Mixtral block and against bare dense products."""
    import torch

    from papers.moepp.peers import cpu, peers

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bench = _bench(folder)
        peers(bench)
        cpu(bench)
    gpu = bench.results["environment"]["gpu"]
    found = {(row["d"], row["experts"], row["tokens"], row["name"]): row["over_ours"] for row in bench.results["peers"]}
    for size, (d, experts) in {"small": (768, 8), "large": (1536, 16)}.items():
        peer = "ours" if cfg.gpu.peer == "ours" else f"transformers {cfg.gpu.peer}"
        key = (d, experts, 32_768, peer)
        if key in found:
            yield _ratio(f"over_transformers_{size}", found[key], f"{gpu}, bf16")
        else:
            yield NotTested(f"over_transformers_{size}", "needs the package transformers")
        share = [100 * value for value in found[d, experts, 32_768, "dense products"]]
        yield _ratio(f"dense_share_{size}", share, f"{gpu}, bf16")
    threads = {(row["d"], row["tokens"], row["name"]): row for row in bench.results["cpu"]}
    row = threads.get((64, 2048, "ours" if cfg.gpu.peer == "ours" else "transformers eager"))
    if row is None:
        yield NotTested("over_transformers_cpu", "needs the package transformers")
    else:
        yield _ratio("over_transformers_cpu", row["over_ours"], row["cpu"])
    for name in ("peers", "cpu"):
        shown = [
            {key: value[0] if isinstance(value, list) else value for key, value in row.items()}
            for row in bench.results[name]
        ]
        yield Table(f"gpu_{name}", f"Whole vanilla layers on {gpu if name == 'peers' else 'one CPU thread'}", shown)


@experiment(claims=["parallel_speedup", "parallel_model"], config=["parallel"], gpu=True)
def gpu_parallel(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Two processes over NCCL, exact routing, the slowest rank counts."""
    import torch

    if torch.cuda.device_count() < 2:
        for claim in ("parallel_speedup", "parallel_model"):
            yield NotTested(claim, "needs two GPUs of one host")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parallel.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run(
            [*launch, "-m", "papers.moepp.parallel_gpu", "--out", str(out)], check=True, cwd=Path(__file__).parents[3]
        )
        data = json.loads(out.read_text())
    rows = {(row["model"], row["tau"]): row for row in data["layers"]}
    ratio = rows["1B", 0.75]["speedup"] if cfg.parallel.zero_computation_local else rows["1B", None]["speedup"]
    gpu = data["environment"]["gpu"]
    yield Measurement("parallel_speedup", ratio, note=f"2 x {gpu}")
    error = max(abs(row["modelled_s"] / row["in_turn_s"] - 1) for row in data["layers"])
    alpha, bandwidth = data["link"]["alpha_s"], data["link"]["bandwidth_bytes_per_s"]
    yield Measurement(
        "parallel_model", error, note=f"alpha {1e6 * alpha:.0f} µs, {bandwidth / 1e9:.0f} GB/s; 2 x {gpu}"
    )
    yield Table("gpu_parallel", f"Expert parallelism on 2 x {gpu}", data["layers"])
