"""The device model: the paper's ratios on its GPU, other devices, token counts, energy, expert parallelism."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from papers.moepp.experiments.rows import MODELLED, MODELS, ROWS, TAUS, claims
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

MEASURED = Path(__file__).parents[1] / "measured"
_OTHERS = {
    "parts": "the kernels of a layer, 65,536 tokens",
    "peers": "whole vanilla layer against peers",
    "backends": "our kernels against torch's grouped product",
    "cpu": "one CPU thread",
}
TOKENS = (256, 1024, 4096, 16_384, 65_536, 131_072)


def assumed_of(section: Any) -> Any:
    """What the section ``hardware`` assumes."""
    from papers.moepp.hardware import Assumed

    return Assumed(
        fused=section.fused, launches=section.launches, launch_s=section.launch_s, compute_fraction=section.compute_fraction,
        bandwidth_fraction=section.bandwidth_fraction,
    )  # fmt: skip


@experiment(claims=claims("modelled_speedup", MODELLED), config=["hardware", "device"])
def device_model(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Ratios of modelled expert times. Nothing is fitted to the paper; the model's error is the one against our own measurements."""
    from papers.moepp.hardware import energy_j_per_token, layer_cost, speedup
    from papers.moepp.shape import SHAPES
    from papers.moepp.shape import TAUS as ALL_TAUS
    from shared.errors import UserError
    from shared.hardware import load_device

    h, device, assumed = cfg.hardware, load_device(cfg.device), assumed_of(cfg.hardware)
    error, compared = model_error_rel(), []
    for model, tau in ROWS:
        s = SHAPES[MODELS[model]]
        gain = float(speedup(s if h.zero_computation else s.vanilla(), [TAUS[tau]], h.tokens, device, assumed)[0])
        if (model, tau) in MODELLED:
            yield Measurement(f"modelled_speedup_{model}_{tau}", gain, model_error_rel=error)
        printed = ctx.published[f"expert_s_{model}_moe"] / ctx.published[f"expert_s_{model}_{tau}"]
        for series, value in (("printed", printed), ("modelled", gain), ("bound 1/rho", 1 / s.rho(TAUS[tau]))):
            compared.append(
                {"model": MODELS[model], "tau": TAUS[tau], "series": f"{MODELS[model]} {series}", "speedup": value}
            )
    yield Table(
        "paper_rows",
        f"Tab. 3 against the device model on {device.title}",
        compared,
        Plot("line", "tau", "speedup", "series"),
    )
    rows, energy, missing = [], [], []
    for name in h.devices:
        other = load_device(name)
        try:
            for model, s in SHAPES.items():
                for tokens in TOKENS:
                    gains = speedup(s, ALL_TAUS, tokens, other, assumed)
                    rows += [
                        {"device": name, "model": model, "tokens": tokens, "tau": tau, "series": f"{name} {model}", "speedup": float(gain),
                         "of_bound": float(gain) * s.rho(tau)}
                        for tau, gain in zip(ALL_TAUS, gains, strict=True)
                    ]  # fmt: skip
        except UserError as problem:
            missing.append(str(problem))
            continue
        try:
            for model, s in SHAPES.items():
                shares = [s.rho(tau) for tau in ALL_TAUS] + [1.0]
                joules = energy_j_per_token(s, shares, h.tokens, other, assumed)
                energy += [
                    {"device": name, "model": model, "arm": arm, "mJ_per_token": 1e3 * float(j)}
                    for arm, j in zip([*(f"tau {tau}" for tau in ALL_TAUS), "MoE"], joules, strict=True)
                ]
        except UserError as problem:
            missing.append(str(problem))
    note = "; ".join(missing)
    plot_rows = [row for row in rows if row["tau"] == 0.1 and row["model"] == "1B"]
    plot = Plot(
        "line",
        "tokens",
        "speedup",
        "device",
        log_x=True,
        hline=SHAPES["1B"].rho(0.1) ** -1,
        ylabel="speed-up of the experts",
    )
    yield Table(
        "devices_1b",
        "1B, tau 0.10: modelled speed-up over the tokens in a batch; the line is 1/rho",
        plot_rows,
        plot,
        note,
    )
    yield Table("devices", "Modelled speed-up on all devices", rows, note=note)
    yield Table(
        "energy",
        "Modelled energy of the experts per token",
        energy,
        Plot("bar", "model", "mJ_per_token", "arm", log_y=True),
        note,
    )
    cost = layer_cost(SHAPES["1B"], [1.0, *(SHAPES["1B"].rho(tau) for tau in ALL_TAUS)], h.tokens, device, assumed)
    parts = [
        {"arm": arm, "part": part, "ms": 1e3 * float(getattr(cost, f"{part}_s")[index])}
        for index, arm in enumerate(["MoE", *(f"tau {tau}" for tau in ALL_TAUS)])
        for part in ("gemm", "pointwise", "weights", "combine", "launch")
    ]
    yield Table(
        "breakdown", f"1B: where a layer's time goes on {device.title}", parts, Plot("stacked", "arm", "ms", "part")
    )
    yield from _measured_tables(ctx.published)


