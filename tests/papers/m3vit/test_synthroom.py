"""SynthRoom: labels that follow from the geometry, determinism, flips, the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.m3vit import synthroom
from papers.m3vit.dataset import Batches, flip, scenes
from papers.m3vit.synthroom import Scene, render
from shared.errors import UserError

seeds = st.integers(0, 10_000_000)


def world_points(scene: Scene) -> np.ndarray:
    """Hit points (H, W, 3) from the depth label alone, through the camera."""
    height, width = scene.depth.shape
    camera = scene.camera
    v, u = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    tangent = np.tan(camera.fov / 2)
    x = (2 * u - 1) * tangent * width / height
    y = (1 - 2 * v) * tangent
    rays = x[..., None] * camera.right + y[..., None] * camera.up + camera.forward
    return camera.position + scene.depth[..., None].astype(np.float64) * rays


def world_normals(scene: Scene) -> np.ndarray:
    """Normals (H, W, 3) in the room's axes."""
    camera = scene.camera
    n = scene.normals.astype(np.float64)
    return n[..., :1] * camera.right + n[..., 1:2] * camera.up - n[..., 2:] * camera.forward


@given(seeds, st.sampled_from([(16, 16), (24, 40), (32, 32)]))
@settings(max_examples=25, deadline=None)
def test_same_seed_same_bytes_and_shapes(seed: int, image: tuple[int, int]) -> None:
    one, two = render(seed, image), render(seed, image)
    for name, array in one.labels().items():
        assert array.tobytes() == two.labels()[name].tobytes(), name
        assert array.shape[:2] == image
    assert one.image.dtype == np.uint8
    assert one.image.tobytes() != render(seed + 1, image).image.tobytes()


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_normals_are_unit_and_face_the_camera(seed: int) -> None:
    scene = render(seed, (32, 32))
    np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1.0, atol=1e-6)
    rays = world_points(scene) - scene.camera.position
    assert (np.sum(world_normals(scene) * rays, -1) < 1e-6).all()
    assert (scene.depth > 0).all()


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_labels_lie_where_the_geometry_says(seed: int) -> None:
    scene = render(seed, (32, 32))
    points, normals = world_points(scene), world_normals(scene)
    floor = scene.semseg == synthroom.FLOOR
    np.testing.assert_allclose(points[floor][:, 1], 0.0, atol=1e-4)
    np.testing.assert_allclose(normals[floor], np.broadcast_to([0, 1, 0], normals[floor].shape), atol=1e-5)
    ceiling = scene.semseg == synthroom.CEILING
    np.testing.assert_allclose(points[ceiling][:, 1], 2.8, atol=1e-4)
    np.testing.assert_allclose(normals[ceiling], np.broadcast_to([0, -1, 0], normals[ceiling].shape), atol=1e-5)
    wall = scene.semseg == synthroom.WALL
    np.testing.assert_allclose(normals[wall][:, 1], 0.0, atol=1e-5)
    assert (np.abs(points[wall][:, 0]) < 3.5 + 1e-3).all()
    assert (points[wall][:, 2] < 7 + 1e-3).all()
    assert (points[..., 1] > -1e-3).all()
    assert (points[..., 1] < 2.8 + 1e-3).all()
    # tops look up, sides sideways; the sphere's halves divide at its centre, where the normal is level
    tops = np.isin(scene.parts, [synthroom.BOX_TOP, synthroom.CYLINDER_TOP])
    np.testing.assert_allclose(normals[tops][:, 1], 1.0, atol=1e-5)
    sides = np.isin(scene.parts, [synthroom.BOX_SIDE, synthroom.CYLINDER_SIDE])
    np.testing.assert_allclose(normals[sides][:, 1], 0.0, atol=1e-5)
    assert (normals[scene.parts == synthroom.SPHERE_UPPER][:, 1] >= 0).all()
    assert (normals[scene.parts == synthroom.SPHERE_LOWER][:, 1] <= 0).all()


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_neighbours_on_a_flat_face_differ_at_right_angles_to_its_normal(seed: int) -> None:
    scene = render(seed, (32, 32))
    points, normals = world_points(scene), world_normals(scene)
    for axis in (0, 1):
        step = np.diff(points, axis=axis)
        here = normals[:-1] if axis == 0 else normals[:, :-1]
        same = np.diff(scene.surface.astype(int), axis=axis) == 0
        flat = same & (np.abs(np.diff(normals, axis=axis)).max(-1) < 1e-6)
        assert flat.sum() > 500
        np.testing.assert_allclose(np.sum(step * here, -1)[flat], 0.0, atol=1e-4)


