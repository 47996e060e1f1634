"""When to grow and where to send an image: the binomial test on a window, thresholds, and routing by familiarity.

Under "no shift" an image fails a threshold set at the p-th percentile with probability p, so the number of failures in a window of n is
Binomial(n, p), and EAR grows when it exceeds the (1 - alpha) quantile. But the threshold is itself estimated, from few held-out images:
mixed over that error the count is beta-binomial, and only then is alpha kept. "More than half of the window" misses mild shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from scipy.stats import betabinom, binom
from torch import Tensor

from papers.ear.hdc import DomainMemory
from shared.errors import UserError, unknown

Rule = Literal["binomial", "calibrated", "half", "always"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True)
class GrowthRule:
    """``binomial``: the test with an exact threshold. ``calibrated``: the same with the error of a threshold that rests on ``held_out``
    images, whatever the distribution of scores. ``half``: more than half of the window. ``always``: grow at every window.
    """

    rule: str = "calibrated"
    fail_rate: float = 0.05
    alpha: float = 1e-3

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("growth rule", self.rule, RULES)
        if not 0 < self.fail_rate < 1 or not 0 < self.alpha < 1:
            raise UserError(f"fail_rate={self.fail_rate} and alpha={self.alpha} must lie between 0 and 1")

    def limit(self, n: int, held_out: int | None = None) -> int:
        """Failures in a window of ``n`` from which on EAR grows; one more than the window holds if it never can."""
        if n < 1:
            raise UserError("a window needs at least one image")
        if self.rule == "always":
            return 0
        if self.rule == "half":
            return n // 2 + 1
        if self.rule == "calibrated":
            if not held_out:
                raise UserError("the calibrated rule needs the number of held-out images behind the threshold")
            return int(_failures(n, held_out, self.fail_rate).ppf(1 - self.alpha)) + 1
        return int(binom.ppf(1 - self.alpha, n, self.fail_rate)) + 1


def _failures(n: int, held_out: int, fail_rate: float) -> Any:
    """The number of failures in a window without a shift: the threshold is the order statistic k of m held-out scores, and
    F(X_(k)) ~ Beta(k, m + 1 - k) for any continuous distribution F of scores.
    """
    k = fail_rate * (held_out - 1) + 1
    return betabinom(n, k, held_out + 1 - k)


def false_growth_rate(limit: int, n: int, held_out: int, fail_rate: float = 0.05) -> float:
    """Probability that a window of ``n`` images without a shift has ``limit`` failures or more, over the error of the threshold too."""
    return float(_failures(n, held_out, fail_rate).sf(limit - 1))


@dataclass(frozen=True)
class WindowReport:
    """What :meth:`EAR.observe` saw in a window."""

    failures: int
    limit: int
    window: int
    grow: bool
    by_domain: tuple[int, ...]  # images of the window that each known domain accepts


def examine(q: Tensor, memories: Sequence[DomainMemory], rule: GrowthRule) -> WindowReport:
    """Test a window of hypervectors against all known domains: an image fails when every domain rejects it."""
    scores = torch.stack([m.score(q) for m in memories], 1)
    accepted = scores >= torch.tensor([m.threshold for m in memories])
    failures = int((~accepted.any(1)).sum())
    limit = rule.limit(len(q), min(len(m.held_out) for m in memories))
    return WindowReport(failures, limit, len(q), failures >= limit, tuple(accepted.sum(0).tolist()))


def route(q: Tensor, memories: Sequence[DomainMemory], *, standardise: bool = False) -> Tensor:
    """Index of the most familiar domain of each image: argmax_d s_d(x), optionally as z-scores against held-out images."""
    scores = [((m.score(q) - m.mean) / m.std) if standardise else m.score(q) for m in memories]
    return torch.stack(scores, 1).argmax(1)
