"""Read-outs, losses, retrieval and baselines against closed forms and automatic differentiation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from papers.lsm.baselines import (
    SRNN,
    SURROGATE_WIDTH,
    LinearOutput,
    PlainRNN,
    Scan,
    Training,
    classifier,
    epochs_run,
    tune,
)
from papers.lsm.encoder import Liquid
from papers.lsm.pairing_jobs import _selected, permutations
from papers.lsm.readout import logistic, ridge, split_features
from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import (
    Aligned,
    AlignSettings,
    Modality,
    align,
    all_pairs,
    all_windows,
    contrastive,
    label_targets,
    retrieval,
)
from shared.errors import UserError

# --- losses ---


def test_identical_embeddings_give_the_log_of_the_batch_size() -> None:
    a = torch.ones(7, 5)
    labels = torch.arange(7)
    assert float(contrastive(a, a, labels, tau=0.1, loss="hard")) == pytest.approx(math.log(7), rel=1e-5)
    assert float(contrastive(a, a, labels, tau=0.1, loss="labels")) == pytest.approx(math.log(7), rel=1e-5)


def test_the_label_aware_loss_is_bounded_by_the_entropy_of_its_targets() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    entropy = (3 * math.log(3) + 2 * math.log(2)) / 6  # rows of weights 1/3, 1/2, 1
    targets = label_targets(labels)
    assert float(-(targets * targets.clamp(min=1e-9).log()).sum(1).mean()) == pytest.approx(entropy, rel=1e-5)
    perfect = torch.eye(3)[labels]
    assert float(contrastive(perfect, perfect, labels, tau=0.01)) == pytest.approx(entropy, rel=1e-4)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        assert (
            float(contrastive(torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g), labels, tau=0.1))
            >= entropy
        )


def test_the_soft_loss_has_a_trivial_point_without_gradient() -> None:
    a, v = torch.zeros(9, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    loss = contrastive(a, v, torch.arange(9), tau=1.0, loss="soft")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(9), rel=1e-5)
    assert not a.grad.any()  # type: ignore[union-attr]
    assert not v.grad.any()  # type: ignore[union-attr]


def test_prototypes_are_means_over_both_modalities() -> None:
    # Support 0.5 and 1.5 of class 0 (mean 1), 3 and 5 of class 1 (mean 4); queries 1 and 4 in both modalities.
    a = torch.tensor([[0.5], [3.0], [1.0], [4.0]])
    v = torch.tensor([[1.5], [5.0], [1.0], [4.0]])
    loss = contrastive(a, v, torch.tensor([0, 1, 0, 1]), tau=1.0, loss="prototypes")
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-9)), rel=1e-3)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match="loss 'labls'"):
        contrastive(torch.ones(2, 2), torch.ones(2, 2), torch.arange(2), tau=1.0, loss="labls")


def test_retrieval_takes_the_nearest_by_cosine() -> None:
    queries = torch.tensor([[2.0, 0.1], [0.1, 3.0]])
    gallery = torch.tensor([[0.0, 9.0], [5.0, 0.0]])
    assert float(retrieval(queries, gallery, torch.tensor([0, 1]))) == 0.0
    assert float(retrieval(queries, gallery.flip(0), torch.tensor([0, 1]))) == 1.0
    assert float(retrieval(queries, gallery, torch.tensor([0, 0]))) == 1.0


# --- the protocol ---


def test_the_protocol_covers_every_pair_and_every_window() -> None:
    assert len(all_pairs()) == 36
    assert len(set(all_pairs())) == 36
    windows = all_windows()
    assert len(windows) == 23
    assert windows[18] == (18, 19, 20, 21)


def test_permutations_leave_the_identity_out() -> None:
    found = permutations(3, 40, 0)
    assert all(sorted(order) == [0, 1, 2] and order != [0, 1, 2] for order in found)
    assert permutations(9, 3, 1) == permutations(9, 3, 1)


def _toy(noise: float, seed: int, shift: bool = False) -> tuple[Modality, Modality]:
    """Two modalities whose features are a shared class vector, each through a matrix of its own."""
    g = torch.Generator().manual_seed(seed)
    code = torch.randn(6, 8, generator=g)
    sides = []
    for _ in range(2):
        mix = torch.randn(8, 20, generator=g)
        x = (code[:, None] + noise * torch.randn(6, 16, 8, generator=g)) @ mix
        sides.append(Modality(x[:, :8], x[:, 8:12], x[:, 12:]))
    return sides[0], sides[1]


def test_heads_learn_what_the_modalities_share_and_problems_are_independent() -> None:
    audio, image = _toy(0.1, 0)
    settings = AlignSettings(dim=16, epochs=25, batch=32, lr=1e-2)
    problems: list[tuple[int, ...]] = [(0, 1), (2, 3), (4, 5)]
    found = align(audio, image, problems, settings, seed=0)
    assert found.test_seen.shape == (25, 3)
    assert float(found.test_seen[-1].min()) == 1.0
    assert torch.equal(align(audio, image, problems, settings, 0).test_unseen, found.test_unseen)


def test_unseen_classes_never_reach_training() -> None:
    audio, image = _toy(0.3, 1)
    settings = AlignSettings(dim=8, epochs=3, batch=16)
    before = align(audio, image, [(0, 1)], settings, 0)
    spoilt = Modality(audio.train.clone(), audio.val.clone(), audio.test)
    spoilt.train[:2] = 1e3
    spoilt.val[:2] = -1e3
    after = align(spoilt, image, [(0, 1)], settings, 0)
    assert torch.equal(before.test_unseen, after.test_unseen)
    assert torch.equal(before.val_seen, after.val_seen)


def test_selection_reads_validation_alone_and_reports_what_test_selection_would_claim() -> None:
    val = torch.tensor([[0.5, 0.9], [0.8, 0.7]])
    unseen = torch.tensor([[0.9, 0.3], [0.4, 0.6]])
    chosen = _selected([Aligned(val, val, unseen, unseen)])
    assert chosen["unseen"] == pytest.approx([0.4, 0.3])
    assert chosen["test_selected"] == pytest.approx([0.9, 0.6])
    assert chosen["last"] == pytest.approx([0.4, 0.6])


# --- read-outs ---


def _separable(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(120) % 3
    return torch.randn(120, 10, generator=g) + 6 * torch.eye(10)[labels], labels


def test_both_read_outs_solve_a_separable_task_and_neither_solves_noise() -> None:
    x, y = _separable(0)
    split = split_features(x, y, [60, 30, 30])
    assert ridge(split, 3).test == 1.0
    assert logistic(split, 3).test == 1.0
    noise = split_features(torch.randn(120, 10, generator=torch.Generator().manual_seed(1)), y, [60, 30, 30])
    assert ridge(noise, 3).test < 0.7


def test_ridge_is_the_least_squares_solution() -> None:
    from sklearn.linear_model import Ridge

    x, y = _separable(2)
    x = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    split = split_features(x, y, [60, 30, 30]).standardised()
    best = max(
        (
            Ridge(alpha=p).fit(split.train[0].numpy(), torch.eye(3)[split.train[1]].numpy())
            for p in (1.0, 10.0, 100.0, 1000.0)
        ),
        key=lambda m: (m.predict(split.val[0].numpy()).argmax(1) == split.val[1].numpy()).mean(),
    )
    expected = best.predict(split.test[0].numpy()).argmax(1)
    assert ridge(split_features(x, y, [60, 30, 30]), 3).predictions.tolist() == expected.tolist()


def test_silent_features_do_no_harm() -> None:
    x, y = _separable(4)
    split = split_features(torch.cat([x, torch.zeros(120, 5)], 1), y, [60, 30, 30])
    assert ridge(split, 3).test == 1.0


# --- baselines ---


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, u: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(u)  # type: ignore[attr-defined]
        ctx.threshold = threshold  # type: ignore[attr-defined]
        return (u > threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors  # type: ignore[attr-defined]
        near = (u - ctx.threshold).abs() < SURROGATE_WIDTH  # type: ignore[attr-defined]
        return grads[0] * near / (2 * SURROGATE_WIDTH), None


def test_the_scan_has_the_gradients_of_the_step_by_step_loop() -> None:
    g = torch.Generator().manual_seed(0)
    current = torch.randn(12, 3, 5, generator=g, dtype=torch.float64).requires_grad_()
    w = (0.5 * torch.randn(5, 5, generator=g, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(12, 3, 5, generator=g, dtype=torch.float64)
    u = s = torch.zeros(3, 5, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(12):
        u = 0.9 * u * (1 - s) + current[t] + s @ w
        s = _Spike.apply(u, 0.6)
        total = total + (weight[t] * s).sum()
    expected = torch.autograd.grad(total, (current, w))
    found = torch.autograd.grad((weight * Scan.apply(current, w, 0.9, 0.6)).sum(), (current, w))
    assert expected[1].abs().sum() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_compiled_scan_has_the_spikes_and_gradients_of_the_torch_loop() -> None:
    pytest.importorskip("numba")
    g = torch.Generator().manual_seed(1)
    x = (torch.rand(30, 4, 12, generator=g) < 0.3).to(torch.uint8)
    w_in, w_rec = 0.2 * torch.randn(12, 20, generator=g), 0.1 * torch.randn(20, 20, generator=g)
    weight = torch.randn(30, 4, 20, generator=g)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        a, b = (w.to(dtype).requires_grad_() for w in (w_in, w_rec))
        spikes = Scan.apply(x.to(dtype) @ a, b, 0.9, 0.3)  # float64 is not compiled
        return [spikes.detach(), *torch.autograd.grad((weight.to(dtype) * spikes).sum(), (a, b))]

    assert 0.05 < float(gradients(torch.float32)[0].mean()) < 0.6
    for a, b in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_the_elman_scan_has_the_gradients_of_torchs_rnn() -> None:
    torch.manual_seed(0)
    model = PlainRNN(6, 9, 3, steps=11).double()
    x = torch.randn(5, 14, 6, dtype=torch.float64)
    weight = torch.randn(5, 3, dtype=torch.float64)
    ours = torch.autograd.grad((weight * model(x)).sum(), list(model.parameters()))
    last = model.rnn(x[:, :11])[0][:, -1]
    theirs = torch.autograd.grad((weight * model.head(last)).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_an_untrained_spiking_network_is_the_liquid() -> None:
    body = SRNN(30, 20, decay=0.9, v_th=5.0, const=0.25, seed=3)  # const is a power of two: exact
    x = (torch.rand(4, 25, 30, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.uint8)
    counts = Liquid.of(gaussian(30, 20, 3), decay=0.9, v_th=5.0, const=0.25).encode(x)
    assert counts.sum() > 0
    torch.testing.assert_close(body.spikes(x).sum(0), counts.float())


def test_training_selects_on_validation_and_learns() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = (torch.rand(90, 10, 12, generator=g) < 0.05 + 0.4 * torch.eye(12)[y][:, None]).to(torch.uint8)
    parts = ((x[:50], y[:50]), (x[50:70], y[50:70]), (x[70:], y[70:]))
    torch.manual_seed(0)
    model = LinearOutput(SRNN(12, 16, decay=0.9, v_th=0.3, const=0.03, seed=0), 3)
    training = classifier(model, parts, batch=16, lr=1e-2, seed=0)
    training.run(5)
    early = training.best["val"]
    training.run(10)
    assert training.best["test"] > 0.6
    assert training.best["val"] >= early
    assert 1 <= training.best["epoch"] <= 15


def test_tuning_goes_on_with_the_learning_rate_that_validation_prefers() -> None:
    done = []

    def make(rate: float) -> Training:
        weight = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(weight.weight, 1.0)
        return Training(
            weight,
            4,
            lambda chosen: weight(torch.ones(len(chosen), 1)).square().mean(),  # pulls the weight to zero
            lambda: float(1 - weight.weight.detach().abs()),
            lambda: {"test": 0.0},
            batch=4,
            lr=rate,
            seed=0,
        )

    rates = [1e-4, 5e-2]
    found = tune(make, rates, 3, 8, lambda: done.append(1))
    assert found["lr"] == 5e-2
    assert found["epoch"] == 8
    assert found["val"] == pytest.approx(
        8 * 5e-2, rel=0.1
    )  # Adam moves by its rate at every step, from where the trial ended
    assert len(done) == epochs_run(rates, 3, 8) == 2 * 3 + 5
    assert epochs_run([1.0], 4, 1) == 1


# --- jobs ---


def test_supervised_job_reads_its_data_and_silence_is_chance(tmp_path: Path) -> None:
    from papers.lsm.jobs import data_job, supervised_job

    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()

    def quiet(done: int, total: int) -> None:
        assert done <= total

    made = data_job(seed=0, name="order", size=8, root=None, workdir=tmp_path / "data", progress=quiet)
    options = {"decay": 0.97, "v_th": 5.3, "neurons": 40, "formed": 0.85, "read_noise": 0.02, "recurrent": True}
    sizes = [40, 20, 20]

    def run(gain: float) -> dict[str, dict[str, dict[str, float]]]:
        liquid = {**options, "gain": gain}
        found = supervised_job(
            seed=0,
            data=made["data"],
            sizes=sizes,
            liquid=liquid,
            consts=[0.08],
            workdir=tmp_path / "work",
            progress=quiet,
        )
        return found["arms"]

    loud, silent = run(1.0), run(1e-3)
    assert set(loud) == {"raw counts", "liquid", "no recurrence", "formed cells", "formed cells, read noise"}
    assert loud["liquid"]["ridge"]["test"] > 0.3
    assert silent["liquid"]["rate"] == 0.0
    assert silent["liquid"]["ridge"]["test"] <= 0.3
    assert loud["raw counts"]["ridge"] == silent["raw counts"]["ridge"]
