"""Contrastive alignment of two frozen encoders and retrieval across modalities, for many problems at once.

A problem is a set of unseen classes: heads are trained on the other classes and scored on both. All problems of a protocol (36 pairs of
nine digits, 23 windows of four letters) are trained together as one batch of small matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import unknown

LOSSES = ("labels", "hard", "soft", "prototypes")


class Heads(nn.Module):
    """One linear projection and GELU per modality; embeddings are L2-normalised for the loss and for retrieval."""

    def __init__(self, audio_features: int, image_features: int, dim: int) -> None:
        super().__init__()
        self.audio, self.image = nn.Linear(audio_features, dim), nn.Linear(image_features, dim)

    def forward(self, audio: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(self.audio(audio)), F.gelu(self.image(image))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows, (…, B, B) -> (…)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(-1)


def label_targets(labels: Tensor) -> Tensor:
    """Rows of equal weights on the items of the same class."""
    same = (labels.unsqueeze(-1) == labels.unsqueeze(-2)).float()
    return same / same.sum(-1, keepdim=True)


def contrastive(a: Tensor, v: Tensor, labels: Tensor, *, tau: float, loss: str = "labels") -> Tensor:
    """Loss (…) of embeddings (…, B, d) of paired items.

    ``labels``: label-aware InfoNCE on cosines. ``hard``: each item only matches its partner. ``soft``: the likely loss of the paper's code,
    on raw products with targets from the embeddings themselves, which has a trivial solution. ``prototypes``: squared distances of the
    second half of the batch to class means of the first half, over both modalities (a prototypical network).

    Raises:
        UserError: unknown loss.
    """
    if loss == "soft":
        logits = a @ v.mT / tau
        targets = (tau * (a @ a.mT + v @ v.mT) / 2).softmax(-1)
        return 0.5 * (soft_cross_entropy(logits, targets) + soft_cross_entropy(logits.mT, targets.mT))
    if loss == "prototypes":
        return _prototypical(a, v, labels)
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    logits = F.normalize(a, dim=-1) @ F.normalize(v, dim=-1).mT / tau
    targets = label_targets(labels) if loss == "labels" else torch.eye(a.shape[-2]).expand(logits.shape)
    return 0.5 * (soft_cross_entropy(logits, targets) + soft_cross_entropy(logits.mT, targets.mT))


def _prototypical(a: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    half = a.shape[-2] // 2
    classes = int(labels.max()) + 1
    one_hot = F.one_hot(labels, classes).float()
    support, query = one_hot[..., :half, :], labels[..., half:]
    sums = support.mT @ a[..., :half, :] + support.mT @ v[..., :half, :]
    number = 2 * support.sum(-2)  # (…, K)
    prototypes = sums / number.clamp(min=1).unsqueeze(-1)
    missing = torch.where(number == 0, -1e9, 0.0).unsqueeze(-2)
    total = a.new_zeros(a.shape[:-2])
    for e in (a, v):
        logits = -torch.cdist(e[..., half:, :], prototypes).square() + missing
        total = total + F.cross_entropy(logits.flatten(0, -2), query.flatten(), reduction="none").reshape(
            query.shape
        ).mean(-1)
    return 0.5 * total


def retrieval(queries: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """Share (…) of queries (…, Q, d) whose nearest item of the gallery by cosine has their class; both have the same ``labels`` (Q,)."""
    best = (F.normalize(queries, dim=-1) @ F.normalize(gallery, dim=-1).mT).argmax(-1)
    return (labels[best] == labels).double().mean(-1)


@dataclass(frozen=True)
class Modality:
    """Features (K classes, n items, D) of the training, validation and test parts."""

    train: Tensor
    val: Tensor
    test: Tensor

    def permuted(self, order: Sequence[int]) -> Modality:
        """Class k is played by class ``order[k]``: the null hypothesis of the pairing."""
        index = list(order)
        return Modality(self.train[index], self.val[index], self.test[index])


@dataclass(frozen=True)
class AlignSettings:
    """How heads are trained: plain Adam, no schedule, no weight decay."""

    dim: int = 64
    epochs: int = 6
    batch: int = 70
    lr: float = 3e-3
    tau: float = 0.1
    loss: str = "labels"


@dataclass(frozen=True)
class Aligned:
    """Top-1 retrieval per epoch and problem (E, J), audio to image; ``reverse_unseen`` is image to audio."""

    val_seen: Tensor
    test_seen: Tensor
    test_unseen: Tensor
    reverse_unseen: Tensor


def all_pairs(classes: int = 9) -> list[tuple[int, ...]]:
    """Every pair of unseen classes."""
    return list(combinations(range(classes), 2))


def all_windows(classes: int = 26, width: int = 4) -> list[tuple[int, ...]]:
    """Every run of consecutive unseen classes."""
    return [tuple(range(start, start + width)) for start in range(classes - width + 1)]


class _Side:
    """One modality of all problems: features standardised by the seen classes' training items, and heads as batched weights."""

    def __init__(self, data: Modality, seen: Tensor, dim: int, generator: torch.Generator) -> None:
        self.data, self.seen = data, seen
        train = data.train[seen].flatten(1, 2)  # (J, 7 n, D)
        self.mean = train.mean(1, keepdim=True)
        sd = train.std(1, keepdim=True)
        self.scale = torch.where(sd > 0, 1 / sd, torch.zeros_like(sd))
        self.train = (train - self.mean) * self.scale
        features, bound = train.shape[2], 1 / math.sqrt(train.shape[2])

        def uniform(*shape: int) -> Tensor:
            return ((torch.rand(*shape, generator=generator) * 2 - 1) * bound).requires_grad_()

        self.weight, self.bias = uniform(len(seen), features, dim), uniform(len(seen), 1, dim)

    def embed(self, x: Tensor) -> Tensor:
        return F.gelu(torch.baddbmm(self.bias, x, self.weight))

    @torch.no_grad()
    def embed_part(self, part: Tensor, classes: Tensor) -> Tensor:
        """Embeddings (J, C n, d) of the ``classes`` (J, C) of a part (K, n, D)."""
        return self.embed((part[classes].flatten(1, 2) - self.mean) * self.scale)


