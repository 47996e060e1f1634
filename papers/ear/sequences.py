"""Worker functions of the sequences: domain-incremental (Sec. 4.5) and class-incremental learning (Sec. 4.6), EAR and its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.ear import continual
from papers.ear.adaptors import Architecture
from papers.ear.continual import EWC, NearestMean, Replay, Ridge, StreamingLDA, pooled, sequential
from papers.ear.domains import DOMAINS
from papers.ear.ear import EAR, EARSettings
from papers.ear.growth import GrowthRule, route
from papers.ear.hdc import HDSettings, cosine
from papers.ear.jobs import Progress, detector_settings, open_world
from papers.ear.learner import AdaptorNet, TrainSettings, accuracy, new_net, train_net
from papers.ear.world import CLASSES, World

Task = tuple[list[Tensor], Tensor]
Matrix = list[list[float]]


def _share(labels: Tensor, truth: Tensor) -> float:
    return float((labels == truth).float().mean())


def _summary(matrix: Matrix) -> dict[str, Any]:
    return {
        "accuracy": continual.final_accuracy(matrix),
        "forgetting": continual.forgetting(matrix),
        "bwt": continual.backward_transfer(matrix),
        "matrix": matrix,
    }


def ear_settings(
    detector: Mapping[str, Any],
    head: Mapping[str, Any],
    train: Mapping[str, Any],
    architecture: str,
    seed: int,
    **changes: Any,
) -> EARSettings:
    """Settings of the stand-in's EAR from the config."""
    return EARSettings(
        detector=detector_settings(detector, seed), head=HDSettings(dim=head["dim"], grid=head["grid"], seed=1),
        train=TrainSettings(**train), architecture=architecture, held_out_fraction=detector["held_out"], seed=seed, **changes,
    )  # fmt: skip


def _new_ear(world: World, settings: EARSettings) -> EAR:
    side = world.settings.side
    return EAR(world.encoder, classes=CLASSES, settings=settings, image_shape=(1, side, side))


def gradient_rivals(
    tasks: Sequence[Task], tests: Sequence[Task], channels: tuple[int, ...], head: HDSettings, architecture: str,
    train: TrainSettings, *, seed: int, replay_images: int, ewc_strength: float,
) -> dict[str, Any]:  # fmt: skip
    """Naive, EWC, replay and joint training of one adaptor of the same architecture."""

    def net() -> AdaptorNet:
        return new_net(Architecture.parse(architecture), channels, CLASSES, head, seed, train.scale)

    def run(**tools: Any) -> dict[str, Any]:
        matrix: Matrix = []
        sequential(
            net(), tasks, train, seed=seed,
            after=lambda k, m: matrix.append([accuracy(m.evaluate(x), y) for x, y in tests]), **tools,
        )  # fmt: skip
        return _summary(matrix)

    joint = [torch.cat(parts) for parts in zip(*[x for x, _ in tasks], strict=True)]
    model = train_net(net(), joint, torch.cat([y for _, y in tasks]), train, seed=seed)
    final = [accuracy(model.evaluate(x), y) for x, y in tests]
    return {
        "naive, one adaptor": run(),
        "EWC, one adaptor": run(ewc=EWC(ewc_strength)),
        f"replay of {replay_images} images": run(replay=Replay(replay_images, seed)),
        "joint, one adaptor": {"accuracy": sum(final) / len(final), "forgetting": 0.0, "bwt": 0.0, "matrix": [final]},
    }


def free_rivals(ear: EAR, tasks: Sequence[Task], tests: Sequence[Task]) -> dict[str, Any]:
    """Nearest mean and streaming LDA on pooled taps, ridge on the detector's hypervectors; none needs a gradient or a domain id."""
    result = {}
    width = sum(ear.encoder.channels)
    learners: dict[str, tuple[Any, Any]] = {
        "nearest class mean": (NearestMean(width, CLASSES), pooled),
        "streaming LDA": (StreamingLDA(width, CLASSES), pooled),
        "ridge on hypervectors": (Ridge(ear.settings.detector.dim, CLASSES), ear.embed),
    }
    for name, (learner, view) in learners.items():
        seen = [view(x) for x, _ in tests]
        matrix: Matrix = []
        for x, y in tasks:
            learner.learn(view(x), y)
            matrix.append([_share(learner.logits(v).argmax(1), t) for v, (_, t) in zip(seen, tests, strict=True)])
        result[name] = _summary(matrix)
    return result


