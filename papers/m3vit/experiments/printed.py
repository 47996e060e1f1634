"""Arithmetic on the printed tables: do Δ_m and the energies follow from their own rows (Tab. 1 to 4)?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.experiment import Context, Measurement, Result, experiment

# Order of the metrics in the published rows, and which of them are better when lower.
_PASCAL = ("semseg", "normals", "parts", "saliency", "edge")
_NYUD = ("semseg", "depth")
_LOWER_IS_BETTER = {"normals", "depth"}

_ROWS = {
    "delta_m_m3vit_pascal": "metrics_pascal_m3vit_multi",
    "delta_m_mvit_pascal": "metrics_pascal_mvit",
    "delta_m_cross_stitch_pascal": "metrics_pascal_cross_stitch",
    "delta_m_single_pascal": "metrics_pascal_m3vit_single",
    "delta_m_task_cond_pascal": "metrics_pascal_m3vit_task_cond",
    "delta_m_m3vit_nyud": "metrics_nyud_m3vit_multi",
    "delta_m_cross_stitch_nyud": "metrics_nyud_cross_stitch",
    "delta_m_mvit_nyud": "metrics_nyud_mvit",
    "delta_m_gradnorm_nyud": "metrics_nyud_gradnorm",
}


def delta_m_of_row(tasks: Sequence[str], row: Sequence[float], baseline: Sequence[float]) -> float:
    """Δ_m in percent of a printed row over the single-task row (Sec. 4.1)."""
    gains = [
        (-1.0 if task in _LOWER_IS_BETTER else 1.0) * (value - base) / base
        for task, value, base in zip(tasks, row, baseline, strict=True)
    ]
    return 100.0 * sum(gains) / len(gains)


@experiment(claims=list(_ROWS), config=[])
def printed_delta_m(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Δ_m of every printed row."""
    for claim, row in _ROWS.items():
        data = "pascal" if "_pascal_" in row else "nyud"
        tasks = _PASCAL if data == "pascal" else _NYUD
        yield Measurement(claim, delta_m_of_row(tasks, ctx.published[row], ctx.published[f"metrics_{data}_stl"]))


@experiment(
    claims=[
        "energy_is_power_times_latency",
        "gpu_energy_ratio_dense",
        "fpga_latency_against_gpu",
        "edge_moe_gpu_energy_ratio",
    ],
    config=["hardware"],
)
def printed_energy(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Energies and energy ratios from printed latencies and powers."""
    p: Mapping[str, float] = ctx.published
    worst = 0.0
    for name, printed in p.items():
        if name.startswith("energy_"):
            power = p["gpu_power"] if "_gpu_" in name else cfg.hardware.power_w
            deviation = 100.0 * (power * p[name.replace("energy_", "latency_")] / printed - 1.0)
            worst = max(worst, deviation, key=abs)
    yield Measurement("energy_is_power_times_latency", worst)
    yield Measurement("gpu_energy_ratio_dense", p["energy_pascal_gpu_dense"] / p["energy_pascal_fpga_reordered"])
    yield Measurement("fpga_latency_against_gpu", p["latency_pascal_fpga_reordered"] / p["latency_pascal_gpu_dense"])
    gpu = p["edge_moe_gpu_latency"] * p["edge_moe_gpu_power"]
    yield Measurement("edge_moe_gpu_energy_ratio", gpu / (p["edge_moe_latency"] * p["edge_moe_power"]))
