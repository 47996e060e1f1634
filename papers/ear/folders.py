"""Domain-adaptation sets as folders, ``root/<domain>/<class>/*.jpg``: PACS, Office-Home, DomainNet, Office-31.

The paper names "several benchmark datasets for domain adaptation"; which ones could not be read. Nothing is downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import UserError, unknown

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class Layout:
    """Domains of a set in the order in which they arrive, with the folder of each, and its number of classes."""

    domains: dict[str, str]
    classes: int


LAYOUTS = {
    "pacs": Layout({"photo": "photo", "art": "art_painting", "cartoon": "cartoon", "sketch": "sketch"}, 7),
    "office_home": Layout({"real": "Real World", "art": "Art", "clipart": "Clipart", "product": "Product"}, 65),
    "domainnet": Layout({d: d for d in ("real", "clipart", "infograph", "painting", "quickdraw", "sketch")}, 345),
    "office31": Layout({"amazon": "amazon/images", "dslr": "dslr/images", "webcam": "webcam/images"}, 31),
}


@dataclass(frozen=True)
class DomainFolder:
    """Files and labels of one domain; labels start from 0 in the alphabetical order of the class folders."""

    name: str
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def split(self, seed: int, test_share: float = 0.2) -> tuple[DomainFolder, DomainFolder]:
        """Training and test part: 80/20 within each class, by the seed alone."""
        rng = random.Random(seed)
        test: set[int] = set()
        for label in range(len(self.classes)):
            members = [i for i, other in enumerate(self.labels) if other == label]
            test.update(rng.sample(members, round(test_share * len(members))))
        return self._part([i for i in range(len(self.files)) if i not in test]), self._part(sorted(test))

    def with_list(self, path: Path, root: Path, first_label: int = 0) -> DomainFolder:
        """The files of an official split list, lines "path label". PACS lists count from 1: pass ``first_label=1``.

        Raises:
            UserError: a line that is not of that form, or a label outside the classes.
        """
        files, labels = [], []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name, _, label = line.rpartition(" ")
            value = int(label) - first_label if label.lstrip("-").isdigit() else -1
            if not name or not 0 <= value < len(self.classes):
                raise UserError(
                    f"{path}, line {number}: '{line}' is not a path and a label from {first_label} to "
                    f"{len(self.classes) - 1 + first_label}"
                )
            files.append(root / name)
            labels.append(value)
        return DomainFolder(self.name, self.classes, tuple(files), tuple(labels))

    def load(self, size: int = 224) -> tuple[Tensor, Tensor]:
        """Images (N, 3, size, size) in [0, 1] and labels; the encoder applies ImageNet's mean and spread."""
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        images = torch.empty(len(self.files), 3, size, size)
        for index, file in enumerate(self.files):
            with Image.open(file) as image:
                images[index] = (
                    pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) / 255
                )
        return images, torch.tensor(self.labels)

    def _part(self, chosen: list[int]) -> DomainFolder:
        files, labels = tuple(self.files[i] for i in chosen), tuple(self.labels[i] for i in chosen)
        return DomainFolder(self.name, self.classes, files, labels)


def load_folders(name: str, root: Path) -> dict[str, DomainFolder]:
    """All domains of a set, in the order of its layout.

    Raises:
        UserError: unknown set, missing folder, or domains whose classes differ.
    """
    if name not in LAYOUTS:
        raise unknown("data set", name, LAYOUTS)
    result: dict[str, DomainFolder] = {}
    for domain, place in LAYOUTS[name].domains.items():
        folder = root / place
        if not folder.is_dir():
            raise UserError(
                f"{name}: the folder {folder} is missing; unpack the set so that it holds one folder per class"
            )
        classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        found = [
            (f, i)
            for i, c in enumerate(classes)
            for f in sorted((folder / c).iterdir())
            if f.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise UserError(f"{name}: {folder} holds no images in class folders")
        result[domain] = DomainFolder(domain, classes, tuple(f for f, _ in found), tuple(i for _, i in found))
    first = next(iter(result.values()))
    for other in result.values():
        if other.classes != first.classes:
            raise UserError(f"{name}: the domains '{first.name}' and '{other.name}' have different class folders")
    return result
