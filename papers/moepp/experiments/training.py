"""Byte-level language models at reduced scale: MoE++ against the vanilla layer on the same batches (C2, C3, C9 to C11, C14)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.experiment import (
    Artifact,
    Context,
    NotTested,
    Picture,
    Plot,
    Result,
    Table,
    experiment,
    mean_interval,
    seed_measurement,
)

VANILLA = {"n_constant": 0, "n_copy": 0, "n_zero": 0, "pathway": False, "tau": 1.0}
KINDS = ("constant", "copy", "zero")
SHOWN_BYTES = 1600
_ARM_KEYS = ("zero_computation", "n_constant", "n_copy", "n_zero", "k", "tau", "pathway")


def arms_of(cfg: Any) -> dict[str, dict[str, Any]]:
    """What each arm sets; the MoE++ arms start from the section ``lm``."""
    lm, train = cfg.lm, cfg.train
    plus = {key: lm[key] for key in _ARM_KEYS if key != "zero_computation"}
    if not lm.zero_computation:
        plus = {**VANILLA, "k": lm.k}

    def changed(**values: Any) -> dict[str, Any]:
        return {**plus, **values} if lm.zero_computation else plus

    arms = {
        "MoE++": plus,
        "MoE": {**VANILLA, "k": 2},
        "MoE, one expert": {**VANILLA, "k": 1},
        "no residual": changed(pathway=False),
    }
    arms |= {f"tau {tau}": changed(tau=tau) for tau in train.taus}
    return arms | {f"no {kind}": changed(**{f"n_{kind}": 0}) for kind in train.ablations}


def _jobs(cfg: Any, ctx: Context, arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One job per distinct arm and seed, in the order of the arms."""
    from omegaconf import OmegaConf

    lm: dict[str, Any] = OmegaConf.to_container(cfg.lm)  # type: ignore[assignment]
    train: dict[str, Any] = OmegaConf.to_container(cfg.train)  # type: ignore[assignment]
    model = {key: value for key, value in lm.items() if key not in _ARM_KEYS}
    train = {key: value for key, value in train.items() if key not in ("taus", "ablations")}
    distinct: list[Mapping[str, Any]] = []
    for arm in arms.values():
        if arm not in distinct:
            distinct.append(arm)
    shown = arms["MoE++"] if cfg.lm.zero_computation else None
    return [
        {"arm": dict(arm), "seed": seed, "model": model, "train": train, "root": cfg.data.root,
         "show": SHOWN_BYTES if arm is shown and seed == ctx.seeds[0] else 0}
        for arm in distinct for seed in ctx.seeds
    ]  # fmt: skip


