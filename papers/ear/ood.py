"""Out-of-distribution scores to compare the hyperdimensional detector with, and the metrics. Larger means more out of distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from papers.ear.hdc import HDEncoder, HDSettings, bundle, cosine
from papers.ear.learner import Features
from shared.errors import UserError

# --- metrics ---


def auroc(inliers: Tensor, outliers: Tensor) -> float:
    """Area under the ROC curve by ranks, ties averaged: P(score of an outlier > score of an inlier)."""
    ranks = rankdata(torch.cat((inliers, outliers)).double().numpy())
    n_in, n_out = len(inliers), len(outliers)
    return float((ranks[n_in:].sum() - n_out * (n_out + 1) / 2) / (n_in * n_out))


def fpr_at_tpr(inliers: Tensor, outliers: Tensor, tpr: float = 0.95) -> float:
    """Share of inliers flagged by the threshold that flags ``tpr`` of the outliers."""
    threshold = torch.quantile(outliers.double(), 1 - tpr)
    return float((inliers.double() >= threshold).double().mean())


# --- scores on logits ---


def msp(logits: Tensor) -> Tensor:
    """Minus the largest softmax probability (Hendrycks and Gimpel 2017)."""
    return -logits.softmax(1).max(1).values


def max_logit(logits: Tensor) -> Tensor:
    """Minus the largest logit."""
    return -logits.max(1).values


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Free energy -T logsumexp(logits / T) (Liu et al. 2020)."""
    return -temperature * torch.logsumexp(logits / temperature, 1)


def odin(
    model: Callable[[Tensor], Tensor], images: Tensor, *, temperature: float = 1000.0, epsilon: float = 0.0014
) -> Tensor:
    """ODIN (Liang et al. 2018): softmax at a high temperature after a step of ``epsilon`` toward a more certain input.

    ``model`` maps images to logits and lets gradients pass.
    """
    x = images.clone().requires_grad_(True)
    logits = model(x) / temperature
    loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        return msp(model(images - epsilon * gradient.sign()) / temperature)


# --- scores on features ---


class Mahalanobis:
    """Smallest squared Mahalanobis distance to a class mean, one shared covariance per tap, added over taps (Lee et al. 2018).

    Taps are average-pooled to one vector each; ``ridge`` (a share of the mean variance) keeps the covariance invertible.
    """

    def __init__(self, taps: Features, labels: Tensor, classes: int, ridge: float = 1e-4) -> None:
        self.means, self.factors = [], []
        counts = torch.bincount(labels, minlength=classes).clamp_min(1)
        for tap in taps:
            x = tap.mean((2, 3)).double()
            mean = bundle(x, labels, classes) / counts[:, None]
            centred = x - mean[labels]
            covariance = centred.T @ centred / len(x)
            covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
            self.means.append(mean[torch.bincount(labels, minlength=classes) > 0])
            self.factors.append(torch.linalg.cholesky(covariance))

    def __call__(self, taps: Features) -> Tensor:
        total = torch.zeros(len(taps[0]), dtype=torch.float64)
        for tap, means, factor in zip(taps, self.means, self.factors, strict=True):
            total += (
                torch.cdist(_whiten(tap.mean((2, 3)).double(), factor), _whiten(means, factor)).square().min(1).values
            )
        return total


def _whiten(vectors: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, vectors.T, upper=False).T


class KNN:
    """Distance to the k-th nearest training vector, unit-length pooled features of the last tap (Sun et al. 2022)."""

    def __init__(self, taps: Features, k: int = 50) -> None:
        self.bank = F.normalize(taps[-1].mean((2, 3)), dim=1)
        if not 1 <= k <= len(self.bank):
            raise UserError(f"k={k} must lie between 1 and the {len(self.bank)} training images")
        self.k = k

    def __call__(self, taps: Features) -> Tensor:
        distances = torch.cdist(F.normalize(taps[-1].mean((2, 3)), dim=1), self.bank)
        return distances.kthvalue(self.k, dim=1).values


class HDDetector:
    """Minus the largest cosine to a class exemplar, for any :class:`HDSettings` (HDFF among them).

    ``exemplars="random"`` replaces what was learnt by noise (a control); ``per_class=False`` keeps one exemplar for all classes.
    """

    def __init__(
        self,
        channels: Sequence[int],
        taps: Features,
        labels: Tensor,
        classes: int,
        settings: HDSettings,
        *,
        per_class: bool = True,
        exemplars: str = "learnt",
    ) -> None:
        self.encoder = HDEncoder(channels, settings).fit(taps)
        with torch.no_grad():
            groups, n = (labels, classes) if per_class else (torch.zeros_like(labels), 1)
            total = bundle(self.encoder(taps), groups, n)
        if exemplars == "random":
            total = torch.randn(total.shape, generator=torch.Generator().manual_seed(settings.seed + 1))
        self.exemplars = total[torch.bincount(groups, minlength=n) > 0]
        if settings.binary:
            self.exemplars = torch.where(self.exemplars < 0, -1.0, 1.0)

    @torch.no_grad()
    def __call__(self, taps: Features) -> Tensor:
        return -cosine(self.encoder(taps), self.exemplars).max(1).values


def encoder_with(net: nn.Module, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images -> logits through a frozen encoder and an adaptor, differentiable in the images."""
    return lambda images: net(encoder(images))
