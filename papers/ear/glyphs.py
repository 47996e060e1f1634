"""Images without a download: glyphs of the fonts that ship with matplotlib, each a random hand's: bent, slanted, thick or thin.

Digits play the part of MNIST, letters that of the generic data that the encoder is pre-trained on: the two share no class and no
image, as CIFAR-10 and MNIST do in the reference run.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPQRTUVWXYabdefhkmnrtwy"  # letters that look like a digit or like each other are left out
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
BANK_SIDE = 48


@lru_cache(maxsize=4)
def bank(characters: str) -> Tensor:
    """Every character in every face, centred, white on black: (faces, characters, side, side)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plates = np.zeros((len(FACES), len(characters), BANK_SIDE, BANK_SIDE), np.float32)
    for i, face in enumerate(FACES):
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), 40, layout_engine=ImageFont.Layout.BASIC)
        for j, character in enumerate(characters):
            left, top, right, bottom = font.getbbox(character)
            image = Image.new("L", (BANK_SIDE, BANK_SIDE))
            corner = (BANK_SIDE / 2 - (left + right) / 2, BANK_SIDE / 2 - (top + bottom) / 2)
            ImageDraw.Draw(image).text(corner, character, fill=255, font=font)
            plates[i, j] = np.asarray(image, np.float32) / 255
    return torch.from_numpy(plates)


def draw(characters: str, count: int, side: int, seed: int, *, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """``count`` images (N, 1, side, side) in [0, 1] and their labels, the index of the character.

    ``spread`` scales how far a hand departs from print: slant, size, place, bending.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    labels = torch.randint(len(characters), (count,), generator=generator)
    faces = torch.randint(len(FACES), (count,), generator=generator)
    images = bank(characters)[faces, labels].unsqueeze(1)
    thick = torch.rand(count, generator=generator).view(-1, 1, 1, 1)
    images = torch.where(thick < 0.3, F.max_pool2d(images, 3, 1, 1), images)

    angle, slant = 0.2 * spread * uniform(count), 0.25 * spread * uniform(count)
    scale_x, scale_y = 1 + 0.2 * spread * uniform(count), 1 + 0.2 * spread * uniform(count)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale_x, -sin * scale_y + slant
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale_x, cos * scale_y
    theta[:, :, 2] = 0.12 * spread * uniform(count, 2)
    grid = F.affine_grid(theta, [count, 1, side, side], align_corners=False)
    bend = F.interpolate(
        0.13 * spread * uniform(count, 2, 4, 4), size=(side, side), mode="bicubic", align_corners=False
    )
    images = (
        F.interpolate(images, scale_factor=0.75, mode="area") if side < 24 else images
    )  # no aliasing on small images
    return F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False).clamp(0, 1), labels
