"""Losses per task and their weights (Supp. A.2 and the authors' configs)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import unknown

VOID = 255  # label of pixels that do not count

LOSS_WEIGHTS = {
    "semseg": 1.0,
    "depth": 1.0,
    "parts": 2.0,
    "human_parts": 2.0,
    "sal": 5.0,
    "normals": 10.0,
    "edge": 50.0,
}

EDGE_POSITIVE_WEIGHT = 0.95


def task_loss(task: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Loss of one task, a scalar.

    ``prediction`` (B, C, H, W); ``target`` (B, H, W) integer classes for semseg and parts, else (B, C, H, W) floats.
    semseg, parts: cross-entropy. depth: L1. normals: L1 between the unit prediction and the label. edge: binary cross-entropy with
    positives at 0.95 and negatives at 0.05. sal: the same with positives at the share of negatives in the batch (HED).
    """
    if task in ("semseg", "parts", "human_parts"):
        return F.cross_entropy(prediction, target, ignore_index=VOID)
    if task == "depth":
        return _masked_l1(prediction, target)
    if task == "normals":
        # F.normalize(eps=1e-12), which takes 40 times longer over a middle dimension
        return _masked_l1(prediction * prediction.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt(), target)
    if task == "edge":
        return _balanced_bce(prediction, target, torch.tensor(EDGE_POSITIVE_WEIGHT, dtype=target.dtype))
    if task == "sal":
        return _balanced_bce(prediction, target, 1.0 - target.mean())
    raise unknown("task", task, LOSS_WEIGHTS)


def _masked_l1(prediction: Tensor, target: Tensor) -> Tensor:
    valid = target != VOID
    return torch.where(valid, prediction - target, 0.0).abs().sum() / valid.sum()


def _balanced_bce(prediction: Tensor, target: Tensor, positive_weight: Tensor) -> Tensor:
    """Mean of −w·y·log p − (1−w)·(1−y)·log(1−p)."""
    weight = torch.where(target > 0, positive_weight, 1.0 - positive_weight)
    return F.binary_cross_entropy_with_logits(prediction, target, weight)


def total_loss(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], weights: Mapping[str, float] = LOSS_WEIGHTS
) -> Tensor:
    """Weighted sum over the tasks of ``predictions``."""
    losses = [weights[task] * task_loss(task, prediction, targets[task]) for task, prediction in predictions.items()]
    return torch.stack(losses).sum()
