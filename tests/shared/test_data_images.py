"""Loaders of small image sets: layouts, ranges, and clear refusals. Real files are used where they are, else tiny ones are written."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data.cifar10 import load_cifar10
from shared.data.mnist import load_mnist
from shared.errors import UserError


def _idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    for split in ("train", "t10k"):
        _idx(raw / f"{split}-images-idx3-ubyte", images)
        _idx(raw / f"{split}-labels-idx1-ubyte", np.array([7, 3], np.uint8))
    loaded, labels = load_mnist(tmp_path, train=True)
    assert loaded.shape == (2, 1, 28, 28)
    assert labels.tolist() == [7, 3]
    assert torch.equal(loaded, torch.from_numpy(images).unsqueeze(1).float() / 255)


def test_mnist_missing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="put the four IDX files into"):
        load_mnist(tmp_path, train=True)


def test_cifar_classes_are_alphabetical_and_pixels_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10-jpeg"
    folder.mkdir()
    shades = {"truck/1.jpg": 250, "bird/2.jpg": 120, "bird/1.jpg": 10}
    with tarfile.open(folder / "test.tar", "w") as archive:
        for name, shade in shades.items():
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (shade, shade, shade)).save(buffer, "JPEG", quality=100)
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(info, buffer)
    images, labels = load_cifar10(tmp_path, train=False)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1]
    assert [int(i.float().mean().round()) for i in images] == [10, 120, 250]
    few, _ = load_cifar10(tmp_path, train=False, limit=2)
    assert len(few) == 2


def test_cifar_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable CIFAR-10 archive"):
        load_cifar10(tmp_path, train=True)
    (tmp_path / "cifar10-jpeg").mkdir()
    (tmp_path / "cifar10-jpeg" / "train.tar").write_bytes(gzip.compress(b"not a tar"))
    with pytest.raises(UserError, match="no readable CIFAR-10 archive"):
        load_cifar10(tmp_path, train=True)


def test_digits_range_and_count() -> None:
    pytest.importorskip("sklearn")
    from shared.data.digits import load_digits

    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
