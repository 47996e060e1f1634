"""Metrics of dense prediction and Δ_m (Sec. 4.1). Each metric takes batches with :meth:`update` and gives a number with :meth:`compute`.

mIoU, saliency and edge F are in percent, the angle of normals in degrees, depth in metres.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.m3vit.losses import VOID
from shared.errors import UserError, unknown

LOWER_IS_BETTER = frozenset({"normals", "depth"})


class Metric(Protocol):
    """Accumulates over batches; predictions (B, C, H, W) are the decoder's raw output."""

    def update(self, prediction: Tensor, target: Tensor) -> None: ...

    def compute(self) -> float:
        """Raises UserError if no labelled pixel was seen."""
        ...


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    if not float(denominator) > 0:
        raise UserError("no labelled pixel was seen: evaluate on at least one labelled image")
    return float(numerator) / float(denominator)


class MeanIoU:
    """Intersection over union of pixels pooled over the data set, mean over classes that occur in label or prediction."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``target`` (B, H, W) classes, 255 void."""
        valid = target != VOID
        pairs = self.num_classes * target[valid].long() + prediction.argmax(1)[valid]
        self.confusion += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.confusion)

    def compute(self) -> float:
        """Percent."""
        hit = self.confusion.diagonal().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        occurs = union > 0
        return 100 * _ratio((hit[occurs] / union[occurs]).sum(), occurs.sum())


class SaliencyIoU:
    """Mean IoU over images at the best of 15 thresholds in [0.2, 0.9]; an empty mask met by an empty prediction counts 1."""

    def __init__(self) -> None:
        self.thresholds = torch.linspace(0.2, 0.9, 15)
        self.total = torch.zeros(15, dtype=torch.float64)
        self.images = torch.zeros(())

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``target`` (B, 1, H, W) of 0 and 1."""
        masks = prediction.sigmoid().flatten(1)[None] > self.thresholds[:, None, None]  # (15, B, H·W)
        labels = target.flatten(1) > 0.5
        union = (masks | labels).sum(-1)
        iou = torch.where(union > 0, (masks & labels).sum(-1) / union, 1.0)
        self.total += iou.double().sum(1)
        self.images += len(prediction)

    def compute(self) -> float:
        """Percent."""
        return 100 * _ratio(self.total.max(), self.images)


class NormalAngle:
    """Mean angle in degrees between prediction and label over valid pixels."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.pixels = torch.zeros((), dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``target`` (B, 3, H, W), 255 void."""
        valid = (target != VOID).all(1)
        cosine = F.cosine_similarity(prediction.double(), target.double(), dim=1).clamp(-1, 1)
        self.total += torch.rad2deg(cosine.acos())[valid].sum()
        self.pixels += valid.sum()

    def compute(self) -> float:
        """Degrees."""
        return _ratio(self.total, self.pixels)


class DepthRMSE:
    """Root mean square error over all valid pixels of the data set."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.pixels = torch.zeros((), dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``target`` (B, 1, H, W) metres, 255 void."""
        valid = target != VOID
        self.total += (prediction - target)[valid].double().square().sum()
        self.pixels += valid.sum()

    def compute(self) -> float:
        """Metres."""
        return _ratio(self.total, self.pixels) ** 0.5


class EdgeF:
    """odsF: the best F over 99 thresholds, each used for the whole data set.

    A predicted and a true edge pixel match within ``tolerance`` pixels. The benchmark's one-to-one matching and thinning are left out:
    labels and predictions are compared as masks, so the numbers rank models here but are not BSDS numbers.
    """

    def __init__(self, tolerance: int = 1) -> None:
        self.tolerance = tolerance
        self.thresholds = torch.arange(1, 100) / 100 - 1e-6  # a probability that equals a threshold passes it
        # per threshold: predicted, predicted and right, true and found; then true
        self.counts = torch.zeros(3, 99, dtype=torch.float64)
        self.true = torch.zeros((), dtype=torch.float64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """``target`` (B, 1, H, W) of 0 and 1."""
        edges = target > 0.5
        probability = prediction.sigmoid()
        self.counts[0] += self._above(probability)
        self.counts[1] += self._above(probability[self._dilate(edges.float()) > 0.5])
        self.counts[2] += self._above(self._dilate(probability)[edges])
        self.true += edges.sum()

    def _dilate(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2 * self.tolerance + 1, stride=1, padding=self.tolerance)

    def _above(self, probability: Tensor) -> Tensor:
        """How many values reach each threshold."""
        passed = torch.bucketize(probability.flatten(), self.thresholds, right=True)
        return torch.bincount(passed, minlength=100).flip(0).cumsum(0).flip(0)[1:]

    def compute(self) -> float:
        """Percent."""
        predicted, right, found = self.counts
        precision = right / predicted.clamp(min=1)
        recall = torch.tensor([_ratio(value, self.true) for value in found])
        return float(100 * (2 * precision * recall / (precision + recall).clamp(min=1e-12)).max())


def metric_for(task: str, channels: int) -> Metric:
    """The metric of a task; ``channels`` is its number of classes."""
    if task in ("semseg", "parts", "human_parts"):
        return MeanIoU(channels)
    metrics: dict[str, type[SaliencyIoU] | type[NormalAngle] | type[DepthRMSE] | type[EdgeF]] = {
        "sal": SaliencyIoU,
        "normals": NormalAngle,
        "depth": DepthRMSE,
        "edge": EdgeF,
    }
    if task not in metrics:
        raise unknown("task", task, ["semseg", "parts", "human_parts", *metrics])
    return metrics[task]()


def delta_m(values: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Δ_m in percent: the mean over tasks of the relative gain over ``baseline``, signed so that better is positive."""
    gains = [
        (-1.0 if task in LOWER_IS_BETTER else 1.0) * (value - baseline[task]) / baseline[task]
        for task, value in values.items()
    ]
    return 100 * sum(gains) / len(gains)
