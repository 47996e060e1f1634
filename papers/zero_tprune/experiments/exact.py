"""Counts, arithmetic and facts that need neither data nor a clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

PROTOTYPE = ((3, 0.9), (6, 0.8), (9, 0.7))  # the authors' early notebook: I-stage only


@experiment(
    claims=[
        "baseline_flops", "flops_cut_a", "flops_cut_b", "ablation_flops", "prototype_flops_tiny", "prototype_flops_small",
        "prototype_flops_base", "augreg_flops", "mixed_conventions", "tome_count",
    ],
    config=["exact"],
)  # fmt: skip
def counts(cfg: Any, ctx: Context) -> Iterator[Result]:
    """FLOPs in the authors' convention, to the last digit."""
    from papers.zero_tprune.budget import solve
    from papers.zero_tprune.counts import flops
    from papers.zero_tprune.plans import EViT, Layer, Rule, Schedule, ToMe, family
    from papers.zero_tprune.shape import DEIT_B, DEIT_S, DEIT_T, plain

    convention, prunes = cfg.exact.convention, cfg.exact.prunes
    base = flops(DEIT_S).total(convention)
    yield Measurement("baseline_flops", base / 1e9, note=f"{base:,} MAC, {convention}")
    for claim, printed in (("flops_cut_a", "flops_a"), ("flops_cut_b", "flops_b")):
        value = 100 * (1 - ctx.published[printed] * 1e9 / base)
        yield Measurement(
            claim, value, note="the paper's FLOPs over our exact baseline; the schedule behind them is not published"
        )
    ablation = family(12, 196, 0.1)
    yield Measurement("ablation_flops", flops(DEIT_S, ablation if prunes else None).total(convention) / 1e9)
    prototype = Schedule(tuple(Layer(after, keep) for after, keep in PROTOTYPE), Rule(method="random"))
    for claim, shape in (
        ("prototype_flops_tiny", DEIT_T),
        ("prototype_flops_small", DEIT_S),
        ("prototype_flops_base", DEIT_B),
    ):
        yield Measurement(claim, flops(shape, prototype if prunes else None).total("model"))
    augreg = plain("vit_small_patch16_224", 12, 384, 6)
    yield Measurement("augreg_flops", flops(augreg).total(convention) / 1e9)
    gap = flops(DEIT_S).total("model") - flops(DEIT_S).total("blocks")
    yield Measurement("mixed_conventions", 100 * gap / (ctx.published["flops_a"] * 1e9))
    merged = flops(DEIT_S, ToMe((13,) * 12))
    yield Measurement("tome_count", (merged.total("model") - merged.pruning) / 1e9)

    plans = {
        "unpruned": None,
        "prototype 0.9/0.8/0.7": prototype,
        "ablation (recalled)": ablation,
        "Zero-TP-a (solved)": solve(DEIT_S, ctx.published["flops_a"] * 1e9),
        "Zero-TP-b (solved)": solve(DEIT_S, ctx.published["flops_b"] * 1e9),
        "ToMe r=8": ToMe((8,) * 12),
        "ToMe r=13": ToMe((13,) * 12),
        "EViT 0.7": EViT(0.7),
    }
    rows = []
    for name, plan in plans.items():
        count = flops(DEIT_S, plan)
        patches = plan.patches(12, 196) if plan else (196,) * 13
        rows.append({
            "plan": name, "blocks_gflops": count.total("blocks") / 1e9, "model_gflops": count.total("model") / 1e9,
            "pruning_mflops": count.pruning / 1e6, "patches": " ".join(map(str, patches)),
        })  # fmt: skip
    yield Table("flops", "DeiT-S in both conventions (1 MAC = 1 FLOP, as the paper counts)", rows)


@experiment(claims=["loss_reduction", "same_throughput"])
def tables(cfg: Any, ctx: Context) -> Iterator[Result]:
    """What the paper's own tables give."""
    p = ctx.published
    before, after = p["lvvit_accuracy"] - p["lvvit_tome"], p["lvvit_accuracy"] - p["lvvit_zero"]
    yield Measurement("loss_reduction", 100 * (1 - after / before), note="LV-ViT-S against ToMe, 3.5 and 3.6 GFLOPs")
    yield Measurement(
        "same_throughput", p["throughput_tome"] / p["throughput_a"], note="ToMe at 2.95 over Zero-TP-a at 2.97 GFLOPs"
    )
    rows = []
    for name, base, zero, other in (("AugReg, ATS", 81.41, 80.22, 79.21), ("AugReg, ToMe", 81.41, 80.22, 79.30),
                                    ("LV-ViT-S, ATS", 83.3, 81.5, 80.4), ("LV-ViT-S, ToMe", 83.3, 81.5, 79.8),
                                    ("DeiT-S, ATS", 79.8, 79.4, 79.2)):  # fmt: skip
        rows.append({"pair": name, "loss_reduction_percent": 100 * (1 - (base - zero) / (base - other))})
    plot = Plot("bar", "pair", "loss_reduction_percent", ylabel="percent")
    yield Table("loss_reductions", "Reduction of the accuracy loss in all pairs of the paper's tables", rows, plot)