def align(
    audio: Modality, image: Modality, problems: Sequence[tuple[int, ...]], settings: AlignSettings, seed: int
) -> Aligned:
    """Train and score the heads of all ``problems`` (sets of unseen classes, equally large) together, each on its own seen classes."""
    classes = audio.train.shape[0]
    unseen = torch.tensor(problems)
    seen = torch.tensor([[k for k in range(classes) if k not in problem] for problem in problems])
    generator = torch.Generator().manual_seed(seed)
    sides = [_Side(data, seen, settings.dim, generator) for data in (audio, image)]
    parameters = [p for side in sides for p in (side.weight, side.bias)]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
    per_class = audio.train.shape[1]
    labels = torch.arange(seen.shape[1]).repeat_interleave(
        per_class
    )  # position among the seen classes: the same for every problem
    order_of = [torch.arange(seen.shape[1]).repeat_interleave(part.shape[1]) for part in (audio.val, audio.test)]
    unseen_labels = torch.arange(unseen.shape[1]).repeat_interleave(audio.test.shape[1])
    history: list[list[Tensor]] = [[], [], [], []]
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(settings.batch):
            if len(chosen) < 2:
                continue
            optimizer.zero_grad(set_to_none=True)
            a, v = (side.embed(side.train[:, chosen]) for side in sides)
            batch_labels = labels[chosen].expand(len(problems), -1)
            # The mean over problems scales no problem's Adam step.
            contrastive(a, v, batch_labels, tau=settings.tau, loss=settings.loss).sum().backward()
            optimizer.step()
        val, test, other = (
            [side.embed_part(getattr(side.data, part), classes_) for side in sides]
            for part, classes_ in (("val", seen), ("test", seen), ("test", unseen))
        )
        history[0].append(retrieval(val[0], val[1], order_of[0]))
        history[1].append(retrieval(test[0], test[1], order_of[1]))
        history[2].append(retrieval(other[0], other[1], unseen_labels))
        history[3].append(retrieval(other[1], other[0], unseen_labels))
    return Aligned(*(torch.stack(h) for h in history))
