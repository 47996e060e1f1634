"""What "fixed" and "nothing old is touched" mean, checked bit by bit on a small EAR (claims C1, C7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from papers.ear import glyphs
from papers.ear.domains import shift
from papers.ear.ear import EAR, EARSettings
from papers.ear.encoder import STAND_IN_CHANNELS, FrozenEncoder, SmallEncoder, tensor_hashes
from papers.ear.hdc import HDSettings
from papers.ear.learner import TrainSettings, train_net

DOMAINS = ("clean", "invert", "rot")
SIDE = 20


@dataclass(frozen=True)
class FrozenCheck:
    """Tensors of the encoder that adaptation changed, tensors with a gradient, and images of old domains whose logits changed."""

    changed_tensors: int
    tensors: int
    with_gradient: int
    changed_logits: int
    compared_logits: int


def check_frozen(*, seed: int, images: int, train_encoder: bool = False, share_adaptor: bool = False) -> FrozenCheck:
    """Adapt a randomly initialised encoder to three domains and compare bits.

    ``train_encoder`` fine-tunes the encoder too, ``share_adaptor`` gives all domains one adaptor: the controls.
    """
    torch.manual_seed(seed)
    network = SmallEncoder()
    encoder = FrozenEncoder(network, STAND_IN_CHANNELS)
    hd = HDSettings(dim=512, grid=2)
    settings = EARSettings(
        detector=hd,
        head=hd,
        train=TrainSettings(epochs=1, batch=64, lr=3e-3),
        architecture="conv/8-conv/8-conv/8-conv/8",
    )
    ear = EAR(encoder, classes=10, settings=settings, image_shape=(1, SIDE, SIDE))
    before = tensor_hashes(encoder)
    with_gradient = changed_logits = compared = 0
    probes, kept = [], []
    for k, domain in enumerate(DOMAINS):
        drawn, labels = glyphs.draw(glyphs.DIGITS, images, SIDE, 10 * seed + k)
        shown = shift(drawn, domain, seed + k)
        if train_encoder and k:
            with_gradient += _fine_tune(ear, encoder, shown, labels)
        taps = encoder.features(shown)
        ear.fit_features(taps, labels, domain)
        if share_adaptor and k:
            first = ear.domains[0].net.requires_grad_(True)
            train_net(first, taps, labels, settings.train, seed=k, start_classifier=False)
        probes.append(taps)
        fixed = torch.full((images,), k)
        kept.append(ear.predict_features(taps, domains=fixed).logits)
        for j in range(k):
            again = ear.predict_features(probes[j], domains=torch.full((images,), j)).logits
            changed_logits += int((again != kept[j]).any(1).sum())
            compared += images
        with_gradient += sum(p.grad is not None for p in encoder.parameters())
    after = tensor_hashes(encoder)
    changed = sum(before[name] != after[name] for name in before)
    return FrozenCheck(changed, len(before), with_gradient, changed_logits, compared)


def _fine_tune(ear: EAR, encoder: FrozenEncoder, images: torch.Tensor, labels: torch.Tensor) -> int:
    """A step of full fine-tuning; returns the tensors that got a gradient."""
    parameters = list(encoder.requires_grad_(True).parameters())
    loss = F.cross_entropy(ear.domains[-1].net(encoder(images)), labels)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                p -= 1e-2 * g
    encoder.requires_grad_(False)
    return sum(g is not None for g in grads)
