"""Metrics and losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.m3vit.losses import LOSS_WEIGHTS, task_loss, total_loss
from papers.m3vit.metrics import DepthRMSE, EdgeF, MeanIoU, NormalAngle, SaliencyIoU, delta_m, metric_for
from shared.errors import UserError

PASCAL = ("semseg", "normals", "parts", "sal", "edge")


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def logit(p: torch.Tensor) -> torch.Tensor:
    return (p / (1 - p)).log()


def test_mean_iou_by_hand() -> None:
    # class 0: 2 of union 3, class 1: 1 of union 2 (void pixel left out); class 2 occurs nowhere and does not count
    target = torch.tensor([[[0, 0, 1, 1, 255]]])
    predicted = torch.tensor([[[0, 0, 0, 1, 2]]])
    metric = MeanIoU(3)
    metric.update(one_hot(predicted, 3), target)
    assert metric.compute() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_mean_iou_pools_pixels_over_batches() -> None:
    metric = MeanIoU(2)
    metric.update(one_hot(torch.tensor([[[0, 0]]]), 2), torch.tensor([[[0, 0]]]))
    metric.update(one_hot(torch.tensor([[[0, 1]]]), 2), torch.tensor([[[1, 1]]]))
    assert metric.compute() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)  # a mean of the batches' values would differ


def test_saliency_takes_the_best_threshold_of_the_mean_over_images() -> None:
    # thresholds 0.20, 0.25, …, 0.90. Image 1: IoU 1 for thresholds in [0.3, 0.8), image 2: IoU 1 below 0.4, else 0.
    metric = SaliencyIoU()
    predictions = torch.tensor([[[[0.8, 0.3]]], [[[0.4, 0.1]]]])
    metric.update(logit(predictions), torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]]))
    assert metric.compute() == pytest.approx(100.0)
    metric.update(logit(torch.tensor([[[[0.1, 0.95]]]])), torch.tensor([[[[1.0, 0.0]]]]))
    assert metric.compute() == pytest.approx(100 * 2 / 3)


def test_saliency_of_an_empty_image() -> None:
    metric = SaliencyIoU()
    metric.update(torch.full((1, 1, 2, 2), -9.0), torch.zeros(1, 1, 2, 2))
    assert metric.compute() == pytest.approx(100.0)


def test_normal_angle_by_hand() -> None:
    metric = NormalAngle()
    target = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [255.0, 255.0, 255.0]])
    prediction = torch.tensor([[0.0, 0.0, 7.0], [3.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    metric.update(prediction.T.reshape(1, 3, 1, 3), target.T.reshape(1, 3, 1, 3))
    assert metric.compute() == pytest.approx(22.5, abs=1e-4)  # 0 and 45 degrees; the third is not labelled


def test_depth_rmse_pools_pixels() -> None:
    metric = DepthRMSE()
    metric.update(torch.tensor([[[[1.0, 2.0, 9.0]]]]), torch.tensor([[[[1.0, 4.0, 255.0]]]]))
    metric.update(torch.tensor([[[[0.0, 0.0, 0.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0, 1.0, 1.0]]]]))
    assert metric.compute() == pytest.approx(math.sqrt((4 + 4) / 6))


def test_edge_f_is_the_best_dataset_wide_threshold() -> None:
    target = torch.tensor([[[[1.0, 0.0, 1.0, 0.0]]]])
    probability = torch.tensor([[[[0.9, 0.5, 0.3, 0.1]]]])
    metric = EdgeF(tolerance=0)
    metric.update(logit(probability), target)
    assert metric.compute() == pytest.approx(100 * 0.8)  # at 0.3: precision 2/3, recall 1
    metric.update(logit(torch.tensor([[[[0.1, 0.9, 0.1, 0.1]]]])), torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]))
    # best now: at 0.3, 4 predicted, 2 right of 3 true: P 1/2, R 2/3, F 4/7; at 0.1: 8 predicted, P 3/8, R 1, F 6/11
    assert metric.compute() == pytest.approx(100 * 4 / 7)


def test_edge_tolerance_forgives_one_pixel() -> None:
    target = torch.zeros(1, 1, 5, 5)
    target[..., 2] = 1
    for shift, expected in [(0, 100.0), (1, 100.0), (2, 0.0)]:
        metric = EdgeF(tolerance=1)
        metric.update(torch.where(target.roll(shift, -1) > 0, 9.0, -9.0), target)
        assert metric.compute() == pytest.approx(expected, abs=1e-6)


def test_metrics_of_nothing_are_errors() -> None:
    for task in ("semseg", "sal", "normals", "depth", "edge"):
        with pytest.raises(UserError, match="label"):
            metric_for(task, 7).compute()
    with pytest.raises(UserError, match="semseg"):
        metric_for("semsg", 7)


@pytest.mark.parametrize(
    ("values", "baseline", "expected"),
    [
        ((72.8, 14.5, 62.1, 66.3, 71.7), (66.2, 13.9, 59.9, 66.3, 68.8), 2.708),  # M²ViT, PASCAL
        ((70.7, 15.5, 58.7, 64.9, 68.8), (66.2, 13.9, 59.9, 66.3, 68.8), -1.766),  # M-ViT
        ((66.1, 13.9, 60.6, 66.8, 69.9), (66.2, 13.9, 59.9, 66.3, 68.8), 0.674),  # Cross-Stitch
        ((45.6, 0.589), (43.9, 0.585), 1.594),  # M²ViT, NYUD
        ((40.9, 0.631), (43.9, 0.585), -7.348),  # M-ViT
        ((44.2, 0.570), (43.9, 0.585), 1.624),  # Cross-Stitch
    ],
)
def test_delta_m_of_the_published_rows(values: tuple[float, ...], baseline: tuple[float, ...], expected: float) -> None:
    tasks = PASCAL if len(values) == 5 else ("semseg", "depth")
    ours, theirs = dict(zip(tasks, values, strict=True)), dict(zip(tasks, baseline, strict=True))
    assert round(delta_m(ours, theirs), 3) == expected


@given(st.dictionaries(st.sampled_from(PASCAL), st.floats(1, 100), min_size=1))
def test_delta_m_of_the_baseline_is_zero(values: dict[str, float]) -> None:
    assert delta_m(values, values) == 0


# --- losses ----------------------------------------------------------------------------------------------------------


def test_loss_weights_of_the_paper() -> None:
    assert {"semseg": 1, "depth": 1, "parts": 2, "sal": 5, "normals": 10, "edge": 50}.items() <= LOSS_WEIGHTS.items()


def test_cross_entropy_ignores_void() -> None:
    prediction = torch.tensor([[[[0.0, 5.0]], [[math.log(3), -5.0]]]])  # p(class 1) = 3/4 at the first pixel
    assert task_loss("parts", prediction, torch.tensor([[[1, 255]]])) == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_depth_and_normal_losses_mask_and_normalise() -> None:
    depth = task_loss("depth", torch.tensor([[[[1.0, 7.0]]]]), torch.tensor([[[[3.0, 255.0]]]]))
    assert depth == pytest.approx(2.0)
    prediction = torch.tensor([0.0, 3.0, 4.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    target = torch.tensor([[0.0, 255.0], [0.0, 255.0], [1.0, 255.0]]).view(1, 3, 1, 2)
    assert task_loss("normals", prediction, target) == pytest.approx((0 + 0.6 + 0.2) / 3, rel=1e-6)


def test_edge_loss_weighs_positives_by_0_95() -> None:
    prediction = torch.zeros(1, 1, 1, 4)
    target = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    assert task_loss("edge", prediction, target) == pytest.approx((0.95 + 3 * 0.05) * math.log(2) / 4, rel=1e-6)


def test_saliency_loss_weighs_positives_by_the_share_of_negatives() -> None:
    prediction = torch.zeros(2, 1, 1, 2)
    target = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    assert task_loss("sal", prediction, target) == pytest.approx((0.75 + 3 * 0.25) * math.log(2) / 4, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(-30, 30), st.floats(0, 1))
def test_saliency_loss_equals_the_weighted_cross_entropy(scale: float, share: float) -> None:
    torch.manual_seed(0)
    prediction = scale * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    target = (torch.rand(2, 1, 4, 4, dtype=torch.float64) < share).double()
    weight = torch.where(target > 0, 1 - target.mean(), target.mean())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(prediction, target, weight)
    torch.testing.assert_close(task_loss("sal", prediction, target), expected)


def test_total_loss_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    predictions = {"depth": torch.randn(1, 1, 2, 2), "edge": torch.randn(1, 1, 2, 2)}
    targets = {"depth": torch.rand(1, 1, 2, 2), "edge": torch.ones(1, 1, 2, 2)}
    expected = task_loss("depth", predictions["depth"], targets["depth"]) + 50 * task_loss(
        "edge", predictions["edge"], targets["edge"]
    )
    torch.testing.assert_close(total_loss(predictions, targets), expected)
    heavier = total_loss(predictions, targets, {"edge": 0.0, "depth": 3.0})
    torch.testing.assert_close(heavier, 3 * task_loss("depth", predictions["depth"], targets["depth"]))
