"""Real scenes in Mega-NeRF's layout, and chunks on disk for scenes that exceed memory.

::

    <scene>/coordinates.pt                   {'origin_drb': 3-vector, 'pose_scale_factor': float}
    <scene>/{train,val}/metadata/<stem>.pt   {'W', 'H', 'intrinsics': [fx, fy, cx, cy], 'c2w': 3 x 4}
    <scene>/{train,val}/rgbs/<stem>.jpg      or .JPG, .png, .PNG
    <scene>/mappings.txt                     lines image_name,metadata_name (optional: names of raw photos)
    <scene>/masks/<stem>.pt                  optional zip with a torch bool mask: true where pixels count

World axes are x down, y right, z back. Training uses train and val images sorted by name (the index is the appearance number); val images
contribute their **left halves** to training, and metrics use their **right halves**. Files are torch pickles: they are loaded with
``weights_only`` and can run no code.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from papers.switchnerf.rays import Altitude, Camera, Rays
from shared.errors import UserError

SUFFIXES = (".jpg", ".JPG", ".png", ".PNG")
ALTITUDE_M = {
    "building": (8.0, 50.0),
    "rubble": (11.0, 38.0),
    "residence": (30.0, 118.0),
    "sci-art": (-14.0, 70.0),
    "campus": (3.0, 132.0),
}


def load_safely(path: Path) -> Any:
    """A torch file without running code from it.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a Mega-NeRF scene needs it") from None
    except Exception as error:  # unpickling refuses in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be loaded safely ({reason}); save it again with plain tensors and numbers"
        ) from error


@dataclass(frozen=True)
class Photo:
    """One image of a scene with its camera; pixels are read when asked for."""

    number: int  # appearance
    camera: Camera
    image: Path
    mask: Path | None
    held_out: bool  # a val image: left half for training, right half for metrics

    def pixels(self) -> Tensor:
        """Colours (height, width, 3), uint8, at the camera's size."""
        with Image.open(self.image) as file:
            picture = file.convert("RGB")
            size = (self.camera.width, self.camera.height)
            picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(picture))

    def counts(self, training: bool) -> Tensor:
        """Which pixels (height, width) are used: the mask's, and half of a val image."""
        height, width = self.camera.height, self.camera.width
        keep = torch.ones(height, width, dtype=torch.bool) if self.mask is None else _mask(self.mask, height, width)
        if self.held_out:
            left = torch.arange(width) < width // 2
            keep &= left if training else ~left
        return keep


def _mask(path: Path, height: int, width: int) -> Tensor:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name == path.name]
            content = archive.read(names[0]) if names else None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a zip file with a mask") from error
    if content is None:  # a plain torch file, which is a zip file too
        mask = load_safely(path)
    else:
        try:
            mask = torch.load(BytesIO(content), weights_only=True)
        except Exception as error:
            raise UserError(f"the mask inside {path} cannot be loaded safely") from error
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UserError(f"{path} must hold a two-dimensional mask")
    resized = torch.nn.functional.interpolate(mask[None, None].float(), (height, width))
    return resized[0, 0] > 0


@dataclass(frozen=True)
class Scene:
    """A scene: photos in the order of their appearance numbers, scale and bounds."""

    photos: tuple[Photo, ...]
    origin_drb: Tensor
    scale: float  # metres per unit
    altitude: Altitude | None
    near: float
    far: float

    @property
    def training_views(self) -> tuple[Photo, ...]:
        """All photos: of val images the left half is used."""
        return self.photos

    @property
    def test_views(self) -> tuple[Photo, ...]:
        """Val images, whose right halves are scored."""
        return tuple(photo for photo in self.photos if photo.held_out)

    def rays(self, photo: Photo, training: bool = True) -> tuple[Rays, Tensor]:
        """Rays and colours (n, 3) in [0, 1] of the pixels of a photo that count."""
        keep = photo.counts(training).flatten()
        rays = photo.camera.rays(self.near, self.far, photo.number).map(lambda t: t[keep])
        rays = rays if self.altitude is None else self.altitude.bound(rays)
        return rays, photo.pixels().view(-1, 3)[keep].float() / 255


def load_scene(
    folder: Path, *, scale_down: int = 1, altitude_m: tuple[float, float] | None = None, far: float = 1e5
) -> Scene:
    """Read a scene's metadata.

    Args:
        scale_down: images are made so many times smaller; width and height must divide.
        altitude_m: top and ground planes on the downward axis, metres (:data:`ALTITUDE_M` has the public scenes').

    Raises:
        UserError: a missing or damaged file; the sentence names it.
    """
    folder = Path(folder)
    coordinates = load_safely(folder / "coordinates.pt")
    if not isinstance(coordinates, Mapping) or not {"origin_drb", "pose_scale_factor"} <= set(coordinates):
        raise UserError(f"{folder / 'coordinates.pt'} must hold origin_drb and pose_scale_factor")
    scale, origin = float(coordinates["pose_scale_factor"]), torch.as_tensor(coordinates["origin_drb"]).float()
    found = [(path, part == "val") for part in ("train", "val") for path in (folder / part / "metadata").glob("*.pt")]
    if not found:
        raise UserError(f"{folder} has no metadata: train/metadata/*.pt and val/metadata/*.pt are expected")
    found.sort(key=lambda pair: pair[0].name)
    names = _mappings(folder / "mappings.txt")
    photos = []
    for number, (path, held_out) in enumerate(found):
        camera = _camera(path, scale_down)
        mask = folder / "masks" / path.name
        photos.append(Photo(number, camera, _image(path, names), mask if mask.exists() else None, held_out))
    planes = None
    if altitude_m is not None:
        top, ground = ((metres - float(origin[0])) / scale for metres in altitude_m)
        planes = Altitude(top, ground)
    return Scene(tuple(photos), origin, scale, planes, 1.0 / scale, far)


