"""Step time and peak memory: measured on this host, on its GPU, and as committed from a GPU that this host may not have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from papers.mobiletl.experiments.setup import MB, switches
from shared.experiment import Context, Measurement, Plot, Result, Table, asset, experiment

_TITLES = {
    "ft_all": "FT-All",
    "ft_blocks": "FT-k",
    "mobiletl": "MobileTL-k",
    "mobiletl_recompute": "MobileTL-k, recomputing",
    "ft_blocks_checkpoint": "FT-k, checkpoint per block",
    "ft_blocks_compiled": "FT-k, torch.compile",
    "norm": "norms",
    "bias": "shifts",
    "last": "classifier",
}


@experiment(claims=["cpu_step_ratio"], config=["model", "method", "measure"])
def cpu_time(cfg: Any, ctx: Context) -> Iterator[Result]:
    """A step of MobileTL-k against one of FT-k on the same frozen int8 part, in alternation on one core."""
    rows = []
    for index, name in enumerate(dict.fromkeys([cfg.model.name, *cfg.measure.also])):
        timings = _cpu_steps(cfg, name, ctx.seed, peers=index == 0)
        rows += [
            {"network": name, "method": method, "ms": 1e3 * t.median_s, "over FT-k": timings.ratio(method, "FT-k").median}
            for method, t in timings.by_name.items()
        ]  # fmt: skip
        if index == 0:
            ratio = timings.ratio("MobileTL-k", "FT-k")
            yield Measurement(
                "cpu_step_ratio", ratio.median, ratio.low, ratio.high, note=f"one core of {timings.device}"
            )
    yield Table(
        "cpu_step_time", f"Training step on CPU, batch {cfg.measure.batch}, {cfg.measure.resolution} pixels", rows,
        Plot("bar", x="method", y="ms", series="network", ylabel="ms a step"),
        note=f"Medians on one core of {timings.device}, k = {cfg.method.blocks}.",
    )  # fmt: skip


def _cpu_steps(cfg: Any, name: str, seed: int, *, peers: bool) -> Any:
    """Timings of a step of one network; ``peers``: also FT-All and a checkpoint per block."""
    import torch
    import torch.nn.functional as F

    from papers.mobiletl.convert import adapt, parameter_groups
    from papers.mobiletl.models import create
    from papers.mobiletl.peers import checkpointed
    from shared.measure import measure

    torch.manual_seed(seed)
    base = create(name, cfg.model.classes)
    images = torch.randn(cfg.measure.batch, 3, cfg.measure.resolution, cfg.measure.resolution)
    labels = torch.randint(0, cfg.model.classes, (cfg.measure.batch,))

    def step(model: Any) -> Any:
        optimizer = torch.optim.Adam(parameter_groups(model.train(), lr=1e-4))

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return run

    k = cfg.method.blocks
    steps = {
        "FT-k": step(adapt(base, "ft_blocks", k)),
        "MobileTL-k": step(adapt(base, "mobiletl", k, **switches(cfg), recompute=cfg.method.recompute)),
    }
    if peers:
        steps |= {
            "FT-k, checkpoint per block": step(checkpointed(base, k)),
            "FT-All": step(adapt(base, "ft_all")),
        }
    return measure(steps, rounds=cfg.measure.rounds, min_round_s=0.0, warmup=2)


def _variant(method: Any) -> str:
    if method.recompute:
        return "mobiletl_recompute"
    return "ft_blocks" if (method.act_backward, method.inner_norm) == ("exact", "full") else "mobiletl"


@experiment(
    claims=["gpu_step_ratio", "gpu_step_ratio_graph", "gpu_step_ratio_eager", "gpu_peak_reduction"],
    config=["method", "gpu"],
    gpu=True,
)
def gpu_measurements(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Step time at the smallest batch and peak allocated memory at the largest, MobileNetV3-Small at 224."""
    from papers.mobiletl.gpu import measure_all

    batches = tuple(cfg.gpu.batches)

    def save(result: Mapping[str, Any]) -> None:
        if cfg.gpu.keep:
            Path(cfg.gpu.keep).write_text(json.dumps(result, indent=1) + "\n")

    result = measure_all(
        cfg.method.blocks, batches, compile_peer=cfg.gpu.compile, save=save, models=list(cfg.gpu.models)
    )
    small, large = (_rows(result, batch) for batch in (min(batches), max(batches)))
    ours = _variant(cfg.method)
    note = f"{result['machine']}, torch {result['torch']}"
    for claim, key in (
        ("gpu_step_ratio", "loop_over_ft_blocks"),
        ("gpu_step_ratio_graph", "graph_over_ft_blocks"),
        ("gpu_step_ratio_eager", "over_ft_blocks"),
    ):
        yield Measurement(claim, *small[ours][key], note=note)
    saved = 100.0 * (1.0 - large[ours]["peak_bytes"] / large["ft_blocks"]["peak_bytes"])
    yield Measurement("gpu_peak_reduction", saved, note=note)
    yield from _gpu_tables("gpu", "This GPU", result)


@experiment(claims=[])
def reference_measurements(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The committed measurements of ``python -m papers.mobiletl.gpu`` on an H100."""
    result = json.loads(asset(__file__, "../reference/h100_sxm.json").read_text())
    yield from _gpu_tables("reference", "Committed reference", result)


def _rows(result: Mapping[str, Any], batch: int) -> Mapping[str, Any]:
    from papers.mobiletl.gpu import MODELS

    return next(
        entry["rows"] for entry in result["networks"] if entry["model"] == MODELS[0] and entry["batch"] == batch
    )


def _gpu_tables(name: str, title: str, result: Mapping[str, Any]) -> Iterator[Result]:
    where = f"{result['machine']}, torch {result['torch']}, {result['date']}"
    for entry in result["networks"]:
        rows = [
            {
                "method": _TITLES[key],
                "peak MB": row["peak_bytes"] / MB,
                "saved MB": row["saved_bytes"] / MB,
                "eager ms": 1e3 * row["step_s"],
                "eager over FT-k": row["over_ft_blocks"][0],
                "graphed() ms": 1e3 * row["loop_step_s"] if "loop_step_s" in row else None,
                "graphed() over FT-k": row["loop_over_ft_blocks"][0] if "loop_step_s" in row else None,
                "graph ms": 1e3 * row["graph_step_s"] if "graph_step_s" in row else None,
                "graph over FT-k": row["graph_over_ft_blocks"][0] if "graph_step_s" in row else None,
            }
            for key, row in entry["rows"].items()
        ]
        yield Table(
            f"{name}_{entry['model']}_{entry['batch']}",
            f"{title}: {entry['model']}, 224 pixels, batch {entry['batch']}, k = {entry['blocks']}",
            rows, Plot("bar", x="method", y="peak MB", ylabel="MB allocated at the peak of a step"),
            note=f"{where}. Peaks are above what lies there between steps. graphed(): forward and backward replay; graph: the whole step.",
        )  # fmt: skip
    if "compiler" in result:
        entry = result["compiler"]
        rows = [
            {
                "method": _TITLES[key],
                "peak MB": row["peak_bytes"] / MB,
                "eager ms": 1e3 * row["step_s"],
                "over FT-k": row["over_ft_blocks"][0],
            }
            for key, row in entry["rows"].items()
        ]
        yield Table(
            f"{name}_compiler", f"{title}: torch.compile's min-cut against eager, {entry['model']}, batch {entry['batch']}", rows,
            note=f"{where}.",
        )  # fmt: skip
