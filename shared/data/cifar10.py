"""CIFAR-10 from a tar of JPEG files, ``<root>/cifar10-jpeg/{train,test}.tar`` with members ``<class>/<number>.jpg``.

The JPEG step is lossy, so accuracies can lie a little under those on the original pickles.
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError


def load_cifar10(root: Path | str, *, train: bool, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as bytes and labels (N,); classes in alphabetical order, images by class and number.

    Args:
        root: the folder that holds ``cifar10-jpeg``.
        train: 50,000 training images, else 10,000 test images.
        limit: read the first ``limit`` images of a fixed shuffle; all by default.

    Raises:
        UserError: the archive is not there, or cannot be read.
    """
    from PIL import Image

    path = Path(root) / "cifar10-jpeg" / ("train.tar" if train else "test.tar")
    try:
        with tarfile.open(path) as archive:
            members = sorted(
                (m for m in archive.getmembers() if m.isfile() and m.name.endswith(".jpg")), key=lambda m: m.name
            )
            classes = sorted({_class(m) for m in members})
            order = torch.randperm(len(members), generator=torch.Generator().manual_seed(0))[:limit].sort().values
            images = np.empty((len(order), 3, 32, 32), np.uint8)
            for row, index in enumerate(order.tolist()):
                file = archive.extractfile(members[index])
                assert file is not None
                with Image.open(file) as image:
                    images[row] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"no readable CIFAR-10 archive at {path}: it holds <class>/<number>.jpg") from error
    labels = torch.tensor([classes.index(_class(members[index])) for index in order.tolist()])
    return torch.from_numpy(images), labels


def _class(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).parent.name
