"""Worker functions of the trained claims: data once per seed, then read-outs, baselines and device sweeps on it.

Plain values in and out. A job names the folder of its data by its key, which depends on the settings and the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.lsm.bits import pack, unpack
from papers.lsm.encoder import Liquid, firing_rate
from papers.lsm.readout import READOUTS, Split, ridge, split_features
from papers.lsm.weights import GENERATORS, Weights, breakdown, forming_voltage, weight_sd

Progress = Callable[[int, int], None]


# --- data ---


def data_job(*, seed: int, name: str, size: int, root: str | None, workdir: Path, progress: Progress) -> dict[str, Any]:
    """Draw one set and leave it packed in the folder: ``digits`` (MNIST where ``root`` is given), ``words``, ``order``, ``curves``."""
    content: dict[str, Any]
    if name == "curves":
        from papers.lsm.data.curves import shared_kinematics

        c = shared_kinematics(size, seed)
        content = {
            "neural": pack(c.neural), "images": pack(c.images), "labels": c.labels, "instances": c.instances, "drawn": c.drawn[:52],
        }  # fmt: skip
    elif name == "digits" and root is not None:
        content = _mnist(root, seed, size)
    else:
        x, y = _small_set(name, size, seed)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        content = {"words": pack(x[order]), "labels": y[order], "inputs": x.shape[2]}
    torch.save(content, workdir / "data.pt")
    progress(1, 1)
    return {"data": workdir.name}


def _small_set(name: str, size: int, seed: int) -> tuple[Tensor, Tensor]:
    from papers.lsm.data.camera import saccade_digits
    from papers.lsm.data.speech import order_task, spoken_digits

    if name == "digits":
        return saccade_digits(seed)
    return spoken_digits(size, seed) if name == "words" else order_task(size, seed)


def _mnist(root: str, seed: int, size: int) -> dict[str, Any]:
    """Real digits before the camera: the training images in a seeded order, then the test images; ``size`` limits either, 0 takes all."""
    from papers.lsm.data.camera import packed_spike_trains
    from shared.data.mnist import load_mnist

    images, labels = [], []
    for train in (True, False):
        x, y = load_mnist(root, train=train)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)) if train else torch.arange(len(y))
        kept = order[: size or None]
        images.append(x[kept, 0])
        labels.append(y[kept])
    return {
        "words": packed_spike_trains(torch.cat(images), seed), "labels": torch.cat(labels), "inputs": 256, "tested": len(labels[1]),
    }  # fmt: skip


def open_data(workdir: Path, key: str) -> dict[str, Any]:
    """What a :func:`data_job` left beside this job."""
    return torch.load(workdir.parent / key / "data.pt", weights_only=True)


def open_spikes(workdir: Path, key: str, number: int | None = None) -> tuple[SpikeSet, Tensor]:
    """The first ``number`` spike trains of a labelled set, and their labels."""
    content = open_data(workdir, key)
    return SpikeSet(content["words"][:number], content["inputs"]), content["labels"][:number]


class SpikeSet:
    """A packed set that is unpacked block by block: features of any liquid, and raw counts."""

    def __init__(self, words: Tensor, inputs: int, block: int = 4000) -> None:
        self.words, self.inputs, self.block = words, inputs, block

    @property
    def steps(self) -> int:
        return self.words.shape[1]

    def spikes(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        return unpack(self.words[chosen], self.inputs)

    def raw(self) -> Tensor:
        return torch.cat([unpack(w, self.inputs).sum(1, dtype=torch.int16) for w in self.words.split(self.block)])

    def counts(self, liquid: Liquid, generator: torch.Generator | None = None) -> Tensor:
        return liquid.encode_words(self.words, generator=generator)

    def density(self) -> float:
        return float(self.spikes(slice(0, 500)).float().mean())


# --- supervised read-outs (H5, H7, H13, H15) ---


def make_weights(generator: str, inputs: int, neurons: int, seed: int, *, formed: float = 0.85) -> Weights:
    """Weights of a named generator; cells are formed with probability ``formed`` where the generator has cells."""
    from shared.errors import unknown

    if generator not in GENERATORS:
        raise unknown("generator", generator, GENERATORS)
    return (
        breakdown(inputs, neurons, seed, formed=formed)
        if generator == "breakdown"
        else GENERATORS[generator](inputs, neurons, seed)
    )


def _chosen(score_of: Callable[[float], tuple[Split, Any]], consts: Sequence[float]) -> dict[str, Any]:
    """The const with the best validation accuracy (ridge), its features, and what selection on the test part would have claimed."""
    best: dict[str, Any] = {"val": -1.0}
    test_selected = 0.0
    for const in consts:
        split, rate = score_of(const)
        score = ridge(split, int(split.train[1].max()) + 1)
        test_selected = max(test_selected, score.test)
        if score.val > best["val"]:
            best = {"val": score.val, "const": const, "split": split, "rate": rate}
    return {**best, "test_selected": test_selected}


def supervised_job(
    *, seed: int, data: str, sizes: list[int], liquid: Mapping[str, Any], consts: list[float], workdir: Path, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """Linear read-outs on raw counts, the liquid, the liquid without recurrence, formed cells, and formed cells with read noise."""
    spikes, labels = open_spikes(workdir, data, sum(sizes))
    classes, neurons = int(labels.max()) + 1, int(liquid["neurons"])
    formed, noise = float(liquid["formed"]), float(liquid["read_noise"])
    software = make_weights("gaussian", spikes.inputs, neurons, seed)
    device = make_weights("breakdown", spikes.inputs, neurons, seed, formed=formed)
    arms: dict[str, tuple[Weights, float]] = {
        "liquid": (software if liquid["recurrent"] else software.without_recurrence(), 0.0),
        "no recurrence": (software.without_recurrence(), 0.0), "formed cells": (device, 0.0),
        "formed cells, read noise": (device, noise),
    }  # fmt: skip
    raw = split_features(spikes.raw(), labels, sizes)
    result: dict[str, Any] = {"raw counts": _read_outs(raw, classes)}
    for index, (name, (weights, eta)) in enumerate(arms.items()):

        def features(const: float, weights: Weights = weights, eta: float = eta) -> tuple[Split, float]:
            one = Liquid.of(
                weights, decay=liquid["decay"], v_th=liquid["v_th"], const=const * float(liquid["gain"]), read_noise=eta
            )
            counts = spikes.counts(one, torch.Generator().manual_seed(seed))
            return split_features(counts, labels, sizes), firing_rate(counts, spikes.steps)

        # Noise is met after the const was chosen on the noiseless array, as a chip would be.
        grid = [result["formed cells"]["const"]] if eta else consts
        best = _chosen(features, grid)
        result[name] = {
            **_read_outs(best["split"], classes),
            "const": best["const"],
            "rate": best["rate"],
            "test_selected": best["test_selected"],
        }
        progress(index + 1, len(arms))
    return {"arms": result, "density": spikes.density()}


def _read_outs(split: Split, classes: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, fit in READOUTS.items():
        score = fit(split, classes)
        confusion = torch.zeros(classes, classes, dtype=torch.long)
        confusion.index_put_((split.test[1], score.predictions.long()), torch.tensor(1), accumulate=True)
        result[name] = {"val": score.val, "test": score.test, "confusion": confusion.tolist()}
    return result


def sweep_job(
    *, seed: int, data: str, sizes: list[int], liquid: Mapping[str, Any], consts: list[float], formed: list[float], noises: list[float],
    neurons: list[int], workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """From device to accuracy: forming voltage, read noise and size, each with const tuned on validation and with const fixed."""
    spikes, labels = open_spikes(workdir, data, sum(sizes))
    decay, v_th, fixed = liquid["decay"], liquid["v_th"], float(liquid["const"])
    total, done = len(formed) + len(noises) + len(neurons), 0

    def tested(weights: Weights, grid: Sequence[float], eta: float = 0.0) -> dict[str, Any]:
        def features(const: float) -> tuple[Split, float]:
            one = Liquid.of(weights, decay=decay, v_th=v_th, const=const, read_noise=eta)
            counts = spikes.counts(one, torch.Generator().manual_seed(seed))
            return split_features(counts, labels, sizes), firing_rate(counts, spikes.steps)

        best = _chosen(features, grid)
        return {"test": ridge(best["split"], int(labels.max()) + 1).test, "rate": best["rate"], "const": best["const"]}

    result: dict[str, list[dict[str, Any]]] = {"forming": [], "noise": [], "size": []}
    for q in formed:
        w = breakdown(spikes.inputs, int(liquid["neurons"]), seed, formed=q)
        one, tuned = tested(w, [fixed]), tested(w, consts)
        row = {"formed": q, "forming_v": forming_voltage(q) if 0 < q < 1 else None, "weight_sd": weight_sd(q)}
        result["forming"].append({**row, "fixed": one, "tuned": tuned})
        done += 1
        progress(done, total)
    device = breakdown(spikes.inputs, int(liquid["neurons"]), seed, formed=float(liquid["formed"]))
    for eta in noises:
        result["noise"].append({"eta": eta, **tested(device, [fixed], eta)})
        done += 1
        progress(done, total)
    for n in neurons:
        w = make_weights("gaussian", spikes.inputs, n, seed)
        # The recurrent gain grows with sqrt(N): const is scaled back so that sizes compare.
        result["size"].append({"neurons": n, **tested(w, [fixed * (200 / n) ** 0.5])})
        done += 1
        progress(done, total)
    return result


# --- trained baselines (H6, H8) ---


def trained_job(
    *, seed: int, data: str, sizes: list[int], kind: str, train: Mapping[str, Any], rates: list[float], workdir: Path, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """SRNN with linear or spiking output, or a plain RNN. Every learning rate is tried for a few epochs, the best on validation goes on."""
    from papers.lsm.baselines import SRNN, LinearOutput, PlainRNN, SpikingOutput, Training, classifier, epochs_run, tune

    spikes, labels = open_spikes(workdir, data, sum(sizes))
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    parts = tuple((spikes.spikes(slice(a, b)), labels[a:b]) for a, b in pairwise(edges))
    classes, neurons = int(labels.max()) + 1, train["neurons"]

    def network() -> torch.nn.Module:
        torch.manual_seed(seed)
        if kind == "RNN":
            return PlainRNN(spikes.inputs, neurons, classes, train["rnn_steps"])
        body = SRNN(spikes.inputs, neurons, decay=train["decay"], v_th=train["v_th"], const=train["const"], seed=seed)
        return (
            SpikingOutput(body, classes, decay=train["output_decay"])
            if kind == "SRNN-SNN"
            else LinearOutput(body, classes)
        )

    def make(rate: float) -> Training:
        return classifier(network(), parts, batch=train["batch"], lr=rate, seed=seed, mse=kind == "SRNN-SNN")

    plan = (rates, train["trial_epochs"], train["epochs"])
    return tune(make, *plan, counted(progress, epochs_run(*plan)))


def counted(progress: Progress, total: int) -> Callable[[], None]:
    """Reports one more step of ``total`` at every call."""
    steps = count(1)
    return lambda: progress(next(steps), total)
