"""The reference run on real images: MobileNetV3-Small at 224, pre-trained on five classes of CIFAR-10, transferred to the other five.

``python -m papers.mobiletl.cifar --data ROOT --out FILE.json`` on an NVIDIA GPU; needs torch, timm, triton, numpy and Pillow alone.
The same command completes a run that was interrupted.
Pre-training is ours, from random weights: no network is needed, and the figures are not the paper's, which start from ImageNet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mobiletl.anatomy import forward_from, forward_to
from papers.mobiletl.convert import THROUGH, adapt, parameter_groups
from papers.mobiletl.models import create
from papers.mobiletl.settle import settle_norms
from shared.data.cifar10 import load_cifar10
from shared.measure.timing import device_name

RESOLUTION = 224
RESULT = "cifar10.json"
MODEL = "mobilenetv3_small_100"
METHODS: tuple[tuple[str, int], ...] = (
    ("last", 0), ("ft_blocks", 1), ("mobiletl", 1), ("ft_blocks", 3), ("mobiletl", 3), ("ft_blocks", 5), ("mobiletl", 5), ("bias", 0),
    ("ft_all", 0), ("norm", 0), ("lite_bias", 0),
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, on the device once: nothing may be copied there while a graph is captured."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return mean, std


def enlarge(images: Tensor) -> Tensor:
    """Bytes (N, 3, 32, 32) -> normalised (N, 3, 224, 224)."""
    mean, std = _normalisation(images.device)
    x = (images.float() / 255 - mean) / std
    # F.interpolate would take a slow way in deterministic mode, for the sake of a gradient that images do not have
    out: Tensor = torch.ops.aten.upsample_bilinear2d(x, [RESOLUTION, RESOLUTION], False)
    return out


def augment(images: Tensor, flips: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift by up to 4 pixels for the batch, and the flips (N,), each 0 or 1."""
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    x = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")[..., dy : dy + 32, dx : dx + 32]
    return torch.where(flips.view(-1, 1, 1, 1) == 1, x.flip(-1), x)


def accuracy(predict: Any, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in per cent."""
    with torch.no_grad():
        hits = sum(
            int((predict(x).argmax(1) == y).sum())
            for x, y in zip(inputs.split(batch), labels.split(batch), strict=True)
        )
    return 100 * hits / len(labels)


@cache
def _stream() -> torch.cuda.Stream:
    """A graph cannot be captured on the default stream."""
    return torch.cuda.Stream()


class _Training:
    """Steps of one training run; on a GPU captured once as a CUDA graph and replayed, all on one stream.

    ``loss`` reads the images' numbers and their flips, both (batch,), from two tensors that stay in place; so do the learning rates.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor], batch: int
    ) -> None:  # fmt: skip
        self.model, self._optimizer = model, optimizer
        self._index = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        self._flips = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(self._index, self._flips).backward()
            optimizer.step()

        self._run: Callable[[], object] = run
        if DEVICE != "cuda":
            return
        self._stream = _stream()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        self._run = graph.replay
        model.load_state_dict(before)  # in place: as if the steps before the capture had not been
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        self._stream.wait_stream(torch.cuda.current_stream())

    def step(self, index: Tensor, flips: Tensor, rate_factor: float) -> None:
        """One step at ``rate_factor`` times the learning rates; numbers and flips are on the device."""
        with torch.cuda.stream(self._stream) if DEVICE == "cuda" else nullcontext():
            self._index.copy_(index)
            self._flips.copy_(flips)
            for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
                group["lr"].fill_(rate * rate_factor)
            self._run()


