"""The trainer: reproducible, resumable with the same result, honest about damage and divergence."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.training import CHECKPOINT, FitResult, fit, warmup_poly


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


def small_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


def run(
    workdir: Path | None,
    steps: int = 12,
    kill_at: int | None = None,
    seed: int = 3,
    lr: float = 1e-2,
    checkpoint_every_s: float = 0.0,
    spoil_at: int | None = None,
) -> tuple[nn.Module, FitResult, list[int]]:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_poly(steps, warmup_steps=3))
    seen: list[int] = []

    def loss(step: int) -> Tensor:
        if step == kill_at:
            raise Killed
        seen.append(step)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        value = (model(x) - x[:, :2]).square().mean()  # dropout draws from the global stream
        return value * float("nan") if step == spoil_at else value

    result = fit(
        model,
        optimizer,
        schedule,
        loss,
        steps=steps,
        seed=seed,
        workdir=workdir,
        checkpoint_every_s=checkpoint_every_s,
        clip_norm=1.0,
    )
    return model, result, seen


def assert_same_weights(one: nn.Module, two: nn.Module) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_same_seed_same_bits() -> None:
    one, first, _ = run(None)
    two, second, _ = run(None)
    assert_same_weights(one, two)
    assert first.losses == second.losses
    assert run(None, seed=4)[1].losses != first.losses


@pytest.mark.parametrize("kill_at", [1, 5, 11])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, kill_at: int) -> None:
    whole, expected, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=kill_at)
    torch.randn(5)  # whatever else happened to the random state
    resumed, result, seen = run(tmp_path)
    assert seen == list(range(kill_at, 12))
    assert_same_weights(whole, resumed)
    assert result.losses == expected.losses
    assert result.notes == ()


def test_the_checkpoint_that_a_kill_leaves_may_lie_further_back(tmp_path: Path) -> None:
    whole, _, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=4)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=9, checkpoint_every_s=3600.0)  # writes none: resumes from step 4 again
    resumed, _, seen = run(tmp_path)
    assert seen[0] == 4
    assert_same_weights(whole, resumed)


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first, result, _ = run(tmp_path, checkpoint_every_s=3600.0)
    again, repeated, seen = run(tmp_path)
    assert seen == []
    assert repeated.losses == result.losses
    assert repeated.seconds >= result.seconds > 0
    assert_same_weights(first, again)


def test_no_temporary_files_stay(tmp_path: Path) -> None:
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no checkpoint at all"]
)
def test_a_damaged_checkpoint_is_set_aside(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole, _, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=6)
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    model, result, seen = run(tmp_path)
    assert seen[0] == 0
    assert "corrupt" in result.notes[0]
    assert (tmp_path / (CHECKPOINT + ".corrupt")).exists()
    assert_same_weights(whole, model)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_checkpoint_with_flipped_bits_changes_nothing(tmp_path: Path, share: float) -> None:
    whole, _, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=6)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    start = int(share * len(content))
    content[start : start + 100] = bytes(byte ^ 0x10 for byte in content[start : start + 100])
    path.write_bytes(bytes(content))
    model, _, _ = run(tmp_path)
    assert_same_weights(whole, model)


def test_a_checkpoint_of_another_model_is_not_used(tmp_path: Path) -> None:
    expected, _, _ = run(None)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=6)
    path = tmp_path / CHECKPOINT
    saved = torch.load(path, weights_only=True)
    saved["model"]["0.weight"] += 1.0  # loads first, and must be undone when the rest does not fit
    saved["model"]["4.weight"] = torch.zeros(3, 16)
    torch.save(saved, path)
    model, result, seen = run(tmp_path)
    assert seen[0] == 0
    assert "another run" in result.notes[0]
    assert_same_weights(expected, model)


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, kill_at=6)
    expected, _, _ = run(None, seed=9)
    model, result, seen = run(tmp_path, seed=9)
    assert seen[0] == 0
    assert "another run" in result.notes[0]
    assert_same_weights(expected, model)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_is_data_not_code(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / CHECKPOINT)
    _, result, seen = run(tmp_path)
    assert seen[0] == 0
    assert result.notes
    assert not (tmp_path / "sprung").exists()


def test_seconds_add_up_over_steps_and_attempts(tmp_path: Path) -> None:
    def nap(kill_at: int | None) -> FitResult:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

        def loss(step: int) -> Tensor:
            if step == kill_at:
                raise Killed
            time.sleep(0.01)
            return model(torch.ones(1, 1)).sum()

        return fit(model, optimizer, schedule, loss, steps=6, seed=0, workdir=tmp_path, checkpoint_every_s=0.0)

    with pytest.raises(Killed):
        nap(kill_at=4)
    assert nap(kill_at=None).seconds >= 0.06


def test_a_loss_that_is_not_finite_names_step_and_seed() -> None:
    with pytest.raises(UserError, match=r"step 4 .*seed 3"):
        run(None, spoil_at=4)


def test_gradients_are_clipped() -> None:
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    fit(model, optimizer, schedule, lambda step: (model.weight * 30.0).sum(), steps=1, seed=0, clip_norm=2.0)
    torch.testing.assert_close(model.weight.norm(), torch.tensor(2.0))


def test_schedule_by_hand() -> None:
    factor = warmup_poly(10, warmup_steps=4, power=0.9)
    assert [factor(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1 * 0.7**0.9 / 0.7**0.9])
    assert factor(4) == pytest.approx(1.0)
    assert factor(7) == pytest.approx(0.5**0.9)
    assert factor(10) == 0.0


def test_progress_reports_every_step() -> None:
    seen: list[tuple[int, int]] = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    fit(
        model,
        optimizer,
        schedule,
        lambda step: model(torch.ones(1, 1)).sum(),
        steps=3,
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
