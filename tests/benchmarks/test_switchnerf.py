"""Hot paths on a CPU: the hash encode in its two CPU forms, a training step of each network at reduced size, and ray casting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from papers.switchnerf.arms import arm
from papers.switchnerf.city import build_city, surface_samples
from papers.switchnerf.hashgrid import HashEncoding
from papers.switchnerf.hmohe import CONFIG_S
from papers.switchnerf.speed import encode_calls
from shared.measure import measure

POINTS = 8192


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_encode(benchmark: Any, backend: Any) -> None:
    encoding = HashEncoding(CONFIG_S.experts, backend)
    x, offsets = torch.rand(POINTS, 3), torch.linspace(0, POINTS, 5).long()
    grad = torch.randn(POINTS, encoding.width)

    def both() -> None:
        encoding.table.grad = None
        encoding(x, offsets).backward(grad)

    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    if backend == "numba" and not benchmark.disabled:
        calls, restore = encode_calls(POINTS)
        try:
            timings = measure(calls, rounds=7)
        finally:
            restore()
        benchmark.extra_info["ratio: numba / reference"] = timings.ratio("numba", "reference").median


@pytest.mark.parametrize("name", ["single", "hetero", "mlp"])
def test_training_step(benchmark: Any, name: str) -> None:
    field = arm(name).build()
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-3)
    x, direction, colour = (t[:POINTS] for t in surface_samples(build_city(0), 2 * POINTS, 0))

    def step() -> None:
        optimizer.zero_grad()
        out = field(x, direction)
        (F.mse_loss(out.colour, colour) + 5e-4 * out.balance).backward()
        optimizer.step()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_ray_casting(benchmark: Any) -> None:
    city = build_city(0)
    benchmark.pedantic(surface_samples, args=(city, 50_000, 0), rounds=3, warmup_rounds=1)
