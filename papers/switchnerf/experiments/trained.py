"""Training on the small city: the surface field (tier 0) for most claims, full rendering (tier 1) as a check of the whole pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.experiment import (
    Artifact,
    Context,
    Measurement,
    Picture,
    Plot,
    Result,
    Table,
    experiment,
    mean_interval,
    seed_measurement,
)

Fits = dict[tuple[int, str], dict[str, Any]]


@experiment(
    claims=["hash_over_mlp", "more_experts_help", "experts_used", "drops_fall", "hetero_helps", "hetero_helps_oracle",
            "hash_gate_helps", "learned_over_fixed", "equal_parameters", "ranges_matter", "capacity_helps"],
    config=["arms", "tier0"],
)  # fmt: skip
def surface_field(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Every arm on the same rays; the MLP rival has its own learning-rate grid, chosen on validation rays, and equal CPU time."""
    a = cfg.arms
    fits, tuned = _fit_all(cfg, ctx)
    seeds = list(ctx.seeds)

    def psnr(seed: int, name: str) -> float:
        return float(fits[seed, name]["psnr"])

    def gap(claim: str, ours: str, theirs: str, note: str = "") -> Measurement:
        return seed_measurement(claim, [psnr(s, ours) - psnr(s, theirs) for s in seeds], note)

    def best(seed: int, names: Any) -> float:
        return max(psnr(seed, name) for name in names)

    margins = ", ".join(f"{psnr(s, a.ours) - psnr(s, a.mlp):+.2f}" for s in seeds)
    yield gap("hash_over_mlp", a.ours, a.mlp, f"by seed: {margins} dB")
    yield gap("more_experts_help", a.many, a.single, "equal ranges 16 to 512, tables of 2^12")
    shares = [_least_used(fits[s, a.ours]["expert_share"]) for s in seeds]
    yield seed_measurement("experts_used", shares, "share of the least used expert on test points")
    drops = [fits[s, a.ours]["drop_rate"] for s in seeds]
    yield seed_measurement(
        "drops_fall", [d[0] - d[1] for d in drops], f"from {_mean(drops, 0):.2f} to {_mean(drops, 1):.2f}"
    )
    hetero = [psnr(s, a.ours) - best(s, a.homogeneous) for s in seeds]
    yield seed_measurement("hetero_helps", hetero, "against the best of three homogeneous ranges in every seed")
    oracle = [psnr(s, a.oracle) - best(s, a.oracle_homogeneous) for s in seeds]
    yield seed_measurement("hetero_helps_oracle", oracle, "against the better of two homogeneous ranges in every seed")
    yield gap("hash_gate_helps", a.ours, a.mlp_gate)
    yield gap("learned_over_fixed", a.mlp, a.mlp_fixed)
    yield gap("equal_parameters", a.single_equal, a.ours, "one table of 2^14 per level against four of 2^12")
    yield gap("ranges_matter", a.oracle, a.reversed)
    yield gap("capacity_helps", a.ours, a.open)
    yield _summary(fits, seeds)
    yield _by_detail(fits, seeds)
    curve = [
        {"experts": count, "seed": s, "psnr_db": psnr(s, name)}
        for count, name in zip((1, 4, 8), a.curve, strict=True)
        for s in seeds
    ]
    title = "PSNR by number of experts at a fixed table size"
    yield Table("experts_curve", title, curve, Plot("line", "experts", "psnr_db", "seed", log_x=True))
    title = "The MLP rival's learning rates: validation PSNR, and the one chosen in each seed"
    yield Table("mlp_rates", title, tuned)


def _arm_names(a: Any) -> list[str]:
    listed = [a.ours, a.many, a.open, a.single, a.single_equal, a.mlp_gate, *a.homogeneous, a.oracle, *a.oracle_homogeneous,
              a.reversed, a.mlp, a.mlp_fixed, *a.curve]  # fmt: skip
    return list(dict.fromkeys(listed))


def _fit_all(cfg: Any, ctx: Context) -> tuple[Fits, list[dict[str, Any]]]:
    """All fits by seed and arm; of the MLP arms the learning rate with the best validation PSNR."""
    from papers.switchnerf.jobs import fit_surface

    t = cfg.tier0
    jobs = []
    for seed in ctx.seeds:
        common = {"seed": seed, "batch": t.batch, "train_rays": t.train_rays, "test_rays": t.test_rays}
        for name in _arm_names(cfg.arms):
            if name.startswith("mlp"):
                jobs += [{**common, "arm": name, "steps": t.mlp_steps, "lr": lr} for lr in t.mlp_lrs]
            else:
                jobs.append({**common, "arm": name, "steps": t.steps, "lr": t.lr})
    fits: Fits = {}
    rates: dict[tuple[int, str], float] = {}
    tuned = []
    for job, result, _ in ctx.map("surface field", fit_surface, jobs):
        key = (job["seed"], job["arm"])
        if key not in fits or result["validation_psnr"] > fits[key]["validation_psnr"]:
            fits[key], rates[key] = result, job["lr"]
        if job["arm"].startswith("mlp"):
            row = {
                "arm": job["arm"],
                "seed": job["seed"],
                "lr": job["lr"],
                "validation_psnr_db": result["validation_psnr"],
            }
            tuned.append(row)
    for row in tuned:
        row["chosen"] = rates[row["seed"], row["arm"]] == row["lr"]
    return fits, sorted(tuned, key=lambda row: (row["arm"], row["seed"], row["lr"]))


