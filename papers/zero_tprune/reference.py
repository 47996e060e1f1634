"""Two reference networks on real images, trained once on a GPU and kept beside this file: ``checkpoints/{mnist,cifar10}.pt``.

``mnist`` is the stand-in's own network on ClutterDigits with MNIST's digits, ``cifar10`` a plain ViT of nine blocks. Both were trained
with all of their tokens. ``python -m papers.zero_tprune.reference --data FOLDER --out FOLDER`` trains them again (:data:`RECIPES` is the
whole recipe) and compares all methods on them; FOLDER holds ``MNIST/raw`` and ``cifar10-jpeg``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from papers.zero_tprune import digits, standin
from papers.zero_tprune.search import correct
from shared.errors import UserError

FOLDER = Path(__file__).parent / "checkpoints"
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Recipe:
    """AdamW, 5 % warm-up, cosine to zero, clip 1, BF16 products; CIFAR-10 with crops, flips, CutMix in every second batch."""

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.05
    smoothing: float = 0.0
    seed: int = 0


RECIPES = {
    "mnist": Recipe(2915, 256, 2.0e-3),
    "cifar10": Recipe(4182, 1024, 1.5e-3, 0.1, 0.1),
}


def build(name: str, seed: int = 0) -> Any:
    """The network of a reference, in evaluation mode, with random weights."""
    if name == "mnist":
        return standin.build(seed).eval()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=128, depth=9, num_heads=4, mlp_ratio=2.0
    ).eval()


def load(name: str) -> Any:
    """The trained network of ``mnist`` or ``cifar10``.

    Raises:
        UserError: its checkpoint is not there.
    """
    path = FOLDER / f"{name}.pt"
    if not path.exists():
        raise UserError(
            f"no checkpoint {path.name}: python -m papers.zero_tprune.reference --data FOLDER --out FOLDER trains it"
        )
    model = build(name)
    model.load_state_dict({key: value.float() for key, value in torch.load(path, weights_only=True).items()})
    return model.eval()


def missing(name: str, root: str | Path | None) -> str:
    """Why a reference cannot be evaluated; empty where it can."""
    folder = {"mnist": "MNIST/raw", "cifar10": "cifar10-jpeg"}[name]
    if root is None or not (Path(root) / folder).is_dir():
        return f"needs data.root=FOLDER with {folder}"
    return "" if (FOLDER / f"{name}.pt").exists() else f"needs the checkpoint {name}.pt"


def images(
    name: str, root: str | Path, *, train: bool, limit: int, seed: int = standin.TEST_SEED
) -> tuple[Tensor, Tensor]:
    """``limit`` normalised images and their labels: canvases for ``mnist``, the first of a fixed shuffle for ``cifar10``.

    Raises:
        UserError: the data set is not below ``root``.
    """
    if name == "mnist":
        return digits.load("mnist", str(root), train=train).canvases(limit, torch.Generator().manual_seed(seed))
    from shared.data.cifar10 import load_cifar10

    pixels, labels = load_cifar10(root, train=train, limit=limit)
    return normalise(pixels), labels


def normalise(pixels: Tensor) -> Tensor:
    """CIFAR-10's bytes [B, 3, 32, 32] as the network takes them."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (CIFAR_MEAN, CIFAR_STD))
    return (pixels.float() / 255 - mean) / std


