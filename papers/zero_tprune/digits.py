"""ClutterDigits: a digit among distractors on a noisy canvas, where half of the patches say nothing. Our stand-in for ImageNet.

40 x 40 grey images: smooth background, three crops of other digits, the target digit at a random place by maximum. Sources: the digits of
scikit-learn (no download), or MNIST from ``data.root``. Everything is drawn from one seeded generator, vectorised over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE, DIGIT, CROP, DISTRACTORS = 40, 28, 8, 3
TRAIN_DIGITS = 1400  # of scikit-learn's 1797; the others are the test digits
MEAN, SCALE = 0.2, 0.3


@dataclass(frozen=True)
class Digits:
    """Source digits [M, 28, 28] in [0, 1] with labels [M]."""

    images: Tensor
    labels: Tensor

    def canvases(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` normalised canvases [count, 1, 40, 40] and the labels of their targets, on the generator's device."""
        where = generator.device

        def place(limit: int) -> tuple[Tensor, Tensor]:
            return (torch.randint(0, limit, (count,), generator=generator, device=where) for _ in range(2))  # type: ignore[return-value]

        coarse = torch.rand(count, 1, 6, 6, generator=generator, device=where)
        canvas = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0] * 0.25
        canvas = canvas + 0.05 * torch.randn(count, SIZE, SIZE, generator=generator, device=where)
        for _ in range(DISTRACTORS):
            other = torch.randint(0, len(self.labels), (count,), generator=generator, device=where)
            inner = (DIGIT - CROP) // 2
            crop_y, crop_x = (inner // 2 + p for p in place(inner))
            piece = _window(self.images[other], crop_y, crop_x, CROP) * 0.8
            canvas = torch.maximum(canvas, _paste(piece, *place(SIZE - CROP + 1)))
        target = torch.randint(0, len(self.labels), (count,), generator=generator, device=where)
        canvas = torch.maximum(canvas, _paste(self.images[target], *place(SIZE - DIGIT + 1)))
        return ((canvas - MEAN) / SCALE)[:, None], self.labels[target]


def _window(images: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """Windows [B, size, size] of images [B, h, w] at corners (y, x)."""
    rows = y[:, None, None] + torch.arange(size, device=y.device)[None, :, None]
    columns = x[:, None, None] + torch.arange(size, device=y.device)[None, None, :]
    return images[torch.arange(len(images), device=y.device)[:, None, None], rows, columns]


def _paste(pieces: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pieces [B, s, s] on empty canvases [B, 40, 40] at corners (y, x)."""
    size = pieces.shape[-1]
    padded = F.pad(pieces, (SIZE - size,) * 4)
    return _window(padded, SIZE - size - y, SIZE - size - x, SIZE)


def load(source: str, root: str | None, *, train: bool) -> Digits:
    """Source digits. Training and test digits never overlap.

    Raises:
        UserError: MNIST is asked for and not there.
    """
    if source == "mnist":
        from shared.data.mnist import load_mnist
        from shared.errors import UserError

        if root is None:
            raise UserError("standin.source=mnist needs data.root=FOLDER, the folder that holds MNIST/raw")
        images, labels = load_mnist(root, train=train)
        return Digits(images[:, 0], labels)
    from shared.data.digits import load_digits

    images, labels = load_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:TRAIN_DIGITS] if train else order[TRAIN_DIGITS:]
    large = F.interpolate(images[chosen], size=(24, 24), mode="bilinear", align_corners=False)
    return Digits(F.pad(large, (2, 2, 2, 2))[:, 0], labels[chosen])
