"""Counts on the full-size configurations and arithmetic on the printed tables: neither training nor a clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.moepp.experiments.rows import MODELS, TAUS
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

COMPLEXITY = (("06b", "010"), ("06b", "075"), ("1b", "010"), ("1b", "075"), ("7b", "075"))


@experiment(
    claims=[
        *(f"complexity_{model}_{tau}" for model, tau in COMPLEXITY), "zero_computation_parameters", "activated_06b", "activated_1b",
        "activated_7b", "activated_7b_two_embeddings",
    ],
    config=["counting"],
)  # fmt: skip
def counts(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Parameters of the four models, and FFN work counted from an exact routing."""
    from papers.moepp.shape import SHAPES, activated_parameters, expert_flops_per_token, parameters

    for model, tau in COMPLEXITY:
        share, assignments = _counted_share(MODELS[model], TAUS[tau], cfg.counting)
        yield Measurement(f"complexity_{model}_{tau}", share, note=f"{assignments:,} assignments counted")
    sizes = {name: (parameters(s), parameters(s.vanilla())) for name, s in SHAPES.items()}
    shares = {name: 100 * (plus.total - vanilla.total) / vanilla.total for name, (plus, vanilla) in sizes.items()}
    worst = max(MODELS.values(), key=lambda name: shares[name])
    extra = sizes[worst][0].total - sizes[worst][1].total
    yield Measurement("zero_computation_parameters", shares[worst], note=f"{extra:,} parameters at {worst}")
    for model, name in MODELS.items():
        exact = activated_parameters(SHAPES[name])
        yield Measurement(f"activated_{model}", exact / 1e9, note=f"{exact:,}")
    yield Measurement("activated_7b_two_embeddings", activated_parameters(SHAPES["7B"], 2) / 1e9)
    rows = [
        {"model": name, "MoE": vanilla.total, "MoE++": plus.total, "zero-computation experts": plus.zero_computation,
         "router and residual": plus.router + plus.pathway, "activated": activated_parameters(SHAPES[name]),
         "FFN GFLOP/token": expert_flops_per_token(SHAPES[name]) / 1e9}
        for name, (plus, vanilla) in sizes.items()
    ]  # fmt: skip
    yield Table("parameters", "Parameters and FLOPs, counted", rows, note="65,536 tokens of vocabulary, untied head")


def _counted_share(name: str, tau: float, section: Any) -> tuple[float, int]:
    from papers.moepp.shape import SHAPES
    from papers.moepp.synthetic import exact_routing

    s = SHAPES[name] if section.zero_computation else SHAPES[name].vanilla()
    ids = exact_routing(section.tokens, s.k, s.experts, tau)
    return int((ids < s.experts.ffn).sum()) / ids.numel(), ids.numel()


