"""What the timing scripts share: one run with its time limit, CUDA graphs, and the machine behind the numbers."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.calibrate.clock import graph_of
from shared.measure import Timings, measure


class Bench:
    """One run: device, time limit, results so far."""

    def __init__(self, out: Path, budget_s: float, smoke: bool) -> None:
        self.device, self.smoke, self.out = "cpu" if smoke else "cuda", smoke, out
        self.dtype = torch.float32 if smoke else torch.bfloat16
        self.end = time.monotonic() + budget_s
        self.results: dict[str, Any] = {"environment": environment(self.device)}

    def late(self) -> bool:
        """Whether the time limit has passed: what is left is left out."""
        return time.monotonic() > self.end

    def measure(
        self, functions: Mapping[str, Callable[[], object]], *, graph: bool = True, round_s: float = 0.025
    ) -> Timings:
        calls = {name: graphed(call) if graph and not self.smoke else call for name, call in functions.items()}
        return measure(
            calls,
            device=self.device,
            rounds=6,
            min_round_s=0.0 if self.smoke else round_s,
            warmup=1 if self.smoke else 2,
        )

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def tokens(self, count: int) -> int:
        return 16 if self.smoke else count


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and commit behind the numbers."""
    import triton

    from shared.runner.environment import environment as of_run

    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {"gpu": "none"}
    run = {key: of_run()[key] for key in ("cpu", "num_cores", "commit", "dirty")}
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {**gpu, **versions, **run}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` captured as a CUDA graph."""
    return graph_of(call, 1).replay


def relative(a: Tensor, b: Tensor) -> float:
    """Relative distance in norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())
