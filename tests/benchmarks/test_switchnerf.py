"""Hot paths on a CPU: the hash encode in its two CPU forms, training steps of the networks at reduced size, and ray casting.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from papers.switchnerf.arms import arm
from papers.switchnerf.city import City, build_city, cameras, cast, surface_samples
from papers.switchnerf.hashgrid import HashEncoding
from papers.switchnerf.hmohe import CONFIG_S
from papers.switchnerf.speed import encode_calls
from shared.measure import Ratio, measure

POINTS = 8192


def _record(benchmark: Any, name: str, ratio: Ratio) -> None:
    benchmark.extra_info[f"ratio: {name}"] = [ratio.low, ratio.median, ratio.high]


@pytest.mark.parametrize("backend", ["numba"])
def test_encode(benchmark: Any, backend: Any) -> None:
    encoding = HashEncoding(CONFIG_S.experts, backend)
    x, offsets = torch.rand(POINTS, 3), torch.linspace(0, POINTS, 5).long()
    grad = torch.randn(POINTS, encoding.width)

    def both() -> None:
        encoding.table.grad = None
        encoding(x, offsets).backward(grad)

    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    if not benchmark.disabled:
        calls, restore = encode_calls(POINTS)
        try:
            timings = measure(calls, rounds=7)
        finally:
            restore()
        _record(benchmark, f"{backend} / reference", timings.ratio(backend, "reference"))


@pytest.mark.parametrize("other", ["single", "mlp"])
def test_training_step(benchmark: Any, other: str) -> None:
    """Four hash experts against one (what routing costs: the work per point is the same) and against MLP experts (what hashing saves)."""
    x, direction, colour = (t[:POINTS] for t in surface_samples(build_city(0), 2 * POINTS, 0))

    def step_of(name: str) -> Callable[[], None]:
        field = arm(name).build()
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            out = field(x, direction)
            (F.mse_loss(out.colour, colour) + 5e-4 * out.balance).backward()
            optimizer.step()

        return step

    steps = {name: step_of(name) for name in ("hetero", other)}
    benchmark.pedantic(steps["hetero"], rounds=5, warmup_rounds=1)
    if not benchmark.disabled:
        timings = measure(steps, rounds=7, warmup=1)
        _record(benchmark, f"hetero / {other}", timings.ratio("hetero", other))


def test_ray_casting(benchmark: Any) -> None:
    """Lot by lot against all 131 boxes at once, and a city of 16 times as many boxes against the small one."""
    city, large = build_city(0), build_city(0, districts=8)
    views = {name: cameras(built, 16, 0, 32) for name, built in (("small", city), ("large", large))}
    rays = {name: [view.rays(0.0, 10.0) for view in found] for name, found in views.items()}
    origin, direction = (
        {name: torch.cat([getattr(r, field) for r in found]) for name, found in rays.items()}
        for field in ("origin", "direction")
    )
    calls: dict[str, Callable[[], object]] = {
        "lot by lot": lambda: cast(city, origin["small"], direction["small"]),
        "all boxes": lambda: _nearest_of_all(city, origin["small"], direction["small"]),
        "16 times the boxes": lambda: cast(large, origin["large"], direction["large"]),
    }
    benchmark.pedantic(calls["lot by lot"], rounds=3, warmup_rounds=1)
    if not benchmark.disabled:
        timings = measure(calls, rounds=7, warmup=1)
        _record(benchmark, "lot by lot / all boxes", timings.ratio("lot by lot", "all boxes"))
        _record(benchmark, "16 times the boxes / the small city", timings.ratio("16 times the boxes", "lot by lot"))


def _nearest_of_all(city: City, origin: Tensor, direction: Tensor) -> Tensor:
    """Depth of the nearest box, every ray against every box."""
    full = city.height.flatten() > 0
    low = F.pad(city.low.flatten(0, 1)[full], (0, 1))
    high = torch.cat([city.high.flatten(0, 1)[full], city.height.flatten()[full][:, None]], -1)
    inverse = 1.0 / direction[:, None]
    first, second = (low - origin[:, None]) * inverse, (high - origin[:, None]) * inverse
    near, far = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
    return torch.where((near < far) & (near > 0), near, torch.inf).amin(-1)