def _camera(path: Path, scale_down: int) -> Camera:
    data = load_safely(path)
    missing = {"W", "H", "intrinsics", "c2w"} - set(data if isinstance(data, Mapping) else ())
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
    fx, fy, cx, cy = (float(v) for v in data["intrinsics"])
    pose = torch.as_tensor(data["c2w"]).float()
    if pose.shape != (3, 4):
        raise UserError(f"c2w in {path} must be 3 x 4, got {tuple(pose.shape)}")
    try:
        return Camera(int(data["W"]), int(data["H"]), fx, fy, cx, cy, pose).scaled(scale_down)
    except ValueError as error:
        raise UserError(f"{path}: {error}; choose another scale_down") from error


def _mappings(path: Path) -> dict[str, str]:
    """Name of the metadata file -> name of the image."""
    if not path.exists():
        return {}
    lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise UserError(f"{path}: every line must be image_name,metadata_name")
    return {metadata.strip(): image.strip() for image, metadata in lines}


def _image(metadata: Path, names: Mapping[str, str]) -> Path:
    folder = metadata.parent.parent / "rgbs"
    candidates = [folder / f"{metadata.stem}{suffix}" for suffix in SUFFIXES]
    if metadata.name in names:
        candidates.append(folder / names[metadata.name])
    for path in candidates:
        if path.exists():
            return path
    raise UserError(f"no image for {metadata}: expected {metadata.stem} with one of {', '.join(SUFFIXES)} in {folder}")


COLUMNS = ("origin", "direction", "near", "far", "image", "colour")


def write_chunks(scene: Scene, folder: Path, chunk_rays: int, seed: int = 0) -> list[Path]:
    """Shuffle all training pixels over files of about ``chunk_rays`` rays, one photo in memory at a time.

    Every photo's pixels are dealt at random to all chunks and appended; a chunk is shuffled when it is read. Rays are float32, colours
    uint8. Existing chunks in the folder are kept if they were written from the same scene and seed, else replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(int(photo.counts(True).sum()) for photo in scene.training_views)
    count = max(1, -(-total // chunk_rays))
    key = f"{total} {count} {seed}"
    paths = [folder / f"chunk{index:04d}.bin" for index in range(count)]
    stamp = folder / "complete.txt"
    if stamp.exists() and stamp.read_text() == key and all(path.exists() for path in paths):
        return paths
    stamp.unlink(missing_ok=True)
    for path in folder.glob("chunk*.bin"):
        path.unlink()
    for photo in scene.training_views:
        rays, colour = scene.rays(photo)
        record = _pack(rays, colour)
        target = np.random.default_rng((seed, photo.number)).integers(0, count, len(record))
        for index, path in enumerate(paths):
            with path.open("ab") as file:
                file.write(record[target == index].tobytes())
    stamp.write_text(key)
    return paths


_RECORD = np.dtype([("ray", np.float32, 8), ("image", np.int32), ("colour", np.uint8, 3)])


def _pack(rays: Rays, colour: Tensor) -> np.ndarray[Any, Any]:
    record = np.zeros(len(rays), dtype=_RECORD)
    record["ray"] = torch.cat([rays.origin, rays.direction, rays.near[:, None], rays.far[:, None]], -1).numpy()
    record["image"] = rays.image.numpy()
    record["colour"] = (255 * colour).round().byte().numpy()
    return record


def read_chunk(path: Path, seed: int = 0) -> tuple[Rays, Tensor]:
    """Rays and colours in [0, 1] of a chunk, shuffled."""
    record = np.fromfile(path, dtype=_RECORD)
    record = record[np.random.default_rng(seed).permutation(len(record))]
    ray = torch.from_numpy(record["ray"].copy())
    image = torch.from_numpy(record["image"].astype(np.int64))
    rays = Rays(ray[:, :3], ray[:, 3:6], ray[:, 6], ray[:, 7], image)
    return rays, torch.from_numpy(record["colour"].astype(np.float32)) / 255


def batches(paths: Sequence[Path], size: int, seed: int = 0) -> Iterator[tuple[Rays, Tensor]]:
    """Endless batches of ``size`` rays, chunk by chunk in an order that is shuffled every round."""
    round_number = 0
    while True:
        rng = np.random.default_rng((seed, round_number))
        for index in rng.permutation(len(paths)):
            rays, colour = read_chunk(paths[index], int(rng.integers(2**31)))
            for start in range(0, len(rays) - size + 1, size):
                yield rays.map(lambda t, s=start: t[s : s + size]), colour[start : start + size]  # type: ignore[misc]
        round_number += 1
