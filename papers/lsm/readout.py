"""Linear read-outs of frozen spike counts (as in the official scripts): ridge in closed form, logistic regression by scikit-learn.

Penalties are chosen on the validation split only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

RIDGE = (1.0, 10.0, 100.0, 1000.0)
LOGISTIC = (0.01, 0.1)  # inverse penalties C


@dataclass(frozen=True)
class Split:
    """Features and labels of the three parts."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def standardised(self) -> Split:
        """Zero mean and unit variance of the training part; silent features stay zero."""
        x = self.train[0].float()
        mean, sd = x.mean(0), x.std(0)
        sd = torch.where(sd > 0, sd, torch.ones_like(sd))
        return Split(*(((f.float() - mean) / sd, y) for f, y in (self.train, self.val, self.test)))


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1] with the penalty that validation chose; predictions on the test part."""

    val: float
    test: float
    predictions: Tensor


def split_features(features: Tensor, labels: Tensor, sizes: Sequence[int]) -> Split:
    """Consecutive parts of ``sizes`` (train, validation, test)."""
    edges = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    parts = [(features[a:b], labels[a:b]) for a, b in pairwise(edges)]
    return Split(parts[0], parts[1], parts[2])


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def ridge(split: Split, classes: int) -> Score:
    """Least squares on one-hot targets with an intercept."""
    s = split.standardised()
    x, y = s.train[0].double(), torch.nn.functional.one_hot(s.train[1], classes).double()
    offset = y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)  # one decomposition serves every penalty
    projected = vectors.T @ (x.T @ (y - offset))
    best: Score | None = None
    for penalty in RIDGE:
        weights = vectors @ (projected / (values.clamp(min=0) + penalty).unsqueeze(1))
        val = _accuracy(s.val[0].double() @ weights + offset, s.val[1])
        if best is None or val > best.val:
            scores = s.test[0].double() @ weights + offset
            best = Score(val, _accuracy(scores, s.test[1]), scores.argmax(1))
    assert best is not None
    return best


def logistic(split: Split, classes: int) -> Score:
    """Multinomial logistic regression with an L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    s = split.standardised()
    best: Score | None = None
    for inverse in LOGISTIC:
        model = LogisticRegression(C=inverse, max_iter=200, tol=1e-3).fit(s.train[0].numpy(), s.train[1].numpy())
        val = float(model.score(s.val[0].numpy(), s.val[1].numpy()))
        if best is None or val > best.val:
            predictions = torch.from_numpy(model.predict(s.test[0].numpy()))
            best = Score(val, float((predictions == s.test[1]).double().mean()), predictions)
    assert best is not None
    return best


READOUTS = {"ridge": ridge, "logistic": logistic}
