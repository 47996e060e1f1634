"""Scenes from COLMAP: its text export (``cameras.txt``, ``images.txt``) of an undistorted reconstruction.

COLMAP's own bindings (pycolmap) are no dependency of the suite, so binary models and lens distortion stay COLMAP's business::

    colmap image_undistorter --image_path photos --input_path sparse/0 --output_path scene
    colmap model_converter --input_path scene/sparse --output_path scene/sparse --output_type TXT

and ``load_colmap(Path("scene"))``. Images hold world-to-camera rotations (quaternion, scalar first) and translations; camera axes are
right, down and forward, and pixel centres lie at +0.5 as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from papers.switchnerf.megadata import Photo, Scene
from papers.switchnerf.rays import Camera
from shared.errors import UserError

PINHOLE = {"SIMPLE_PINHOLE": (0, 0, 1, 2), "PINHOLE": (0, 1, 2, 3)}  # where fx, fy, cx, cy stand among the parameters


def load_colmap(
    folder: Path,
    *,
    model: str = "sparse",
    images: str = "images",
    scale_down: int = 1,
    hold_out: int = 8,
    near: float = 0.01,
    far: float = 1e5,
) -> Scene:
    """Read a scene: every ``hold_out``-th photo by name is a test view (its left half is trained on, its right half scored).

    Camera centres are moved and scaled into [-1, 1], as Switch-NeRF has them; ``near`` and ``far`` are in those units.

    Raises:
        UserError: a missing or damaged file, or a camera with distortion; the sentence says what to do.
    """
    folder = Path(folder)
    kinds = _cameras(folder / model / "cameras.txt")
    entries = sorted(_images(folder / model / "images.txt"), key=lambda entry: entry[2])
    if not entries:
        raise UserError(f"{folder / model / 'images.txt'} lists no image: register at least one in COLMAP")
    poses = np.stack([pose for pose, _, _ in entries])
    low, high = poses[:, :, 3].min(0), poses[:, :, 3].max(0)
    origin, scale = (low + high) / 2, float((high - low).max() / 2) or 1.0
    poses[:, :, 3] = (poses[:, :, 3] - origin) / scale
    photos = []
    for number, (pose, (_, camera_id, name)) in enumerate(zip(poses, entries, strict=True)):
        if camera_id not in kinds:
            raise UserError(f"{name} was taken by camera {camera_id}, which {folder / model / 'cameras.txt'} lacks")
        path = folder / images / name
        if not path.exists():
            raise UserError(f"{path} is missing: images= names the folder of the undistorted photos")
        width, height, fx, fy, cx, cy = kinds[camera_id]
        camera = Camera(int(width), int(height), fx, fy, cx, cy, torch.from_numpy(pose).float())
        try:
            camera = camera.scaled(scale_down)
        except ValueError as error:
            raise UserError(f"{name}: {error}; choose another scale_down") from error
        photos.append(Photo(number, camera, path, None, held_out=number % hold_out == 0))
    return Scene(tuple(photos), torch.from_numpy(origin).float(), scale, None, near, far)


def _lines(path: Path) -> list[str]:
    """Lines without comments; empty ones stay, since an image without points has an empty second line."""
    if not path.exists():
        raise UserError(f"{path} is missing: export the model as text (colmap model_converter --output_type TXT)")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _cameras(path: Path) -> dict[int, tuple[float, ...]]:
    """Width, height, fx, fy, cx, cy by camera."""
    found = {}
    for line in _lines(path):
        if not line.strip():
            continue
        number, kind, *values = line.split()
        if kind not in PINHOLE:
            raise UserError(
                f"{path}: camera {number} is of type {kind}; undistort the photos (colmap image_undistorter)"
            )
        try:
            width, height, *parameters = (float(value) for value in values)
            found[int(number)] = (width, height, *(parameters[place] for place in PINHOLE[kind]))
        except (ValueError, IndexError):
            raise UserError(f"{path}: camera {number} needs width, height and the parameters of {kind}") from None
    return found


def _images(path: Path) -> Iterator[tuple[np.ndarray, int, str]]:
    """Pose (3, 4) with columns right, up, back and centre, camera number and file name of every image."""
    for line in _lines(path)[::2]:  # every second line lists points
        words = line.split(maxsplit=9)
        if not words:
            continue
        try:
            w, x, y, z, *shift = (float(word) for word in words[1:8])
            rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
            camera_id, name = int(words[8]), words[9]
        except (ValueError, IndexError):
            raise UserError(f"{path}: cannot read the image line '{line[:60]}'") from None
        axes = rotation.T * np.array([1.0, -1.0, -1.0])  # columns right, down, forward -> right, up, back
        yield np.concatenate([axes, -(rotation.T @ np.array(shift))[:, None]], axis=1), camera_id, name
