"""COLMAP text models: rays through pixels meet the points that COLMAP's projection puts there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from papers.switchnerf.colmap import load_colmap
from shared.errors import UserError

CAMERAS = "# Camera list\n1 SIMPLE_PINHOLE 8 6 10 4.5 2.5\n2 PINHOLE 8 6 9 11 4 3\n"
POSES = {  # name: camera, quaternion (scalar first), translation
    "b.png": (1, (0.9, 0.1, -0.3, 0.2), (0.5, -1.0, 2.0)),
    "a.png": (2, (0.2, 0.7, 0.1, -0.6), (-3.0, 0.4, 1.0)),
    "sub/c d.png": (1, (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}


def _scene(folder: Path, cameras: str = CAMERAS) -> Path:
    (folder / "sparse").mkdir()
    (folder / "sparse" / "cameras.txt").write_text(cameras)
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"]
    for number, (name, (camera, q, t)) in enumerate(POSES.items(), 1):
        lines += [
            " ".join(map(str, (number, *q, *t, camera, name))),
            "" if number == 2 else "1.5 2.5 -1 3.0 4.0 7",
        ]
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8)).save(path)
    (folder / "sparse" / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_rays_meet_what_colmap_projects(tmp_path: Path) -> None:
    scene = load_colmap(_scene(tmp_path), hold_out=3)
    assert [photo.image.name for photo in scene.photos] == ["a.png", "b.png", "c d.png"]  # by name
    assert [photo.held_out for photo in scene.photos] == [True, False, False]
    intrinsics = {1: (10, 10, 4.5, 2.5), 2: (9, 11, 4, 3)}
    u, v, depth = 6, 1, 3.7
    for photo in scene.photos:
        camera, q, t = POSES[photo.image.relative_to(tmp_path / "images").as_posix()]
        fx, fy, cx, cy = intrinsics[camera]
        r = Rotation.from_quat([*q[1:], q[0]]).as_matrix()
        seen = depth * np.array([(u + 0.5 - cx) / fx, (v + 0.5 - cy) / fy, 1.0])  # x right, y down, z forward
        point = r.T @ (seen - np.array(t))
        target = (torch.from_numpy(point).float() - scene.origin_drb) / scene.scale
        rays, colour = scene.rays(photo, training=False) if photo.held_out else scene.rays(photo)
        pixel = v * 4 + u - 4 if photo.held_out else v * 8 + u  # of a test view the right half is scored
        along = torch.nn.functional.normalize(target - rays.origin[pixel], dim=-1)
        torch.testing.assert_close(rays.direction[pixel], along, atol=1e-5, rtol=0)
        assert (along @ -photo.camera.pose[:, 2]) > 0  # in front of the camera
        assert colour.shape[1] == 3
    centres = torch.stack([photo.camera.pose[:, 3] for photo in scene.photos])
    assert centres.abs().max().item() == pytest.approx(1.0)


def test_unusable_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_converter"):
        load_colmap(tmp_path)
    folder = _scene(tmp_path, CAMERAS + "3 OPENCV 8 6 9 9 4 3 0.1 0 0 0\n")
    with pytest.raises(UserError, match="image_undistorter"):
        load_colmap(folder)
    (folder / "sparse" / "cameras.txt").write_text("1 PINHOLE 8 6 9 11 4 3\n")
    with pytest.raises(UserError, match="camera 2"):
        load_colmap(folder)
    (folder / "sparse" / "cameras.txt").write_text(CAMERAS)
    (folder / "images" / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png is missing"):
        load_colmap(folder)
