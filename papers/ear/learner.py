"""One adaptor with its hyperdimensional classifier, and how the two are trained (headings 3.2: "basic model", "training the adaptors").

h(x) is the bundle of the adapted taps; logits are s cos(h, C_k). C starts as the bundle of the untrained adaptor's h and is trained
with the adaptor by cross-entropy; :func:`rebundle` makes it anew from the trained adaptor without a gradient. ``steps=0`` is the
gradient-free mode ("reconfigure only", as in HyDRATE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.ear.adaptors import Adaptor, Architecture
from papers.ear.hdc import HDEncoder, HDSettings, bundle, cosine, grid_pool, shared_encoder
from shared.training import fit

Features = Sequence[Tensor]


@dataclass(frozen=True)
class TrainSettings:
    """How an adaptor is trained; the paper's settings are unknown, these are ours."""

    epochs: int = 3
    batch: int = 128
    lr: float = 3e-3
    weight_decay: float = 1e-3
    scale: float = 16.0  # s: sharpness of the softmax


class AdaptorNet(nn.Module):
    """Adaptor, fixed projection, classifier C.

    Args:
        architecture: ops of the adaptor.
        channels: of the encoder's taps.
        classes: K.
        hd: D, G and the kind of projection; the projection is the same for all adaptors of one EAR, so classifiers can be compared.
        scale: s of the logits.
    """

    def __init__(
        self, architecture: Architecture, channels: Sequence[int], classes: int, hd: HDSettings, scale: float = 16.0
    ) -> None:
        super().__init__()
        self.adaptor_channels = tuple(channels)
        self.adaptor = Adaptor(architecture, channels)
        self.hd = shared_encoder(tuple(channels), hd)
        self.classifier = nn.Parameter(torch.zeros(classes, hd.dim))
        self.scale = scale
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def embed(self, taps: Features) -> Tensor:
        """h(x), not normalised: (B, D)."""
        return self.hd.project(_descriptors(self.hd, self.adaptor(taps)))

    def forward(self, taps: Features) -> Tensor:
        """Logits (B, K)."""
        return self.scale * cosine(self.embed(taps), self.classifier)

    @torch.no_grad()
    def evaluate(self, taps: Features, batch: int = 1024) -> Tensor:
        """Logits of cached features in evaluation mode."""
        was = self.training
        self.eval()
        result = torch.cat([self(part) for part in batches(taps, batch)])
        self.train(was)
        return result

    @torch.no_grad()
    def embed_all(self, taps: Features, batch: int = 1024) -> Tensor:
        """Unit-length h of cached features in evaluation mode."""
        was = self.training
        self.eval()
        result = torch.cat([F.normalize(self.embed(part), dim=1) for part in batches(taps, batch)])
        self.train(was)
        return result


def _descriptors(hd: HDEncoder, taps: Sequence[Tensor | None]) -> list[Tensor | None]:
    grid = hd.settings.grid
    return [None if t is None else F.normalize(grid_pool(t, grid), dim=1) for t in taps]


def batches(taps: Features, size: int) -> list[list[Tensor]]:
    """Features cut into batches."""
    return [[t[i : i + size] for t in taps] for i in range(0, len(taps[0]), size)]


def take(taps: Features, index: Tensor | slice) -> list[Tensor]:
    """Features of some images."""
    return [t[index] for t in taps]


@torch.no_grad()
def warm_statistics(net: AdaptorNet, taps: Features, passes: int = 6) -> None:
    """Forward passes in training mode, so that batch statistics exist before anything is read in evaluation mode."""
    net.train()
    for _ in range(passes):
        net.embed(taps)
    net.eval()


@torch.no_grad()
def rebundle(net: AdaptorNet, taps: Features, labels: Tensor) -> None:
    """C from the bundle of h over ``taps``; only the classes that occur are marked as seen."""
    total = bundle(net.embed_all(taps), labels, len(net.classifier))
    net.classifier.copy_(F.normalize(total, dim=1))
    net.seen.copy_(torch.bincount(labels, minlength=len(total)) > 0)


def epoch_order(n: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Indices of step ``i``: a new shuffle each epoch, drawn from the seed; a last batch that is not full is dropped."""
    batch = min(batch, n)
    per_epoch = n // batch
    kept: dict[int, Tensor] = {}

    def indices(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        if epoch not in kept:
            kept.clear()
            kept[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        return kept[epoch][place * batch : (place + 1) * batch]

    return indices


def train_net(
    net: AdaptorNet,
    taps: Features,
    labels: Tensor,
    settings: TrainSettings,
    *,
    seed: int,
    start_classifier: bool = True,
    penalty: Callable[[], Tensor] | None = None,
    workdir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AdaptorNet:
    """Train adaptor and classifier on cached features; returns ``net`` in evaluation mode.

    Args:
        start_classifier: whether C starts as the bundle of the untrained adaptor's h.
        penalty: added to the loss of each step (EWC).
    """
    n = len(labels)
    warm_statistics(net, take(taps, slice(0, 256)))
    if start_classifier:
        rebundle(net, taps, labels)
    else:
        net.seen |= torch.bincount(labels, minlength=len(net.classifier)) > 0
    steps = settings.epochs * (n // min(settings.batch, n))
    if steps == 0:
        return net
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps + 1)
    order = epoch_order(n, settings.batch, seed)

    def loss(step: int) -> Tensor:
        index = order(step)
        value = F.cross_entropy(net(take(taps, index)), labels[index])
        return value if penalty is None else value + penalty()

    fit(net, optimizer, schedule, loss, steps=steps, seed=seed, workdir=workdir, progress=progress)
    return net.eval()


def new_net(
    architecture: Architecture, channels: Sequence[int], classes: int, hd: HDSettings, seed: int, scale: float = 16.0
) -> AdaptorNet:
    """A net whose weights depend on ``seed`` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptorNet(architecture, channels, classes, hd, scale)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their class's."""
    return float((logits.argmax(1) == labels).float().mean())
