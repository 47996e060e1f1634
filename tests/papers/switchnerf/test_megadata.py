"""Mega-NeRF's layout on a tiny scene that the test writes: halves, masks, mappings, altitude, chunks, and refusal of unsafe files."""

from __future__ import annotations

import os
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from papers.switchnerf.megadata import batches, load_safely, load_scene, read_chunk, write_chunks
from shared.errors import UserError

WIDTH, HEIGHT = 8, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-pixsfm"
    torch.save(
        {"origin_drb": torch.tensor([-10.0, 0.0, 0.0]), "pose_scale_factor": 20.0}, _made(root / "coordinates.pt")
    )
    for number, (part, stem) in enumerate((("train", "000000"), ("val", "000001"), ("train", "000002"))):
        pose = torch.eye(3, 4)
        pose[:, 3] = torch.tensor([0.1 * number, 0.0, 0.0])
        metadata = {"W": WIDTH, "H": HEIGHT, "intrinsics": torch.tensor([8.0, 8.0, 4.0, 3.0]), "c2w": pose}
        torch.save(metadata, _made(root / part / "metadata" / f"{stem}.pt"))
        pixels = np.full((HEIGHT, WIDTH, 3), 50 * number, dtype=np.uint8)
        pixels[..., 1] = np.arange(WIDTH)
        name = "raw_photo.png" if number == 2 else f"{stem}.png"
        Image.fromarray(pixels).save(_made(root / part / "rgbs" / name))
    (root / "mappings.txt").write_text("raw_photo.png,000002.pt\n")
    mask = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    mask[0] = False
    torch.save(mask, tmp_path / "000000.pt")
    with zipfile.ZipFile(_made(root / "masks" / "000000.pt"), "w") as archive:
        archive.write(tmp_path / "000000.pt", "000000.pt")
    return root


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_val_images_give_their_left_half_to_training_and_their_right_half_to_metrics(folder: Path) -> None:
    scene = load_scene(folder)
    assert [photo.held_out for photo in scene.photos] == [False, True, False]
    (val,) = scene.test_views
    assert val.number == 1
    rays, colour = scene.rays(val, training=True)
    assert len(rays) == HEIGHT * WIDTH // 2
    assert set((255 * colour[:, 1]).round().tolist()) == {0, 1, 2, 3}
    _, right = scene.rays(val, training=False)
    assert set((255 * right[:, 1]).round().tolist()) == {4, 5, 6, 7}
    assert (rays.image == 1).all()


def test_masks_and_mappings(folder: Path) -> None:
    scene = load_scene(folder)
    assert len(scene.rays(scene.photos[0])[0]) == (HEIGHT - 1) * WIDTH
    assert scene.photos[2].image.name == "raw_photo.png"
    assert int(scene.photos[2].pixels()[0, 0, 0]) == 100


def test_scaling_and_bounds(folder: Path) -> None:
    scene = load_scene(folder, scale_down=2, altitude_m=(-6.0, 10.0))
    camera = scene.photos[0].camera
    assert (camera.width, camera.height, camera.fx, camera.cy) == (4, 3, 4.0, 1.5)
    assert scene.altitude is not None
    assert (scene.altitude.top, scene.altitude.ground) == pytest.approx((0.2, 1.0))
    assert scene.near == pytest.approx(0.05)
    with pytest.raises(UserError, match="cannot be scaled down by 4"):
        load_scene(folder, scale_down=4)


def test_chunks_hold_every_training_pixel_once(folder: Path, tmp_path: Path) -> None:
    scene = load_scene(folder)
    paths = write_chunks(scene, tmp_path / "chunks", chunk_rays=50)
    total = (HEIGHT - 1) * WIDTH + HEIGHT * WIDTH // 2 + HEIGHT * WIDTH
    assert len(paths) == -(-total // 50)
    parts = [read_chunk(path) for path in paths]
    images = torch.cat([rays.image for rays, _ in parts])
    assert torch.bincount(images).tolist() == [(HEIGHT - 1) * WIDTH, HEIGHT * WIDTH // 2, HEIGHT * WIDTH]
    got = torch.cat([torch.cat([r.direction, c, r.image[:, None].float()], -1) for r, c in parts])
    want = torch.cat(
        [torch.cat([r.direction, c, r.image[:, None].float()], -1) for r, c in map(scene.rays, scene.photos)]
    )
    order = lambda t: t[np.lexsort(t.numpy().T)]  # noqa: E731
    torch.testing.assert_close(order(got), order(want))
    before = [path.stat().st_mtime_ns for path in paths]
    assert write_chunks(scene, tmp_path / "chunks", chunk_rays=50) == paths  # kept, not appended to
    assert [path.stat().st_mtime_ns for path in paths] == before
    for rays, colour in islice(batches(paths, 16), 9):
        assert len(rays) == len(colour) == 16


def test_pickles_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"origin_drb": Trap()}, tmp_path / "coordinates.pt")
    with pytest.raises(UserError, match="cannot be loaded safely"):
        load_safely(tmp_path / "coordinates.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"coordinates\.pt is missing"):
        load_scene(tmp_path / "nowhere")
    (folder / "train" / "rgbs" / "000000.png").unlink()
    with pytest.raises(UserError, match="no image for"):
        load_scene(folder)
    torch.save({"W": 1}, folder / "train" / "metadata" / "000000.pt")
    with pytest.raises(UserError, match="lacks H, c2w, intrinsics"):
        load_scene(folder)
