"""Transfer at a scale that a CPU trains: handwritten digits, five classes to the other five, every method on the same rates and seeds.

Stand-in A is scikit-learn's digits; stand-in B is MNIST or Fashion-MNIST with the target's intensities inverted. A job pre-trains one
network from one seed, or transfers it in one way at every rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mobiletl.anatomy import forward_from, forward_to
from papers.mobiletl.convert import THROUGH, adapt, parameter_groups
from papers.mobiletl.models import create
from papers.mobiletl.settle import settle_norms
from shared.data.digits import load_digits
from shared.data.mnist import load_mnist
from shared.errors import unknown
from shared.training import fit

CLASSES = 5
WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Split:
    """Images (N, 1, H, W), centred, and labels (N,) from 0 to 4."""

    images: Tensor
    labels: Tensor

    def first(self, n: int) -> Split:
        """The first ``n``."""
        return Split(self.images[:n], self.labels[:n])


@dataclass(frozen=True)
class Task:
    """A source task and a target task; ``validation`` picks the learning rate, ``test`` is looked at once."""

    source: Split
    source_test: Split
    train: Split
    validation: Split
    test: Split


def _of(images: Tensor, labels: Tensor, *, target: bool) -> Split:
    keep = labels >= CLASSES if target else labels < CLASSES
    return Split(images[keep], labels[keep] % CLASSES)


def digits(train_images: int) -> Task:
    """Stand-in A: 8 x 8 digits enlarged to 24 x 24; 0 to 4 to 5 to 9. 1,200 images of a fixed shuffle train, 597 test."""
    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = images[order].repeat_interleave(3, 2).repeat_interleave(3, 3) - 0.5
    labels = labels[order]
    return _task((images[:1200], labels[:1200]), (images[1200:], labels[1200:]), train_images)


def idx(root: str, name: str, *, source_images: int, train_images: int, test_images: int) -> Task:
    """Stand-in B: 28 x 28 images from IDX files, the target's intensities inverted after centring."""
    parts = []
    for train in (True, False):
        images, labels = load_mnist(root, train=train, name=name)
        inverted = torch.where((labels >= CLASSES).view(-1, 1, 1, 1), 0.5 - images, images - 0.5)
        parts.append((inverted, labels))
    task = _task(*parts, train_images)
    return Task(
        task.source.first(source_images), task.source_test.first(test_images), task.train, task.validation.first(test_images),
        task.test.first(test_images),
    )  # fmt: skip


def _task(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], train_images: int) -> Task:
    target = _of(*train, target=True)
    rest = Split(target.images[train_images:], target.labels[train_images:])
    return Task(
        _of(*train, target=False), _of(*test, target=False), target.first(train_images), rest, _of(*test, target=True)
    )  # fmt: skip


def load_task(options: dict[str, Any]) -> Task:
    """From a job's ``data`` options. Raises UserError for an unknown stand-in or files that are not there."""
    if options["name"] == "digits":
        return digits(options["train_images"])
    if options["name"] in ("MNIST", "FashionMNIST"):
        sizes = {key: options[key] for key in ("source_images", "train_images", "test_images")}
        return idx(options["root"], options["name"], **sizes)
    raise unknown("stand-in", options["name"], ("digits", "MNIST", "FashionMNIST"))


def accuracy(predict: Callable[[Tensor], Tensor], split: Split, batch: int = 500) -> float:
    """Top-1 in per cent."""
    with torch.no_grad():
        parts = zip(split.images.split(batch), split.labels.split(batch), strict=True)
        hits = sum(int((predict(x).argmax(1) == y).sum()) for x, y in parts)
    return 100.0 * hits / len(split.labels)


def _train(
    model: nn.Module, predict: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, *, lr: float, epochs: int, batch: int,
    seed: int, workdir: Path | None = None, progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Adam with a cosine to zero; shuffles depend on the seed alone."""
    per_epoch = len(labels) // batch
    steps = epochs * per_epoch
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(epochs)]
    optimizer = torch.optim.Adam(parameter_groups(model, lr=lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    def loss(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        index = orders[epoch][place * batch : (place + 1) * batch]
        return F.cross_entropy(predict(inputs[index]), labels[index])

    fit(model, optimizer, schedule, loss, steps=steps, seed=seed, workdir=workdir, progress=progress)
    settle_norms(model.train(), predict, inputs.split(500))


def pretrain(
    task: Task, network: str, options: dict[str, Any], seed: int, workdir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, float]:  # fmt: skip
    """Train all of a network on the source task; returns it with its source test accuracy."""
    torch.manual_seed(seed)
    model = create(network, CLASSES, in_chans=1)
    _train(
        model, model, task.source.images, task.source.labels, lr=options["lr"], epochs=options["epochs"], batch=options["batch"],
        seed=seed, workdir=workdir, progress=progress,
    )  # fmt: skip
    return model, accuracy(model.eval(), task.source_test)


def transfer(
    base: nn.Module, task: Task, *, method: str, blocks: int, lr: float, epochs: int, batch: int, seed: int, **switches: Any
) -> dict[str, float]:  # fmt: skip
    """Train on the target with a new classifier; returns validation and test accuracy.

    The frozen part is a fixed function of the images, so its maps are computed once.
    """
    torch.manual_seed(seed + 1)
    base.classifier = nn.Linear(base.classifier.in_features, CLASSES)  # type: ignore[union-attr,arg-type]
    model = adapt(base, method, blocks, resolution=task.train.images.shape[-1], **switches)
    if method in (*THROUGH, "ft_all"):
        _train(model, model, task.train.images, task.train.labels, lr=lr, epochs=epochs, batch=batch, seed=seed)
    else:
        with torch.no_grad():
            maps = forward_to(model, task.train.images, blocks)
        predict = lambda x: forward_from(model, x, blocks)  # noqa: E731
        _train(model, predict, maps, task.train.labels, lr=lr, epochs=epochs, batch=batch, seed=seed)
    model.eval()
    return {"validation": accuracy(model, task.validation), "test": accuracy(model, task.test)}


def pretrain_job(
    *, seed: int, network: str, data: dict[str, Any], source: dict[str, Any], workdir: Path, progress: Callable[[int, int], None]
) -> dict[str, float]:  # fmt: skip
    """Pre-train and leave the weights in ``workdir``."""
    model, score = pretrain(load_task(data), network, source, seed, workdir, progress)
    torch.save(model.state_dict(), workdir / WEIGHTS)
    return {"source_accuracy": score}


def transfer_job(
    *, seed: int, network: str, data: dict[str, Any], target: dict[str, Any], arm: dict[str, Any], weights: str, workdir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """One arm (method, blocks, switches) at every rate of ``target["rates"]``: validation and test accuracy by rate."""
    task = load_task(data)
    base = create(network, CLASSES, in_chans=1)
    base.load_state_dict(torch.load(weights, weights_only=True))
    options = {key: value for key, value in arm.items() if key != "name"}
    scores = {}
    for done, lr in enumerate(target["rates"], start=1):
        scores[f"{lr:g}"] = transfer(
            base, task, lr=lr, seed=seed, epochs=target["epochs"], batch=target["batch"], **options
        )
        progress(done, len(target["rates"]))
    return scores


def best_rate(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The rate with the best validation accuracy; the lower one of two equals."""
    return max(sorted(scores, key=float), key=lambda rate: scores[rate]["validation"])
