"""The GPU rows (C12): how far launches explain them, and real timings where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.m3vit.experiments.setup import encoder_of
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment


@experiment(claims=["gpu_launch_model"], config=["model", "gpu"])
def gpu_launches(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Roofline plus a launch per kernel, for the published GPU; nothing is fitted to its rows."""
    from papers.m3vit import counts
    from papers.m3vit.gpu import encoder_kernels, gpu_latency
    from shared.hardware.device import load_device

    device = load_device(cfg.gpu.device)
    encoder, tokens = encoder_of(cfg.model), counts.dataset("pascal").tokens()

    def modelled(shape: Any, execution: str) -> Any:
        return gpu_latency(
            encoder_kernels(shape, tokens, heads=cfg.model.heads, execution=execution),
            peak_flop_per_s=device.op_per_s("float32"),
            bandwidth_bytes_per_s=device.bandwidth_bytes_per_s(),
            launch_s=cfg.gpu.launch_s,
            bytes_per_value=cfg.gpu.bytes_per_value,
        )

    dense = modelled(encoder.dense(), "looped")
    forms = {"dense": dense, "looped": modelled(encoder, "looped"), "grouped": modelled(encoder, "grouped")}
    yield Measurement("gpu_launch_model", forms[cfg.gpu.execution].total_s / dense.total_s)
    yield Table(
        "gpu_model",
        f"Modelled GPU latency of one PASCAL-Context frame on {device.title or device.id}",
        [
            {"execution": name, "part": part, "ms": 1e3 * seconds, "kernels": form.kernels}
            for name, form in forms.items()
            for part, seconds in (("work", form.work_s), ("launches", form.launch_s))
        ],
        Plot("stacked", x="execution", y="ms", series="part", ylabel="ms"),
        note=f"Published: {1e3 * ctx.published['latency_pascal_gpu_dense']:.2f} ms dense, "
        f"{1e3 * ctx.published['latency_pascal_gpu_moe']:.2f} ms with experts.",
    )


@experiment(claims=["gpu_moe_slowdown", "gpu_grouping_gain"], config=["model", "gpu"], gpu=True)
def gpu_timing(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Encoder forward time at batch 1 with random weights: dense, looped experts, grouped experts, in alternation."""
    from papers.m3vit.timing import time_encoders

    result = time_encoders(size=cfg.model.size, heads=cfg.model.heads, device="cuda")
    slow = {"looped": "expert_by_expert", "grouped": "grouped", "dense": "dense again"}[cfg.gpu.execution]
    yield _ratio("gpu_moe_slowdown", result, slow, "dense")
    yield _ratio(
        "gpu_grouping_gain", result, "expert_by_expert", "grouped" if cfg.gpu.grouping else "expert_by_expert again"
    )
    yield Table("gpu_timing", f"Encoder forward time on {result['device']}", result["rows"])


def _ratio(claim: str, result: dict[str, Any], numerator: str, denominator: str) -> Measurement:
    ratio = result["ratios"][f"{numerator}/{denominator}"]
    return Measurement(claim, ratio["median"], ratio["low"], ratio["high"], note=f"fp32, batch 1, {result['device']}")
