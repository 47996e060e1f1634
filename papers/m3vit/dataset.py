"""SynthRoom scenes as arrays and as training batches: generated once, cached on disk, mirrored for augmentation."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papers.m3vit import synthroom
from shared.errors import UserError
from shared.files import set_aside, whole_file

TRAIN_START, VAL_START = 0, 1_000_000  # scene seeds
IMAGE_MEAN, IMAGE_STD = 0.41, 0.22  # of all pixels and channels, rounded

# Normals and depth are stored in half precision: 0.03 degrees and 0.05 %.
_STORED = {"normals": np.float16, "depth": np.float16}
_FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class Scenes:
    """Scenes as arrays (n, H, W, …) by name: image, semseg, parts, sal, normals, edge, depth."""

    arrays: Mapping[str, NDArray[Any]]
    note: str = ""  # what was wrong with the cache, if anything


def scenes(
    seeds: range,
    image: tuple[int, int],
    panels: tuple[int, int] = (1, 3),
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scenes:
    """The scenes of ``seeds``, read from ``cache`` (.npz) if it holds just these, else rendered and written there.

    A cache that cannot be read is renamed to ``*.corrupt``; a cache of other scenes is replaced. ``note`` tells of either.
    """
    fingerprint = _fingerprint(seeds, image, panels)
    note = ""
    if cache is not None and cache.exists():
        arrays, note = _read(cache, fingerprint)
        if arrays is not None:
            return Scenes(arrays)
    arrays = _render_all(seeds, image, panels, progress)
    if cache is not None:
        _write(cache, arrays, fingerprint)
    return Scenes(arrays, note)


def _fingerprint(seeds: range, image: tuple[int, int], panels: tuple[int, int]) -> str:
    """Names the scenes: arguments, and the code that renders them."""
    code = hashlib.sha256(Path(synthroom.__file__).read_bytes()).hexdigest()[:16]
    return f"{seeds} {tuple(image)} {tuple(panels)} {code}"


def _render_all(
    seeds: range, image: tuple[int, int], panels: tuple[int, int], progress: Callable[[int, int], None] | None
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for row, seed in enumerate(seeds):
        for name, label in synthroom.render(seed, image, panels).labels().items():
            if name not in arrays:
                arrays[name] = np.empty((len(seeds), *label.shape), _STORED.get(name, label.dtype))
            arrays[name][row] = label
        if progress is not None:
            progress(row + 1, len(seeds))
    return arrays


def _read(path: Path, fingerprint: str) -> tuple[dict[str, NDArray[Any]] | None, str]:
    """The arrays, or None and the reason. Reading a member to its end checks its CRC-32."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored[_FINGERPRINT]) != fingerprint:
                return None, f"{path.name} held other scenes and was replaced"
            return {name: stored[name] for name in stored.files if name != _FINGERPRINT}, ""
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        aside = set_aside(path, "corrupt")
        return None, f"{path.name} was damaged: set aside as {aside.name}, the scenes were made anew"


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], fingerprint: str) -> None:
    """Atomic: a reader sees the whole file or none."""
    with whole_file(path) as file:
        np.savez(file, allow_pickle=False, **{_FINGERPRINT: np.array(fingerprint)}, **arrays)


def flip(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mirror labels (B, H, W, …) left to right; the x component of normals changes its sign."""
    mirrored = {name: label.flip(2) for name, label in labels.items()}
    if "normals" in mirrored:
        mirrored["normals"][..., 0] *= -1
    return mirrored


class Batches:
    """Training batches as a function of the step number and the seed: the same for every model, and for a resumed run.

    Every epoch is a shuffle of its own; what does not fill a batch is left out. With ``augment``, half of the images are mirrored.
    """

    def __init__(self, data: Scenes, batch: int, seed: int, augment: bool = True) -> None:
        self.tensors = {name: torch.from_numpy(array) for name, array in data.arrays.items()}
        self.num_scenes = len(data.arrays["image"])
        if not 1 <= batch <= self.num_scenes:
            raise UserError(f"batch is {batch}: choose 1 to the number of training scenes ({self.num_scenes})")
        self.batch, self.seed, self.augment = batch, seed, augment

    def __call__(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) and targets of batch ``step``; see :func:`to_model`."""
        epoch, position = divmod(step, self.num_scenes // self.batch)
        shuffled = np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_scenes)
        rows = torch.from_numpy(shuffled[position * self.batch : (position + 1) * self.batch])
        labels = {name: tensor[rows] for name, tensor in self.tensors.items()}
        if self.augment:
            chosen = torch.from_numpy(np.random.default_rng([self.seed, 1, step]).random(self.batch) < 0.5)
            for name, mirrored in flip({name: label[chosen] for name, label in labels.items()}).items():
                labels[name][chosen] = mirrored
        return to_model(labels)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All scenes once, in order, not mirrored: for evaluation."""
        for start in range(0, self.num_scenes, self.batch):
            yield to_model({name: tensor[start : start + self.batch] for name, tensor in self.tensors.items()})


def to_model(labels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Arrays (B, H, W, …) as the model takes them: images (B, 3, H, W) of about zero mean and unit variance, and targets.

    Class labels become (B, H, W) int64, all others (B, C, H, W) float32. Images are standardised by fixed constants.
    """
    images = (labels["image"].permute(0, 3, 1, 2).float() - 255 * IMAGE_MEAN) / (255 * IMAGE_STD)
    targets: dict[str, Tensor] = {}
    for name, label in labels.items():
        if name in ("semseg", "parts"):
            targets[name] = label.long()
        elif name == "normals":
            targets[name] = label.permute(0, 3, 1, 2).float()
        elif name != "image":
            targets[name] = label[:, None].float()
    return images, targets
