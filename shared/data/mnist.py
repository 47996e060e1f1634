"""MNIST, or another set in its format (Fashion-MNIST), from IDX files under ``<root>/MNIST/raw``."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shared.errors import UserError


def load_mnist(root: Path | str, *, train: bool, name: str = "MNIST") -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [0, 1] and labels (N,), in the order of the files.

    Args:
        root: the folder that holds ``<name>/raw``.
        train: 60,000 training images, else 10,000 test images.
        name: ``MNIST`` or ``FashionMNIST``.

    Raises:
        UserError: the files are not there, or cannot be read.
    """
    from torchvision import datasets

    try:
        data = getattr(datasets, name)(str(root), train=train, download=False)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"no readable {name} under {root}: put the four IDX files into {Path(root) / name / 'raw'}"
        ) from error
    return data.data.unsqueeze(1).float() / 255, data.targets.long()
