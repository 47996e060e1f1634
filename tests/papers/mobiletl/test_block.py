"""The block as one function: the same results, gradients and statistics as layer by layer, in every mode that it claims."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from papers.mobiletl import convert, mobiletl
from papers.mobiletl.anatomy import anatomy
from papers.mobiletl.block import FusedInvertedResidual, FusedRecomputingInvertedResidual
from papers.mobiletl.graphs import graphed
from papers.mobiletl.models import create
from shared.errors import UserError


def _base(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create(name, 5, in_chans=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], nn.Module]:
    """Five MobileTL blocks that run as separate modules."""

    def build(base: nn.Module) -> nn.Module:
        with monkeypatch.context() as patch:
            patch.setattr(convert, "can_fuse", lambda block: False)
            return mobiletl(base, 5)

    return build


def _after_two_steps(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v2"])  # with and without squeeze-and-excitation
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_layer_by_layer(
    name: str, recompute: bool, train: bool, dtype: torch.dtype, layer_by_layer: Callable[[nn.Module], nn.Module]
) -> None:
    base = _base(name)
    kind = FusedRecomputingInvertedResidual if recompute else FusedInvertedResidual
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, reference = mobiletl(base, 5, recompute=recompute), layer_by_layer(base)
        assert all(type(ours.get_submodule(path)) is kind for path in anatomy(base).blocks[-5:])
        x = torch.randn(4, 1, 24, 24, dtype=dtype).to(memory_format=layout)
        found = [_after_two_steps(m.to(dtype, memory_format=layout).train(train), x) for m in (ours, reference)]
        assert found[0][0].keys() == found[1][0].keys()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-7  # torch's hard sigmoid takes 1/6 in float32
        for values, references in zip(*found, strict=True):  # gradients, then statistics
            for key, value in references.items():
                assert torch.allclose(values[key].double(), value.double(), rtol=tolerance, atol=tolerance), key


def test_two_forward_passes_before_the_backward_passes() -> None:
    """The running statistics move with the second pass; the first one's gradient must neither fail nor change."""
    model = mobiletl(_base("tiny_v3"), 3).train()
    once = copy.deepcopy(model)
    x = [torch.randn(4, 1, 24, 24) for _ in range(2)]
    losses = [model(images).square().mean() for images in x]
    (losses[0] + losses[1]).backward()
    for images in x:
        once(images).square().mean().backward()
    for p, q in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


def test_lowest_block_needs_no_input_gradient_and_others_do() -> None:
    model = mobiletl(_base("tiny_v2"), 1).train()
    block = model.get_submodule(anatomy(_base("tiny_v2")).blocks[-1])
    x = torch.randn(2, 48, 6, 6)
    assert block(x).grad_fn is not None
    x.requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None


def test_blocks_that_do_more_run_layer_by_layer() -> None:
    """Stochastic depth, mixed precision: not what the function computes."""
    base = create("tiny_v2", 5, in_chans=1)
    last = base.get_submodule(anatomy(base).blocks[-1])
    last.drop_path = nn.Dropout(0.5)
    assert type(mobiletl(base, 2).get_submodule(anatomy(base).blocks[-1])) is InvertedResidual
    model = mobiletl(_base("tiny_v3"), 2).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 1, 24, 24)).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(UserError, match="NVIDIA GPU"):
        graphed(mobiletl(_base("tiny_v2"), 2).train(), torch.randn(2, 1, 24, 24))
