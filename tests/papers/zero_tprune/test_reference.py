"""The kept networks: their files fit their code, their recipe trains, and the interval over images is McNemar's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from papers.zero_tprune import reference
from papers.zero_tprune.experiments.reference import gap
from papers.zero_tprune.search import correct
from shared.errors import UserError

DATA = Path(__file__).parents[4] / "shared" / "data"


def test_gap_by_hand() -> None:
    """100 images, 30 only ours, 10 only theirs: 20 points; the differences are +1 (30), -1 (10), 0 (60), of variance 0.4 - 0.2²."""
    value, half = gap(30, 10, 100)
    values = torch.tensor([1.0] * 30 + [-1.0] * 10 + [0.0] * 60)
    assert value == pytest.approx(20.0)
    assert half == pytest.approx(100 * 1.96 * float(values.std(correction=0)) / 10)
    assert gap(0, 0, 10) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_kept_networks_are_whole(name: str) -> None:
    model = reference.load(name)
    record = json.loads((reference.FOLDER / f"{name}.json").read_text())
    size = 40 if name == "mnist" else 32
    assert model(torch.zeros(1, 1 if name == "mnist" else 3, size, size)).shape == (1, 10)
    assert record["test_accuracy_percent"] > 75
    assert (reference.FOLDER / f"{name}.pt").stat().st_size < 3_000_000


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_kept_networks_see(name: str) -> None:
    """On 200 test images: within four standard errors of the accuracy that the record states."""
    if reason := reference.missing(name, DATA):
        pytest.skip(f"{reason}, looked in {DATA.name}")
    images, labels = reference.images(name, DATA, train=False, limit=200)
    stated = json.loads((reference.FOLDER / f"{name}.json").read_text())["test_accuracy_percent"] / 100
    hits = correct(reference.load(name), images, labels).float().mean()
    assert abs(float(hits) - stated) < 4 * (stated * (1 - stated) / 200) ** 0.5


def test_cutmix_keeps_the_share_of_each_label() -> None:
    """Images that are constant in value: the mean of a mixed image is the mean of the labels' values."""
    value = torch.arange(10.0)
    x = value[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    mixed, labels = reference._cutmix(x, torch.eye(10), torch.Generator().manual_seed(0), torch.arange(32))
    assert torch.allclose(labels.sum(dim=1), torch.ones(10))
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), labels @ value, atol=1e-4)
    assert not torch.equal(mixed, x)


def test_missing_data_and_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MNIST/raw" in reference.missing("mnist", None)
    assert "cifar10-jpeg" in reference.missing("cifar10", tmp_path)
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint mnist\.pt"):
        reference.load("mnist")


def test_the_recipe_trains_on_mnist(tmp_path: Path) -> None:
    if reason := reference.missing("mnist", DATA):
        pytest.skip(f"{reason}, looked in {DATA.name}")
    recipe = reference.Recipe(steps=3, batch=8, lr=1e-3)
    model, record = reference.train("mnist", DATA, recipe, "cpu", 100.0)
    assert record["recipe"]["steps"] == 3
    before = reference.build("mnist")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
