"""The reference run on real images: MobileNetV3-Small at 224, pre-trained on five classes of CIFAR-10, transferred to the other five.

``python -m papers.mobiletl.cifar --data ROOT --out FILE.json`` on an NVIDIA GPU; needs torch, timm, triton, numpy and Pillow alone.
Pre-training is ours, from random weights: no network is needed, and the figures are not the paper's, which start from ImageNet.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mobiletl.anatomy import forward_from, forward_to
from papers.mobiletl.convert import adapt, parameter_groups
from papers.mobiletl.models import create
from shared.data.cifar10 import load_cifar10
from shared.measure.timing import device_name

RESOLUTION = 224
MODEL = "mobilenetv3_small_100"
METHODS: tuple[tuple[str, int], ...] = (
    ("last", 0), ("bias", 0), ("norm", 0), ("ft_blocks", 1), ("mobiletl", 1), ("ft_blocks", 3), ("mobiletl", 3), ("ft_blocks", 5),
    ("mobiletl", 5), ("ft_all", 0),
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def enlarge(images: Tensor) -> Tensor:
    """Bytes (N, 3, 32, 32) -> normalised (N, 3, 224, 224)."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (images.float() / 255 - mean) / std
    return F.interpolate(x, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift by up to 4 pixels for the batch and a flip for each image."""
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    x = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")[..., dy : dy + 32, dx : dx + 32]
    flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)


def accuracy(predict: Any, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in per cent."""
    with torch.no_grad():
        hits = sum(
            int((predict(x).argmax(1) == y).sum())
            for x, y in zip(inputs.split(batch), labels.split(batch), strict=True)
        )
    return 100 * hits / len(labels)


def pretrain(data: dict[str, Tensor], *, epochs: int, batch: int, lr: float, seed: int) -> tuple[nn.Module, float]:
    """Train on the source classes; returns the network and its source test accuracy in per cent."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = create(MODEL, num_classes=5).to(DEVICE).to(memory_format=torch.channels_last)
    steps = epochs * (len(data["source"]) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    model.train()
    done = 0
    while done < steps:
        order = torch.randperm(len(data["source"]), generator=generator).to(DEVICE)
        for index in order[: len(order) // batch * batch].split(batch):
            images = enlarge(augment(data["source"][index], generator)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(model(images), data["source_labels"][index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    model.eval().to(memory_format=torch.contiguous_format)
    return model, accuracy(lambda x: model(enlarge(x)), data["source_test"], data["source_test_labels"])


def transfer(
    base: nn.Module,
    data: dict[str, Tensor],
    *,
    method: str,
    blocks: int,
    lr: float,
    seed: int,
    images: int,
    epochs: int,
    batch: int,
) -> dict[str, Any]:
    """Transfer to the target classes with Adam and a cosine; top-1 on the target test images in per cent.

    The frozen part's maps are computed once, for each image and its mirror image; methods that change the lower part see the images.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base.classifier = nn.Linear(base.classifier.in_features, 5, device=DEVICE)  # type: ignore[union-attr,arg-type]
    model = adapt(base, method, blocks).to(DEVICE).train()
    chosen = torch.randperm(len(data["target"]), generator=generator)[:images].to(DEVICE)
    train, labels = data["target"][chosen], data["target_labels"][chosen]
    whole = method in ("bias", "norm", "ft_all")
    count = 0 if method == "last" else blocks

    def lower(x: Tensor) -> Tensor:
        return enlarge(x) if whole else forward_to(model, enlarge(x), count)

    def upper(x: Tensor) -> Tensor:
        return model(x) if whole else forward_from(model, x, count)

    if not whole:
        with torch.no_grad():
            maps = torch.stack([torch.cat([lower(x) for x in part.split(500)]) for part in (train, train.flip(-1))])
    steps = epochs * (images // batch)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=lr), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(images, generator=generator)[: images // batch * batch].split(batch):
            flips = torch.randint(0, 2, (batch,), generator=generator)
            if whole:
                picked = train[index.to(DEVICE)]
                x = enlarge(torch.where(flips.to(DEVICE).view(-1, 1, 1, 1) == 1, picked.flip(-1), picked))
            else:
                x = maps[flips.to(DEVICE), index.to(DEVICE)]
            loss = F.cross_entropy(upper(x), labels[index.to(DEVICE)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    score = accuracy(lambda x: model(enlarge(x)), data["target_test"], data["target_test_labels"])
    return {"method": method, "blocks": blocks, "lr": lr, "seed": seed, "accuracy": score}


def load(root: Path) -> dict[str, Tensor]:
    """CIFAR-10 split into source classes 0 to 4 and target classes 5 to 9, as bytes on the GPU."""
    data: dict[str, Tensor] = {}
    for train in (True, False):
        images, labels = load_cifar10(root, train=train)
        suffix = "" if train else "_test"
        for part, keep in (("source", labels < 5), ("target", labels >= 5)):
            data[part + suffix] = images[keep].to(DEVICE)
            data[f"{part}{suffix}_labels"] = (labels[keep] % 5).to(DEVICE)
    return data


_STATE: dict[str, Any] = {}


def _start(path: str) -> None:
    """A worker of the pool: data and weights once."""
    torch.set_num_threads(1)
    _STATE.update(torch.load(path, map_location=DEVICE, weights_only=True))


def _job(job: dict[str, Any]) -> dict[str, Any]:
    base = create(MODEL, num_classes=5).to(DEVICE)
    base.load_state_dict(_STATE["weights"])
    return transfer(base, _STATE["data"], **job)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10-jpeg/{train,test}.tar")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrain-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--workers", type=int, default=10)
    arguments = parser.parse_args()
    start = time.time()
    data = load(arguments.data)
    print(f"data after {time.time() - start:.0f} s", flush=True)
    base, source_accuracy = pretrain(data, epochs=arguments.pretrain_epochs, batch=256, lr=3e-3, seed=0)
    print(f"source accuracy {source_accuracy:.2f} % after {time.time() - start:.0f} s", flush=True)
    result: dict[str, Any] = {
        "machine": device_name(DEVICE), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "model": MODEL,
        "resolution": RESOLUTION, "source_accuracy": source_accuracy, "pretrain_epochs": arguments.pretrain_epochs,
        "images": arguments.images, "epochs": arguments.epochs, "batch": arguments.batch, "runs": [],
    }  # fmt: skip
    shared = {key: value.cpu() for key, value in data.items() if key.startswith("target")}
    state_file = arguments.out.with_suffix(".state.pt")
    torch.save({"weights": {k: v.cpu() for k, v in base.state_dict().items()}, "data": shared}, state_file)
    size = {"images": arguments.images, "epochs": arguments.epochs, "batch": arguments.batch}
    jobs = [
        {"method": method, "blocks": blocks, "lr": lr, "seed": seed, **size}
        for method, blocks in reversed(METHODS)
        for seed in range(arguments.seeds)
        for lr in arguments.rates
    ]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, initializer=_start, initargs=(str(state_file),)) as pool:
        for run in pool.imap_unordered(_job, jobs):
            result["runs"].append(run)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["seconds"] = time.time() - start
    result["runs"].sort(key=lambda run: (run["method"], run["blocks"], run["lr"], run["seed"]))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    state_file.unlink()
    for method, blocks in METHODS:
        print(
            method,
            blocks,
            {lr: [round(a, 2) for a in by_rate(result["runs"], method, blocks)[lr]] for lr in arguments.rates},
        )
    print(f"{result['seconds']:.0f} s")


def by_rate(runs: list[dict[str, Any]], method: str, blocks: int) -> dict[float, list[float]]:
    """Accuracies of one way of transfer, in per cent, by learning rate, in the order of the seeds."""
    chosen = sorted((r for r in runs if (r["method"], r["blocks"]) == (method, blocks)), key=lambda r: r["seed"])
    return {lr: [r["accuracy"] for r in chosen if r["lr"] == lr] for lr in sorted({r["lr"] for r in chosen})}


if __name__ == "__main__":
    main()
