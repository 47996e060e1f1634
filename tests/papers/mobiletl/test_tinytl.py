"""TinyTL's lite residuals: shapes, a start that changes nothing, what trains, and their place in the accountings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from papers.mobiletl import adapt
from papers.mobiletl.anatomy import anatomy
from papers.mobiletl.counts import roles, trace_layers, trained_parameters
from papers.mobiletl.models import create
from papers.mobiletl.tinytl import LiteResidual, add_lite_residuals


def test_module_by_hand() -> None:
    """192 -> 192, 3x3, two groups: 192 * 96 * 9 + 2 * 192, then 192 * 192 + 2 * 192 parameters."""
    lite = LiteResidual(192, 192, stride=1, kernel=3)
    assert sum(p.numel() for p in lite.parameters()) == 192 * 96 * 9 + 192 * 192 + 4 * 192
    assert lite.train()(torch.randn(2, 192, 7, 7), (7, 7)).abs().max() == 0  # the last norm's scale starts at 0
    assert lite(torch.randn(2, 192, 1, 1), (1, 1)).shape == (2, 192, 1, 1)


@pytest.mark.parametrize("method", ["lite", "lite_bias"])
def test_network_starts_as_it_was_and_trains_the_side_modules(method: str) -> None:
    base = create("tiny_v3", 5, in_chans=1)
    x = torch.randn(4, 1, 24, 24)
    model = adapt(base, method, resolution=24)
    assert torch.equal(model.eval()(x), adapt(base, "bias").eval()(x))
    model.train()(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == with_gradient
    main = {name for name in trained if ".lite." not in name and not name.startswith("classifier")}
    assert all(name.endswith("bias") for name in main)
    assert bool(main) is (method == "lite_bias")


def test_kernels_fit_the_pooled_map_and_roles_follow_the_gradient() -> None:
    """At 224 the last stage has 7 x 7 maps, pooled to 3 x 3. Without shifts nothing flows back through the lowest block."""
    with torch.device("meta"):
        model = create("proxyless_mobile", 100)
    add_lite_residuals(model, anatomy(model).blocks, 224)
    kernels = [
        model.get_submodule(f"{path}.lite.conv1").get_parameter("weight").shape[-1] for path in anatomy(model).blocks
    ]
    assert kernels == [5] * 16 + [3] * 4
    layers = trace_layers(model, (2, 3, 224, 224))
    found = dict(zip((layer.path for layer in layers), roles(model, layers, "lite"), strict=True))
    assert found["blocks.0.0.conv_dw"] == found["conv_stem"] == "frozen"
    assert found["blocks.1.0.conv_pw"] == "through"
    assert found["blocks.0.0.lite.norm1"] == "trained"
    side = sum(p.numel() for m in model.modules() if isinstance(m, LiteResidual) for p in m.parameters())
    assert trained_parameters(layers, roles(model, layers, "lite")) == side + 1280 * 100 + 100
    shifts = sum(m.bias.numel() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "lite" not in n)
    assert trained_parameters(layers, roles(model, layers, "lite_bias")) == side + 1280 * 100 + 100 + shifts
