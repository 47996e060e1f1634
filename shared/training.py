"""The one trainer of the suite: seeded, resumable with a bit-identical result, small.

The loop knows nothing of data or models: a function of the step number computes the loss. Give it data that depends on the step alone
(shuffles drawn from the seed), and a run that was killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import copy
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shared.errors import UserError
from shared.files import set_aside, whole_file

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class FitResult:
    """What a training run left behind, besides the weights in the model."""

    losses: tuple[float, ...]  # one per step
    seconds: float  # time spent in steps, over all attempts that a checkpoint recorded
    notes: tuple[str, ...]  # a damaged checkpoint that was set aside


def warmup_poly(steps: int, warmup_steps: int = 0, power: float = 0.9) -> Callable[[int], float]:
    """Factor on the learning rate for ``LambdaLR``: linear from 1/warmup_steps to 1, then (1 − progress)**power down to 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return (1.0 - (step - warmup_steps) / max(steps - warmup_steps, 1)) ** power

    return factor


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    batch_loss: Callable[[int], Tensor],
    *,
    steps: int,
    seed: int,
    workdir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint_every_s: float = 30.0,
    clip_norm: float | None = None,
) -> FitResult:
    """Take ``steps`` steps on ``batch_loss(step)`` and leave the trained weights in ``model``, in training mode.

    The global random state starts from ``seed``. With ``workdir``, weights, optimiser, schedule and random state are saved there at most
    every ``checkpoint_every_s`` seconds and at the end, and a later call with the same arguments goes on from there. A checkpoint that
    cannot be read, or belongs to another run, is renamed to ``*.corrupt`` or ``*.other`` and training starts afresh, with a note.
    Raises UserError when the loss is not finite.
    """
    path = None if workdir is None else Path(workdir) / CHECKPOINT
    run = {"seed": seed, "steps": steps}
    losses: list[float] = []
    seconds = 0.0
    notes: list[str] = []
    torch.manual_seed(seed)
    if path is not None and path.exists():
        saved, note = _load(path, run)
        if saved is not None:
            start = copy.deepcopy(_state(model, optimizer, schedule))
            try:
                _restore(saved, model, optimizer, schedule)
                losses, seconds = saved["losses"].tolist(), saved["seconds"]
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # another model: may be half loaded
                note = _set_aside(path, "other", "belonged to another run")
                _restore(start, model, optimizer, schedule)
            del saved, start
        if note:
            notes.append(note)

    def save() -> None:
        if path is not None:
            record = {"losses": torch.tensor(losses, dtype=torch.float64), "seconds": seconds}
            _save(path, {**run, **record, **_state(model, optimizer, schedule)})

    model.train()
    first, last_saved = len(losses), time.monotonic()
    for step in range(first, steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {step} of {steps} (seed {seed}): lower the learning rate or the loss weights"
            )
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(value)
        seconds += time.perf_counter() - started
        if time.monotonic() - last_saved >= checkpoint_every_s and step + 1 < steps:
            save()
            last_saved = time.monotonic()
        if progress is not None:
            progress(step + 1, steps)
    if first < steps:
        save()
    return FitResult(tuple(losses), seconds, tuple(notes))


def _state(model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    return state


def _restore(state: dict[str, Any], model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def _save(path: Path, content: dict[str, Any]) -> None:
    """A kill leaves the old checkpoint or the new one."""
    with whole_file(path) as file:
        torch.save(content, file)


def _load(path: Path, run: dict[str, int]) -> tuple[dict[str, Any] | None, str]:
    """The checkpoint, or None and why it was set aside."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(path, weights_only=True)
    except Exception:  # torch raises many kinds on damaged files, and all of them mean the same here
        return None, _set_aside(path, "corrupt", "could not be read")
    if not isinstance(content, dict) or any(content.get(key) != value for key, value in run.items()):
        return None, _set_aside(path, "other", "belonged to another run")
    return content, ""


def _set_aside(path: Path, suffix: str, reason: str) -> str:
    aside = set_aside(path, suffix)
    return f"{path.name} {reason}: set aside as {aside.name}, training started afresh"
