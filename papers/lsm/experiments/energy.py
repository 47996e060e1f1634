"""The energy model: one conversion energy from one printed ratio, the other ratio predicted; other accountings beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.lsm.experiments.counting import TASK_NAMES
from shared.errors import unknown
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment


@experiment(
    claims=[
        "energy_atv", "energy_btv", "energy_atv_from_btv", "energy_event_driven_atv", "energy_event_driven_btv", "energy_bottom_up_atv",
        "latency_nmnist",
    ],
    config=["energy", "macro", "device"],
)  # fmt: skip
def energy(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.lsm.counts import NMNIST, NTIDIGITS, TASKS
    from papers.lsm.experiments.setup import plain
    from papers.lsm.hardware import (
        Macro,
        digital_mac_j,
        energy_ratio,
        map_encoder,
        mean_neuron_step_j,
        multiplexed_sample_s,
        solve_kappa,
    )
    from shared.hardware import load_device

    e, macro = cfg.energy, Macro(**plain(cfg.macro))
    printed = {"atv": float(ctx.published["energy_atv"]), "btv": float(ctx.published["energy_btv"])}
    if e.fit_on not in printed:
        raise unknown("energy.fit_on", e.fit_on, printed)
    mac_j = digital_mac_j(load_device(cfg.device))
    kappas = {name: solve_kappa(TASKS[name], ratio) for name, ratio in printed.items()}
    kappa, control = kappas[e.fit_on], bool(e.per_weight)
    densities = {name: tuple(float(d) for d in e.input_density[name]) for name in printed}
    rate = float(e.firing_rate)

    def ratio(name: str, value: float, digital: float | None = None) -> float:
        return energy_ratio(TASKS[name], value, digital_macs=digital, per_weight=control)

    def events(name: str) -> float:
        return TASKS[name].event_macs(densities[name], rate) if e.event_driven else TASKS[name].encoder_macs

    note = f"kappa {kappa:.2f} from {TASK_NAMES[e.fit_on]}, {1e12 * kappa * mac_j:.1f} pJ per neuron and step"
    yield Measurement("energy_atv", ratio("atv", kappa), note=note)
    yield Measurement("energy_btv", ratio("btv", kappas["atv"]), note=f"kappa {kappas['atv']:.2f} from audio-vision")
    yield Measurement(
        "energy_atv_from_btv", ratio("atv", kappas["btv"]), note=f"kappa {kappas['btv']:.2f} from brain-vision"
    )
    for name in printed:
        yield Measurement(
            f"energy_event_driven_{name}",
            ratio(name, kappa, events(name)),
            note=f"{events(name):,.0f} MAC instead of {TASKS[name].encoder_macs:,}",
        )
    parts = mean_neuron_step_j(TASKS["atv"], macro, densities["atv"], rate)
    bottom_up = sum(parts.values()) / mac_j
    yield Measurement(
        "energy_bottom_up_atv",
        ratio("atv", bottom_up),
        note=f"{1e12 * sum(parts.values()):.2f} pJ per neuron and step, kappa {bottom_up:.2f}",
    )
    yield Measurement("latency_nmnist", 1e6 * macro.sample_s(NMNIST))

    rows = []
    for name in printed:
        t = TASKS[name]
        update = float(e.neuron_ops_mac) * t.conversions
        for label, value in (("fitted", kappa), ("bottom-up", bottom_up)):
            rows.append(
                {
                    "task": TASK_NAMES[name], "conversion energy": label, "printed": printed[name], "dense digital": ratio(name, value),
                    "event-driven digital": ratio(name, value, events(name)),
                    "event-driven, with neuron updates": ratio(name, value, events(name) + update),
                }
            )  # fmt: skip
    yield Table("accountings", "Energy of digital hardware over that of the hybrid, by accounting", rows)
    yield Table(
        "mechanisms",
        "Energy per neuron and step, bottom-up",
        [
            {"task": TASK_NAMES[name], "part": part, "pJ": 1e12 * j}
            for name in printed
            for part, j in mean_neuron_step_j(TASKS[name], macro, densities[name], rate).items()
        ],
        Plot("stacked", "task", "pJ", "part", ylabel="pJ"),
        note=f"The printed ratios need {1e12 * kappas['atv'] * mac_j:.1f} and {1e12 * kappas['btv'] * mac_j:.1f} pJ.",
    )  # fmt: skip
    totals = []
    for name in printed:
        t = TASKS[name]
        for system, items in (
            ("digital, dense", {"encoder": t.encoder_macs * mac_j, "heads": t.head_macs * mac_j}),
            ("digital, event-driven", {"encoder": events(name) * mac_j, "heads": t.head_macs * mac_j}),
            ("hybrid", {"encoder": kappa * t.conversions * mac_j, "heads": t.head_macs * mac_j}),
        ):
            totals += [
                {"system": f"{TASK_NAMES[name]}, {system}", "part": part, "µJ": 1e6 * j} for part, j in items.items()
            ]
    yield Table(
        "totals", "Energy of a sample (pair)", totals, Plot("bar", "system", "µJ", "part", ylabel="µJ", log_y=True)
    )
    sweep = [
        {"kappa": k, "task": TASK_NAMES[name], "ratio": ratio(name, float(k)), "digital": "dense"}
        for k in (1, 2, 4, 8, 12.8, 16, 32, 64, 128, 256, 512)
        for name in printed
    ]
    yield Table(
        "kappa",
        "Energy ratio against the conversion energy",
        sweep,
        Plot("line", "kappa", "ratio", "task", log_x=True, log_y=True, hline=1.0),
    )
    mapped = [
        ("N-MNIST", NMNIST),
        ("N-TIDIGITS", NTIDIGITS),
        ("brain", TASKS["btv"].encoders[0]),
        ("E-MNIST", TASKS["btv"].encoders[1]),
    ]
    yield Table(
        "mapping",
        "Encoders on 512 x 512 arrays: blocks, and latency of a sample on one array that is used again for every block",
        [
            {
                "encoder": name, "rows": x.inputs + x.neurons, "columns": 2 * x.neurons, "arrays": map_encoder(x).arrays,
                "fits one": x.fits_array(), "latency µs": 1e6 * multiplexed_sample_s(macro, x),
            }
            for name, x in mapped
        ],
    )  # fmt: skip
