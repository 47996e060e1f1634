"""Zero-shot scores against closed forms, and baselines of detection against independent implementations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from papers.ear import ood, scores
from papers.ear.adaptors import Architecture
from papers.ear.encoder import STAND_IN_CHANNELS
from papers.ear.hdc import HDSettings, hadamard_transform
from papers.ear.learner import AdaptorNet, new_net, take
from papers.ear.scores import SCORES, prepare, score
from shared.errors import UserError

SIDES = (7, 5, 3, 3)


def _taps(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, c, s, s, generator=generator) for c, s in zip(STAND_IN_CHANNELS, SIDES, strict=True)]


def _net(text: str = "conv/8-id-dw/2-lin/8") -> tuple[AdaptorNet, list[torch.Tensor], torch.Tensor]:
    taps, labels = _taps(128), torch.arange(128) % 10
    net = new_net(Architecture.parse(text), STAND_IN_CHANNELS, 10, HDSettings(dim=128, grid=2), seed=0)
    return prepare(net, taps, labels), taps, labels


def test_synflow_of_a_chain_is_layers_times_output() -> None:
    chain = nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )
    positive = copy.deepcopy(chain).double()
    with torch.no_grad():
        for p in positive.parameters():
            p.abs_()
        output = positive(torch.ones(1, 5, dtype=torch.float64)).sum()
    assert float(scores.synflow(chain, [torch.zeros(2, 5)])) == pytest.approx(3 * float(output), rel=1e-12)


def test_jacob_cov_closed_forms() -> None:
    same = torch.randn(1, 40, dtype=torch.float64).expand(256, 40)
    assert scores.jacob_cov(same) == pytest.approx(-2.5497e7, rel=1e-4)
    signs = hadamard_transform(torch.eye(512, dtype=torch.float64))[
        1:257
    ]  # rows of mean zero, orthogonal: no correlation
    assert scores.jacob_cov(signs) == pytest.approx(-256.0, rel=1e-4)


def test_condition_of_a_linear_kernel_is_that_of_the_gram() -> None:
    x = torch.randn(6, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(x) ** 2
    assert scores.log_condition(x @ x.T) == pytest.approx(float(torch.log(values[0] / values[-1])), rel=1e-9)


def test_tangent_kernel_is_the_product_of_per_image_gradients() -> None:
    net, taps, _ = _net()
    kernel = scores.ntk(net, take(taps, slice(0, 5)), seed=3)
    v = torch.randn(128, generator=torch.Generator().manual_seed(3))
    rows = []
    for i in range(5):
        value = F.normalize(net.embed(take(taps, slice(i, i + 1))), dim=1) @ v
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), list(net.adaptor.parameters()))]))
    jacobian = torch.stack(rows)
    assert torch.allclose(kernel, jacobian @ jacobian.T, rtol=1e-3, atol=1e-4)


def test_spectrum_scores() -> None:
    flat = torch.ones(9, dtype=torch.float64)
    assert scores.entropy_rank(flat) == pytest.approx(9)
    assert scores.power_law_slope(1 / torch.arange(1, 30, dtype=torch.float64) ** 2) == pytest.approx(-2)
    labels = torch.arange(12) % 3
    assert scores.kernel_alignment(F.one_hot(labels).float(), labels) == pytest.approx(1.0)


def test_zico_worked_by_hand() -> None:
    first, second = [torch.tensor([1.0, 2.0, 5.0])], [torch.tensor([3.0, -2.0, 5.0])]
    # weight 0: mean|g| 2, std 1; weight 1: mean|g| 2, std 2; weight 2 has no spread
    assert scores.zico([first, second]) == pytest.approx(float(torch.log(torch.tensor(2.0 + 1.0))))


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_finite_and_repeatable(name: str) -> None:
    net, taps, labels = _net()
    value = score(net, name, taps, labels, samples=6)
    assert value == score(net, name, taps, labels, samples=6)
    assert value == value
    assert abs(value) < 1e12


def test_gradient_scores_of_an_adaptor_without_convolutions() -> None:
    net, taps, labels = _net("id-id-skip-id")
    assert score(net, "snip", taps, labels) == 0
    with pytest.raises(UserError, match="unknown score"):
        score(net, "fisher", taps, labels)


# --- detection ---


def test_auroc_of_equal_separated_and_mixed_scores() -> None:
    same = torch.tensor([1.0, 2.0, 3.0])
    assert ood.auroc(same, same) == 0.5
    assert ood.auroc(same, same + 10) == 1.0
    assert ood.auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert ood.fpr_at_tpr(same, same + 10) == 0.0
    assert ood.fpr_at_tpr(same + 10, same) == 1.0


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=30), st.lists(st.integers(-50, 50), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_auroc_is_symmetric_and_invariant_to_monotone_maps(a: list[int], b: list[int]) -> None:
    x, y = torch.tensor(a).double(), torch.tensor(b).double()
    value = ood.auroc(x, y)
    assert ood.auroc(torch.exp(x / 20), torch.exp(y / 20)) == pytest.approx(value)
    assert ood.auroc(-x, -y) == pytest.approx(1 - value)
    assert ood.auroc(y, x) == pytest.approx(1 - value)


def test_auroc_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = torch.randn(80).round(decimals=1), (torch.randn(60) + 0.5).round(decimals=1)
    truth = [0] * 80 + [1] * 60
    assert ood.auroc(x, y) == pytest.approx(metrics.roc_auc_score(truth, torch.cat([x, y]).numpy()))


def test_logit_scores_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    e2 = float(torch.exp(torch.tensor(2.0)))
    assert ood.msp(logits).tolist() == pytest.approx([-e2 / (1 + e2), -0.5])
    assert ood.max_logit(logits).tolist() == [-2.0, 0.0]
    assert ood.energy(logits).tolist() == pytest.approx([-float(torch.log(torch.tensor(1 + e2))), -0.693147], abs=1e-5)


def test_odin_moves_the_input_to_more_certainty() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = lambda x: x @ weight.T  # noqa: E731
    images = torch.tensor([[2.0, 1.0]])
    still = ood.odin(model, images, temperature=1.0, epsilon=0.0)
    moved = ood.odin(model, images, temperature=1.0, epsilon=0.5)
    # the step raises the winner and lowers the loser by 0.5 each: the margin of 1 becomes 2
    assert float(still) == pytest.approx(-1 / (1 + float(torch.exp(torch.tensor(-1.0)))))
    assert float(moved) == pytest.approx(-1 / (1 + float(torch.exp(torch.tensor(-2.0)))))


def test_mahalanobis_is_scipys() -> None:
    from scipy.spatial.distance import mahalanobis

    generator = torch.Generator().manual_seed(0)
    tap = torch.randn(60, 4, 1, 1, generator=generator)
    labels = torch.arange(60) % 2
    found = ood.Mahalanobis([tap], labels, 3, ridge=0.0)([tap[:5]])
    x = tap[:, :, 0, 0].double()
    means = [x[labels == k].mean(0) for k in (0, 1)]
    centred = torch.cat([x[labels == k] - means[k] for k in (0, 1)])
    inverse = torch.linalg.inv(centred.T @ centred / 60).numpy()
    expected = [min(mahalanobis(v, m, inverse) ** 2 for m in means) for v in x[:5]]
    assert found.tolist() == pytest.approx(expected, rel=1e-8)


def test_knn_distance_and_its_limits() -> None:
    bank = [torch.eye(4)[:, :, None, None]]
    detector = ood.KNN(bank, k=2)
    assert float(detector([torch.eye(4)[:1, :, None, None]])) == pytest.approx(2**0.5, abs=1e-5)
    with pytest.raises(UserError, match="must lie between"):
        ood.KNN(bank, k=5)


def test_pytorch_ood_agrees() -> None:
    detectors = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")
    logits = torch.randn(30, 7)
    assert torch.allclose(detectors.MaxSoftmax.score(logits), ood.msp(logits), atol=1e-6)
    assert torch.allclose(detectors.EnergyBased.score(logits), ood.energy(logits), atol=1e-5)
    known, new = torch.randn(400, 6), torch.randn(50, 6)
    labels = torch.arange(400) % 5
    bank, queries = [known[:, :, None, None]], [new[:, :, None, None]]
    theirs = detectors.Mahalanobis(None).fit_features(known, labels).predict_features(new)
    ours = ood.Mahalanobis(bank, labels, 5, ridge=0.0)(queries)
    # Theirs is half the squared distance, under a covariance summed over the 400 vectors.
    assert torch.allclose(2 * 400 * theirs.double(), ours, rtol=1e-3)
    theirs = detectors.KNN(None, k=3).fit_features(known, labels).predict_features(new)
    assert torch.allclose(torch.as_tensor(theirs).float(), ood.KNN(bank, k=3)(queries), atol=1e-5)
