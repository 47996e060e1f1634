"""The paper's eight data sets from local folders: an ImageFolder tree, or the layout that torchvision keeps. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.transforms import v2

from shared.errors import UserError, unknown

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Opener = Callable[[Path, bool, Any], Any]

CLASSES = {
    "cars": 196,
    "flowers": 102,
    "aircraft": 100,
    "cub": 200,
    "pets": 37,
    "food": 101,
    "cifar10": 10,
    "cifar100": 100,
}

# With the official training and validation sets joined where torchvision keeps them apart.
_TORCHVISION: dict[str, Opener] = {
    "cars": lambda root, train, t: datasets.StanfordCars(str(root), split=_split(train), transform=t),
    "flowers": lambda root, train, t: _joined(datasets.Flowers102, root, ("train", "val") if train else ("test",), t),
    "aircraft": lambda root, train, t: datasets.FGVCAircraft(
        str(root), split="trainval" if train else "test", transform=t
    ),
    "pets": lambda root, train, t: datasets.OxfordIIITPet(
        str(root), split="trainval" if train else "test", transform=t
    ),
    "food": lambda root, train, t: datasets.Food101(str(root), split=_split(train), transform=t),
    "cifar10": lambda root, train, t: datasets.CIFAR10(str(root), train=train, transform=t),
    "cifar100": lambda root, train, t: datasets.CIFAR100(str(root), train=train, transform=t),
}


def _split(train: bool) -> str:
    return "train" if train else "test"


def _joined(kind: Any, root: Path, splits: tuple[str, ...], transform: Any) -> Any:
    return torch.utils.data.ConcatDataset([kind(str(root), split=split, transform=transform) for split in splits])


def transforms(train: bool, resolution: int) -> v2.Compose:
    """Random crops (scale 0.22 to 1) and flips for training, a centre crop for testing; ImageNet's mean and deviation."""
    if train:
        steps: list[Any] = [
            v2.RandomResizedCrop(resolution, scale=(0.22, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    else:
        steps = [v2.Resize(resolution, antialias=True), v2.CenterCrop(resolution)]
    tail = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return v2.Compose([v2.ToImage(), v2.RGB(), *steps, *tail])


def open_dataset(name: str, root: str | Path, *, train: bool, resolution: int = 224) -> Any:
    """Images (3, resolution, resolution) and labels of a data set's training or test part.

    Looks for ``<root>/<name>/{train,val}/<class>/*`` and ``<root>/{train,val}/<class>/*``, then for torchvision's layout in ``<root>``.

    Raises:
        UserError: an unknown name, or nothing to read under ``root``.
    """
    if name not in CLASSES:
        raise unknown("data set", name, CLASSES)
    root = Path(root)
    transform = transforms(train, resolution)
    for folder in (root / name, root):
        part = folder / ("train" if train else "val")
        if part.is_dir() and any(child.is_dir() for child in part.iterdir()):
            return datasets.ImageFolder(str(part), transform=transform)
    if name in _TORCHVISION:
        try:
            return _TORCHVISION[name](root, train, transform)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"no {name} under {root}: put images into {root / name}/train/<class> and {root / name}/val/<class>, or the files of "
                f"torchvision's {name} into {root} ({' '.join(str(error).split())[:80]})"
            ) from error
    raise UserError(
        f"no {name} under {root}: put images into {root / name}/train/<class> and {root / name}/val/<class>"
    )
