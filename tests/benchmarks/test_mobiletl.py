"""Hot paths of MobileTL on a CPU: the fused norm and activation, the bit packing, a whole training step, the accounting.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from papers.mobiletl import adapt, parameter_groups
from papers.mobiletl.accounting import stored_bytes
from papers.mobiletl.counts import roles, trace_layers
from papers.mobiletl.functional import pack_bits, shift_act
from papers.mobiletl.models import create
from shared.measure import measure

MAP = (8, 576, 7, 7)  # of the block of Fig. 1


def test_fused_norm_and_activation(benchmark: Any) -> None:
    """Forward and backward against torch's trained batch norm and Hard-Swish; fewer passes over the map, so it must win.

    It takes about three quarters of the time. What hid that: in a process that has only seen maps of this size, the C library gives
    memory back after each call, to whichever function's order of allocations happens to trigger it; and 11 rounds of 20 ms are a few
    time slices each, with the second largest as the upper limit of the interval, so two interrupted rounds decided. Longer and more
    rounds average the interruptions and keep the limit.
    """
    torch.empty(2**23).fill_(0.0)  # freed at once: from here on memory of this size is kept, as in a training process
    x, dy = torch.randn(MAP, requires_grad=True), torch.randn(MAP)
    weight, bias, mean, var = (torch.rand(MAP[1]) + 0.5 for _ in range(4))
    weight.requires_grad_(), bias.requires_grad_()
    constant = weight.detach()

    def plain() -> None:
        y = F.hardswish(F.batch_norm(x, mean, var, weight, bias, training=True))
        torch.autograd.grad(y, (x, weight, bias), dy)

    def fused() -> None:
        torch.autograd.grad(shift_act(x, constant, bias, mean, var, 1e-5, "hard_swish"), (x, bias), dy)

    ratio = measure({"plain": plain, "fused": fused}, rounds=21, min_round_s=0.1).ratio("fused", "plain")
    benchmark.extra_info["ratio: fused / plain"] = ratio.median
    benchmark(fused)
    assert ratio.high < 1.0


def test_packing(benchmark: Any) -> None:
    """NumPy's packing of a mask against the same in torch operators."""
    bits = torch.randn(MAP) >= 0
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

    def operators() -> torch.Tensor:
        return (bits.view(-1, 8).to(torch.uint8) * weights).sum(1, dtype=torch.uint8)

    assert torch.equal(operators(), pack_bits(bits))
    ratio = measure({"numpy": lambda: pack_bits(bits), "torch": operators}, rounds=11).ratio("numpy", "torch")
    benchmark.extra_info["ratio: numpy / torch"] = ratio.median
    benchmark(pack_bits, bits)
    assert ratio.high < 0.5


def _step(method: str, **options: Any) -> Callable[[], None]:
    model = adapt(create("mbv3_small"), method, 5, **options).train()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-4))
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(0, 10, (8,))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def test_training_step(benchmark: Any) -> None:
    """MobileTL-5, and its recomputing variant, against FT-5BLKs on the same frozen int8 part; MobileNetV3-Small, 224, batch 8."""
    steps = {"ft": _step("ft_blocks"), "mobiletl": _step("mobiletl"), "recompute": _step("mobiletl", recompute=True)}
    timings = measure(steps, rounds=9, min_round_s=0.0, warmup=2)
    for name in ("mobiletl", "recompute"):
        benchmark.extra_info[f"ratio: {name} / ft"] = timings.ratio(name, "ft").median
    benchmark.pedantic(steps["mobiletl"], rounds=3)
    assert timings.ratio("mobiletl", "ft").low < 1.0


def test_accounting_of_a_network(benchmark: Any) -> None:
    """Tracing MobileNetV2 on the meta device and counting one way of transfer."""
    with torch.device("meta"):
        model = create("mbv2")

    def count() -> int:
        layers = trace_layers(model, (8, 3, 224, 224))
        return stored_bytes(layers, roles(model, layers, "mobiletl", 5))

    assert benchmark(count) == 27_960_256
    images = torch.empty(8, 3, 224, 224, device="meta")
    timings = measure({"counting": count, "forward": lambda: model(images)}, rounds=6, min_round_s=0.0, warmup=1)
    benchmark.extra_info["ratio: counting / meta forward"] = timings.ratio("counting", "forward").median
