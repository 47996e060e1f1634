"""The growth rule, the metrics of a sequence, and the rivals of EAR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.ear import continual
from papers.ear.continual import NearestMean, Replay, Ridge, StreamingLDA
from papers.ear.growth import GrowthRule, examine, false_growth_rate, route
from papers.ear.hdc import DomainMemory
from shared.errors import UserError


@pytest.mark.parametrize(("n", "limit"), [(20, 6), (50, 9), (100, 14), (2500, 161)])
def test_binomial_limits(n: int, limit: int) -> None:
    assert GrowthRule("binomial").limit(n) == limit


def test_other_rules() -> None:
    assert GrowthRule("half").limit(500) == 251
    assert GrowthRule("always").limit(500) == 0
    with pytest.raises(UserError, match="number of held-out images"):
        GrowthRule("calibrated").limit(500)
    with pytest.raises(UserError, match="unknown growth rule"):
        GrowthRule("never")


@given(st.integers(1, 800), st.integers(20, 2000))
@settings(max_examples=40, deadline=None)
def test_a_threshold_from_fewer_images_asks_for_more_failures(n: int, held_out: int) -> None:
    few, many = GrowthRule("calibrated").limit(n, held_out), GrowthRule("calibrated").limit(n, 20 * held_out)
    assert GrowthRule("binomial").limit(n) <= many + 1
    assert many <= few <= n + 1


def test_calibrated_rule_keeps_its_rate_where_the_binomial_does_not() -> None:
    """Thresholds from 100 uniform scores, windows of 500 uniform scores: the rate of false growths at alpha = 1 %."""
    rng = np.random.default_rng(0)
    held = rng.random((20_000, 100))
    thresholds = np.quantile(held, 0.05, axis=1)
    failures = rng.binomial(500, thresholds)
    rates = {
        rule: float((failures >= GrowthRule(rule, alpha=0.01).limit(500, 100)).mean())
        for rule in ("binomial", "calibrated")
    }
    assert rates["calibrated"] == pytest.approx(0.01, abs=0.005)
    assert rates["binomial"] > 0.1
    limit = GrowthRule("binomial", alpha=0.01).limit(500)
    assert false_growth_rate(limit, 500, 100) == pytest.approx(rates["binomial"], abs=0.01)
    assert false_growth_rate(limit, 500, 10**7) < 0.011  # with an exact threshold the binomial rate comes back


def _memory(direction: list[float], threshold: float, held_out: list[float]) -> DomainMemory:
    return DomainMemory(torch.tensor([direction]), torch.tensor([True]), threshold, torch.tensor(held_out))


def test_window_fails_only_where_every_domain_rejects() -> None:
    known = [_memory([1.0, 0.0], 0.9, [0.95] * 60), _memory([0.0, 1.0], 0.9, [0.95] * 60)]
    first, second, neither = [1.0, 0.0], [0.0, 1.0], [0.7, 0.7]
    q = torch.tensor([first] * 10 + [second] * 5 + [neither] * 3)
    report = examine(q, known, GrowthRule("binomial"))
    assert (report.failures, report.by_domain, report.grow) == (3, (10, 5), False)
    assert examine(torch.tensor([neither] * 18), known, GrowthRule("binomial")).grow
    assert route(q[:15], known).tolist() == [0] * 10 + [1] * 5


def test_standardised_routing_favours_the_tight_domain() -> None:
    tight, diffuse = _memory([1.0, 0.0], 0.0, [0.98, 0.99, 1.0]), _memory([0.0, 1.0], 0.0, [0.3, 0.5, 0.7])
    q = torch.tensor([[0.8, 0.6]])
    assert route(q, [tight, diffuse]).item() == 0
    assert route(q, [tight, diffuse], standardise=True).item() == 1


def test_metrics_of_a_sequence() -> None:
    matrix = [[0.9, 0.1], [0.6, 0.8]]
    assert continual.final_accuracy(matrix) == pytest.approx(0.70)
    assert continual.forgetting(matrix) == pytest.approx(0.30)
    assert continual.backward_transfer(matrix) == pytest.approx(-0.30)
    late_peak = [
        [0.5, 0, 0],
        [0.9, 0.5, 0],
        [0.7, 0.5, 0.5],
    ]  # forgetting counts from the peak, not from the first accuracy
    assert continual.forgetting(late_peak) == pytest.approx((0.2 + 0.0) / 2)
    assert continual.forgetting([[0.4]]) == 0


def _blobs(n: int = 240, classes: int = 4, dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    return centres[labels] + torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize("make", [NearestMean, StreamingLDA, Ridge])
def test_gradient_free_learners_do_not_depend_on_the_order(make: type) -> None:
    x, labels = _blobs()
    whole, parts = make(6, 5), make(6, 5)
    whole.learn(x, labels)
    for k in (3, 1, 0, 2):
        parts.learn(x[labels == k], labels[labels == k])
    assert torch.allclose(whole.logits(x), parts.logits(x), atol=1e-4)
    assert (whole.logits(x).argmax(1) == labels).float().mean() > 0.8
    assert (whole.logits(x).argmax(1) < 4).all()  # the class that was never seen never wins


def test_streaming_lda_is_scikit_learns() -> None:
    module = pytest.importorskip("sklearn.discriminant_analysis")
    x, labels = _blobs()
    ours = StreamingLDA(6, 4, shrinkage=0.0)
    ours.learn(x, labels)
    theirs = module.LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(x.numpy(), labels.numpy())
    assert (ours.logits(x).argmax(1).numpy() == theirs.predict(x.numpy())).all()


def test_ridge_is_the_normal_equation() -> None:
    x, labels = _blobs()
    ridge = Ridge(6, 4, penalty=0.1)
    ridge.learn(x, labels)
    level = 0.1 * float((x.T @ x).diagonal().mean())
    augmented = torch.cat([x, level**0.5 * torch.eye(6)])
    target = torch.cat([torch.nn.functional.one_hot(labels, 4).float(), torch.zeros(6, 4)])
    expected = x @ torch.linalg.lstsq(augmented, target).solution
    assert torch.allclose(ridge.logits(x), expected, atol=1e-4)


def test_reservoir_holds_equal_shares_of_all_tasks() -> None:
    replay = Replay(60, seed=0)
    for k in range(3):
        taps = [torch.full((100, 2, 1, 1), float(k))]
        mixed, labels = replay.mixed_with(taps, torch.full((100,), k))
        assert len(mixed[0]) == len(labels)
        assert (k == 0) == (len(labels) == 100)
        replay.store(taps, torch.full((100,), k))
    assert torch.bincount(replay.labels).tolist() == pytest.approx([20, 20, 20], abs=4)
    assert len(replay.labels) == 60
    assert torch.equal(replay.taps[0][:, 0, 0, 0].long(), replay.labels)


def test_expert_gate_sends_a_domain_to_its_own_autoencoder() -> None:
    generator = torch.Generator().manual_seed(0)

    def domain(seed: int) -> list[torch.Tensor]:
        basis = torch.randn(3, 24, generator=torch.Generator().manual_seed(seed))
        return [(torch.randn(300, 3, generator=generator) @ basis + 2 * basis[0])[:, :, None, None]]

    first, second = domain(1), domain(2)
    gates = [continual.gate(d, steps=120) for d in (first, second)]
    routes = continual.gate_route(gates, [torch.cat([first[0], second[0]])])
    truth = torch.arange(600) // 300
    assert (routes == truth).float().mean() > 0.9
