"""Conversion of timm models: what trains, what stays, what autograd keeps on the real implementation."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mobiletl import adapt, adapted_state_dict, load_adapted, mobiletl, parameter_groups
from papers.mobiletl.accounting import Rules, stored_bytes
from papers.mobiletl.anatomy import anatomy, forward_from, forward_to
from papers.mobiletl.convert import convert_block
from papers.mobiletl.counts import block_roles, roles, trace_layers
from papers.mobiletl.layers import FrozenConv2d, ShiftNormAct
from papers.mobiletl.models import create, fig1_block
from shared.errors import UserError
from shared.workload import trace

ZOO = ["mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0", "mnasnet_100"]


def _model(name: str = "tiny_v3", classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = create(name, classes, in_chans=1 if name.startswith("tiny") else 3)
    for module in model.modules():  # as after pre-training: statistics and scales that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def _images(n: int = 4) -> Tensor:
    return torch.randn(n, 1, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*ZOO, "proxyless_mobile"])
def test_three_lines_convert_and_train_any_of_the_zoo(name: str) -> None:
    model = mobiletl(create(name, num_classes=10), blocks=3)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3))
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_frozen_part_runs_without_graph_and_stays() -> None:
    model = mobiletl(_model(), blocks=2).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert forward_to(model, _images(), 2).grad_fn is None
    model(_images()).sum().backward()
    frozen = anatomy(model).blocks[:-2]
    assert not [n for n, _ in model.named_parameters() if n.startswith((*frozen, "conv_stem", "bn1"))]
    assert all(p.grad is not None for p in model.parameters())
    changed = {name.rpartition(".")[0] for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert changed == {"blocks.3.2.bn3", "blocks.3.1.bn3", "bn2"}  # the last norm of each trained block, and the head's


def test_int8_weights_are_within_half_a_step() -> None:
    conv = nn.Conv2d(6, 8, 3, bias=False)
    frozen = FrozenConv2d(conv)
    assert frozen.weight_int8.dtype == torch.int8
    assert int(frozen.weight_int8.abs().amax()) == 127
    step = conv.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    assert bool(((frozen.weight_int8 * frozen.scale - conv.weight).abs() <= step / 2 * 1.001).all())


def test_forward_in_eval_is_the_base_networks_up_to_int8() -> None:
    base = _model().eval()
    x = _images()
    everything = mobiletl(base, blocks=len(anatomy(base).blocks)).eval()
    assert torch.allclose(everything(x), base(x), atol=1e-5)  # nothing is frozen, so nothing is quantised
    three = mobiletl(base, blocks=3).eval()
    assert (three(x) - base(x)).norm() < 0.05 * base(x).norm()


def test_training_mode_keeps_the_frozen_statistics() -> None:
    """Internal norms normalise with the running statistics in train mode too."""
    base = _model().eval()
    block = base.get_submodule(anatomy(base).blocks[-1])
    expected = block.bn1(block.conv_pw(torch.ones(1, 48, 6, 6)))
    model = mobiletl(base, blocks=1).train()
    ours = model.get_submodule(anatomy(base).blocks[-1])
    assert torch.allclose(ours.bn1(ours.conv_pw(torch.ones(1, 48, 6, 6))), expected, atol=1e-6)


def test_k_zero_is_head_only_fine_tuning_bit_for_bit() -> None:
    x, y = _images(), torch.tensor([0, 1, 2, 3])
    gradients = []
    for method in ("mobiletl", "ft_blocks"):
        model = adapt(_model(), method, 0).train()
        F.cross_entropy(model(x), y).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    head = {"conv_head.weight", "bn2.weight", "bn2.bias", "classifier.weight", "classifier.bias"}
    assert gradients[0].keys() == gradients[1].keys() == head
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class _PlainGate(nn.Module):
    """Hard sigmoid from operators that are exact in float64; torch's own derivative takes 1/6 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v2"])
