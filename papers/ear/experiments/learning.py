"""Claims that are learnt from one domain at a time: detection (Sec. 4.3), growth, zero-shot search (Sec. 4.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers.ear.experiments.setup import SECTIONS, by_seed, mean, plain, worlds_of
from shared.experiment import (
    Context,
    Measurement,
    Picture,
    Plot,
    Result,
    Table,
    experiment,
    half_width,
    mean_interval,
    seed_measurement,
)

RIVAL_SCORES = ("grad_norm", "zico", "gram_rank")


@experiment(
    claims=["hdc_beats_msp", "hdc_beats_energy", "mahalanobis_beats_hdc", "centring_destroys"],
    config=[*SECTIONS, "ood", "train"],
)
def ood(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.jobs import SHIFTS, ood_job

    worlds = worlds_of(cfg, ctx)
    options = {"detector": plain(cfg.detector), "dims": list(cfg.ood.dims), "train": plain(cfg.train)}
    results = by_seed(ctx, "detectors", ood_job, [{"seed": s, "world": worlds[s][0], **options} for s in ctx.seeds])
    ours = "HDC, 4 taps" if cfg.ood.exemplars == "learnt" else "HDC, random exemplars"

    def gap(a: str, b: str) -> list[float]:
        return [100 * (r["detectors"][a]["mean"] - r["detectors"][b]["mean"]) for r in results]

    yield seed_measurement("hdc_beats_msp", gap(ours, "MSP"))
    yield seed_measurement("hdc_beats_energy", gap(ours, "energy"))
    yield seed_measurement("mahalanobis_beats_hdc", gap("Mahalanobis, 4 taps", ours))
    yield seed_measurement("centring_destroys", gap("HDC, not centred, grid 1", "HDC, centred per channel"))
    names = list(results[0]["detectors"])
    rows = []
    for name in names:
        found = [r["detectors"][name] for r in results]
        rows.append(
            {
                "detector": name,
                **{d: 100 * mean([f[d] for f in found]) for d in SHIFTS},
                "mean AUROC": 100 * mean([f["mean"] for f in found]),
                "±": half_width([100 * f["mean"] for f in found]),
                "FPR95": 100 * mean([f["fpr95"] for f in found]),
            }
        )
    main = [r for r in rows if ", D=" not in r["detector"]]
    yield Table(
        "detectors",
        "AUROC by shift, clean images in distribution",
        main,
        Plot("bar", "detector", "mean AUROC", error="±"),
    )
    yield Table(
        "dimensions",
        "Dimension, memory and AUROC",
        _pareto(cfg, rows),
        Plot("line", "MB", "mean AUROC", "form", log_x=True),
    )
    yield from _ood_pictures(results[0], worlds[ctx.seeds[0]])


def _pareto(cfg: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from papers.ear.encoder import STAND_IN_CHANNELS
    from papers.ear.world import CLASSES

    width = sum(STAND_IN_CHANNELS) * cfg.detector.grid**2
    result = []
    for row in rows:
        if ", D=" in row["detector"]:
            dim, binary = int(row["detector"].rpartition("=")[2]), "binary" in row["detector"]
            entries = dim * (
                4 * width + CLASSES * (1 / 8 if binary else 4)
            )  # the matrix stays dense, exemplars may be bits
            result.append(
                {
                    "form": "binary" if binary else "float",
                    "D": dim,
                    "MB": entries / 1e6,
                    "mean AUROC": row["mean AUROC"],
                    "±": row["±"],
                }
            )
    return result


def _ood_pictures(result: Mapping[str, Any], world: tuple[str, Any]) -> Iterator[Result]:
    from papers.ear.domains import DOMAINS
    from papers.ear.pictures import domain_grid, histograms
    from papers.ear.world import load_world

    images = load_world(world[1] / "world.pt")
    yield Picture("domains", "The domains", domain_grid({d: images.raw(f"{d}/test")[:12] for d in DOMAINS}))
    yield Picture(
        "scores", "Familiarity of each domain to the first", histograms(result["scores"], result["threshold"])
    )


@experiment(
    claims=["growth_when_needed", "false_growths", "true_growths"],
    config=[*SECTIONS, "growth"],
)
def growth(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.growth import RULES
    from papers.ear.jobs import SHIFTS, growth_job
    from shared.errors import unknown

    if cfg.growth.rule not in RULES:
        raise unknown("growth.rule", cfg.growth.rule, RULES)
    worlds, windows = worlds_of(cfg, ctx), cfg.growth.windows
    options = {"detector": plain(cfg.detector), "window": cfg.growth.window, "windows": windows}
    results = by_seed(ctx, "growth", growth_job, [{"seed": s, "world": worlds[s][0], **options} for s in ctx.seeds])

    def grown(rule: str, kind: str) -> list[int]:
        return [sum(f >= r["limits"][rule] for f in r["failures"][kind]) for r in results]

    false, true = grown(cfg.growth.rule, "stream"), grown(cfg.growth.rule, "shift")
    yield seed_measurement(
        "growth_when_needed", [t / len(SHIFTS) - f / windows for t, f in zip(true, false, strict=True)]
    )
    yield seed_measurement("false_growths", false)
    yield seed_measurement("true_growths", true)
    yield Table(
        "rules",
        f"Growth by rule, {windows} windows without a shift and {len(SHIFTS)} with one, mean of seeds",
        [
            {
                "rule": rule,
                "limit": mean([r["limits"][rule] for r in results]),
                "false growths": mean(grown(rule, "stream")),
                "true growths": mean(grown(rule, "shift")),
            }
            for rule in RULES
        ],
    )
    shares = [
        {"window": name, "failing %": 100 * mean([r["failures"]["shift"][i] / r["window"] for r in results])}
        for i, name in enumerate(SHIFTS)
    ]
    calm = 100 * mean([f / r["window"] for r in results for f in r["failures"]["stream"]])
    yield Table(
        "failures",
        "Images of a window that fail the threshold",
        [{"window": "no shift", "failing %": calm}, *shares],
        Plot("bar", "window", "failing %", hline=5.0),
    )


@experiment(
    claims=["nas_tau", "nas_beats_proxies", "nas_pick", "counting_beats_spectral", "nas_cost"],
    config=["world", "data", "head", "train", "nas"],
)
def nas(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.jobs import nas_job
    from papers.ear.scores import SCORES
    from shared.errors import unknown

    allowed = (*SCORES, "random")
    if cfg.nas.score not in allowed:
        raise unknown("nas.score", cfg.nas.score, allowed)
    worlds, domains = worlds_of(cfg, ctx), list(cfg.nas.domains)
    search = {key: cfg.nas[key] for key in ("min_params", "max_params", "candidates")}
    options = {"search": search, "head": plain(cfg.head), "train": plain(cfg.train)}
    jobs = [{"seed": s, "world": worlds[s][0], "domain": d, **options} for s in ctx.seeds for d in domains]
    runs = {(job["seed"], job["domain"]): result["rows"] for job, result, _ in ctx.map("candidates", nas_job, jobs)}
    taus = {key: _taus(rows, key) for key, rows in runs.items()}

    def mean_over_domains(value: Any) -> list[float]:
        return [mean([value(seed, d) for d in domains]) for seed in ctx.seeds]

    score = cfg.nas.score
    yield seed_measurement("nas_tau", mean_over_domains(lambda s, d: taus[s, d][score]))
    best_rival = lambda s, d: max(taus[s, d][r] for r in RIVAL_SCORES)  # noqa: E731
    yield seed_measurement("nas_beats_proxies", mean_over_domains(lambda s, d: taus[s, d][score] - best_rival(s, d)))
    yield seed_measurement("nas_pick", mean_over_domains(lambda s, d: 100 * _pick_gain(runs[s, d], score, (s, d))))
    yield seed_measurement(
        "counting_beats_spectral", mean_over_domains(lambda s, d: taus[s, d]["macs"] - taus[s, d][score])
    )
    ratios = [_cost_ratio(rows) for rows in runs.values()]
    average, low, high = mean_interval(ratios)
    yield Measurement(
        "nas_cost",
        average,
        low,
        high,
        len(ctx.seeds),
        note=f"{search['candidates']} candidates a domain, CPU seconds, NTK score with its passes",
    )
    rows = []
    for name in allowed:
        per_domain = {d: [taus[s, d][name] for s in ctx.seeds] for d in domains}
        means = [mean([taus[s, d][name] for d in domains]) for s in ctx.seeds]
        gain = mean([100 * _pick_gain(runs[s, d], name, (s, d)) for s in ctx.seeds for d in domains])
        rows.append(
            {
                "score": name,
                **{d: mean(v) for d, v in per_domain.items()},
                "mean tau": mean(means),
                "±": half_width(means),
                "pick, points over random": gain,
            }
        )
    oracle = mean(
        [100 * (max(r["accuracy"] for r in run) - mean([r["accuracy"] for r in run])) for run in runs.values()]
    )
    yield Table(
        "proxies",
        "Kendall tau with trained accuracy, inside the parameter band",
        rows,
        Plot("bar", "score", "mean tau", error="±"),
        note=f"the best of the sample lies {oracle:.1f} points over its mean",
    )
    first = runs[ctx.seeds[0], domains[0]]
    points = [
        {"score": r["scores"]["ntk_cond"], "accuracy %": 100 * r["accuracy"], "adaptor": r["architecture"]}
        for r in first
    ]
    yield Table(
        "candidates",
        f"Spectral score against trained accuracy, {domains[0]}",
        points,
        Plot("scatter", "score", "accuracy %", xlabel="-log NTK condition number"),
    )


def _taus(rows: Sequence[Mapping[str, Any]], key: tuple[int, str]) -> dict[str, float]:
    from scipy.stats import kendalltau

    accuracy = [r["accuracy"] for r in rows]
    columns = {name: [r["scores"][name] for r in rows] for name in rows[0]["scores"]} | {
        "random": _noise(len(rows), key)
    }
    result = {}
    for name, values in columns.items():
        tau = float(kendalltau(values, accuracy).statistic)
        result[name] = tau if tau == tau else 0.0  # a score that is the same for all candidates ranks nothing
    return result


def _noise(n: int, key: tuple[int, str]) -> list[float]:
    import random

    generator = random.Random(f"{key[0]}/{key[1]}")
    return [generator.random() for _ in range(n)]


def _pick_gain(rows: Sequence[Mapping[str, Any]], score: str, key: tuple[int, str]) -> float:
    values = _noise(len(rows), key) if score == "random" else [r["scores"][score] for r in rows]
    best = max(range(len(rows)), key=values.__getitem__)
    return rows[best]["accuracy"] - mean([r["accuracy"] for r in rows])


def _cost_ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(r["seconds"]["train"] for r in rows) / sum(r["seconds"]["ntk_cond"] for r in rows)