def _adam(groups: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Adam, or AdamW where ``weight_decay`` is given, with learning rates that a captured graph reads from memory."""
    groups = list(groups)
    groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
    for group in groups:
        group["lr"] = torch.tensor(float(group.get("lr", lr)), device=DEVICE)
    kind = torch.optim.AdamW if options else torch.optim.Adam
    return kind(groups, fused=DEVICE == "cuda", capturable=DEVICE == "cuda", **options)


def _orders(images: int, batch: int, epochs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the images and flips of every step, (steps, batch) each."""
    per_epoch = images // batch
    orders = [torch.randperm(images, generator=generator)[: per_epoch * batch].view(-1, batch) for _ in range(epochs)]
    return torch.cat(orders).to(DEVICE), torch.randint(0, 2, (epochs * per_epoch, batch), generator=generator).to(
        DEVICE
    )


def pretrain(data: dict[str, Tensor], *, epochs: int, batch: int, lr: float, seed: int) -> tuple[nn.Module, float]:
    """Train on the source classes; returns the network and its source test accuracy in per cent. Deterministic on one kind of machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = create(MODEL, num_classes=5).to(DEVICE).to(memory_format=torch.channels_last).train()
    index, flips = _orders(len(data["source"]), batch, epochs, generator)
    images = torch.zeros(batch, *data["source"].shape[1:], device=DEVICE)
    optimizer = _adam(model.parameters(), lr, weight_decay=0.05)

    def loss(picked: Tensor, _: Tensor) -> Tensor:
        x = enlarge(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.cross_entropy(model(x), data["source_labels"][picked], label_smoothing=0.1)

    training = _Training(model, optimizer, loss, batch)
    warmup = 0.15 * len(index)
    for step in range(len(index)):
        with torch.cuda.stream(_stream()) if DEVICE == "cuda" else nullcontext():
            images.copy_(augment(data["source"][index[step]], flips[step], generator))
        factor = (
            (step + 1) / warmup
            if step < warmup
            else (1 + math.cos(math.pi * (step - warmup) / (len(index) - warmup))) / 2
        )
        training.step(index[step], flips[step], factor)
    _synchronise()
    model.eval().to(memory_format=torch.contiguous_format)
    return model, accuracy(lambda x: model(enlarge(x)), data["source_test"], data["source_test_labels"])


def transfer(
    base: nn.Module, data: dict[str, Tensor], *, method: str, blocks: int, runs: list[tuple[int, float]], images: int,
    epochs: int, batch: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Transfer in one way at every (seed, learning rate) of ``runs``, Adam and a cosine; top-1 on target images in per cent.

    ``validation`` is on target images that no run trained on, to choose the rate with; ``accuracy`` on the test images. The frozen
    part's maps are computed once, for each image and its mirror image; methods that change the lower part see the images.
    """
    whole = method in (*THROUGH, "ft_all")
    count = 0 if method == "last" else blocks
    reference = adapt(base, method, blocks).to(DEVICE).eval()

    def lower(x: Tensor) -> Tensor:
        """The images as bytes, or the frozen part's maps of them."""
        if whole:
            return x
        with torch.no_grad():
            return torch.cat([forward_to(reference, enlarge(part), count) for part in x.split(500)])

    sets = {"validation": (lower(data["target_validation"]), data["target_validation_labels"]),
            "accuracy": (lower(data["target_test"]), data["target_test_labels"])}  # fmt: skip
    trainings: list[tuple[_Training, Callable[[Tensor], Tensor], Tensor, Tensor]] = []
    maps_by_seed: dict[int, tuple[Tensor, Tensor]] = {}
    for seed, lr in runs:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(data["target"]), generator=generator)[:images].to(DEVICE)
        index, flips = _orders(images, batch, epochs, generator)
        if seed not in maps_by_seed:
            train = data["target"][chosen]
            maps_by_seed[seed] = torch.stack([lower(train), lower(train.flip(-1))]), data["target_labels"][chosen]
        trainings.append((*_start(base, method, blocks, seed, lr, batch, *maps_by_seed[seed]), index, flips))
    for step in range(len(trainings[0][2])):
        factor = (1 + math.cos(math.pi * step / len(trainings[0][2]))) / 2
        for training, _, index, flips in trainings:
            training.step(index[step], flips[step], factor)
    _synchronise()
    found = []
    for (seed, lr), (training, predict, _, _) in zip(runs, trainings, strict=True):
        settle_norms(training.model, predict, maps_by_seed[seed][0].flatten(0, 1).split(500))
        training.model.eval()
        scores = {name: accuracy(predict, inputs, labels) for name, (inputs, labels) in sets.items()}
        found.append({"method": method, "blocks": blocks, "lr": lr, "seed": seed, **scores})
    return found