@experiment(
    claims=[
        "openmoe_compute", "fastest_1b_without_boolq", "faster_and_better_1b", "faster_and_better_7b", "fastest_06b_is_worse",
        "share_of_bound_1b_010", "affine_held_out_1b", "affine_held_out_06b", "constants_of_eq_10",
    ]
)  # fmt: skip
def printed_tables(cfg: Any, ctx: Context) -> Iterator[Result]:
    """What follows from the printed tables alone."""
    from papers.moepp.hardware import affine_law
    from papers.moepp.routing import published_constants
    from papers.moepp.shape import SHAPES

    p = ctx.published
    yield Measurement("openmoe_compute", p["activated_7b"] / p["activated_openmoe"])
    without = p["without_boolq_1b"]
    yield Measurement("fastest_1b_without_boolq", without["010"] - without["moe"])
    ratios = {tau: p["expert_s_1b_moe"] / p[f"expert_s_1b_{tau}"] for tau in TAUS}
    yield Measurement("faster_and_better_1b", max(ratios[tau] for tau in TAUS if without[tau] > without["moe"]))
    yield Measurement("faster_and_better_7b", p["without_boolq_7b"]["075"] - p["without_boolq_7b"]["moe"])
    yield Measurement("fastest_06b_is_worse", p["average_06b"]["010"] - p["average_06b"]["moe"])
    yield Measurement("share_of_bound_1b_010", 100 * ratios["010"] * SHAPES["1B"].rho(0.1))
    rows = []
    for model in ("06b", "1b"):
        s, times = SHAPES[MODELS[model]], [p[f"expert_s_{model}_{tau}"] for tau in TAUS]
        rho = [s.rho(tau) for tau in TAUS.values()]
        a, b = affine_law(rho, times)
        moe = p[f"expert_s_{model}_moe"]
        yield Measurement(
            f"affine_held_out_{model}", 100 * ((a + b) / moe - 1), note=f"a = {1e3 * a:.1f} ms, b = {1e3 * b:.1f} ms"
        )
        for share, seconds in zip([*rho, 1.0], [*times, moe], strict=True):
            rows += [
                {"model": MODELS[model], "rho": share, "series": f"{MODELS[model]} printed", "ms": 1e3 * seconds},
                {
                    "model": MODELS[model],
                    "rho": share,
                    "series": f"{MODELS[model]} a + b·rho",
                    "ms": 1e3 * (a + b * share),
                },
            ]
    plot = Plot("line", "rho", "ms", "series", xlabel="rho, FFN share of the assignments", ylabel="ms")
    yield Table(
        "affine", "Tab. 3 and the line through its MoE++ rows; rho = 1 is the MoE row, not used in the fit", rows, plot
    )
    yield Measurement("constants_of_eq_10", float(published_constants(8)), note=f"Tab. 2 has {p['constants_06b']}")


@experiment(
    claims=["literal_capacity", "untrained_share", "sampled_share", "parallel_balance", "parallel_bytes"],
    config=["parallel"],
)
def routing_facts(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Capacity, untrained and sampled routing, and the bytes of an all-to-all counted from routed assignments."""
    import math

    import torch

    from papers.moepp.hardware import all_to_all_bytes, sampled_share
    from papers.moepp.layer import MoEPlusPlus
    from papers.moepp.shape import SHAPES, expert_flops_per_token
    from papers.moepp.synthetic import exact_routing

    small, s = SHAPES["0.6B"], SHAPES["1B"]
    experts, tokens = small.experts, 2048
    share = 1.1 * tokens / (0.75 * experts.ffn + experts.zero_computation)
    places = experts.ffn * math.ceil(0.75 * share) + experts.zero_computation * math.ceil(share)
    yield Measurement(
        "literal_capacity", 100 * (1 - places / (2 * tokens)), note=f"{places} places for {2 * tokens} assignments"
    )
    torch.manual_seed(ctx.seed)
    with torch.no_grad():
        shares = []
        for _ in range(64):  # experts of one layer differ by chance
            layer = MoEPlusPlus(64, 8, experts.ffn, tau=0.1, n_constant=experts.constant)
            ids = layer.route(torch.randn(512, 64), None).ids
            shares.append(float((ids < experts.ffn).float().mean()))
    yield Measurement("untrained_share", sum(shares) / len(shares), note="mean over 64 fresh layers")
    yield Measurement("sampled_share", sampled_share(small, 0.1))
    rho = s.rho(0.1)
    vanilla = float(all_to_all_bytes(s, 1.0, 1024, 2)) / expert_flops_per_token(s)
    ours = float(all_to_all_bytes(s, rho, 1024, 2)) / expert_flops_per_token(s, 0.1)
    yield Measurement("parallel_balance", ours / vanilla)
    ids = exact_routing(cfg.parallel.tokens, s.k, s.experts, 0.75)
    travels = ids < (s.experts.ffn if cfg.parallel.zero_computation_local else s.experts.total)
    home = (
        (ids.clamp(max=s.experts.ffn - 1) < s.experts.ffn // 2) if cfg.parallel.zero_computation_local else ids % 2 == 0
    )
    sent = int((travels & ~home).sum()) * s.d_model * 2
    base = float(all_to_all_bytes(s, 1.0, cfg.parallel.tokens, 2))
    yield Measurement(
        "parallel_bytes",
        sent / base,
        note=f"{sent / 1e6:.1f} of {base / 1e6:.1f} MB from rank 0 of 2, counted row by row",
    )
