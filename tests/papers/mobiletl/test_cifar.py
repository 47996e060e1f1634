"""The reference run in miniature: it can be interrupted, and the rate of every seed comes from the first one's validation images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papers.mobiletl import cifar
from papers.mobiletl.cifar import load
from papers.mobiletl.settle import settle_norms

OPTIONS: dict[str, Any] = {
    "pretrain_epochs": 1,
    "epochs": 1,
    "images": 32,
    "batch": 16,
    "seeds": [0, 1],
    "rates": [1e-3, 3e-3],
}


def _data(root: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = {}
    for name, n in (("source", 256), ("source_test", 8), ("target", 40), ("target_validation", 8), ("target_test", 8)):
        data[name] = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        data[f"{name}_labels"] = torch.randint(0, 5, (n,), generator=generator)
    return data


def test_validation_has_all_target_classes_although_the_files_go_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(10).repeat_interleave(100)
    images = torch.arange(1000).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    monkeypatch.setattr(cifar, "load_cifar10", lambda root, train: (images, labels))
    data = load(Path("."), validation=100)
    assert torch.bincount(data["target_validation_labels"]).min() >= 8  # 20 expected
    assert torch.bincount(data["target_labels"], minlength=5).min() >= 60
    numbers = torch.cat([data["target"], data["target_validation"]])[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(500, 1000))
    assert (data["target_labels"] == data["target"][:, 0, 0, 0] // 100 - 5).all()


def test_settled_norms_hold_the_mean_over_all_batches_and_frozen_ones_stay() -> None:
    trained, frozen = nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3).eval()
    model = nn.Sequential(trained, frozen)
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    odd = torch.full((4, 3, 4, 4), 1e4)
    for batch in (*images.split(4), odd):  # the last batch owns a tenth of the running mean
        model(batch)
    assert trained.running_mean is not None
    assert trained.running_mean.min() > 900
    settle_norms(model, model, images.split(4))
    torch.testing.assert_close(trained.running_mean, images.mean((0, 2, 3)))
    assert trained.momentum == 0.1
    assert frozen.running_mean is not None
    assert (frozen.running_mean == 0).all()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "RESOLUTION", 32)
    monkeypatch.setattr(cifar, "METHODS", (("last", 0), ("mobiletl", 2)))
    monkeypatch.setattr(cifar, "load", _data)


def test_interrupted_run_is_completed_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    transfer = cifar.transfer

    def breaks(base: Any, data: Any, **options: Any) -> Any:
        if options["method"] == "mobiletl":
            raise KeyboardInterrupt
        return transfer(base, data, **options)

    monkeypatch.setattr(cifar, "transfer", breaks)
    with pytest.raises(KeyboardInterrupt):
        cifar.run(tmp_path, out, **OPTIONS)
    before = json.loads(out.read_text())
    assert {(r["method"], r["seed"]) for r in before["runs"]} == {("last", 0), ("last", 1)}
    assert not before["complete"]

    started = []

    def watched(base: Any, data: Any, **options: Any) -> Any:
        started.append((options["method"], options["runs"]))
        return transfer(base, data, **options)

    monkeypatch.setattr(cifar, "transfer", watched)
    result = cifar.run(tmp_path, out, **OPTIONS)
    rate = cifar.best_rate(result["runs"], "mobiletl", 2, seed=0)
    assert started == [("mobiletl", [(0, 1e-3), (0, 3e-3)]), ("mobiletl", [(1, rate)])]
    assert result["complete"]
    assert result["runs"][:3] == before["runs"]
    assert len(cifar.accuracies(result, "mobiletl", 2, [0, 1])) == 2

    started.clear()
    assert cifar.run(tmp_path, out, **OPTIONS)["runs"] == result["runs"]
    assert started == []


def test_other_weights_start_anew(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    first = cifar.run(tmp_path, out, **OPTIONS)
    changed = cifar.run(tmp_path, out, **{**OPTIONS, "pretrain_epochs": 2})
    assert first["weights"] != changed["weights"]
    assert len(changed["runs"]) == len(first["runs"])


def test_rate_comes_from_validation() -> None:
    runs = [
        {"method": "last", "blocks": 0, "seed": 0, "lr": 1e-3, "validation": 60.0, "accuracy": 1.0},
        {"method": "last", "blocks": 0, "seed": 0, "lr": 1e-2, "validation": 50.0, "accuracy": 99.0},
        {"method": "last", "blocks": 0, "seed": 1, "lr": 1e-3, "validation": 0.0, "accuracy": 2.0},
    ]
    assert cifar.best_rate(runs, "last", 0, 0) == 1e-3
    assert cifar.accuracies({"runs": runs}, "last", 0, [0, 1]) == [1.0, 2.0]
