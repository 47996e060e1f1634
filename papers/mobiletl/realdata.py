"""Full-scale transfer on one of the real data sets: one way of transfer, one rate, one seed (Sec. 5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.mobiletl.convert import adapt, parameter_groups
from papers.mobiletl.datasets import CLASSES, open_dataset
from papers.mobiletl.models import create
from shared.training import fit


def real_job(
    *, seed: int, method: str, blocks: int, act_backward: str, inner_norm: str, lr: float, dataset: str, model: str, pretrained: bool,
    epochs: int, batch: int, workers: int, root: str, resolution: int, workdir: Path, progress: Callable[[int, int], None],
) -> dict[str, float]:  # fmt: skip
    """Adam with a cosine to zero from pretrained weights; top-1 in per cent on the test part.

    The order of the images depends on the seed and the step alone; their random crops do not survive a resumed run.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    network = adapt(
        create(model, CLASSES[dataset], pretrained=pretrained),
        method,
        blocks,
        act_backward=act_backward,
        inner_norm=inner_norm,
    ).to(device)
    train = open_dataset(dataset, root, train=True, resolution=resolution)
    per_epoch = len(train) // batch
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.randperm(len(train), generator=generator)[: per_epoch * batch].view(-1, batch).tolist()
        for _ in range(epochs)
    ]
    optimizer = torch.optim.Adam(parameter_groups(network, lr=lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    loaders: dict[int, Any] = {}

    def batches(epoch: int, start: int) -> Any:
        loader = torch.utils.data.DataLoader(
            train, batch_sampler=orders[epoch][start:], num_workers=workers, pin_memory=device == "cuda"
        )
        return iter(loader)

    def loss(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        if epoch not in loaders:
            loaders.clear()
            loaders[epoch] = batches(epoch, place)
        images, labels = next(loaders[epoch])
        return F.cross_entropy(network(images.to(device)), labels.to(device))

    fit(network, optimizer, schedule, loss, steps=epochs * per_epoch, seed=seed, workdir=workdir, progress=progress)
    return {
        "accuracy": _accuracy(
            network.eval(), open_dataset(dataset, root, train=False, resolution=resolution), workers, device
        )
    }


def _accuracy(network: torch.nn.Module, test: Any, workers: int, device: str) -> float:
    hits = total = 0
    with torch.no_grad():
        for images, labels in torch.utils.data.DataLoader(test, batch_size=64, num_workers=workers):
            hits += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100.0 * hits / total