@cache
def model_error_rel() -> float | None:
    """Largest relative error of the modelled speed-up against our own timings at 65,536 tokens; None before there are any."""
    errors = [abs(row["modelled"] / row["measured"] - 1) for row in validation() if row["tokens"] == 65_536]
    return max(errors) if errors else None


def validation() -> Iterator[dict[str, Any]]:
    """Measured and modelled speed-ups of our own kernels on the GPU that measured them, with that device's calibration."""
    from papers.moepp.hardware import Assumed, speedup
    from papers.moepp.shape import SHAPES
    from shared.hardware import load_device

    for path in sorted(MEASURED.glob("*.json")):
        data = json.loads(path.read_text())
        for row in data.get("speedup", []):
            if row["tau"] is None:
                continue
            gain = speedup(SHAPES[row["model"]], [row["tau"]], row["tokens"], load_device(path.stem), Assumed())
            yield {"device": path.stem, "model": row["model"], "tokens": row["tokens"], "tau": row["tau"], "measured": row["speedup"][0],
                   "modelled": float(gain[0])}  # fmt: skip


def _measured_tables(published: Mapping[str, Any]) -> Iterator[Table]:
    """The committed timings, beside the paper's ratios where it prints them."""
    keys = {(MODELS[model], TAUS[tau]): (model, tau) for model, tau in ROWS}

    def printed(row: Mapping[str, Any]) -> float | None:
        if (row["model"], row["tau"]) not in keys:
            return None
        model, tau = keys[row["model"], row["tau"]]
        return float(published[f"expert_s_{model}_moe"] / published[f"expert_s_{model}_{tau}"])

    checked = list(validation())
    if checked:
        plot = Plot("scatter", "measured", "modelled", "model")
        yield Table("validation", "Speed-up of our kernels: device model against measurement", checked, plot)
    for path in sorted(MEASURED.glob("*.json")):
        data: Mapping[str, Any] = json.loads(path.read_text())
        gpu = data["environment"]["gpu"]
        if "speedup" in data:
            rows = [
                {"model": row["model"], "tokens": row["tokens"], "tau": "MoE" if row["tau"] is None else row["tau"],
                 "ms": 1e3 * row["median_s"], "TFLOP/s": row["flop_per_s"] / 1e12, "speedup": row["speedup"][0],
                 "low": row["speedup"][1], "high": row["speedup"][2],
                 "paper": printed(row), "bound": row["bound"], "of_bound": row["of_bound"]}
                for row in data["speedup"]
            ]  # fmt: skip
            yield Table(
                f"measured_{path.stem}", f"Measured on {gpu} (committed): expert time, exact routing, CUDA graphs", rows
            )
            curve = [row for row in rows if row["tau"] in (0.1, 0.75)]
            curve = [{**row, "series": f"{row['model']}, tau {row['tau']}"} for row in curve]
            plot = Plot("line", "tokens", "of_bound", "series", log_x=True, hline=1.0, ylabel="share of 1/rho")
            yield Table(
                f"small_{path.stem}", f"Measured on {gpu}: share of the bound over the tokens in a batch", curve, plot
            )
        for name, title in _OTHERS.items():
            if name in data:
                rows = [
                    {key: value[0] if isinstance(value, list) else value for key, value in row.items()}
                    for row in data[name]
                ]
                yield Table(f"{name}_{path.stem}", f"Measured on {gpu} (committed): {title}", rows)
        if "layers" in data:
            title = f"Measured on {data['ranks']} x {gpu} (committed): expert parallelism over NCCL"
            yield Table(f"parallel_{path.stem}", title, data["layers"])


@experiment(claims=[], config=["parallel", "hardware", "device"])
def expert_parallel(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Alpha-beta model of a layer over several GPUs."""
    from papers.moepp.hardware import all_to_all_bytes, expert_parallel_s
    from papers.moepp.shape import SHAPES
    from papers.moepp.shape import TAUS as ALL_TAUS
    from shared.hardware import AlphaBeta, load_device

    device, section = load_device(cfg.device), cfg.parallel
    if section.link not in device.link:
        return
    link = AlphaBeta(section.link_share * device.link_bytes_per_s(section.link), section.alpha_s)
    rows = []
    for name in ("1B", "7B"):
        s = SHAPES[name]
        for ranks in section.ranks:
            shares = [1.0, *(s.rho(tau) for tau in ALL_TAUS)]
            seconds = expert_parallel_s(s, shares, section.tokens, ranks, device, link, assumed_of(cfg.hardware))
            for arm, share, t in zip(["MoE", *(str(tau) for tau in ALL_TAUS)], shares, seconds, strict=True):
                sent = float(all_to_all_bytes(s, share, section.tokens, ranks))
                rows.append({"model": name, "ranks": ranks, "series": f"{name}, {ranks} GPUs", "tau": arm, "MB_sent": sent / 1e6,
                             "ms": 1e3 * float(t), "speedup": float(seconds[0] / t), "bound": 1 / share})  # fmt: skip
    plot = Plot("line", "bound", "speedup", "series", xlabel="1/rho", ylabel="speed-up of the layer")
    yield Table(
        "parallel", f"Modelled expert parallelism on {device.title}, {section.tokens:,} tokens a GPU", rows, plot
    )
