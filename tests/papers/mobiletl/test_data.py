"""Stand-ins, real data sets in local folders, and training on them end to end in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from papers.mobiletl.datasets import CLASSES, open_dataset
from papers.mobiletl.realdata import real_job
from papers.mobiletl.standin import (
    Split,
    accuracy,
    best_rate,
    digits,
    idx,
    pretrain,
    pretrain_job,
    transfer,
    transfer_job,
)
from shared.errors import UserError

MNIST_ROOT = Path(__file__).resolve().parents[4] / "shared" / "data"
_SOURCE = {"lr": 3e-3, "epochs": 1, "batch": 64}
_DIGITS = {"name": "digits", "train_images": 32}


def _nothing(done: int, total: int) -> None:
    """No progress bar."""


def test_digits_are_enlarged_centred_and_split_by_class() -> None:
    task = digits(200)
    assert task.source.images.shape[1:] == (1, 24, 24)
    assert torch.equal(
        task.train.images[:, :, ::3, ::3], task.train.images[:, :, 2::3, 1::3]
    )  # each pixel three by three
    assert (float(task.train.images.min()), float(task.train.images.max())) == (-0.5, 0.5)
    counts = [len(part.labels) for part in (task.source, task.source_test, task.train, task.validation, task.test)]
    assert counts[2] == 200
    assert sum(counts) == 1797
    assert set(task.test.labels.tolist()) == set(range(5))


@pytest.mark.skipif(not (MNIST_ROOT / "MNIST" / "raw").is_dir(), reason="MNIST's IDX files are not here")
def test_idx_targets_are_inverted() -> None:
    task = idx(str(MNIST_ROOT), "MNIST", source_images=100, train_images=50, test_images=60)
    assert task.source.images.mean() < -0.3  # dark background
    assert task.train.images.mean() > 0.3
    assert [len(s.labels) for s in (task.source, task.train, task.test, task.validation)] == [100, 50, 60, 60]


def test_jobs_are_reproducible_and_the_rate_comes_from_validation(tmp_path: Path) -> None:
    results = []
    for run in ("a", "b"):
        folder = tmp_path / run
        folder.mkdir()
        pretrain_job(seed=3, network="tiny_v2", data=_DIGITS, source=_SOURCE, workdir=folder, progress=_nothing)
        arm = {"name": "mobiletl-2", "method": "mobiletl", "blocks": 2, "act_backward": "step", "inner_norm": "shift"}
        target = {"rates": [1e-3, 3e-3], "epochs": 1, "batch": 16}
        weights = str(folder / "weights.pt")
        results.append(
            transfer_job(
                seed=3,
                network="tiny_v2",
                data=_DIGITS,
                target=target,
                arm=arm,
                weights=weights,
                workdir=folder,
                progress=_nothing,
            )
        )
    assert results[0] == results[1]
    assert set(results[0]) == {"0.001", "0.003"}
    scored = {"0.001": {"validation": 60.0, "test": 1.0}, "0.01": {"validation": 50.0, "test": 99.0}}
    assert best_rate(scored) == "0.001"


def test_cached_maps_train_as_images_do() -> None:
    """Two steps on the frozen part's maps and on the images give the same network."""
    from papers.mobiletl import mobiletl
    from papers.mobiletl.anatomy import forward_from, forward_to
    from papers.mobiletl.models import create

    task = digits(32)
    torch.manual_seed(0)
    base = create("tiny_v3", 5, in_chans=1)
    outputs = []
    for cached in (True, False):
        model = mobiletl(base, 2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            x = task.train.images
            logits = forward_from(model, forward_to(model, x, 2), 2) if cached else model(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, task.train.labels).backward()
            optimizer.step()
        outputs.append(model.eval()(task.train.images))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_training_learns() -> None:
    task = digits(100)
    base, source = pretrain(task, "tiny_v2", {"lr": 3e-3, "epochs": 10, "batch": 64}, seed=0)
    assert source > 60
    scores = transfer(base, task, method="mobiletl", blocks=3, lr=3e-3, epochs=6, batch=16, seed=0)
    assert scores["test"] > 40  # chance is 20


def test_accuracy_counts_the_last_part_batch() -> None:
    split = Split(torch.eye(5).view(5, 5, 1, 1), torch.tensor([0, 1, 2, 3, 0]))
    assert accuracy(lambda x: x.flatten(1), split, batch=2) == 80.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            path = tmp_path / "cifar10" / part / label
            path.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), (200 if label == "cat" else 20, 10 * i, 0)).save(path / f"{i}.jpg")
    return tmp_path


def test_image_folders_are_found_under_the_name(folder: Path) -> None:
    train, test = (open_dataset("cifar10", folder, train=t, resolution=32) for t in (True, False))
    assert (len(train), len(test)) == (8, 4)
    image, label = test[3]
    assert image.shape == (3, 32, 32)
    assert label == 1
    assert float(test[0][0][0].mean()) == pytest.approx((200 / 255 - 0.485) / 0.229, abs=0.05)
    assert len(open_dataset("cub", folder / "cifar10", train=False, resolution=32)) == 4


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    for name in CLASSES:
        with pytest.raises(UserError, match="put images into"):
            open_dataset(name, tmp_path, train=True)
    with pytest.raises(UserError, match="did you mean 'cars'"):
        open_dataset("car", tmp_path, train=True)


def test_full_scale_job_in_miniature(folder: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "seed": 0, "method": "mobiletl", "blocks": 2, "act_backward": "step", "inner_norm": "shift", "lr": 1e-3, "dataset": "cifar10",
        "model": "mbv3_small", "pretrained": False, "epochs": 1, "batch": 4, "workers": 0, "root": str(folder), "resolution": 32,
    }  # fmt: skip
    result = real_job(**job, workdir=tmp_path, progress=_nothing)
    assert 0.0 <= result["accuracy"] <= 100.0
