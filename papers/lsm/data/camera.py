"""An event camera before digits: three saccades, logarithmic contrast, ON and OFF events (stand-in A; N-MNIST was recorded like this).

Any 28 x 28 images go through it: scikit-learn's digits enlarged, MNIST, Fashion-MNIST.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from papers.lsm.bits import pack

CANVAS, VIEW, PADDING = 28, 34, 7
DURATION_S = 0.315
CROP = slice(9, 25)  # the central 16 x 16 pixels of the view, which the paper's code uses


@dataclass(frozen=True)
class Camera:
    """``threshold`` of the logarithmic contrast, ``bins`` of time, ``noise`` of an ON event per pixel and bin."""

    threshold: float = 0.4
    offset: float = 0.1
    bins: int = 50
    substeps: int = 4
    noise: float = 2e-4


def saccade_path(r: Tensor) -> tuple[Tensor, Tensor]:
    """Shift (sx, sy) in pixels at times ``r`` in [0, 1]: down right, up right, back left."""
    phase = (r * 3).clamp(max=2.999999).floor()
    q = r * 3 - phase
    sx = torch.where(phase == 0, 3.5 * q, torch.where(phase == 1, 3.5 + 3.5 * q, 7 - 7 * q))
    sy = torch.where(phase == 0, 7 * q, torch.where(phase == 1, 7 - 7 * q, torch.zeros_like(q)))
    return sx, sy


def place(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits (N, 8, 8) in [0, 1] -> (N, 28, 28): enlarged to 20 x 20 and pasted at a random offset of 3, 4 or 5 pixels."""
    large = F.interpolate(images[:, None], size=20, mode="bilinear", align_corners=False)[:, 0]
    canvas = torch.zeros(len(images), CANVAS, CANVAS)
    offsets = torch.randint(3, 6, (len(images), 2), generator=generator)
    for oy in range(3, 6):
        for ox in range(3, 6):
            chosen = (offsets == torch.tensor([oy, ox])).all(1)
            canvas[chosen, oy : oy + 20, ox : ox + 20] = large[chosen]
    return canvas


def events(
    images: Tensor, generator: torch.Generator, camera: Camera = Camera(), *, crop: slice | None = CROP
) -> tuple[Tensor, Tensor]:
    """ON and OFF events (N, T, h, w) as booleans of images (N, 28, 28) in [0, 1].

    Each pixel keeps a reference level of log(I + offset); it emits floor(|difference| / threshold) events, by which the reference follows,
    and a bin is set where there was at least one.
    """
    canvas = F.pad(images, (PADDING,) * 4)
    window = crop if crop is not None else slice(0, VIEW)
    first, size = window.start, window.stop - window.start
    times = torch.arange(camera.bins * camera.substeps + 1) / (camera.bins * camera.substeps)
    sx, sy = saccade_path(times)

    def view(step: int) -> Tensor:
        x, y = float(sx[step]), float(sy[step])
        ix, iy = int(x), int(y)
        fx, fy = x - ix, y - iy
        block = canvas[:, first + iy : first + iy + size + 1, first + ix : first + ix + size + 1]
        rows = block[:, :-1] * (1 - fy) + block[:, 1:] * fy
        return (rows[:, :, :-1] * (1 - fx) + rows[:, :, 1:] * fx + camera.offset).log_()

    reference = view(0)
    on = torch.zeros(len(images), camera.bins, size, size, dtype=torch.bool)
    off = torch.zeros_like(on)
    for step in range(1, len(times)):
        crossings = ((view(step) - reference) / camera.threshold).trunc_()
        reference += crossings * camera.threshold
        index = (step - 1) // camera.substeps
        on[:, index] |= crossings > 0
        off[:, index] |= crossings < 0
    on |= torch.rand(on.shape, generator=generator) < camera.noise
    return on, off


def spike_trains(images: Tensor, seed: int, camera: Camera = Camera(), block: int = 250) -> Tensor:
    """ON events of the central pixels (N, T, 256) as uint8."""
    generator = torch.Generator().manual_seed(seed)
    parts = [events(part, generator, camera)[0].flatten(2).to(torch.uint8) for part in images.split(block)]
    return torch.cat(parts)


def packed_spike_trains(images: Tensor, seed: int, camera: Camera = Camera(), block: int = 250) -> Tensor:
    """The same as packed words (N, T, 8): 1.6 kB a sample, for sets as large as MNIST."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([pack(events(part, generator, camera)[0].flatten(2)) for part in images.split(block)])


def saccade_digits(seed: int, camera: Camera = Camera()) -> tuple[Tensor, Tensor]:
    """Stand-in A: scikit-learn's 1,797 digits before the camera, (N, T, 256) uint8, and labels. The seed moves digits and noise."""
    from shared.data.digits import load_digits

    images, labels = load_digits()
    canvas = place(images[:, 0], torch.Generator().manual_seed(seed))
    return spike_trains(canvas, seed + 1, camera), labels
