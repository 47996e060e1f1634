"""Zero-shot search of an adaptor under a parameter budget: score candidates of one domain, keep the best."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from papers.ear.adaptors import Architecture, search_space
from papers.ear.hdc import HDSettings
from papers.ear.learner import Features, new_net, take
from papers.ear.scores import prepare, score
from shared.errors import UserError

PROXY_BATCH = 256


@dataclass(frozen=True)
class SearchSettings:
    """The search space, the band of parameters, how many candidates are drawn from it, and the score that ranks them."""

    reductions: tuple[float, ...] = (1 / 8, 1 / 2)
    min_params: int = 0
    max_params: int | None = None
    candidates: int = 40
    score: str = "ntk_cond"
    ntk_samples: int = 16


def draw_candidates(channels: Sequence[int], settings: SearchSettings, seed: int) -> list[Architecture]:
    """Architectures in the band, drawn without replacement (all of them if there are fewer).

    Raises:
        UserError: no architecture lies in the band.
    """
    space = search_space(len(channels), settings.reductions)
    top = settings.max_params if settings.max_params is not None else float("inf")
    band = [a for a in space if settings.min_params <= a.params(channels) <= top]
    if not band:
        sizes = [a.params(channels) for a in space]
        raise UserError(
            f"no adaptor has {settings.min_params} to {settings.max_params} parameters: they have {min(sizes)} to {max(sizes)}"
        )
    return random.Random(seed).sample(band, min(settings.candidates, len(band)))


def search(
    taps: Features,
    labels: Tensor,
    channels: Sequence[int],
    classes: int,
    hd: HDSettings,
    settings: SearchSettings,
    *,
    seed: int = 0,
) -> Architecture:
    """The candidate with the largest zero-shot score on the first images of a domain. Every candidate starts from the same seed."""
    batch = slice(0, PROXY_BATCH)
    taps, labels = take(taps, batch), labels[batch]

    def value(architecture: Architecture) -> float:
        net = prepare(new_net(architecture, channels, classes, hd, seed), taps, labels)
        return score(net, settings.score, taps, labels, samples=settings.ntk_samples, seed=seed)

    return max(draw_candidates(channels, settings, seed), key=value)
