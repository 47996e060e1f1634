"""Integers that the paper's figures print or imply, from the traced layers of the real networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papers.mobiletl.accounting import Rules, stored_bytes, tiny_training_bytes, tinytl_bytes, training_memory
from papers.mobiletl.counts import block_roles, roles, total_parameters, trace_layers, trained_parameters
from papers.mobiletl.flops import mac_flops, step_flops
from papers.mobiletl.models import create, fig1_block
from shared.errors import UserError


def _traced(name: str, num_classes: int = 10) -> tuple[Any, Any]:
    with torch.device("meta"):
        model = create(name, num_classes)
    return model, trace_layers(model, (8, 3, 224, 224))


@pytest.fixture(scope="module")
def v3() -> tuple[Any, Any]:
    return _traced("mbv3_small")


@pytest.fixture(scope="module")
def proxyless() -> tuple[Any, Any]:
    return _traced("proxyless_mobile", 100)


@pytest.mark.parametrize(
    ("version", "method", "total"),
    [
        ("v2", "ft_blocks", 4_036_608),
        ("v2", "mobiletl", 2_169_216),
        ("v3", "ft_blocks", 6_675_984),
        ("v3", "mobiletl", 3_115_152),
    ],
)
def test_block_of_fig_1(version: str, method: str, total: int) -> None:
    layers = trace_layers(fig1_block(version), (8, 96, 7, 7))
    assert stored_bytes(layers, block_roles(layers, method)) == total


def test_pieces_of_the_bars_of_fig_1() -> None:
    """Expand conv 150,528; internal norms 907,776 against 2,304; ReLU6 2 bits against 1; SE 945,936; last norm 151,296."""
    from papers.mobiletl.accounting import layer_bytes

    layers = trace_layers(fig1_block("v3"), (8, 96, 7, 7))
    pieces = {
        layer.path: layer_bytes(layer, role)
        for layer, role in zip(layers, block_roles(layers, "mobiletl"), strict=True)
    }
    assert pieces == {
        "conv_pw": 150_528, "bn1": 2_304, "bn1.act": 28_224, "conv_dw": 903_168, "bn2": 2_304, "bn2.act": 28_224, "se": 945_936,
        "conv_pwl": 903_168, "bn3": 151_296, "add": 0,
    }  # fmt: skip
    v2 = trace_layers(fig1_block("v2"), (8, 96, 7, 7))
    base = {layer.path: layer_bytes(layer, role) for layer, role in zip(v2, block_roles(v2, "ft_blocks"), strict=True)}
    assert (base["bn1"], base["bn1.act"]) == (907_776, 56_448)


def test_dense_block_of_the_motivation_table_keeps_a_third() -> None:
    """8 N + N/8 against 24 N + 2 N/8 bytes with N = 8 · 96 · 49; expansion 1, ReLU6 at 1 bit, no vectors."""
    from timm.models._efficientnet_blocks import ConvBnAct, InvertedResidual

    rules = Rules(vectors=False, relu6_bits=1)
    dense = trace_layers(ConvBnAct(96, 96, 5, act_layer=torch.nn.ReLU6), (8, 96, 7, 7))
    block = trace_layers(InvertedResidual(96, 96, 5, exp_ratio=1.0, act_layer=torch.nn.ReLU6), (8, 96, 7, 7))
    assert (total_parameters(dense), total_parameters(block)) == (230_592, 21_408)
    assert stored_bytes(dense, ("trained",) * len(dense), rules) == 305_760
    assert stored_bytes(block, block_roles(block, "ft_blocks"), rules) == 912_576


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("mbv3_small", 1_528_106, 55_496_640), ("mbv2", 2_236_682, 299_507_072)]
)
def test_parameters_and_macs(name: str, parameters: int, macs: int) -> None:
    _, layers = _traced(name)
    assert total_parameters(layers) == parameters
    assert sum(layer.macs for layer in layers) == 8 * macs


def test_proxyless_is_the_network_of_the_main_results(proxyless: tuple[Any, Any]) -> None:
    _, layers = proxyless
    assert sum(layer.macs for layer in layers if layer.kind == "conv") == 8 * 319_147_584
    assert total_parameters(layers) == 4_080_512 - 900 * 1281
    expand = next(layer for layer in reversed(layers) if layer.path.endswith("conv_pw"))
    assert expand.out_shape == (8, 1152, 7, 7)


@pytest.mark.parametrize(
    ("method", "blocks", "total"),
    [
        ("ft_all", 0, 129_776_384),
        ("ft_blocks", 5, 35_870_592),
        ("mobiletl", 5, 17_779_488),
        ("mobiletl", 11, 78_845_408),
    ],
)
def test_mobilenetv3_small(v3: tuple[Any, Any], method: str, blocks: int, total: int) -> None:
    model, layers = v3
    assert stored_bytes(layers, roles(model, layers, method, blocks)) == total


@pytest.mark.parametrize(
    ("method", "blocks", "total"),
    [
        ("ft_all", 0, 442_598_016),
        ("mobiletl", 17, 256_366_144),
        ("ft_blocks", 5, 49_414_528),
        ("mobiletl", 5, 27_960_256),
    ],
)
def test_mobilenetv2(method: str, blocks: int, total: int) -> None:
    model, layers = _traced("mbv2")
    assert stored_bytes(layers, roles(model, layers, method, blocks)) == total


def test_mac_only_count_misses_the_36_percent(v3: tuple[Any, Any]) -> None:
    """Backward 4 MAC(trained) - 2 MAC(first trained convolution)."""
    model, layers = v3
    everything = mac_flops(layers, roles(model, layers, "ft_all"))
    five = mac_flops(layers, roles(model, layers, "ft_blocks", 5))
    assert (everything.forward, everything.backward) == (887_946_240, 1_689_188_352)
    assert five.backward == 831_064_064
    assert 100 * (1 - five.total / everything.total) == pytest.approx(33.30, abs=0.005)


def test_calibrated_rule_gives_the_bars(v3: tuple[Any, Any]) -> None:
    model, layers = v3
    everything = step_flops(layers, roles(model, layers, "ft_all"))
    five = step_flops(layers, roles(model, layers, "ft_blocks", 5))
    ours = step_flops(layers, roles(model, layers, "mobiletl", 5))
    assert [round(x / 1e6, 2) for x in (everything.forward, everything.backward)] == [1000.59, 1934.96]
    assert [round(x / 1e6, 2) for x in (five.forward, five.backward)] == [975.04, 902.54]
    assert everything.forward - five.forward == 3 * 8_517_376  # batch statistics in stem to block 6
    assert 1 - ours.total / everything.total == pytest.approx(0.378, abs=5e-4)


def test_total_memory_of_the_motivation(v3: tuple[Any, Any]) -> None:
    model, layers = v3
    totals = []
    for method in ("ft_all", "ft_blocks"):
        memory = training_memory(layers, roles(model, layers, method, 5))
        totals.append(memory.parameter_bytes + memory.stored_bytes)
    assert totals == [129_776_384 + 4 * 1_528_106, 35_870_592 + 4 * 1_389_354 + 138_752]


@pytest.mark.parametrize(
    ("method", "blocks", "trained", "megabytes"),
    [("mobiletl", 1, 1_189_476, 32.19), ("ft_blocks", 1, 1_191_780, 32.19), ("ft_blocks", 2, 1_443_876, 35.36),
     ("ft_blocks", 4, 2_199_780, 50.01), ("mobiletl", 4, 2_192_868, 38.81)],
)  # fmt: skip
def test_training_memory_of_proxyless(
    proxyless: tuple[Any, Any], method: str, blocks: int, trained: int, megabytes: float
) -> None:
    model, layers = proxyless
    layer_roles = roles(model, layers, method, blocks)
    assert trained_parameters(layers, layer_roles) == trained
    memory = training_memory(layers, layer_roles, workspace_bytes=8 * 32 * 112 * 112 * 4, rules=Rules(vectors=False))
    assert memory.inference_peak_bytes == 8 * 64 * 112 * 112 * 4
    assert memory.total_bytes / 1e6 == pytest.approx(megabytes, abs=0.006)


def test_tinytl_rule_on_its_own_method(proxyless: tuple[Any, Any]) -> None:
    """Shifts alone: nothing but the sign bits of ReLU6 is stored; the peak is the in and out of the widest early convolution."""
    model, layers = proxyless
    layer_roles = roles(model, layers, "bias")
    assert tinytl_bytes(layers, layer_roles) / 1e6 == pytest.approx(29.9, abs=0.05)


def test_tiny_training_rule() -> None:
    """One block: a bit per output element and 4 bytes per channel for each convolution, int8 inputs and weights."""
    layers = trace_layers(fig1_block("v2"), (8, 96, 7, 7))
    memory = tiny_training_bytes(layers, block_roles(layers, "ft_blocks"))
    outputs, weights = (576 + 576 + 96) * 49, 2 * 96 * 576 + 25 * 576
    assert (memory.mask_bytes, memory.bias_bytes) == (outputs // 8, 4 * (576 + 576 + 96))
    assert (memory.input_bytes, memory.weight_bytes) == ((96 + 576 + 576) * 49, weights)


def test_last_keeps_only_the_classifiers_input(v3: tuple[Any, Any]) -> None:
    model, layers = v3
    assert stored_bytes(layers, roles(model, layers, "last")) == 4 * 8 * 1024


def test_unknown_method(v3: tuple[Any, Any]) -> None:
    model, layers = v3
    with pytest.raises(UserError, match="did you mean 'mobiletl'"):
        roles(model, layers, "mobiltl", 3)
    with pytest.raises(UserError, match="11 blocks"):
        roles(model, layers, "mobiletl", 12)
