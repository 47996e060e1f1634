"""Worker functions of the trained claims: one world, then the four families of experiments on it. Plain values in and out.

A job names the folder of its world by its key, which depends on the world's settings and the code, so a changed world is never mistaken.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from papers.ear import ood
from papers.ear.adaptors import Architecture
from papers.ear.domains import DOMAINS
from papers.ear.ear import EAR, EARSettings
from papers.ear.growth import RULES, GrowthRule
from papers.ear.hdc import HDFF, HDEncoder, HDSettings, remember
from papers.ear.learner import TrainSettings, accuracy, new_net, take, train_net
from papers.ear.scores import SCORES, prepare, score
from papers.ear.search import PROXY_BATCH, SearchSettings, draw_candidates
from papers.ear.world import CLASSES, World, WorldSettings, build_world, load_world, save_world

Progress = Callable[[int, int], None]
SHIFTS = tuple(d for d in DOMAINS if d != "clean")


def world_job(*, seed: int, settings: Mapping[str, Any], workdir: Path, progress: Progress) -> dict[str, Any]:
    """Pre-train an encoder and lay out the domains; the world stays in the job's folder."""
    world = build_world(WorldSettings(**settings), seed, workdir=workdir, progress=progress)
    save_world(world, workdir / "world.pt")
    return {"world": workdir.name, "encoder": world.encoder.fingerprint()}


def open_world(workdir: Path, key: str) -> World:
    """The world that a :func:`world_job` left beside this job."""
    return load_world(workdir.parent / key / "world.pt")


def detector_settings(options: Mapping[str, Any], seed: int) -> HDSettings:
    """HD settings of the detector from the config."""
    return HDSettings(
        dim=options["dim"], grid=options["grid"], center=options["center"], projection=options["projection"], seed=seed
    )


# --- ood (Sec. 4.3) ---