@experiment(
    claims=[
        "better_quality", "quality_kept", "flops_saved", "better_than_one_expert", "trained_ffn_experts", "quality_grows_with_tau",
        "dynamic_ffn_experts", "residual_steadies_routing", "residual_helps", *(f"all_kinds_{kind}" for kind in KINDS),
    ],
    config=["lm", "train", "data"],
)  # fmt: skip
def language_models(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Every arm sees the same bytes in the same order; numbers are from files that no arm has seen."""
    from papers.moepp.jobs import train_job

    arms = arms_of(cfg)
    found: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in arms}
    artifacts = []
    for job, result, workdir in ctx.map("training on source code", train_job, _jobs(cfg, ctx, arms)):
        for name, arm in arms.items():
            if json.dumps(arm, sort_keys=True) == json.dumps(job["arm"], sort_keys=True):
                found[name][job["seed"]] = result
        if job["show"]:
            artifacts.append(Artifact("moepp.pt", workdir / "model.pt"))
    yield from _claims(cfg, ctx.seeds, found)
    yield from _tables(ctx.seeds, found, f"tau {min(cfg.train.taus)}")
    yield from artifacts
    shown = next((result["shown"] for result in found["MoE++"].values() if "shown" in result), None)
    if shown is not None:
        from papers.moepp.pictures import coloured_text

        values = sorted(shown["ffn"])
        limits = values[len(values) // 50], values[-len(values) // 50]
        png = coloured_text(shown["text"], [min(max(v, limits[0]), limits[1]) for v in shown["ffn"]], limits)
        title = "How many FFN experts each byte of an unseen file uses"
        yield Picture("coloured_text", title, png, "first seed, mean over layers; at most K = 2")


def _claims(cfg: Any, seeds: Sequence[int], found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Iterator[Result]:
    def column(name: str, key: str = "bits_per_byte") -> list[float]:
        return [found[name][seed][key] for seed in seeds]

    def saved(name: str) -> list[float]:
        """Bits per byte that MoE++ saves over another arm, by seed."""
        return [other - ours for other, ours in zip(column(name), column("MoE++"), strict=True)]

    steps = f"{cfg.train.steps} steps, same batches for both arms"
    yield seed_measurement("better_quality", saved("MoE"), steps)
    loss = [100 * (ours / other - 1) for other, ours in zip(column("MoE"), column("MoE++"), strict=True)]
    yield seed_measurement("quality_kept", loss, steps)
    flops = zip(column("MoE", "ffn_flops_per_token"), column("MoE++", "ffn_flops_per_token"), strict=True)
    yield seed_measurement("flops_saved", [100 * (1 - ours / other) for other, ours in flops])
    yield seed_measurement("better_than_one_expert", saved("MoE, one expert"), steps)
    yield seed_measurement("trained_ffn_experts", column("MoE++", "ffn_per_token"), "mean over layers and unseen bytes")
    low = min(cfg.train.taus)
    yield seed_measurement("quality_grows_with_tau", saved(f"tau {low}"), f"tau {low} against {cfg.lm.tau}")
    spreads = zip(column("MoE++", "spread"), column("MoE++", "spread_shuffled"), strict=True)
    beyond = [spread - chance for spread, chance in spreads]
    largest, smallest = _extremes(found["MoE++"][seeds[0]]["ffn_by_class"])
    yield seed_measurement("dynamic_ffn_experts", beyond, f"most: {largest}; fewest: {smallest} (first seed)")
    variances = zip(column("no residual", "top1_variance"), column("MoE++", "top1_variance"), strict=True)
    yield seed_measurement(
        "residual_steadies_routing", [without / with_it for without, with_it in variances], "second and later layers"
    )
    yield seed_measurement("residual_helps", saved("no residual"), steps)
    for kind in KINDS:
        if f"no {kind}" in found:
            yield seed_measurement(f"all_kinds_{kind}", saved(f"no {kind}"), steps)
        else:
            yield NotTested(f"all_kinds_{kind}", f"add {kind} to train.ablations, or scale=full: one more arm per seed")


def _extremes(by_class: Mapping[str, float]) -> tuple[str, str]:
    ordered = sorted(by_class, key=lambda name: by_class[name])
    return tuple(f"{name} {by_class[name]:.2f}" for name in (ordered[-1], ordered[0]))  # type: ignore[return-value]


def _tables(seeds: Sequence[int], found: Mapping[str, Mapping[int, Mapping[str, Any]]], other: str) -> Iterator[Table]:
    rows, classes, curves = [], [], []
    for name, results in found.items():
        bits, low, high = mean_interval([results[seed]["bits_per_byte"] for seed in seeds])
        ffn = sum(results[seed]["ffn_per_token"] for seed in seeds) / len(seeds)
        first = results[seeds[0]]
        rows.append({"arm": name, "bits_per_byte": bits, "ci_low": low, "ci_high": high, "FFN experts per token": ffn,
                     "FFN MFLOP per token": first["ffn_flops_per_token"] / 1e6, "top-1 probability": first["top1_mean"],
                     "its variance": first["top1_variance"], "parameters": first["parameters"]})  # fmt: skip
        curves += [
            {"arm": name, "step": index * first["losses_every"], "loss": value}
            for index, value in enumerate(first["losses"])
        ]
    digest = next(iter(found["MoE"].values()))
    note = f"{digest['corpus_bytes']:,} training bytes, SHA-256 of the corpus {digest['corpus'][:12]}"
    plot = Plot(
        "scatter",
        "FFN MFLOP per token",
        "bits_per_byte",
        "arm",
        error=("ci_low", "ci_high"),
        ylabel="bits per unseen byte",
    )
    yield Table(
        "pareto", "Quality against FFN work that was done, counted from the routing of unseen text", rows, plot, note
    )
    for name in ("MoE++", other):
        for kind in found[name][seeds[0]]["ffn_by_class"]:
            values = [
                results["ffn_by_class"][kind] for results in found[name].values() if kind in results["ffn_by_class"]
            ]
            classes.append({"arm": name, "bytes": kind, "FFN experts": sum(values) / len(values)})
    yield Table(
        "by_class",
        "FFN experts per byte by kind of byte, mean over seeds",
        classes,
        Plot("bar", "bytes", "FFN experts", "arm"),
    )
    yield Table(
        "curves",
        "Training loss of the first seed, nats per byte and balance loss",
        curves,
        Plot("line", "step", "loss", "arm"),
    )
