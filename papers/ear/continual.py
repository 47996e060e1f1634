"""Continual learners to compare EAR with, all on the same cached taps, and the metrics of a sequence of tasks.

Gradient learners (naive, EWC, replay, joint) use EAR's own adaptor and classifier; gradient-free ones (nearest mean, streaming LDA,
ridge on hypervectors as in RanPAC) read pooled taps or hypervectors. Expert-Gate routes by reconstruction error instead of by HDC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.ear.hdc import bundle, cosine
from papers.ear.learner import AdaptorNet, Features, TrainSettings, epoch_order, take, train_net
from shared.training import fit

# --- metrics; A[k][j] is the accuracy on task j after step k ---


def final_accuracy(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over tasks after the last step."""
    last = matrix[-1]
    return sum(last) / len(last)


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of (best accuracy before the last step - final accuracy); Avalanche takes first minus last."""
    last, steps = matrix[-1], len(matrix)
    if steps < 2:
        return 0.0
    drops = [max(row[j] for row in matrix[:-1]) - last[j] for j in range(steps - 1)]
    return sum(drops) / len(drops)


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of (final accuracy - accuracy when just learnt)."""
    steps = len(matrix)
    if steps < 2:
        return 0.0
    return sum(matrix[-1][j] - matrix[j][j] for j in range(steps - 1)) / (steps - 1)


# --- gradient-free heads ---


def pooled(taps: Features) -> Tensor:
    """Average-pooled taps, each of unit length, side by side: (B, sum c)."""
    return torch.cat([F.normalize(t.mean((2, 3)), dim=1) for t in taps], 1)


class NearestMean:
    """Largest cosine to a running class mean."""

    def __init__(self, dim: int, classes: int) -> None:
        self.total = torch.zeros(classes, dim)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Add a batch; order does not matter."""
        self.total += bundle(x, labels, len(self.total))

    def logits(self, x: Tensor) -> Tensor:
        """Cosines; a class not seen can never win."""
        seen = self.total.abs().sum(1) > 0
        return cosine(x, self.total).masked_fill(~seen, -torch.inf)


class StreamingLDA:
    """Linear discriminant with running means and one running shared covariance (Hayes and Kanan 2020)."""

    def __init__(self, dim: int, classes: int, shrinkage: float = 1e-4) -> None:
        self.total, self.counts = (
            torch.zeros(classes, dim, dtype=torch.float64),
            torch.zeros(classes, dtype=torch.float64),
        )
        self.second = torch.zeros(dim, dim, dtype=torch.float64)
        self.shrinkage = shrinkage

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Add a batch; class sums and the second moment are exact, so order does not matter."""
        x = x.double()
        self.total += bundle(x, labels, len(self.total))
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.second += x.T @ x

    def logits(self, x: Tensor) -> Tensor:
        """Discriminants without class priors."""
        seen = self.counts > 0
        means = self.total / self.counts.clamp_min(1)[:, None]
        within = (self.second - means.T @ (means * self.counts[:, None])) / self.counts.sum()
        within += self.shrinkage * within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)
        weights = torch.linalg.solve(within, means.T)
        scores = x.double() @ weights - 0.5 * (means * weights.T).sum(1)
        return scores.masked_fill(~seen, -torch.inf)


class Ridge:
    """Ridge regression onto class indicators with running Gram matrices (RanPAC without its non-linearity): D^2 + D K floats."""

    def __init__(self, dim: int, classes: int, penalty: float = 1e-2) -> None:
        self.gram, self.cross = torch.zeros(dim, dim), torch.zeros(dim, classes)
        self.penalty, self.images = penalty, 0

    def learn(self, x: Tensor, labels: Tensor) -> None:
        """Add a batch; order does not matter."""
        self.gram += x.T @ x
        self.cross += bundle(x, labels, self.cross.shape[1]).T
        self.images += len(x)

    def logits(self, x: Tensor) -> Tensor:
        """Regressed indicators; ``penalty`` is per image and relative to the mean variance."""
        level = self.penalty * self.gram.diagonal().mean()
        return x @ torch.linalg.solve(self.gram + level * torch.eye(len(self.gram)), self.cross)


# --- gradient learners ---