def _summary(fits: Fits, seeds: list[int]) -> Table:
    from papers.switchnerf.arms import num_parameters

    rows = []
    for name in dict.fromkeys(key[1] for key in fits):
        found = [fits[s, name] for s in seeds]
        mean, low, high = mean_interval([f["psnr"] for f in found])
        bounds = {"low": low, "high": high} if len(seeds) > 1 else {"low": mean, "high": mean}
        rows.append({
            "arm": name, "psnr_db": mean, **bounds, "parameters": num_parameters(name),
            "cpu_s": sum(f["cpu_s"] for f in found) / len(found), "drop_at_end": sum(f["drop_rate"][1] for f in found) / len(found),
        })  # fmt: skip
    rows.sort(key=lambda row: str(row["arm"]))
    plot = Plot("bar", "arm", "psnr_db", ylabel="test PSNR, dB", error=("low", "high"))
    return Table("surface_field", f"Surface field: all arms, {len(seeds)} seeds", rows, plot)


def _by_detail(fits: Fits, seeds: list[int]) -> Table:
    rows = [
        {
            "arm": name,
            "cycles_per_unit": str(frequency),
            "psnr_db": sum(fits[s, name]["district_psnr"][k] for s in seeds) / len(seeds),
        }
        for name in sorted({key[1] for key in fits})
        for k, frequency in enumerate((2, 8, 24, 64))
    ]
    title = "Surface field by district: the finer the texture, the lower the PSNR"
    return Table("by_detail", title, rows, Plot("bar", "arm", "psnr_db", "cycles_per_unit"))


def _least_used(share: list[float], experts: int = 4) -> float:
    """Share of the least used of ``experts``; those beyond the last used one saw nothing."""
    return min([*share, *[0.0] * (experts - len(share))])


def _mean(drops: list[list[float]], end: int) -> float:
    return sum(d[end] for d in drops) / len(drops)


@experiment(claims=["hash_over_mlp_rendering", "rendering_margin"], config=["tier1", "pictures"])
def rendering(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Train on images of the city with one proposal round; test on unseen views; draw the expert map and a flight."""
    from papers.switchnerf.jobs import CHECKPOINT, fit_images

    t = cfg.tier1
    same = {"steps": t.steps, "batch": t.batch, "views": t.views, "test_views": t.test_views, "pixels": t.pixels,
            "proposal_samples": t.proposal_samples, "samples": t.samples}  # fmt: skip
    names = list(dict.fromkeys([t.ours, t.single, t.mlp]))
    jobs = [
        {"seed": seed, "arm": name, "lr": t.mlp_lr if name.startswith("mlp") else t.lr, **same}
        for seed in ctx.seeds
        for name in names
    ]
    fits: Fits = {}
    folders: dict[tuple[int, str], Path] = {}
    for job, result, folder in ctx.map("rendering", fit_images, jobs):
        fits[job["seed"], job["arm"]] = result
        folders[job["seed"], job["arm"]] = folder

    def gaps(theirs: str) -> list[float]:
        return [fits[s, t.ours]["psnr"] - fits[s, theirs]["psnr"] for s in ctx.seeds]

    yield seed_measurement("hash_over_mlp_rendering", gaps(t.mlp))
    yield seed_measurement("rendering_margin", gaps(t.single))
    rows = [
        {"arm": name, "seed": s, "psnr_db": fits[s, name]["psnr"], "cpu_s": fits[s, name]["cpu_s"],
         "dropped_weight_start": fits[s, name]["dropped_weight"][0], "dropped_weight_end": fits[s, name]["dropped_weight"][1]}
        for s in ctx.seeds for name in names
    ]  # fmt: skip
    yield Table(
        "rendering",
        "Full rendering: test PSNR and rendering weight lost to dropped points",
        rows,
        Plot("bar", "arm", "psnr_db", "seed"),
    )
    seed, name = ctx.seeds[0], t.ours
    yield Artifact(f"{name}-seed{seed}.pt", folders[seed, name] / CHECKPOINT)
    from papers.switchnerf.pictures import city_pictures

    drawn = city_pictures(seed, name, folders[seed, name] / CHECKPOINT, cfg)
    yield Picture("views", "Unseen views: rendered above, true below", drawn.views)
    if drawn.experts is not None:
        note = "Top-down at height 0.03; thin lines: the city as seen from above."
        yield Picture("experts", "Which expert the gate picks, beside the city from above", drawn.experts, note)
    yield Picture("flight", "A flight over the city, rendered by the trained field (an animated PNG)", drawn.flight)
