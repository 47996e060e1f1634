"""Claims that are learnt from a sequence: six domains in turn (Sec. 4.5), ten classes two at a time (Sec. 4.6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers.ear.experiments.setup import SECTIONS, by_seed, mean, plain, worlds_of
from shared.experiment import Context, Picture, Plot, Result, Table, experiment, half_width, seed_measurement


@experiment(
    claims=["dil_accuracy", "dil_forgetting", "gradient_free_gap"],
    config=[*SECTIONS, "head", "train", "adaptor", "rivals", "dil"],
)
def dil(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.domains import DOMAINS
    from papers.ear.pictures import heatmap
    from papers.ear.sequences import dil_job

    worlds, o = worlds_of(cfg, ctx), cfg.dil
    options = {
        "detector": plain(cfg.detector),
        "head": plain(cfg.head),
        "train": plain(cfg.train),
        **plain(cfg.adaptor),
        **plain(cfg.rivals),
        "ewc_strength": o.ewc_strength,
        "window": o.window,
        "rule": o.rule,
    }
    results = by_seed(
        ctx, "domains in turn", dil_job, [{"seed": s, "world": worlds[s][0], **options} for s in ctx.seeds]
    )
    naive = "naive, one adaptor"
    ours = "EAR" if o.grow and o.freeze else "EAR, never grown" if o.freeze else naive
    yield seed_measurement("dil_accuracy", _gaps(results, ours, naive, "accuracy"))
    yield seed_measurement("dil_forgetting", _gaps(results, naive, ours, "forgetting"))
    kind = "trained" if o.train_adaptors else "gradient_free"
    gaps = [
        100
        * mean([r["own"][d][kind] - r["own"][d]["gradient_free"] for d in ("clean", "invert", "edge") if d in r["own"]])
        for r in results
    ]
    yield seed_measurement("gradient_free_gap", gaps)
    yield _methods_table("dil", "Six domains in turn, no domain id at test", results)
    grown = [
        {
            "domain": d["domain"],
            "failing %": None if d["failures"] is None else 100 * d["failures"],
            "grew": str(d["grew"]),
        }
        for d in results[0]["decisions"]
    ]
    yield Table(
        "decisions",
        "When EAR grew (first seed)",
        grown,
        note=f"{results[0]['params_per_domain']:,.0f} parameters a domain: adaptor, C and exemplars",
    )
    names = list(DOMAINS)
    matrix = results[0]["methods"]["EAR"]["matrix"]
    yield Picture(
        "accuracy",
        "EAR: accuracy on each domain over time",
        heatmap(matrix, names, names, "tested on", "after learning"),
    )
    yield Picture(
        "forgetting",
        "One adaptor: accuracy on each domain over time",
        heatmap(results[0]["methods"][naive]["matrix"], names, names, "tested on", "after learning"),
    )
    yield Picture(
        "routes",
        "Where images are routed",
        heatmap(results[0]["routes"], names, results[0]["domains"], "routed to", "image of"),
    )


def _gaps(results: Sequence[Mapping[str, Any]], a: str, b: str, key: str) -> list[float]:
    return [100 * (r["methods"][a][key] - r["methods"][b][key]) for r in results]


def _methods_table(name: str, title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for method in results[0]["methods"]:
        found = [r["methods"][method] for r in results]
        accuracy = [100 * f["accuracy"] for f in found]
        rows.append(
            {
                "method": method,
                "final accuracy %": mean(accuracy),
                "±": half_width(accuracy),
                "forgetting": 100 * mean([f["forgetting"] for f in found]),
                "BWT": 100 * mean([f["bwt"] for f in found]),
            }
        )
    return Table(
        name,
        title,
        rows,
        Plot("bar", "method", "final accuracy %", error="±"),
        note="forgetting is best before the last step minus final, in points",
    )


@experiment(
    claims=["cil_against_naive", "cil_against_joint", "ridge_beats_ear"],
    config=[*SECTIONS, "head", "train", "adaptor", "rivals", "cil"],
)
def cil(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.sequences import cil_job

    worlds, o = worlds_of(cfg, ctx), cfg.cil
    options = {
        "detector": plain(cfg.detector),
        "head": plain(cfg.head),
        "train": {**plain(cfg.train), "epochs": o.epochs},
        **plain(cfg.adaptor),
        **plain(cfg.rivals),
        "ewc_strength": o.ewc_strength,
        "classes_per_task": o.classes_per_task,
    }
    results = by_seed(
        ctx, "classes in turn", cil_job, [{"seed": s, "world": worlds[s][0], **options} for s in ctx.seeds]
    )
    ours = "EAR, all tasks' adaptors" if o.grow else "EAR, never grown"
    yield seed_measurement("cil_against_naive", _gaps(results, ours, "naive, one adaptor", "accuracy"))
    ratios = [r["methods"][ours]["accuracy"] / r["methods"]["joint, one adaptor"]["accuracy"] for r in results]
    yield seed_measurement("cil_against_joint", ratios)
    yield seed_measurement("ridge_beats_ear", _gaps(results, "ridge on hypervectors", ours, "accuracy"))
    yield _methods_table("cil", "Classes in turn on clean digits, all classes at test", results)