def dil_job(
    *, seed: int, world: str, detector: Mapping[str, Any], head: Mapping[str, Any], train: Mapping[str, Any],
    architecture: str, window: int, rule: str, replay_images: int, ewc_strength: float, workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Six domains in turn without a domain id: EAR decides by itself when to grow. Also its routing, and the accuracy of every rival."""
    w = open_world(workdir, world)
    tasks: list[Task] = [(w.taps(f"{d}/train"), w.labels[f"{d}/train"]) for d in DOMAINS]
    tests: list[Task] = [(w.taps(f"{d}/test"), w.labels[f"{d}/test"]) for d in DOMAINS]
    settings = ear_settings(detector, head, train, architecture, seed, growth=GrowthRule(rule))
    ear = _new_ear(w, settings)
    free = _new_ear(w, ear_settings(detector, head, {**train, "epochs": 0}, "id-id-id-id", seed))
    rows: dict[str, Matrix] = {name: [] for name in ("EAR", "EAR, z-scored routing", "EAR, Expert-Gate routing")}
    oracle, gates, decisions = [], [], []
    for k, (x, y) in enumerate(tasks):
        report = ear.observe_features([t[:window] for t in x]) if k else None
        wanted = report is None or report.grow
        decisions.append(
            {"domain": list(DOMAINS)[k], "failures": report.failures / window if report else None, "grew": wanted}
        )
        free.fit_features(x, y)
        if wanted:
            ear.fit_features(x, y, list(DOMAINS)[k])
            gates.append(continual.gate(x, seed=seed + k))
        memories = [d.memory for d in ear.domains]
        matrices: dict[str, list[float]] = {name: [] for name in rows}
        for t, truth in tests:
            q = ear.embed(t)
            routes = {
                "EAR": route(q, memories),
                "EAR, z-scored routing": route(q, memories, standardise=True),
                "EAR, Expert-Gate routing": continual.gate_route(gates, t),
            }
            for name, domains in routes.items():
                matrices[name].append(_share(ear.predict_features(t, domains=domains).labels, truth))
        for name, values in matrices.items():
            rows[name].append(values)
        progress(k + 1, len(tasks) + 4)
    for index, domain in enumerate(ear.domains):
        j = list(DOMAINS).index(domain.name)
        fixed = torch.full((len(tests[j][1]),), index)
        oracle.append(_share(ear.predict_features(tests[j][0], domains=fixed).labels, tests[j][1]))
    confusion = [
        torch.bincount(route(ear.embed(t), [d.memory for d in ear.domains]), minlength=len(ear.domains))
        for t, _ in tests
    ]
    methods = {name: _summary(matrix) for name, matrix in rows.items()}
    methods["EAR, oracle routing"] = {
        "accuracy": sum(oracle) / len(oracle),
        "forgetting": 0.0,
        "bwt": 0.0,
        "matrix": [oracle],
    }
    free_final = [_share(free.predict_features(t).labels, y) for t, y in tests]
    alone = [_share(ear.predict_features(t, domains=torch.zeros(len(y), dtype=torch.long)).labels, y) for t, y in tests]
    methods["EAR, never grown"] = {
        "accuracy": sum(alone) / len(alone),
        "forgetting": 0.0,
        "bwt": 0.0,
        "matrix": [alone],
    }
    methods["EAR, gradient-free"] = {
        "accuracy": sum(free_final) / len(free_final),
        "forgetting": 0.0,
        "bwt": 0.0,
        "matrix": [free_final],
    }
    methods |= gradient_rivals(
        tasks, tests, w.encoder.channels, settings.head, architecture, settings.train,
        seed=seed, replay_images=replay_images, ewc_strength=ewc_strength,
    )  # fmt: skip
    methods |= free_rivals(ear, tasks, tests)
    own = {d.name: _own(ear, free, i, list(DOMAINS).index(d.name), tests) for i, d in enumerate(ear.domains)}
    return {
        "methods": methods, "decisions": decisions, "own": own, "domains": [d.name for d in ear.domains],
        "routes": [(c.float() / c.sum()).tolist() for c in confusion],
        "params_per_domain": ear.num_params_added / len(ear.domains),
    }  # fmt: skip


def _own(ear: EAR, free: EAR, index: int, j: int, tests: Sequence[Task]) -> dict[str, float]:
    """Accuracy of a domain's own net, trained and gradient-free, with the domain known."""
    taps, truth = tests[j]
    trained = ear.predict_features(taps, domains=torch.full((len(truth),), index)).labels
    bundled = free.predict_features(taps, domains=torch.full((len(truth),), j)).labels
    return {"trained": _share(trained, truth), "gradient_free": _share(bundled, truth)}


def cil_job(
    *, seed: int, world: str, detector: Mapping[str, Any], head: Mapping[str, Any], train: Mapping[str, Any],
    architecture: str, classes_per_task: int, replay_images: int, ewc_strength: float, workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Clean digits, two new classes at a time, all classes at test: EAR with one adaptor per task, and its rivals."""
    w = open_world(workdir, world)
    x, y = w.taps("clean/train"), w.labels["clean/train"]
    t, truth = w.taps("clean/test"), w.labels["clean/test"]
    groups = [range(c, c + classes_per_task) for c in range(0, CLASSES, classes_per_task)]

    def part(taps: list[Tensor], labels: Tensor, classes: range) -> Task:
        index = ((labels >= classes.start) & (labels < classes.stop)).nonzero().squeeze(1)
        return [tap[index] for tap in taps], labels[index]

    tasks, tests = [part(x, y, g) for g in groups], [part(t, truth, g) for g in groups]
    settings = ear_settings(detector, head, train, architecture, seed, rebundle=True)
    ear = _new_ear(w, settings)
    rows: dict[str, Matrix] = {
        name: [] for name in ("EAR, all tasks' adaptors", "EAR, routed by exemplars", "EAR, gradient-free")
    }
    for k, (taps, labels) in enumerate(tasks):
        ear.fit_features(taps, labels, f"task{k}")
        exemplars = torch.cat([d.memory.exemplars[d.memory.seen] for d in ear.domains])
        names = torch.cat([d.memory.seen.nonzero().squeeze(1) for d in ear.domains])
        results: dict[str, list[float]] = {name: [] for name in rows}
        for probe, target in tests:
            results["EAR, all tasks' adaptors"].append(_share(ear.predict_features(probe, "all").labels, target))
            results["EAR, routed by exemplars"].append(_share(_routed(ear, probe), target))
            results["EAR, gradient-free"].append(_share(names[cosine(ear.embed(probe), exemplars).argmax(1)], target))
        for name, values in results.items():
            rows[name].append(values)
        progress(k + 1, len(tasks) + 4)
    methods = {name: _summary(matrix) for name, matrix in rows.items()}
    first = [_share(ear.domains[0].net.evaluate(probe).argmax(1), target) for probe, target in tests]
    methods["EAR, never grown"] = {
        "accuracy": sum(first) / len(first),
        "forgetting": 0.0,
        "bwt": 0.0,
        "matrix": [first],
    }
    methods |= gradient_rivals(
        tasks, tests, w.encoder.channels, settings.head, architecture, settings.train,
        seed=seed, replay_images=replay_images, ewc_strength=ewc_strength,
    )  # fmt: skip
    methods |= free_rivals(ear, tasks, tests)
    return {"methods": methods, "params_per_task": ear.num_params_added / len(ear.domains)}


def _routed(ear: EAR, taps: list[Tensor]) -> Tensor:
    """One adaptor pass: the task by raw exemplars, then the classes of that task."""
    domains = route(ear.embed(taps), [d.memory for d in ear.domains])
    best = torch.zeros(len(domains), dtype=torch.long)
    for index, domain in enumerate(ear.domains):
        mine = (domains == index).nonzero().squeeze(1)
        if len(mine):
            cosines = cosine(domain.net.embed_all([t[mine] for t in taps]), domain.net.classifier)
            best[mine] = cosines.masked_fill(~domain.net.seen, -torch.inf).argmax(1)
    return best
