"""Worker functions of the zero-shot protocols: all 36 pairs of digits, SRNN-CLIP on some of them, all 23 windows of letters."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.lsm.encoder import Liquid, firing_rate
from papers.lsm.jobs import Progress, SpikeSet, counted, make_weights, open_data
from papers.lsm.weights import Weights
from papers.lsm.zeroshot import Modality

SECOND_SEED = 1000  # weights of the second modality are drawn apart from those of the first


class _ClassSet:
    """The first items of each class of a labelled set, as many as the parts need: features become (K, n, D) parts."""

    def __init__(
        self, words: Tensor, inputs: int, labels: Tensor, classes: Sequence[int], sizes: Sequence[int]
    ) -> None:
        chosen = torch.cat([(labels == k).nonzero()[: sum(sizes), 0] for k in classes])
        self.spikes, self.classes, self.sizes = SpikeSet(words[chosen], inputs), len(classes), list(sizes)

    def parts(self, features: Tensor) -> Modality:
        """Features (K n, …) as training, validation and test parts."""
        stacked = features.reshape(self.classes, sum(self.sizes), *features.shape[1:])
        train, val, test = (part.float() for part in stacked.split(self.sizes, dim=1))
        return Modality(train, val, test)


def _digit_sets(workdir: Path, digits: str, words: str, sizes: Sequence[int]) -> dict[str, _ClassSet]:
    """Images carry the labels 0 to 9, of which zero is left out; words carry 0 to 8 for one to nine."""
    found = {}
    for name, key, classes in (("image", digits, range(1, 10)), ("audio", words, range(9))):
        content = open_data(workdir, key)
        found[name] = _ClassSet(content["words"], content["inputs"], content["labels"], classes, sizes)
    return found


def permutations(classes: int, number: int, seed: int) -> list[list[int]]:
    """Random orders of the classes without the identity."""
    generator = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < number:
        order = generator.sample(range(classes), classes)
        if order != list(range(classes)):
            found.append(order)
    return found


def zeroshot_job(
    *, seed: int, digits: str, words: str, sizes: list[int], image: Mapping[str, Any], audio: Mapping[str, Any],
    const_pairs: list[list[float]], align: Mapping[str, Any], num_permutations: int, pairing: str, gain: float, workdir: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """All 36 pairs of unseen digits under the true and under permuted pairings of classes; raw counts, no recurrence, other losses beside.

    Every (const, epoch) is chosen per pair by retrieval of validation items of its seen classes; the same for permuted pairings.
    """
    from papers.lsm.zeroshot import AlignSettings, all_pairs
    from papers.lsm.zeroshot import align as run

    sets = _digit_sets(workdir, digits, words, sizes)
    spikes = {name: s.spikes for name, s in sets.items()}
    settings, pairs = AlignSettings(**align), all_pairs()
    weights = {
        "image": make_weights("gaussian", spikes["image"].inputs, image["neurons"], seed),
        "audio": make_weights("gaussian", spikes["audio"].inputs, audio["neurons"], seed + SECOND_SEED),
    }
    device = {
        "image": make_weights("breakdown", spikes["image"].inputs, image["neurons"], seed, formed=image["formed"]),
        "audio": make_weights(
            "breakdown", spikes["audio"].inputs, audio["neurons"], seed + SECOND_SEED, formed=audio["formed"]
        ),
    }

    def liquids(w: Mapping[str, Weights], eta: float = 0.0) -> list[tuple[Any, Any]]:
        result = []
        for consts in const_pairs:
            made = []
            for name, options, const in zip(("audio", "image"), (audio, image), consts[::-1], strict=True):
                one = Liquid.of(
                    w[name], decay=options["decay"], v_th=options["v_th"], const=const * gain, read_noise=eta
                )
                made.append(sets[name].parts(spikes[name].counts(one, torch.Generator().manual_seed(seed))))
            result.append((made[0], made[1]))
        return result

    raw = [(sets["audio"].parts(spikes["audio"].raw()), sets["image"].parts(spikes["image"].raw()))]
    plain = liquids(weights)
    orders = permutations(9, num_permutations, seed)
    true_order = list(range(9)) if pairing == "true" else permutations(9, 1, seed + 1)[0]
    without = {name: w.without_recurrence() for name, w in weights.items()}
    arms: list[tuple[str, Any, list[int], Any]] = [
        ("liquid", plain, true_order, settings),
        ("raw counts", raw, true_order, settings),
        ("no recurrence", liquids(without), true_order, settings),
        ("formed cells, read noise", liquids(device, float(image["read_noise"])), true_order, settings),
        ("prototypes", plain, true_order, AlignSettings(**{**align, "loss": "prototypes"})),
        ("soft loss", plain, true_order, AlignSettings(**{**align, "loss": "soft", "tau": 1.0})),
        *((f"permuted {i}", plain, order, settings) for i, order in enumerate(orders)),
    ]
    result = {}
    for index, (name, features, order, options) in enumerate(arms):
        runs = [run(a.permuted(order), v, pairs, options, seed) for a, v in features]
        result[name] = _selected(runs)
        progress(index + 1, len(arms))
    return {"arms": result, "pairs": [[a + 1, b + 1] for a, b in pairs], "orders": orders}


def _selected(runs: Sequence[Any]) -> dict[str, Any]:
    """Per problem: the (const, epoch) with the best validation retrieval of seen classes, the last epoch, and the best test epoch."""
    val, seen, unseen, reverse = (
        torch.cat([getattr(r, part) for r in runs])
        for part in ("val_seen", "test_seen", "test_unseen", "reverse_unseen")
    )
    choice = val.argmax(0, keepdim=True)
    # The official script keeps an epoch by its test scores, unseen classes included.
    return {
        "seen": seen.gather(0, choice)[0].tolist(), "unseen": unseen.gather(0, choice)[0].tolist(),
        "reverse": reverse.gather(0, choice)[0].tolist(), "last": unseen[-1].tolist(), "test_selected": unseen.max(0).values.tolist(),
    }  # fmt: skip


def clip_job(
    *, seed: int, digits: str, words: str, sizes: list[int], pairs: list[list[int]], image: Mapping[str, Any], audio: Mapping[str, Any],
    train: Mapping[str, Any], workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """SRNN-CLIP: everything trained, some pairs of unseen digits, the loss and items of the liquid's heads, tuned on seen classes."""
    from papers.lsm.baselines import SRNN, SpikingCLIP, Training, clip, epochs_run, tune
    from papers.lsm.zeroshot import retrieval

    sets = _digit_sets(workdir, digits, words, sizes)
    sides = {"audio": audio, "image": image}
    parts = {name: sets[name].parts(sets[name].spikes.spikes()) for name in sides}
    plan = (train["rates"], train["trial_epochs"], train["epochs"])
    step = counted(progress, len(pairs) * epochs_run(*plan))

    def tuned(unseen: list[int]) -> dict[str, float]:
        seen = [k for k in range(9) if k not in unseen]
        items = [parts[name].train[seen].flatten(0, 1) for name in sides]
        labels = torch.arange(len(seen)).repeat_interleave(sizes[0])

        def make(rate: float) -> Training:
            torch.manual_seed(seed)
            bodies = [
                SRNN(
                    sets[name].spikes.inputs, o["neurons"], decay=o["decay"], v_th=train["v_th"], const=train["const"], seed=seed
                )
                for name, o in sides.items()
            ]  # fmt: skip
            model = SpikingCLIP(bodies[0], bodies[1], train["dim"])

            def score(part: str, which: list[int]) -> float:
                chosen = [getattr(parts[name], part)[which] for name in sides]
                e = [model.embed(i, x.flatten(0, 1)) for i, x in enumerate(chosen)]
                return float(retrieval(e[0], e[1], torch.arange(len(which)).repeat_interleave(chosen[0].shape[1])))

            return clip(
                model, items, labels, lambda: score("val", seen),
                lambda: {"seen": score("test", seen), "unseen": score("test", unseen)},
                batch=train["batch"], lr=rate, tau=train["tau"], seed=seed,
            )  # fmt: skip

        return tune(make, *plan, step)

    found = [tuned([k - 1 for k in pair]) for pair in pairs]
    return {"seen": [f["seen"] for f in found], "unseen": [f["unseen"] for f in found], "pairs": pairs}