def evaluate(
    name: str, root: str | Path, *, test_images: int, calibration_images: int, draws_per_method: int, shares: list[float], scorer: str,
    progress: Callable[[int, int], None], workdir: Path | None = None, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """All methods on one reference; see :func:`papers.zero_tprune.standin.evaluate_seed` for what it returns."""

    def there(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(device), pair[1].to(device)

    return standin.compare(
        load(name).to(device),
        there(images(name, root, train=False, limit=test_images)),
        there(images(name, root, train=True, limit=calibration_images, seed=standin.CALIBRATION_SEED)),
        shares=shares, curve=[], draws_per_method=draws_per_method, seed=0, scorer=scorer, progress=progress,
    )  # fmt: skip


def batches(name: str, root: str | Path, recipe: Recipe, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches: images and target distributions [B, 10]."""
    generator = torch.Generator(device).manual_seed(recipe.seed)
    if name == "mnist":
        source = digits.load("mnist", str(root), train=True)
        source = digits.Digits(source.images.to(device), source.labels.to(device))
        while True:
            x, y = source.canvases(recipe.batch, generator)
            yield x, nn.functional.one_hot(y, 10).float()
    from shared.data.cifar10 import load_cifar10

    pixels, labels = (part.to(device) for part in load_cifar10(root, train=True))
    padded, count = nn.functional.pad(normalise(pixels), (4,) * 4, mode="reflect"), 0
    rows = torch.arange(32, device=device)
    while True:
        index, y0, x0, flip = (
            torch.randint(0, top, (recipe.batch,), generator=generator, device=device) for top in (len(labels), 9, 9, 2)
        )
        columns = torch.where(flip[:, None] == 1, rows.flip(0), rows) + x0[:, None]
        channels = torch.arange(3, device=device)[None, :, None, None]
        x = padded[
            index[:, None, None, None], channels, (rows + y0[:, None])[:, None, :, None], columns[:, None, None, :]
        ]
        y = nn.functional.one_hot(labels[index], 10).float()
        count += 1
        if count % 2:
            x, y = _cutmix(x, y, generator, rows)
        yield x, y * (1 - recipe.smoothing) + recipe.smoothing / 10


def _cutmix(x: Tensor, y: Tensor, generator: torch.Generator, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A rectangle of every image comes from another one; labels mix by area."""
    size = (32 * (1 - torch.rand(len(x), generator=generator, device=x.device)).sqrt()).long()[:, None]
    top, left = (torch.randint(-16, 32, (len(x), 1), generator=generator, device=x.device) for _ in range(2))
    inside = ((rows >= top) & (rows < top + size))[:, :, None] & ((rows >= left) & (rows < left + size))[:, None, :]
    other = torch.randperm(len(x), generator=generator, device=x.device)
    share = inside.float().mean(dim=(1, 2))[:, None]
    return torch.where(inside[:, None], x[other], x), y * (1 - share) + y[other] * share


def train(name: str, root: str | Path, recipe: Recipe, device: str, seconds: float) -> tuple[Any, dict[str, Any]]:
    """Train a reference. Where ``seconds`` would not do for all steps, fewer are taken and the record says so."""
    model = build(name, recipe.seed).to(device).train()
    decays = [p for p in model.parameters() if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": decays},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps, started, data = recipe.steps, 0.0, batches(name, root, recipe, device)
    step, losses = 0, []
    while step < steps:
        if step == 20:
            _wait(device)
            started = time.perf_counter()
        if step == 60:  # the speed is known now
            _wait(device)
            steps = min(steps, int(0.95 * seconds * 40 / (time.perf_counter() - started)))
        warm = max(1, steps // 20)
        factor = (
            (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * factor
        x, y = next(data)
        with torch.autocast(device, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 250 == 0:
            losses.append(round(float(loss.detach()), 4))
    _wait(device)
    record = {"recipe": asdict(recipe) | {"steps": steps}, "torch": torch.__version__, "losses_every_250": losses}
    return model.eval(), record | {"seconds": round(time.perf_counter() - started, 1)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    """Train and compare; see the module's first lines."""
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="cifar10,mnist")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of each training")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--images", type=int, default=10_000, help="test images of the comparison")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in options.only.split(","):
        recipe = RECIPES[name] if options.steps is None else Recipe(**asdict(RECIPES[name]) | {"steps": options.steps})
        model, record = train(name, options.data, recipe, device, options.seconds)
        torch.save({key: value.half().cpu() for key, value in model.state_dict().items()}, options.out / f"{name}.pt")
        x, y = images(name, options.data, train=False, limit=options.images)
        hits = correct(model, x.to(device), y.to(device))
        record["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "none"
        record["test_accuracy_percent"] = round(100 * float(hits.float().mean()), 2)
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(name, record["test_accuracy_percent"], record["recipe"], record["seconds"], flush=True)
        FOLDER = options.out
        found = evaluate(
            name, options.data, test_images=options.images, calibration_images=1000, draws_per_method=24, shares=[0.65, 0.5],
            scorer="wpr", progress=lambda done, total: None, device=device,
        )  # fmt: skip
        (options.out / f"{name}_methods.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({share: part["accuracy"] for share, part in found["shares"].items()}), flush=True)


if __name__ == "__main__":
    main()
