"""Distillation between the decoders while training (TAM, one sentence in Supp. A.1; details from the authors' code). Gone at inference.

At each level the decoders' features of all tasks are weighted against each other, give one attention map, and every task predicts again
from the attended features of all tasks. These extra predictions are trained with the task's own loss and weight. Widths of the inner
convolutions and the kernel of the transposed ones are our choice; the sources do not state them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class TAMLevel(nn.Module):
    """One level: features (B, W, h, w) per task -> prediction (B, C, h, w) per task. h and w must be multiples of 4."""

    def __init__(self, tasks: Mapping[str, int], width: int) -> None:
        super().__init__()
        total = len(tasks) * width
        self.balance = nn.Sequential(
            _conv(total, width), nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.Sigmoid()
        )
        self.attention = nn.Sequential(
            _conv(total, width),
            _conv(width, width, stride=2),
            _conv(width, width, stride=2),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.Sigmoid(),
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(_conv(total, width), nn.Conv2d(width, channels, 1))
                for task, channels in tasks.items()
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predictions at the level's resolution."""
        balance = self.balance(torch.cat(list(features.values()), 1))
        first = len(features) // 2  # the first half of the tasks shares B, the others share 1 − B
        weights = [balance / first] * first + [(1 - balance) / (len(features) - first)] * (len(features) - first)
        weighted = [weight * feature for weight, feature in zip(weights, features.values(), strict=True)]
        attention = self.attention(torch.cat(weighted, 1))
        attended = torch.cat([feature * (1 + attention) for feature in features.values()], 1)
        return {task: head(attended) for task, head in self.heads.items()}


class TAM(nn.Module):
    """Levels 0, 1, 2 sit on the features after the 2nd, 3rd and 4th convolution of the decoders."""

    def __init__(self, tasks: Mapping[str, int], width: int, levels: Sequence[int], stages: int) -> None:
        super().__init__()
        if len(tasks) < 2:
            raise UserError("distillation needs at least two tasks: choose more tasks, or no distillation levels")
        if any(not 0 <= level < stages - 1 for level in levels):
            raise UserError(
                f"distillation levels {list(levels)}: a decoder of {stages} stages has levels 0 to {stages - 2}"
            )
        self.levels = nn.ModuleDict({str(level): TAMLevel(tasks, width) for level in levels})

    def forward(self, stages: Mapping[str, Sequence[Tensor]], image: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Decoder stages per task -> for each level, predictions (B, C, H, W) at the size of the image."""
        outputs = []
        for level, module in self.levels.items():
            predictions = module({task: features[int(level) + 1] for task, features in stages.items()})
            outputs.append(
                {task: F.interpolate(p, image, mode="bilinear", align_corners=False) for task, p in predictions.items()}
            )
        return outputs