def test_the_salient_object_is_the_one_of_the_oddest_colour() -> None:
    surface = np.zeros((64, 64), np.uint8)
    objects = [0.1, 0.2, 0.9, 5.0]  # grey levels; the means of the others are far from 0.9, whatever is not visible
    for number, pixels in enumerate([20, 20, 12, 11]):  # the last is too small to be salient, and to count
        surface[10 * number, :pixels] = synthroom._OBJECT_ID + number
    mask = synthroom._salient(surface, np.array(objects)[:, None].repeat(3, 1))
    assert np.array_equal(mask.astype(bool), surface == synthroom._OBJECT_ID + 2)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_parts_refine_objects_and_saliency_is_one_object(seed: int) -> None:
    scene = render(seed, (32, 32))
    kinds = {
        synthroom.SPHERE: {synthroom.SPHERE_UPPER, synthroom.SPHERE_LOWER},
        synthroom.BOX: {synthroom.BOX_TOP, synthroom.BOX_SIDE},
        synthroom.CYLINDER: {synthroom.CYLINDER_TOP, synthroom.CYLINDER_SIDE},
    }
    for kind, parts in kinds.items():
        assert set(np.unique(scene.parts[scene.semseg == kind])) <= parts
    assert (scene.parts[~np.isin(scene.semseg, list(kinds))] == 0).all()
    salient = scene.sal.astype(bool)
    assert len(np.unique(scene.surface[salient])) <= 1
    if salient.any():
        assert set(np.unique(scene.semseg[salient])) <= set(kinds)
        assert salient.sum() == (scene.surface == scene.surface[salient][0]).sum() >= 3


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_edges_lie_only_between_surfaces(seed: int) -> None:
    scene = render(seed, (32, 32))
    expected = np.zeros((32, 32), bool)
    for row in range(32):
        for column in range(32):
            here = scene.surface[row, column]
            right = scene.surface[row, min(column + 1, 31)]
            below = scene.surface[min(row + 1, 31), column]
            expected[row, column] = here != right or here != below
    assert np.array_equal(scene.edge.astype(bool), expected)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_panels_change_meaning_but_not_shape(seed: int) -> None:
    bare, hung = render(seed, (32, 32), panels=(0, 0)), render(seed, (32, 32), panels=(6, 6))
    assert np.abs(bare.depth - hung.depth).max() < 0.005
    np.testing.assert_allclose(bare.normals, hung.normals, atol=1e-6)
    changed = bare.semseg != hung.semseg
    assert set(np.unique(hung.semseg[changed])) <= {synthroom.PANEL}
    assert not (bare.semseg == synthroom.PANEL).any()
    assert np.array_equal(bare.parts, hung.parts)


def test_flip_mirrors_the_scene_and_twice_is_the_identity() -> None:
    labels = {name: torch.from_numpy(array) for name, array in scenes(range(5), (16, 24)).arrays.items()}
    mirrored = flip(labels)
    assert torch.equal(mirrored["semseg"], labels["semseg"].flip(2))
    assert torch.equal(mirrored["normals"][..., 0], -labels["normals"][..., 0].flip(2))
    assert torch.equal(mirrored["normals"][..., 1:], labels["normals"][..., 1:].flip(2))
    for name, label in flip(mirrored).items():
        assert torch.equal(label, labels[name]), name


def test_resolution_does_not_change_the_scene() -> None:
    coarse, fine = render(5, (16, 16)), render(5, (48, 48))  # pixel centres of 16 are centres of every third of 48
    assert np.array_equal(coarse.surface, fine.surface[1::3, 1::3])
    np.testing.assert_allclose(coarse.depth, fine.depth[1::3, 1::3], rtol=1e-6)