def test_exact_switch_is_fine_tuning_with_frozen_internal_statistics(name: str) -> None:
    """All blocks, exact derivative, float64: autograd on the base network with its internal norms in eval mode gives the same."""
    base = _model(name).double()
    x, y = _images().double(), torch.tensor([0, 1, 2, 3])
    ours = mobiletl(base, blocks=7, act_backward="exact").train()
    F.cross_entropy(ours(x), y).backward()
    base.train()
    for path in anatomy(base).blocks:
        block = base.get_submodule(path)
        block.bn1.eval(), block.bn2.eval()
        if hasattr(block.se, "gate"):
            block.se.gate = _PlainGate()
    F.cross_entropy(base(x), y).backward()
    expected = dict(base.named_parameters())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - expected[key].grad).norm() <= 1e-11 * expected[key].grad.norm() + 1e-15, key


def test_relu_network_gets_autograds_gradients() -> None:
    """With plain ReLU the step is exact: all trained gradients equal autograd's in float64."""
    base = _model("tiny_v2")
    for module in base.modules():
        if isinstance(getattr(module, "act", None), nn.ReLU6):
            module.act = nn.ReLU()
    base = base.double()
    x = _images().double()
    ours = mobiletl(base, blocks=7).train()
    ours(x).square().sum().backward()
    base.train()
    for path in anatomy(base).blocks:
        block = base.get_submodule(path)
        block.bn1.eval(), block.bn2.eval()
    base(x).square().sum().backward()
    expected = dict(base.named_parameters())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - expected[key].grad).norm() <= 1e-11 * expected[key].grad.norm(), key


@pytest.mark.parametrize("act_backward", ["step", "exact"])
def test_recomputing_gives_the_same_gradients_and_keeps_a_tenth(act_backward: str) -> None:
    x, y = _images(8), torch.arange(8) % 5
    results, kept = [], []
    for recompute in (False, True):
        model = mobiletl(_model(), blocks=3, act_backward=act_backward, recompute=recompute).train()
        F.cross_entropy(model(x), y).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(trace(model, x, training=True).saved_bytes)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert kept[1] < 0.35 * kept[0]


@pytest.mark.parametrize(
    ("version", "formula", "saved"),
    [("v2", 2_169_216, 2_169_216), ("v3", 3_115_152, 3_115_152 - 1_152 - 144)],
)
def test_block_keeps_what_the_accounting_says(version: str, formula: int, saved: int) -> None:
    """V3: the gate's clip bits come free with the kept gate (2 · 8 · 576 / 8), and ReLU's bits (8 · 144 / 8) with FC2's kept input."""
    model = nn.Sequential(fig1_block(version))
    convert_block(model, "0", act_backward="step", inner_norm="shift", recompute=False)
    work = trace(model.train(), torch.randn(8, 96, 7, 7), training=True)
    assert work.saved_bytes == saved
    assert abs(saved - formula) < 0.005 * formula


def test_recomputing_block_keeps_its_two_inputs() -> None:
    """Block input and last norm's input, 2 · 8 · 96 · 49 · 4 bytes, and that norm's two vectors: 92.5 % under the base."""
    model = nn.Sequential(fig1_block("v2"))
    convert_block(model, "0", act_backward="step", inner_norm="shift", recompute=True)
    x = torch.randn(8, 96, 7, 7)
    forward_only = lambda images: model(images)  # noqa: E731
    assert trace(forward_only, x, training=True).saved_bytes == 301_056 + 768


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "mobilenetv2_100", "proxyless_mobile"])
@pytest.mark.parametrize("blocks", [1, 5])
def test_whole_network_keeps_what_the_accounting_says(name: str, blocks: int) -> None:
    """The head's ReLU6 is the one that counts two bits; its exact derivative needs one, and one is kept."""
    with torch.device("meta"):
        base = create(name, 10)
    layers = trace_layers(base, (8, 3, 224, 224))
    formula = stored_bytes(layers, roles(base, layers, "mobiletl", blocks), Rules(relu6_bits=1))
    saved = trace(mobiletl(base, blocks), torch.empty(8, 3, 224, 224, device="meta"), training=True).saved_bytes
    assert saved == pytest.approx(formula, rel=0.005)


def test_bias_and_norm_methods_train_what_they_say() -> None:
    base = _model()
    bias = adapt(base, "bias")
    trained = {name for name, p in bias.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in base.named_parameters() if ".bn" in f".{n}" and n.endswith("bias")} | {
        "classifier.weight", "classifier.bias"
    }  # fmt: skip
    norm = adapt(base, "norm").train()
    norm(_images()).sum().backward()
    assert norm.bn1.weight.grad is not None
    assert norm.conv_stem.weight.grad is None


