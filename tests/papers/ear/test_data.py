"""Folders of the domain-adaptation sets on tiny generated trees, and the stand-in world with its real sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from papers.ear.folders import LAYOUTS, load_folders
from papers.ear.world import World, WorldSettings, build_world, load_world, pool, save_world
from shared.errors import UserError

TINY = {"train_images": 40, "test_images": 12, "stream_images": 20, "pretrain_images": 128, "pretrain_epochs": 1}
DATA = Path(os.environ.get("PAPERCHECK_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def _tree(root: Path, name: str, classes: tuple[str, ...] = ("cat", "dog"), files: int = 5) -> None:
    for place in LAYOUTS[name].domains.values():
        for k, label in enumerate(classes):
            folder = root / place / label
            folder.mkdir(parents=True)
            for i in range(files):
                Image.new("RGB", (10 + i, 8), (40 * k, 10 * i, 0)).save(folder / f"{i}.jpg", quality=100)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    _tree(tmp_path, name)
    domains = load_folders(name, tmp_path)
    assert list(domains) == list(LAYOUTS[name].domains)
    for domain in domains.values():
        assert domain.classes == ("cat", "dog")
        assert domain.labels == (0,) * 5 + (1,) * 5
        train, test = domain.split(seed=0)
        assert (len(train.files), len(test.files)) == (8, 2)
        assert sorted(test.labels) == [0, 1]
        assert set(train.files).isdisjoint(test.files)
        assert test == domain.split(seed=0)[1]


def test_pixels_and_labels(tmp_path: Path) -> None:
    _tree(tmp_path, "pacs")
    images, labels = load_folders("pacs", tmp_path)["sketch"].load(size=16)
    assert images.shape == (10, 3, 16, 16)
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert float(images[9, 0].mean()) == pytest.approx(40 / 255, abs=0.01)
    assert float(images[9, 1].mean()) == pytest.approx(40 / 255, abs=0.01)


def test_split_lists_count_from_where_they_say(tmp_path: Path) -> None:
    _tree(tmp_path, "pacs")
    domain = load_folders("pacs", tmp_path)["photo"]
    lines = tmp_path / "photo_train.txt"
    lines.write_text("photo/cat/0.jpg 1\nphoto/dog/3.jpg 2\n")
    listed = domain.with_list(lines, tmp_path, first_label=1)
    assert listed.labels == (0, 1)
    assert listed.load(8)[0].shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="line 2"):
        domain.with_list(lines, tmp_path)  # read as if it counted from 0, the last class does not exist


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set"):
        load_folders("imagenet", tmp_path)
    with pytest.raises(UserError, match="is missing"):
        load_folders("pacs", tmp_path)
    _tree(tmp_path, "pacs")
    (tmp_path / "sketch" / "horse").mkdir()
    with pytest.raises(UserError, match="different class folders"):
        load_folders("pacs", tmp_path)


def test_world_is_the_same_again_and_shares_no_image(tmp_path: Path) -> None:
    settings = WorldSettings(**TINY)
    world = build_world(settings, 3, workdir=tmp_path)
    save_world(world, tmp_path / "world.pt")
    again = load_world(tmp_path / "world.pt")
    assert again.encoder.fingerprint() == world.encoder.fingerprint() == build_world(settings, 3).encoder.fingerprint()
    assert again.settings == settings
    assert all(torch.equal(world.images[k], again.images[k]) for k in world.images)
    upright = torch.cat([world.images["clean/train"], world.images["clean/test"], world.images["stream"]]).flatten(1)
    turned = world.images["rot/train"].rot90(-1, (2, 3)).flatten(1)
    assert len(torch.unique(torch.cat([upright, turned]), dim=0)) == len(upright) + len(turned)


def test_scikit_learn_digits_serve_as_a_world() -> None:
    pytest.importorskip("sklearn")
    images, labels = pool(
        WorldSettings(source="digits", side=16, train_images=200, test_images=60, stream_images=100), 0
    )
    assert images.shape == (6 * 260 + 100, 1, 16, 16)
    assert torch.bincount(labels).min() > 100
    with pytest.raises(UserError, match="has 1797 images, the settings ask for"):
        pool(WorldSettings(source="digits"), 0)


@pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason="needs a data folder with MNIST/raw and cifar10-jpeg")
def test_reference_world_on_mnist() -> None:
    settings = WorldSettings(source="mnist", root=str(DATA), side=28, **TINY)
    world = build_world(settings, 0)
    assert isinstance(world, World)
    assert [tuple(t.shape[1:]) for t in world.taps("edge/test")] == [(12, 7, 7), (24, 7, 7), (48, 4, 4), (96, 4, 4)]
    assert world.images["stream"].shape == (20, 1, 28, 28)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="unknown world"):
        WorldSettings(source="svhn")
    with pytest.raises(UserError, match=r"needs data\.root"):
        WorldSettings(source="mnist")
    with pytest.raises(UserError, match="at least 8 pixels"):
        WorldSettings(side=4)
