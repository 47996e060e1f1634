"""The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [0, 1] and labels (1797,), in the library's order."""
    from sklearn import datasets

    data = datasets.load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target).long()