def test_adapted_parts_go_to_disk_and_back_and_into_the_plain_model(tmp_path: object) -> None:
    base = _model()
    model = mobiletl(base, blocks=2).train()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    F.cross_entropy(model(_images()), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    torch.save(adapted_state_dict(model), tmp_path / "adapted.pt")  # type: ignore[operator]
    state = torch.load(tmp_path / "adapted.pt", weights_only=True)  # type: ignore[operator]
    again = mobiletl(base, blocks=2)
    load_adapted(again, state)
    assert torch.equal(again.eval()(_images()), model.eval()(_images()))
    plain = copy.deepcopy(base)
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    assert (plain.eval()(_images()) - model(_images())).norm() < 0.05 * model(_images()).norm()
    assert sum(t.numel() for t in state.values()) < 0.9 * sum(p.numel() for p in base.parameters())
    with pytest.raises(UserError, match="same method and blocks"):
        load_adapted(mobiletl(base, blocks=3), state)


def test_parameter_groups_split_by_kind() -> None:
    groups = {
        g["name"]: g for g in parameter_groups(mobiletl(_model(), 2), lr=1e-3, classifier_lr=1e-2, weight_decay=0.1)
    }
    assert groups["classifier"]["lr"] == 1e-2
    assert groups["norms_and_biases"]["weight_decay"] == 0.0
    assert all(p.dim() == 4 for p in groups["weights"]["params"])


def test_features_of_the_frozen_part_can_be_reused() -> None:
    for name in ("tiny_v3", "mobilenetv3_small_100"):
        model = mobiletl(_model(name), 2).eval()
        x = torch.randn(2, model.conv_stem.weight_int8.shape[1], 32, 32)
        assert torch.equal(forward_from(model, forward_to(model, x, 2), 2), model(x))
    model = mobiletl(_model(), 2, recompute=True).eval()
    assert torch.equal(forward_from(model, forward_to(model, _images(), 2), 2), model(_images()))


def test_internal_norm_keeps_its_scale() -> None:
    model = mobiletl(_model(), 1).train()
    norm = next(m for m in model.modules() if isinstance(m, ShiftNormAct))
    before = norm.weight.clone(), norm.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(_images()).square().sum().backward()
    optimizer.step()
    assert torch.equal(norm.weight, before[0])
    assert not torch.equal(norm.bias, before[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"blocks": 8}, "choose 0 to 7"), ({"blocks": 1, "act_backward": "sign"}, "step"),
     ({"blocks": 1, "inner_norm": "full", "recompute": True}, "batch statistics")],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        mobiletl(_model(), **arguments)  # type: ignore[arg-type]


def test_other_networks_are_refused() -> None:
    with pytest.raises(UserError, match="inverted residual"):
        mobiletl(nn.Sequential(nn.Conv2d(3, 3, 1)), 1)
    with pytest.raises(UserError, match="not a network"):
        mobiletl(timm.create_model("resnet18", num_classes=2), 1)


@pytest.mark.parametrize(("act_backward", "bits"), [("2bit", 2), ("4bit", 4)])
def test_coarse_derivatives_keep_what_the_accounting_says(act_backward: str, bits: int) -> None:
    """Each of the two internal activations of the V3 block of Fig. 1 keeps 28,224 bytes for every bit."""
    layers = trace_layers(fig1_block("v3"), (8, 96, 7, 7))
    counted = stored_bytes(layers, block_roles(layers, "mobiletl", act_backward=act_backward))
    assert counted == 3_115_152 + 2 * 28_224 * (bits - 1)
    model = nn.Sequential(fig1_block("v3"))
    convert_block(model, "0", act_backward=act_backward, inner_norm="shift", recompute=False)
    kept = trace(model.train(), torch.zeros(8, 96, 7, 7), training=True).saved_bytes
    assert abs(kept / counted - 1) < 0.005
    with pytest.raises(UserError, match="SiLU"):
        mobiletl(create("efficientnet_b0"), 2, act_backward=act_backward)
    with pytest.raises(UserError, match="inner_norm='shift'"):
        mobiletl(_model(), 2, act_backward=act_backward, inner_norm="full")
