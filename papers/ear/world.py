"""The stand-in world: digits that six domains show in turn, and an encoder pre-trained on something else and richer.

By default everything is drawn (:mod:`papers.ear.glyphs`): letters for pre-training, digits for the domains. With a data folder the
same code runs on MNIST with an encoder pre-trained on grey CIFAR-10; the handwritten digits of scikit-learn serve too. Domains never
share an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.ear import glyphs
from papers.ear.domains import DOMAINS, shift
from papers.ear.encoder import STAND_IN_CHANNELS, FrozenEncoder, SmallEncoder
from papers.ear.learner import epoch_order
from shared.errors import UserError, unknown
from shared.training import fit

SOURCES = ("glyphs", "digits", "mnist")
CLASSES = 10
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WorldSettings:
    """Where images come from, how many, and how long the encoder is pre-trained."""

    source: str = "glyphs"
    root: str | None = None
    side: int = 20
    train_images: int = 2000  # of each domain
    test_images: int = 1000
    stream_images: int = 10_000  # more clean ones, for windows without a shift
    pretrain_images: int = 16_000
    pretrain_epochs: int = 4

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise unknown("world.source", self.source, SOURCES)
        if self.source == "mnist" and self.root is None:
            raise UserError("world.source=mnist needs data.root, a folder with MNIST/raw and cifar10-jpeg")
        if self.side < 8:
            raise UserError(f"world.side={self.side} must be at least 8 pixels")

    @property
    def needed(self) -> int:
        """Images of all domains and the stream."""
        return len(DOMAINS) * (self.train_images + self.test_images) + self.stream_images


# --- images ---


def pool(settings: WorldSettings, seed: int) -> tuple[Tensor, Tensor]:
    """``settings.needed`` images without a shift and their labels, in an order drawn from the seed.

    Raises:
        UserError: the data set is smaller than that.
    """
    if settings.source == "glyphs":
        return glyphs.draw(glyphs.DIGITS, settings.needed, settings.side, 1_000 + seed)
    if settings.source == "digits":
        from shared.data.digits import load_digits

        images, labels = load_digits()
    else:
        from shared.data.mnist import load_mnist

        assert settings.root is not None
        parts = [load_mnist(settings.root, train=train) for train in (True, False)]
        images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if len(images) < settings.needed:
        raise UserError(
            f"world.source={settings.source} has {len(images)} images, the settings ask for {settings.needed}: "
            "lower world.train_images, world.test_images or world.stream_images"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: settings.needed]
    return _resized(images[order], settings.side), labels[order]


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def pretraining_images(settings: WorldSettings, seed: int) -> tuple[Tensor, Tensor, int]:
    """Generic images, labels and the number of classes: letters, or CIFAR-10 turned grey."""
    if settings.source != "mnist":
        images, labels = glyphs.draw(glyphs.LETTERS, settings.pretrain_images, settings.side, 2_000 + seed)
        return images, labels, len(glyphs.LETTERS)
    from shared.data.cifar10 import load_cifar10

    assert settings.root is not None
    colour, labels = load_cifar10(settings.root, train=True, limit=settings.pretrain_images)
    grey = (colour.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return _resized(grey, settings.side), labels, 10


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Inversion, mirror, shifts of up to a tenth of the side, contrast from half to one and a half."""
    n, reach = len(images), max(1, images.shape[-1] // 10)

    def coin() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator) < 0.5

    images = torch.where(coin(), 1 - images, images)
    images = torch.where(coin(), images.flip(3), images)
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()  # one shift a batch
    images = images.roll((dy, dx), (2, 3))
    contrast = 0.5 + torch.rand(n, 1, 1, 1, generator=generator)
    return ((images - 0.5) * contrast + 0.5).clamp(0, 1)


# --- the encoder ---


def pretrain(
    settings: WorldSettings, seed: int, *, workdir: Path | None = None, progress: Progress | None = None
) -> SmallEncoder:
    """The small encoder trained on the generic images, AdamW 3e-3 and one cycle; resumes from ``workdir``."""
    images, labels, classes = pretraining_images(settings, seed)
    torch.manual_seed(seed)
    net = SmallEncoder(classes)
    batch = 128
    steps = settings.pretrain_epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    order = epoch_order(len(images), batch, seed)

    def loss(step: int) -> Tensor:
        index = order(step)
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return F.cross_entropy(net.classify(augment(images[index], generator)), labels[index])

    fit(net, optimizer, schedule, loss, steps=steps, seed=seed, workdir=workdir, progress=progress)
    return net


# --- the world ---


@dataclass(frozen=True)
class World:
    """A frozen encoder and the images of each domain; taps are computed when asked for."""

    settings: WorldSettings
    encoder: FrozenEncoder
    images: dict[str, Tensor]  # "<domain>/<train|test>" and "stream": bytes
    labels: dict[str, Tensor]

    def raw(self, part: str) -> Tensor:
        """Images of a part, (N, 1, side, side) in [0, 1]."""
        return self.images[part].float() / 255

    def taps(self, part: str) -> list[Tensor]:
        """Cached features of a part."""
        return self.encoder.features(self.raw(part))


def build_world(
    settings: WorldSettings, seed: int, *, workdir: Path | None = None, progress: Progress | None = None
) -> World:
    """Pre-train the encoder and lay out the domains, each on images of its own."""
    net = pretrain(settings, seed, workdir=workdir, progress=progress)
    images, labels = pool(settings, seed)
    parts, targets, start = {}, {}, 0
    for index, domain in enumerate(DOMAINS):
        for split, count in (("train", settings.train_images), ("test", settings.test_images)):
            chunk = slice(start, start + count)
            shown = shift(images[chunk], domain, 10_000 * seed + 10 * index + (split == "test"))
            parts[f"{domain}/{split}"], targets[f"{domain}/{split}"] = _bytes(shown), labels[chunk]
            start += count
    parts["stream"], targets["stream"] = _bytes(images[start:]), labels[start:]
    return World(settings, FrozenEncoder(net, STAND_IN_CHANNELS), parts, targets)


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def save_world(world: World, path: Path) -> None:
    """Write a world so that other jobs can read it."""
    state = world.encoder.taps.state_dict()
    torch.save(
        {"settings": asdict(world.settings), "encoder": state, "images": world.images, "labels": world.labels}, path
    )


def load_world(path: Path) -> World:
    """What :func:`save_world` wrote."""
    content = torch.load(path, weights_only=True)
    net = SmallEncoder(len(content["encoder"]["head.bias"]))
    net.load_state_dict(content["encoder"])
    encoder = FrozenEncoder(net, STAND_IN_CHANNELS)
    return World(WorldSettings(**content["settings"]), encoder, content["images"], content["labels"])
