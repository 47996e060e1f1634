"""The stand-in: small models trained on ClutterDigits, pruned in all ways, compared at equal FLOPs and at equal latency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import (
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

MAIN, HARD = "0.65", "0.5"  # shares of the FLOPs: -35 % as in the abstract, and half


@experiment(
    claims=[
        "loss_against_random", "wpr_beats_random", "full_beats_random", "eir_helps", "s_stage_helps", "vhf_helps", "class_start_helps",
        "beats_tome", "beats_tome_half", "beats_class_row_half", "vhf_costs_here",
    ],
    config=["standin", "data"],
)  # fmt: skip
def standin(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Accuracy by method at equal FLOPs, paired over seeds."""
    results, folders = _results(cfg, ctx)
    seeds = list(ctx.seeds)

    def accuracy(seed: int, share: str, method: str) -> float:
        if method == "base":
            return float(results[seed]["base"])
        return float(results[seed]["shares"][share]["accuracy"][method])

    def gap(claim: str, method: str, other: str, share: str = MAIN) -> Result:
        gaps = [accuracy(s, share, method) - accuracy(s, share, other) for s in seeds]
        return seed_measurement(claim, gaps, f"at {float(share):.0%} of the FLOPs")

    def best_tome(seed: int, share: str) -> float:
        return max(accuracy(seed, share, "tome constant"), accuracy(seed, share, "tome searched"))

    lost = {m: [accuracy(s, MAIN, "base") - accuracy(s, MAIN, m) for s in seeds] for m in ("full", "random")}
    if all(against > 0 for against in lost["random"]):
        shares = [ours / against for ours, against in zip(lost["full"], lost["random"], strict=True)]
        yield seed_measurement("loss_against_random", shares)
    else:
        yield NotTested("loss_against_random", "random dropping loses nothing here: the models are not trained")
    yield gap("wpr_beats_random", "wpr", "random")
    yield gap("full_beats_random", "full", "random")
    yield gap("eir_helps", "wpr+eir", "wpr")
    yield gap("s_stage_helps", "full", "wpr+eir")
    yield gap("vhf_helps", "full vhf 0.01-0.7", "full")
    yield gap("class_start_helps", "full", "full uniform start")
    for claim, share in (("beats_tome", MAIN), ("beats_tome_half", HARD)):
        yield seed_measurement(
            claim, [accuracy(s, share, "full") - best_tome(s, share) for s in seeds], "against the better of two ToMe"
        )
    yield gap("beats_class_row_half", "full", "class row", HARD)
    yield gap("vhf_costs_here", "full", "full vhf 0.01-0.7", HARD)

    rows = []
    for share in results[seeds[0]]["shares"]:
        for method in results[seeds[0]]["shares"][share]["accuracy"]:
            mean, low, high = mean_interval([accuracy(s, share, method) for s in seeds])
            rows.append({"flops_share": float(share), "method": method, "accuracy_percent": mean, "low": low if len(seeds) > 1 else mean,
                         "high": high if len(seeds) > 1 else mean})  # fmt: skip
    bases = [accuracy(s, MAIN, "base") for s in seeds]
    base = sum(bases) / len(bases)
    title = f"ClutterDigits: accuracy at equal FLOPs, {len(seeds)} seeds (unpruned {base:.1f} %, {min(bases):.1f} to {max(bases):.1f})"
    yield Table("standin", title, rows, Plot("line", "flops_share", "accuracy_percent", "method", hline=base))
    plans = [
        {"seed": s, "flops_share": float(share), "schedule": str(found["plans"]["schedule"]),
         "tome_searched": str(found["plans"]["tome searched"]), "ats_share": found["ats_share"],
         "heads_filtered_by_vhf": found["heads_filtered"]}
        for s in seeds for share, found in results[s]["shares"].items() if "ats_share" in found
    ]  # fmt: skip
    title = "Chosen schedules ([block, keep, drop, votes]) and the share of heads that the paper's VHF bounds filter"
    yield Table("standin_plans", title, plans)
    yield _survivors(cfg, seeds[0], folders[seeds[0]], results[seeds[0]])


@experiment(claims=["equal_latency_tome", "equal_latency_class_row"], config=["standin", "data"])
def equal_latency(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Zero-TPrune at -35 % FLOPs against the others at the same latency measured on this CPU, accuracies interpolated over latency."""
    import numpy as np

    from papers.zero_tprune.experiments.latency import latencies

    claims = {"equal_latency_tome": "tome constant", "equal_latency_class_row": "class row"}
    if not cfg.standin.timed:
        for claim in claims:
            yield NotTested(claim, "standin.timed=false")
        return
    results, _ = _results(cfg, ctx)
    gaps: dict[str, list[float]] = {claim: [] for claim in claims}
    rows = []
    for seed in ctx.seeds:
        shares = results[seed]["shares"]
        seconds = latencies({share: found["plans"] for share, found in shares.items()}, batch=64)
        ours = seconds["full", MAIN]
        for claim, method in claims.items():
            points = [(seconds[method, share], found["accuracy"][method]) for share, found in shares.items()]
            points = sorted([(seconds["base", ""], results[seed]["base"]), *points])
            other = float(np.interp(ours, [p[0] for p in points], [p[1] for p in points]))
            gaps[claim].append(shares[MAIN]["accuracy"]["full"] - other)
        rows += [
            {"seed": seed, "method": method, "flops_share": float(share or 1), "ms_per_image": 1e3 * value / 64,
             "accuracy_percent": results[seed]["base"] if method == "base" else shares[share]["accuracy"][method]}
            for (method, share), value in seconds.items()
        ]  # fmt: skip
    for claim, values in gaps.items():
        yield seed_measurement(claim, values, "latency measured on this CPU, plain torch, batch 64")
    yield Table(
        "latency",
        "Accuracy against latency on this CPU",
        rows,
        Plot("scatter", "ms_per_image", "accuracy_percent", "method"),
    )


def _results(cfg: Any, ctx: Context) -> tuple[dict[int, Any], dict[int, Any]]:
    """Trained and evaluated models by seed, and the folders with their weights."""
    from papers.zero_tprune import standin as jobs

    s, root = cfg.standin, cfg.data.root if cfg.standin.source == "mnist" else None
    common = {"source": s.source, "root": root}
    training = [{"seed": seed, "steps": s.steps, "batch": s.batch, "lr": s.lr, **common} for seed in ctx.seeds]
    folders = {job["seed"]: folder for job, _, folder in ctx.map("train", jobs.train_seed, training)}
    evaluation = [
        {"seed": seed, "checkpoint": str(folders[seed] / jobs.CHECKPOINT), "test_images": s.test_images,
         "calibration_images": s.calibration_images, "draws_per_method": s.draws,
         "shares": list(s.shares), "curve": list(s.curve), "scorer": s.scorer, **common}
        for seed in ctx.seeds
    ]  # fmt: skip
    results = {job["seed"]: result for job, result, _ in ctx.map("prune and test", jobs.evaluate_seed, evaluation)}
    return results, folders


def _survivors(cfg: Any, seed: int, folder: Any, result: Any) -> Picture:
    from papers.zero_tprune.experiments.pictures import survivors
    from papers.zero_tprune.standin import CHECKPOINT

    layers = result["shares"][HARD]["plans"]["schedule"]
    root = cfg.data.root if cfg.standin.source == "mnist" else None
    png = survivors(seed, folder / CHECKPOINT, layers, cfg.standin.source, root)
    return Picture("survivors", "Which patches survive, layer by layer, at half of the FLOPs (dark: dropped)", png)
