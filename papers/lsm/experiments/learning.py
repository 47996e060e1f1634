"""Supervised claims: read-outs of frozen liquids, trained baselines, and the way from forming voltage to accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers.lsm.experiments.setup import by_group, by_seed, data_of, digit_sizes, mean, plain
from shared.errors import unknown
from shared.experiment import Context, Picture, Plot, Result, Table, experiment, half_width, seed_measurement

TITLES = {"digits": "saccade digits", "words": "spoken digits", "order": "order task"}
LIQUID_OF = {"digits": "digits", "words": "speech", "order": "speech"}


def _supervised(
    cfg: Any, ctx: Context, names: Sequence[str], *, limited: bool = False
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[int, str]], dict[str, list[int]]]:
    """Read-outs of every seed, keys of the data, and sizes of the parts, by task."""
    from papers.lsm.jobs import supervised_job

    drawn = {
        name: digit_sizes(cfg, limited=limited)
        if name == "digits"
        else (cfg.supervised[name].size, [int(n) for n in cfg.supervised[name].sizes])
        for name in names
    }
    keys = data_of(ctx, cfg, {name: size for name, (size, _) in drawn.items()})
    jobs = {}
    for name, (_, sizes) in drawn.items():
        chosen = cfg.liquids[LIQUID_OF[name]]
        liquid = {
            "decay": chosen.decay, "v_th": chosen.v_th, "neurons": cfg.liquids.neurons, "formed": cfg.liquids.formed,
            "read_noise": cfg.liquids.read_noise, "gain": cfg.liquids.gain,
            "recurrent": cfg.liquids.recurrent,
        }  # fmt: skip
        jobs[name] = [
            {
                "seed": s,
                "data": keys[name][s],
                "sizes": sizes,
                "liquid": liquid,
                "consts": [float(c) for c in chosen.consts],
            }
            for s in ctx.seeds
        ]
    return by_group(ctx, "read-outs", supervised_job, jobs), keys, {name: sizes for name, (_, sizes) in drawn.items()}


def _tests(results: Sequence[Mapping[str, Any]], arm: str, readout: str) -> list[float]:
    return [100 * r["arms"][arm][readout]["test"] for r in results]


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _check_readout(name: str) -> None:
    from papers.lsm.readout import READOUTS

    if name not in READOUTS:
        raise unknown("supervised.readout", name, READOUTS)


@experiment(
    claims=[
        "nmnist_lsm", "nmnist_rram", "ntidigits_lsm", "ntidigits_rram", "rram_delta_nmnist", "rram_delta_ntidigits", "linear_probe",
        "digits_over_raw", "order_over_raw", "digits_recurrence", "order_recurrence", "words_over_raw",
    ],
    config=["liquids", "supervised", "data"],
)  # fmt: skip
def supervised(cfg: Any, ctx: Context) -> Iterator[Result]:
    readout = cfg.supervised.readout
    _check_readout(readout)
    found, _, _ = _supervised(cfg, ctx, list(TITLES))

    def tests(name: str, arm: str) -> list[float]:
        return _tests(found[name], arm, readout)

    on_digits = "MNIST before the camera" if cfg.data.root else "stand-in A"
    yield seed_measurement("nmnist_lsm", tests("digits", "liquid"), note=on_digits)
    yield seed_measurement("nmnist_rram", tests("digits", "formed cells, read noise"), note=on_digits)
    yield seed_measurement("ntidigits_lsm", tests("words", "liquid"), note="stand-in B")
    yield seed_measurement("ntidigits_rram", tests("words", "formed cells, read noise"), note="stand-in B")
    for claim, name in (("rram_delta_nmnist", "digits"), ("rram_delta_ntidigits", "words")):
        yield seed_measurement(claim, _minus(tests(name, "formed cells, read noise"), tests(name, "liquid")))
    over_chance = [
        min(a - 10.0, b - 100.0 / 9) for a, b in zip(tests("digits", "liquid"), tests("words", "liquid"), strict=True)
    ]
    yield seed_measurement("linear_probe", over_chance)
    for name in TITLES:
        yield seed_measurement(f"{name}_over_raw", _minus(tests(name, "liquid"), tests(name, "raw counts")))
    for name in ("digits", "order"):
        yield seed_measurement(f"{name}_recurrence", _minus(tests(name, "liquid"), tests(name, "no recurrence")))

    rows = []
    for name, title in TITLES.items():
        for arm in found[name][0]["arms"]:
            each = [r["arms"][arm] for r in found[name]]
            row: dict[str, Any] = {"task": title, "features": arm}
            for r in ("logistic", "ridge"):
                values = _tests(found[name], arm, r)
                row |= {f"{r} %": mean(values), f"{r} ±": half_width(values)}
            row["firing rate %"] = 100 * mean([a["rate"] for a in each]) if "rate" in each[0] else None
            row["const"] = ", ".join(sorted({f"{a['const']:g}" for a in each})) if "const" in each[0] else ""
            row["ridge %, const chosen on test"] = (
                100 * mean([a["test_selected"] for a in each]) if "test_selected" in each[0] else None
            )
            rows.append(row)
    yield Table(
        "read_outs",
        "Test accuracy of linear read-outs, const and penalty chosen on validation",
        rows,
        Plot("bar", "features", f"{readout} %", "task", error=f"{readout} ±"),
        note="input density "
        + ", ".join(f"{TITLES[n]} {100 * mean([r['density'] for r in found[n]]):.1f} %" for n in TITLES),
    )
    yield from _pictures(cfg, ctx, found)


def _pictures(cfg: Any, ctx: Context, found: Mapping[str, Any]) -> Iterator[Result]:
    from papers.lsm import pictures
    from papers.lsm.jobs import make_weights

    seed = ctx.seeds[0]
    liquid = cfg.liquids.digits
    weights = make_weights("gaussian", 256, cfg.liquids.neurons, seed)
    yield Picture(
        "events",
        "Event frames of a saccade digit, ON in red and OFF in blue, six of 50 bins",
        pictures.event_frames(seed),
        note="stand-in A",
    )
    yield Picture(
        "raster",
        "Input events and spikes of the liquid over one digit",
        pictures.raster(
            weights,
            decay=liquid.decay,
            v_th=liquid.v_th,
            const=float(liquid.consts[-1]) * float(cfg.liquids.gain),
            seed=seed,
        ),
    )
    for name in ("digits", "order"):
        total = sum_matrices([r["arms"]["liquid"][cfg.supervised.readout]["confusion"] for r in found[name]])
        labels = [str(i) for i in range(len(total))] if name == "digits" else order_labels()
        yield Picture(
            f"confusion_{name}",
            f"Confusion on the {TITLES[name]}, all seeds, share of each row",
            pictures.confusion(total, labels),
        )


def sum_matrices(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def order_labels() -> list[str]:
    from papers.lsm.data.speech import ORDER_PAIRS

    return ["-".join(pair[::step]) for pair in ORDER_PAIRS for step in (1, -1)]


@experiment(
    claims=["nmnist_srnn_gap", "nmnist_rnn_gap", "nmnist_snn_gap", "ntidigits_srnn_gap", "ntidigits_rnn_gap"],
    config=["liquids", "supervised", "trained", "data"],
)
def comparison(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.lsm.jobs import trained_job

    readout, rows = cfg.supervised.readout, []
    _check_readout(readout)
    gaps: dict[tuple[str, str], list[float]] = {}
    found, keys, sizes = _supervised(cfg, ctx, ["digits", "order"], limited=True)
    jobs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in found:
        settings = plain(cfg.trained[name])
        for kind in settings.pop("kinds"):
            jobs[name, kind] = [
                {
                    "seed": s, "data": keys[name][s], "sizes": sizes[name], "kind": kind, "train": settings,
                    "rates": [float(r) for r in cfg.trained.rates],
                }
                for s in ctx.seeds
            ]  # fmt: skip
    networks = by_group(ctx, "trained networks", trained_job, jobs)

    def row(name: str, network: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
        return {"task": TITLES[name], "network": network, "accuracy %": mean(values), "±": half_width(values), **more}

    for name in found:
        liquid = _tests(found[name], "liquid", readout)
        rows.append(row(name, "liquid", liquid))
        for kind in (kind for task, kind in networks if task == name):
            results = networks[name, kind]
            values = [100 * r["test"] for r in results]
            gaps[name, kind] = _minus(values, liquid)
            rates = ", ".join(sorted({f"{r['lr']:g}" for r in results}))
            epochs = ", ".join(str(n) for n in sorted({r["epoch"] for r in results}))
            rows.append(row(name, kind, values, **{"learning rates": rates, "epochs chosen": epochs}))
    yield seed_measurement("nmnist_srnn_gap", gaps["digits", "SRNN-ANN"])
    yield seed_measurement("nmnist_snn_gap", gaps["digits", "SRNN-SNN"])
    yield seed_measurement("nmnist_rnn_gap", gaps["digits", "RNN"])
    yield seed_measurement("ntidigits_srnn_gap", gaps["order", "SRNN-ANN"], note="on the order task")
    yield seed_measurement("ntidigits_rnn_gap", gaps["order", "RNN"], note="on the order task")
    yield Table(
        "networks",
        "Trained networks against the liquid with a linear read-out, same items, settings chosen on validation",
        rows,
        Plot("bar", "network", "accuracy %", "task", error="±"),
    )


@experiment(claims=["generator_delta"], config=["liquids", "supervised", "sweep", "data"])
def device_map(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.lsm.jobs import sweep_job

    size, sizes = digit_sizes(cfg, limited=True)
    keys = data_of(ctx, cfg, {"digits": size})["digits"]
    s, chosen = cfg.sweep, cfg.liquids.digits
    sizes_of = [int(n) for n in s.neurons]
    formed = sorted({float(q) for q in s.formed} | {float(cfg.liquids.formed)})
    liquid = {
        "decay": chosen.decay, "v_th": chosen.v_th, "neurons": cfg.liquids.neurons, "const": s.const, "formed": cfg.liquids.formed,
    }  # fmt: skip
    jobs = [
        {
            "seed": seed, "data": keys[seed], "sizes": sizes, "liquid": liquid, "consts": [float(c) for c in chosen.consts],
            "formed": formed, "noises": [float(n) for n in s.noises], "neurons": sizes_of,
        }
        for seed in ctx.seeds
    ]  # fmt: skip
    results = by_seed(ctx, "device map", sweep_job, jobs)

    def column(kind: str, index: int, read: Any) -> list[float]:
        return [100 * read(r[kind][index]) for r in results]

    at = formed.index(float(cfg.liquids.formed))
    reference = sizes_of.index(int(cfg.liquids.neurons)) if int(cfg.liquids.neurons) in sizes_of else 0
    gaussian = column("size", reference, lambda x: x["test"])
    yield seed_measurement(
        "generator_delta",
        _minus(column("forming", at, lambda x: x["fixed"]["test"]), gaussian),
        note="ridge, one const",
    )
    rows = []
    for index, row in enumerate(results[0]["forming"]):
        for way in ("fixed", "tuned"):
            values = column("forming", index, lambda x, way=way: x[way]["test"])
            rows.append(
                {
                    "formed cells": row["formed"], "forming V": row["forming_v"], "weight s.d. µS": row["weight_sd"], "const": way,
                    "accuracy %": mean(values), "±": half_width(values),
                    "firing rate %": mean(column("forming", index, lambda x, way=way: x[way]["rate"])),
                }
            )  # fmt: skip
    plot = Plot(
        "line",
        "weight s.d. µS",
        "accuracy %",
        "const",
        error="±",
        xlabel="weight spread in µS, set by the forming voltage",
    )
    yield Table("forming_accuracy", "Accuracy on saccade digits against weight spread", rows, plot)
    noise = [
        {"read noise": row["eta"], "accuracy %": mean(v), "±": half_width(v)}
        for index, row in enumerate(results[0]["noise"])
        for v in [column("noise", index, lambda x: x["test"])]
    ]
    yield Table(
        "read_noise",
        "Accuracy on saccade digits against read noise",
        noise,
        Plot("line", "read noise", "accuracy %", error="±"),
    )
    sizes_rows = [
        {"neurons": row["neurons"], "accuracy %": mean(v), "±": half_width(v)}
        for index, row in enumerate(results[0]["size"])
        for v in [column("size", index, lambda x: x["test"])]
    ]
    plot = Plot("line", "neurons", "accuracy %", error="±", log_x=True)
    yield Table(
        "liquid_size", "Accuracy on saccade digits against size, const scaled by sqrt(200 / N)", sizes_rows, plot
    )
