"""Latency and energy of a training step on a small device, modelled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.mobiletl.experiments.setup import switches, traced
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

_BAND = (0.5, 1.0, 2.0)  # of the achieved fractions
_SHOWN = ("raspberry_pi_4b", "jetson_nano")  # the paper's boards, beside the device of the run


@experiment(claims=["modelled_over_five", "modelled_over_all"], config=["model", "method", "hardware", "device"])
def step_latency(cfg: Any, ctx: Context) -> Iterator[Result]:
    """One training step of plain and of MobileTL fine-tuning; the paper's latencies are not known to us, so there is no target."""
    from papers.mobiletl.counts import roles
    from papers.mobiletl.hardware import Assumptions, latency_by_phase, step_cost, step_rows
    from shared.errors import UserError, unknown
    from shared.hardware import load_device
    from shared.hardware.batch import ConstantPower

    model, layers = traced(cfg)
    k = cfg.method.blocks
    steps = {
        "FT-All": step_rows(layers, roles(model, layers, "ft_all")),
        f"FT-{k}BLKs": step_rows(layers, roles(model, layers, "ft_blocks", k)),
        f"MobileTL-{k}": step_rows(layers, roles(model, layers, "mobiletl", k, **switches(cfg))),
    }

    def assumed(device: Any) -> Assumptions:
        if device.kind not in cfg.hardware.overhead_s:
            raise unknown("kind of device in hardware.overhead_s", device.kind, cfg.hardware.overhead_s)
        fractions = (cfg.hardware.pointwise_fraction, cfg.hardware.depthwise_fraction, cfg.hardware.bandwidth_fraction)
        return Assumptions(*fractions, cfg.hardware.overhead_s[device.kind])

    def busy_power_w(device: Any) -> float | None:
        for state in ("full_load", "limit"):
            try:
                return float(device.power_w(state))
            except UserError:
                continue
        return None

    device = load_device(cfg.device)
    seconds = [step_cost(rows, device, assumed(device)).latency_s for rows in steps.values()]
    note = f"modelled step times on {device.title}: {', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in zip(steps, seconds, strict=True))}"
    yield Measurement("modelled_over_five", seconds[1] / seconds[2], note=note)
    yield Measurement("modelled_over_all", seconds[0] / seconds[2], note=note)
    table, phases = [], []
    for shown in (device, *(load_device(name) for name in _SHOWN if name != device.id)):
        power_w = busy_power_w(shown)
        for name, rows in steps.items():
            low, middle, high = (
                step_cost(rows, shown, assumed(shown).scaled(factor)).latency_s for factor in reversed(_BAND)
            )
            energy_j = None
            if power_w is not None:
                energy_j = step_cost(rows, shown, assumed(shown), energy=ConstantPower(power_w)).energy_j
            table.append(
                {"device": shown.title, "method": name, "step ms": 1e3 * middle, "low ms": 1e3 * low, "high ms": 1e3 * high,
                 "J a step": energy_j}
            )  # fmt: skip
            for phase, value in latency_by_phase(rows, step_cost(rows, shown, assumed(shown))).items():
                phases.append({"device and method": f"{shown.title}: {name}", "phase": phase, "ms": 1e3 * value})
    yield Table(
        "step_latency", f"Modelled training step of {cfg.model.name}, batch {cfg.model.batch}", table,
        Plot("bar", x="method", y="step ms", series="device", ylabel="ms a step", error=("low ms", "high ms")),
        note="Achieved fractions are assumed; the band halves and doubles them. Energy is busy board power times time.",
    )  # fmt: skip
    yield Table(
        "step_phases", "Where the modelled step goes", phases,
        Plot("stacked", x="device and method", y="ms", series="phase", ylabel="ms a step"),
    )  # fmt: skip