def _start(
    base: nn.Module, method: str, blocks: int, seed: int, lr: float, batch: int, maps: Tensor, labels: Tensor
) -> tuple[_Training, Callable[[Tensor], Tensor]]:  # fmt: skip
    """A network with a new classifier, ready to train on images or maps (2, N, …), upright and mirrored; and its prediction."""
    torch.manual_seed(seed)
    base.classifier = nn.Linear(base.classifier.in_features, 5).to(DEVICE)  # type: ignore[union-attr,arg-type]
    model = adapt(base, method, blocks).to(DEVICE).train()
    count = 0 if method == "last" else blocks

    def predict(x: Tensor) -> Tensor:
        out: Tensor = model(enlarge(x)) if x.dtype == torch.uint8 else forward_from(model, x, count)
        return out

    optimizer = _adam(parameter_groups(model, lr=lr), lr)
    loss = lambda index, flips: F.cross_entropy(predict(maps[flips, index]), labels[index])  # noqa: E731
    return _Training(model, optimizer, loss, batch), predict


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def load(root: Path, validation: int = 2000) -> dict[str, Tensor]:
    """CIFAR-10 split into source classes 0 to 4 and target classes 5 to 9, as bytes on the GPU; random target images validate.

    The files hold the images class by class, so an end of them would be one class.
    """
    data: dict[str, Tensor] = {}
    for train in (True, False):
        images, labels = load_cifar10(root, train=train)
        suffix = "" if train else "_test"
        for part, keep in (("source", labels < 5), ("target", labels >= 5)):
            data[part + suffix] = images[keep].to(DEVICE)
            data[f"{part}{suffix}_labels"] = (labels[keep] % 5).to(DEVICE)
    order = torch.randperm(len(data["target"]), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for suffix in ("", "_labels"):
        shuffled = data[f"target{suffix}"][order]
        data[f"target_validation{suffix}"], data[f"target{suffix}"] = shuffled[:validation], shuffled[validation:]
    return data


def digest(model: nn.Module) -> str:
    """Of a network's weights, to tell whether two runs started from the same."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def _same_bits() -> Iterator[None]:
    """The same bits in every run, and the process as it was afterwards."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first use of the GPU
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer here is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@_same_bits()
def run(
    root: Path, out: Path, *, pretrain_epochs: int, epochs: int, images: int, batch: int, seeds: Sequence[int], rates: Sequence[float],
    trains: str = "blocks", seconds: float = math.inf, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pre-train, then transfer in every way; the result, which is also kept in ``out`` after each way of transfer.

    The first seed runs at every rate, the others at the rate that is best on its validation images. What ``out`` already holds from
    the same weights is not run again. ``trains="head"`` leaves all blocks frozen. After ``seconds`` no further way is started.
    """
    start = time.time()
    data = load(root)
    base, source_accuracy = pretrain(data, epochs=pretrain_epochs, batch=256, lr=3e-3, seed=0)
    print(f"source accuracy {source_accuracy:.2f} % after {time.time() - start:.0f} s", flush=True)
    size = {"images": images, "epochs": epochs, "batch": batch}
    result: dict[str, Any] = {
        "machine": device_name(DEVICE), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "model": MODEL,
        "resolution": RESOLUTION, "weights": digest(base), "source_accuracy": source_accuracy, "pretrain_epochs": pretrain_epochs,
        **size, "trains": trains, "complete": False, "runs": [],
    }  # fmt: skip
    if out.exists():
        before = json.loads(out.read_text())
        if all(before[key] == result[key] for key in ("machine", "torch", "weights", "trains", *size)):
            result["runs"] = before["runs"]
        print(f"{len(result['runs'])} of {len(before['runs'])} finished runs are from these weights", flush=True)
    first, *others = seeds
    for number, (method, blocks) in enumerate(METHODS):
        if time.time() - start > seconds:
            print(f"stopped before {method}-{blocks}: run the same command again", flush=True)
            return result
        for chosen in ([(first, rate) for rate in rates], None):
            if chosen is None:
                chosen = [(seed, best_rate(result["runs"], method, blocks, first)) for seed in others]
            done = {(r["seed"], r["lr"]) for r in result["runs"] if (r["method"], r["blocks"]) == (method, blocks)}
            if left := [pair for pair in chosen if pair not in done]:
                trained = blocks if trains == "blocks" else 0
                found = transfer(base, data, method=method, blocks=trained, runs=left, **size)
                result["runs"] += [{**entry, "blocks": blocks} for entry in found]
        result["complete"] = number == len(METHODS) - 1
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{method}-{blocks} after {time.time() - start:.0f} s: {by_rate(result['runs'], method, blocks)}",
            flush=True,
        )
        if progress is not None:
            progress(number + 1, len(METHODS))
    return result


def job(
    *, seed: int, root: str, seeds: list[int], options: dict[str, Any], workdir: Path, progress: Any
) -> dict[str, Any]:
    """:func:`run` as a job of the runner, resumed from its folder after an interruption."""
    return run(Path(root), workdir / RESULT, seeds=seeds, progress=progress, **options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10-jpeg/{train,test}.tar")
    parser.add_argument("--out", type=Path, required=True, help="result; an unfinished one is completed")
    parser.add_argument("--pretrain-epochs", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no further way of transfer after this time"
    )
    options = vars(parser.parse_args())
    run(options.pop("data"), options.pop("out"), seeds=range(options.pop("seeds")), **options)


def best_rate(runs: Sequence[Mapping[str, Any]], method: str, blocks: int, seed: int) -> float:
    """The learning rate with which one seed of a way of transfer does best on its validation images."""
    own = [r for r in runs if (r["method"], r["blocks"], r["seed"]) == (method, blocks, seed)]
    return float(max(sorted(own, key=lambda r: r["lr"]), key=lambda r: r["validation"])["lr"])


def accuracies(result: Mapping[str, Any], method: str, blocks: int, seeds: Sequence[int]) -> list[float]:
    """Test accuracies of a way of transfer at its rate, in per cent, one per seed."""
    rate = best_rate(result["runs"], method, blocks, seeds[0])
    found = {
        r["seed"]: r["accuracy"]
        for r in result["runs"]
        if (r["method"], r["blocks"], r["lr"]) == (method, blocks, rate)
    }
    return [found[seed] for seed in seeds]


def by_rate(runs: list[dict[str, Any]], method: str, blocks: int) -> dict[float, list[float]]:
    """Accuracies of one way of transfer, in per cent, by learning rate, in the order of the seeds."""
    chosen = sorted((r for r in runs if (r["method"], r["blocks"]) == (method, blocks)), key=lambda r: r["seed"])
    return {lr: [r["accuracy"] for r in chosen if r["lr"] == lr] for lr in sorted({r["lr"] for r in chosen})}


if __name__ == "__main__":
    main()