def windows_job(
    *, seed: int, data: str, sizes: list[int], neurons: int, decay: float, v_th: float, const_neural: float, const_image: float,
    align: Mapping[str, Any], shuffled: bool, gain: float, workdir: Path, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """All 23 windows of four unseen letters: liquids, raw counts, no recurrence. ``shuffled`` breaks the pairing of classes."""
    from papers.lsm.data.curves import ELECTRODES, SIDE
    from papers.lsm.zeroshot import AlignSettings, all_windows
    from papers.lsm.zeroshot import align as run

    content = open_data(workdir, data)
    inputs = {"neural": ELECTRODES, "images": SIDE * SIDE}
    classes = {name: _ClassSet(content[name], n, content["labels"], range(26), sizes) for name, n in inputs.items()}
    sets = {name: one.spikes for name, one in classes.items()}
    consts = {"neural": const_neural * gain, "images": const_image * gain}
    weights = {
        name: make_weights("gaussian", s.inputs, neurons, seed + i * SECOND_SEED)
        for i, (name, s) in enumerate(sets.items())
    }
    order = permutations(26, 1, seed)[0] if shuffled else list(range(26))
    rates = {}

    def modality(name: str, kind: str) -> Modality:
        if kind == "raw counts":
            features = sets[name].raw()
        else:
            w = weights[name].without_recurrence() if kind == "no recurrence" else weights[name]
            features = sets[name].counts(Liquid.of(w, decay=decay, v_th=v_th, const=consts[name]))
            rates[f"{name}, {kind}"] = firing_rate(features, sets[name].steps)
        result = classes[name].parts(features)
        return result.permuted(order) if name == "neural" else result

    result, kinds = {}, ("liquid", "raw counts", "no recurrence")
    for index, kind in enumerate(kinds):
        found = run(modality("neural", kind), modality("images", kind), all_windows(), AlignSettings(**align), seed)
        result[kind] = _selected([found])
        progress(index + 1, len(kinds))
    return {"arms": result, "rates": rates}