def test_class_frequencies() -> None:
    data = scenes(range(60), (32, 32))
    share = np.bincount(data.arrays["semseg"].ravel(), minlength=7) / data.arrays["semseg"].size
    assert 0.3 < share[synthroom.WALL] < 0.6
    assert 0.2 < share[synthroom.FLOOR] < 0.45
    assert (share[[synthroom.SPHERE, synthroom.BOX, synthroom.CYLINDER, synthroom.PANEL]] > 0.01).all()
    assert 0.01 < data.arrays["sal"].mean() < 0.1


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step_and_cover_the_epoch() -> None:
    data = scenes(range(12), (16, 16))
    batches, again = Batches(data, 4, seed=1, augment=False), Batches(data, 4, seed=1, augment=False)
    every = [batches(step)[1]["depth"] for step in range(3)]
    assert torch.equal(again(2)[1]["depth"], every[2])  # without the steps before it
    one_epoch = {tuple(row.flatten().tolist()) for depth in every for row in depth}
    assert len(one_epoch) == 12
    assert not torch.equal(batches(3)[1]["depth"], every[0])  # the next epoch is another shuffle
    assert not torch.equal(Batches(data, 4, seed=2, augment=False)(0)[1]["depth"], every[0])


def test_augmentation_mirrors_images_and_labels_together() -> None:
    data = scenes(range(8), (16, 16))
    plain, augmented = Batches(data, 8, seed=0, augment=False)(5), Batches(data, 8, seed=0)(5)
    mirrored = 0
    for row in range(8):
        same = torch.equal(plain[0][row], augmented[0][row])
        expected = (lambda x: x) if same else (lambda x: x.flip(-1))
        mirrored += not same
        assert torch.equal(augmented[0][row], expected(plain[0][row]))
        for name, target in plain[1].items():
            sign = torch.tensor([1.0 if same else -1.0, 1.0, 1.0])[:, None, None] if name == "normals" else 1
            assert torch.equal(augmented[1][name][row], sign * expected(target[row])), name
    assert 0 < mirrored < 8


def test_targets_have_the_shapes_that_the_losses_take() -> None:
    images, targets = next(iter(Batches(scenes(range(3), (16, 24)), 2, seed=0)))
    assert images.shape == (2, 3, 16, 24)
    assert {name: tuple(t.shape[1:]) for name, t in targets.items()} == {
        "semseg": (16, 24),
        "parts": (16, 24),
        "sal": (1, 16, 24),
        "normals": (3, 16, 24),
        "edge": (1, 16, 24),
        "depth": (1, 16, 24),
    }
    assert targets["semseg"].dtype == torch.int64


def test_a_batch_larger_than_the_data_is_explained() -> None:
    with pytest.raises(UserError, match="training scenes"):
        Batches(scenes(range(3), (16, 16)), 4, seed=0)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_cache_is_written_once_and_read_back(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "rooms" / "train.npz"
    first = scenes(range(3, 8), (16, 16), cache=path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5)
    assert first.note == ""
    stamp = path.stat().st_mtime_ns
    second = scenes(range(3, 8), (16, 16), cache=path)
    assert path.stat().st_mtime_ns == stamp
    for name, array in first.arrays.items():
        assert np.array_equal(array, second.arrays[name])
        assert np.array_equal(array[2], render(5, (16, 16)).labels()[name].astype(array.dtype))
    assert [entry.name for entry in path.parent.iterdir()] == ["train.npz"]


@pytest.mark.parametrize("damage", ["truncate", "flip a byte", "empty"])
def test_a_damaged_cache_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train.npz"
    good = scenes(range(4), (16, 16), cache=path)
    content = bytearray(path.read_bytes())
    if damage == "flip a byte":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content[: {"truncate": len(content) // 2, "empty": 0}.get(damage, len(content))]))
    again = scenes(range(4), (16, 16), cache=path)
    assert "train.npz.corrupt" in again.note
    assert (tmp_path / "train.npz.corrupt").exists()
    for name, array in good.arrays.items():
        assert np.array_equal(array, again.arrays[name])
    assert scenes(range(4), (16, 16), cache=path).note == ""


def test_a_cache_of_other_scenes_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    scenes(range(4), (16, 16), cache=path)
    other = scenes(range(4, 8), (16, 16), cache=path)
    assert "other scenes" in other.note
    assert np.array_equal(other.arrays["image"][0], render(4, (16, 16)).image)


def test_bad_sizes_are_explained() -> None:
    with pytest.raises(UserError, match="image"):
        render(0, (0, 16))
    with pytest.raises(UserError, match="panels"):
        render(0, (16, 16), panels=(3, 1))