@experiment(claims=["no_retraining"])
def switching(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Two schedules on one model: which parameters changed?"""
    import timm
    import torch

    from papers.zero_tprune.plans import family
    from papers.zero_tprune.pruner import prune

    torch.manual_seed(ctx.seed)
    model: Any = timm.create_model("test_vit").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.no_grad(), prune(model, family(6, 100, 0.1)) as pruner:
        first = model(images)
        pruner.plan = family(6, 100, 0.25)
        second = model(images)
    after = model.state_dict()
    changed = len(before.keys() ^ after.keys()) + sum(not torch.equal(before[key], after[key]) for key in before)
    if torch.equal(first, second):
        raise RuntimeError("the second schedule did nothing")
    yield Measurement("no_retraining", changed, note="state-dict entries that differ after two schedules")


@experiment(claims=["vhf_trap", "transposition"], config=["graph"])
def graph(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The two mistakes that an implementation makes easily."""
    import torch

    from papers.zero_tprune.importance import head_mask, start_vector

    tokens, generator = 197, torch.Generator().manual_seed(ctx.seed)
    logits = torch.randn(tokens, tokens, generator=generator)
    sharp = torch.logspace(-2, 3, 24)[:, None, None]  # heads from no opinion to one token each
    a = (sharp * (logits + 3 * torch.randn(tokens, generator=generator))).softmax(dim=-1)
    received = start_vector(tokens, 1).expand(len(sharp), -1)
    given = received
    for _ in range(30):
        received = torch.einsum("hqk,hq->hk", a, received)
        given = torch.einsum("hqk,hk->hq", a, given)
    bounds = tuple(cfg.graph.vhf)
    patches = received[:, 1:] / (tokens if cfg.graph.vhf_scale == "sum1" else 1)
    variance = patches.var(dim=-1, correction=0)
    outside = ((variance < bounds[0]) | (variance > bounds[1])).float().mean()
    note = f"largest possible variance of {tokens} scores of sum 1: {(1 - 1 / tokens) / tokens:.5f}"
    yield Measurement("vhf_trap", 100 * float(outside), note=note)
    votes = given if cfg.graph.transposed else received
    typical = 12  # a head of medium sharpness
    yield Measurement("transposition", float(votes[typical].std() / votes[typical].mean()))
    kept = head_mask(received[None], 1, bounds, "mean1")[0]
    yield Table(
        "vhf", "Variance of the scores of 24 synthetic heads, flat to sharp, and what the bounds do",
        [{"sharpness": float(s), "variance_mean1": float(v * (tokens**2 if cfg.graph.vhf_scale == "sum1" else 1)), "kept_mean1": bool(k)}
         for s, v, k in zip(sharp[:, 0, 0], variance, kept, strict=True)],
        Plot("line", "sharpness", "variance_mean1", log_x=True, log_y=True),
    )  # fmt: skip


@experiment(
    claims=["target_met"], config=["model", "weights", "pretrained", "flops", "latency", "rule", "hardware", "device"]
)
def target(cfg: Any, ctx: Context) -> Iterator[Result]:
    """``model=… flops=…``: the schedule, its counts, and its modelled latency on ``device=…``."""
    from papers.zero_tprune.counts import flops
    from papers.zero_tprune.experiments.options import assumed_of, rule_of
    from papers.zero_tprune.target import find
    from shared.hardware import load_device

    device, hardware = load_device(cfg.device), cfg.hardware
    found = find(
        cfg.model, weights=cfg.weights, flops=cfg.flops, latency=cfg.latency, device=device, dtype=hardware.dtype, batch=hardware.batch,
        assumed=assumed_of(hardware), rule=rule_of(cfg.rule),
    )  # fmt: skip
    note = f"asked for {found.asked:.4g} of the unpruned model, got {found.got:.4g}: {found.describe()}"
    yield Measurement("target_met", 100 * abs(found.got / found.asked - 1), note=note)
    yield Table("schedule", f"{cfg.model}: schedule for {found.what} = {found.asked:.3g}", found.rows())
    unpruned, pruned = flops(found.shape), flops(found.shape, found.plan)
    yield Table(
        "your_model", f"{cfg.model} on {device.title}, {hardware.dtype}, batch {hardware.batch} (modelled)",
        [{"plan": name, "blocks_gflops": count.total("blocks") / 1e9, "model_gflops": count.total("model") / 1e9,
          "latency_s": found.seconds(plan)} for name, count, plan in (("unpruned", unpruned, None), ("pruned", pruned, found.plan))],
    )  # fmt: skip