def ood_job(
    *, seed: int, world: str, detector: Mapping[str, Any], dims: list[int], train: Mapping[str, Any],
    workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """AUROC and FPR of every detector on every shift, clean images in distribution; scores of the HD detector for the histogram."""
    w = open_world(workdir, world)
    taps, labels, channels = w.taps("clean/train"), w.labels["clean/train"], w.encoder.channels
    test = {d: w.taps(f"{d}/test") for d in DOMAINS}
    base = detector_settings(detector, seed)
    net = new_net(
        Architecture.uniform("conv", 4, 1 / 8), channels, CLASSES, HDSettings(dim=1024, grid=base.grid, seed=1), seed
    )
    train_net(net, taps, labels, TrainSettings(**train), seed=seed)

    def hd(name_taps: slice = slice(None), **changes: Any) -> Callable[[str], Tensor]:
        options = {"per_class": changes.pop("per_class", True), "exemplars": changes.pop("exemplars", "learnt")}
        settings = changes.pop("settings", None) or HDSettings(**{**base.__dict__, **changes})
        found = ood.HDDetector(channels[name_taps], taps[name_taps], labels, CLASSES, settings, **options)
        return lambda d: found(test[d][name_taps])

    maha, last = ood.Mahalanobis(taps, labels, CLASSES), ood.Mahalanobis(taps[-1:], labels, CLASSES)
    knn = ood.KNN(taps, min(50, len(labels)))
    images = ood.encoder_with(net, w.encoder)
    detectors: dict[str, Callable[[str], Tensor]] = {
        "HDC, 4 taps": hd(),
        "HDC, random exemplars": hd(exemplars="random"),
        "HDC, last tap": hd(slice(-1, None)),
        "HDC, one exemplar for all classes": hd(per_class=False),
        "HDC, binary": hd(binary=True),
        "HDC, Hadamard": hd(projection="hadamard"),
        "HDC, Gaussian": hd(projection="gaussian"),
        "HDC, centred per channel": hd(center="channel", grid=1),
        "HDC, one scalar centre": hd(center="scalar", grid=1),
        "HDC, not centred, grid 1": hd(center="none", grid=1),
        "HDFF as published": hd(settings=HDSettings(**{**HDFF.__dict__, "dim": base.dim, "seed": seed})),
        "MSP": lambda d: ood.msp(net.evaluate(test[d])),
        "max-logit": lambda d: ood.max_logit(net.evaluate(test[d])),
        "energy": lambda d: ood.energy(net.evaluate(test[d])),
        "ODIN": lambda d: ood.odin(images, w.raw(f"{d}/test")),
        "kNN, last tap": lambda d: knn(test[d]),
        "Mahalanobis, last tap": lambda d: last(test[d][-1:]),
        "Mahalanobis, 4 taps": lambda d: maha(test[d]),
    }
    for dim in dims:
        detectors[f"HDC, D={dim}"] = hd(dim=dim)
        detectors[f"HDC, binary, D={dim}"] = hd(dim=dim, binary=True)
    result, kept = {}, {}
    for done, (name, run) in enumerate(detectors.items()):
        started = time.process_time()
        scores = {d: run(d) for d in DOMAINS}
        seconds = (time.process_time() - started) / sum(len(s) for s in scores.values())
        shifts = {d: ood.auroc(scores["clean"], scores[d]) for d in SHIFTS}
        fpr = sum(ood.fpr_at_tpr(scores["clean"], scores[d]) for d in SHIFTS) / len(SHIFTS)
        result[name] = {
            **shifts,
            "mean": sum(shifts.values()) / len(shifts),
            "fpr95": fpr,
            "seconds_per_image": seconds,
        }
        if name == "HDC, 4 taps":
            kept = {d: (-scores[d][:400]).tolist() for d in DOMAINS}
        progress(done + 1, len(detectors))
    return {
        "detectors": result,
        "scores": kept,
        "threshold": _threshold(taps, labels, channels, base, detector["held_out"]),
    }


def _threshold(
    taps: list[Tensor], labels: Tensor, channels: tuple[int, ...], settings: HDSettings, held_out: float
) -> float:
    return remember(
        HDEncoder(channels, settings).fit(taps)(taps), labels, CLASSES, held_out_fraction=held_out
    ).threshold


# --- growth (abstract: adaptors are added when needed) ---


def growth_job(
    *, seed: int, world: str, detector: Mapping[str, Any], window: int, windows: int, workdir: Path, progress: Progress
) -> dict[str, Any]:
    """Images that fail in windows without a shift and in one window of each shift, and from how many on each rule would grow."""
    w = open_world(workdir, world)
    ear = EAR(
        w.encoder, classes=CLASSES, image_shape=(1, w.settings.side, w.settings.side),
        settings=EARSettings(detector=detector_settings(detector, seed), head=HDSettings(dim=64, grid=1), architecture="id-id-id-id",
                             train=TrainSettings(epochs=0), held_out_fraction=detector["held_out"], seed=seed),
    )  # fmt: skip
    ear.fit_features(w.taps("clean/train"), w.labels["clean/train"], "clean")
    stream = w.taps("stream")
    failures: dict[str, list[int]] = {"stream": [], "shift": []}
    for i in range(windows):
        report = ear.observe_features(take(stream, slice(i * window, (i + 1) * window)))
        failures["stream"].append(report.failures)
        progress(i + 1, windows + len(SHIFTS))
    for domain in SHIFTS:
        report = ear.observe_features(take(w.taps(f"{domain}/train"), slice(0, window)))
        failures["shift"].append(report.failures)
    held_out = len(ear.domains[0].memory.held_out)
    return {
        "failures": failures,
        "limits": {name: GrowthRule(name).limit(window, held_out) for name in RULES},
        "window": window,
    }


# --- nas (Sec. 4.4) ---


def nas_job(
    *, seed: int, world: str, domain: str, search: Mapping[str, Any], head: Mapping[str, Any],
    train: Mapping[str, Any], workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Every score and the trained accuracy of candidates of one domain; what is done stays in the folder, one line per candidate."""
    w = open_world(workdir, world)
    taps, labels = w.taps(f"{domain}/train"), w.labels[f"{domain}/train"]
    test, truth = w.taps(f"{domain}/test"), w.labels[f"{domain}/test"]
    channels, hd = w.encoder.channels, HDSettings(dim=head["dim"], grid=head["grid"], seed=1)
    candidates = draw_candidates(channels, SearchSettings(**search), seed)
    log = workdir / "candidates.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    batch, batch_labels = take(taps, slice(0, PROXY_BATCH)), labels[:PROXY_BATCH]
    prepare_and_score(
        candidates[0], channels, hd, seed, batch, batch_labels
    )  # warms torch.func up, so that no candidate pays for it
    for index, candidate in enumerate(candidates):
        if index < len(rows):
            continue
        values, seconds = prepare_and_score(candidate, channels, hd, seed, batch, batch_labels)
        started = time.process_time()
        net = train_net(
            new_net(candidate, channels, CLASSES, hd, seed), taps, labels, TrainSettings(**train), seed=seed
        )
        seconds["train"] = time.process_time() - started
        row = {
            "architecture": str(candidate),
            "accuracy": accuracy(net.evaluate(test), truth),
            "scores": values,
            "seconds": seconds,
        }
        rows.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        progress(len(rows), len(candidates))
    return {"rows": rows}


def prepare_and_score(
    candidate: Architecture, channels: tuple[int, ...], hd: HDSettings, seed: int, taps: list[Tensor], labels: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """All scores of one candidate; CPU seconds of the preparation with the NTK score, and of all the others."""
    started = time.process_time()
    net = prepare(new_net(candidate, channels, CLASSES, hd, seed), taps, labels)
    values = {"ntk_cond": score(net, "ntk_cond", taps, labels)}
    chosen = time.process_time() - started
    values |= {name: score(net, name, taps, labels) for name in SCORES if name != "ntk_cond"}
    return values, {"ntk_cond": chosen, "others": time.process_time() - started - chosen}