@dataclass
class Replay:
    """A reservoir of stored features: after every task it is a uniform sample of all that was seen."""

    capacity: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.taps: list[Tensor] | None = None
        self.labels = torch.zeros(0, dtype=torch.long)
        self.seen = 0
        self.generator = torch.Generator().manual_seed(self.seed)

    def mixed_with(self, taps: Features, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        """A task's data with the stored features, repeated until they make up half of it."""
        if self.taps is None:
            return list(taps), labels
        repeats = max(1, len(labels) // len(self.labels))
        both = [torch.cat([t, *[old] * repeats]) for t, old in zip(taps, self.taps, strict=True)]
        return both, torch.cat([labels, *[self.labels] * repeats])

    def store(self, taps: Features, labels: Tensor) -> None:
        """Take a task's share of the reservoir."""
        n = len(labels)
        share = self.capacity if self.taps is None else round(self.capacity * n / (self.seen + n))
        new = torch.randperm(n, generator=self.generator)[:share]
        if self.taps is None:
            self.taps, self.labels = take(taps, new), labels[new]
        else:
            old = torch.randperm(len(self.labels), generator=self.generator)[: self.capacity - len(new)]
            self.taps = [torch.cat([a[old], b[new]]) for a, b in zip(self.taps, taps, strict=True)]
            self.labels = torch.cat([self.labels[old], labels[new]])
        self.seen += n


class EWC:
    """Quadratic penalty around the weights after each task, scaled by the diagonal Fisher information (Kirkpatrick et al. 2017)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.anchors: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def penalty(self, net: AdaptorNet) -> Callable[[], Tensor] | None:
        """The term to add to the loss of the next task; none before the first."""
        if not self.anchors:
            return None

        def term() -> Tensor:
            total = torch.zeros(())
            for weights, fisher in self.anchors:
                for name, p in net.named_parameters():
                    total = total + (fisher[name] * (p - weights[name]).square()).sum()
            return 0.5 * self.strength * total

        return term

    def consolidate(self, net: AdaptorNet, taps: Features, labels: Tensor, batch: int = 32) -> None:
        """Remember weights and Fisher information, from mini-batch gradients in evaluation mode."""
        net.eval()
        named = dict(net.named_parameters())
        fisher = {name: torch.zeros_like(p) for name, p in named.items()}
        n_batches = len(labels) // batch
        for i in range(n_batches):
            part = slice(i * batch, (i + 1) * batch)
            loss = F.cross_entropy(net(take(taps, part)), labels[part])
            for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                fisher[name] += batch * g.square() / n_batches
        self.anchors.append(({name: p.detach().clone() for name, p in named.items()}, fisher))


def sequential(
    net: AdaptorNet,
    tasks: Sequence[tuple[Features, Tensor]],
    settings: TrainSettings,
    *,
    seed: int,
    replay: Replay | None = None,
    ewc: EWC | None = None,
    after: Callable[[int, AdaptorNet], None],
) -> AdaptorNet:
    """One adaptor fine-tuned task after task (naive; with ``replay`` or ``ewc`` the remedies); ``after(k, net)`` follows each."""
    for k, (taps, labels) in enumerate(tasks):
        data, targets = replay.mixed_with(taps, labels) if replay else (list(taps), labels)
        penalty = ewc.penalty(net) if ewc else None
        train_net(net, data, targets, settings, seed=seed + k, start_classifier=k == 0, penalty=penalty)
        if replay:
            replay.store(taps, labels)
        if ewc:
            ewc.consolidate(net, taps, labels)
        after(k, net)
    return net


# --- Expert-Gate ---


def gate(taps: Features, *, hidden: int = 16, steps: int = 150, seed: int = 0) -> nn.Module:
    """An under-complete autoencoder of a domain's pooled taps (Aljundi et al. 2017), standardised by that domain's mean and spread."""
    x = pooled(taps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Gate(x.mean(0), x.std(0).clamp_min(1e-4), hidden)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    order = epoch_order(len(x), 128, seed)
    fit(net, optimizer, schedule, lambda step: net.error(x[order(step)]).mean(), steps=steps, seed=seed)
    return net.eval()


class _Gate(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.encode, self.decode = nn.Linear(len(mean), hidden), nn.Linear(hidden, len(mean))

    def error(self, x: Tensor) -> Tensor:
        """Reconstruction error of each vector, in the domain's own units."""
        z = (x - self.mean) / self.std
        return (self.decode(torch.relu(self.encode(z))) - z).square().mean(1)


@torch.no_grad()
def gate_route(gates: Sequence[nn.Module], taps: Features) -> Tensor:
    """Index of the autoencoder that reconstructs each image best."""
    x = pooled(taps)
    return torch.stack([net.error(x) for net in gates], 1).argmin(1)
