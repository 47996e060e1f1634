"""Training: the backward pass, its modules, what autograd saves (by hand and against the allocator), optimisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from shared.workload import Workload, trace

B, D, H, C = 32, 64, 256, 10


def mlp(activation: nn.Module, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H), activation, nn.Linear(H, C)).to(device)


def allocated(function: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that the allocator still holds after a call whose result is kept."""
    function(*inputs)  # first-call caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function(*inputs)
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del kept
    return held


def step(model: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Workload:
    return trace(lambda: model(*inputs).sum().backward(), training=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_and_backward_of_a_linear_layer_are_three_products(device: str) -> None:
    layer = nn.Linear(D, H, device=device)
    macs = B * D * H
    needs_gradient = torch.randn(B, D, device=device, requires_grad=True)
    assert step(layer, needs_gradient).macs == 3 * macs
    assert step(layer, needs_gradient.detach()).macs == 2 * macs  # no gradient of the input
    assert trace(layer, needs_gradient).macs == macs


def test_frozen_layers_save_the_gradient_of_the_weight() -> None:
    model = mlp(nn.ReLU(), "meta").requires_grad_(False)
    model[2].requires_grad_(True)
    x = torch.empty(B, D, device="meta")
    assert step(model, x).macs == B * D * H + 2 * B * H * C
    assert trace(model, x, training=True).saved_bytes == 4 * B * H  # the input of the last layer


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 7, 7)),  # torch's own formula is 8 times too high here
        (nn.Conv2d(4, 12, 3, stride=2, groups=2), (2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3), (2, 4, 10)),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 5)),
    ],
)
def test_each_gradient_of_a_convolution_costs_the_forward_pass(layer: nn.Module, size: tuple[int, ...]) -> None:
    layer = layer.to("meta")
    x = torch.empty(size, device="meta", requires_grad=True)
    forward = trace(layer, x).macs
    assert step(layer, x).macs == 3 * forward
    assert step(layer, x.detach()).macs == 2 * forward


@pytest.mark.parametrize(
    ("layer", "size", "per_element"),
    [
        (nn.LayerNorm(8), (4, 6, 8), 13),  # x̂ 2, g·w 1, two sums 3, dx 4; dw 2, db 1
        (nn.LayerNorm(8, elementwise_affine=False), (4, 6, 8), 10),
        (nn.BatchNorm1d(6), (4, 6, 8), 13),
        (nn.GroupNorm(2, 6), (4, 6, 8), 13),
        (nn.GELU(), (4, 6, 8), 11),
        (nn.ReLU(), (4, 6, 8), 1),
        (nn.Softmax(-1), (4, 6, 8), 4),
    ],
)
def test_vector_operations_of_backward_passes(layer: nn.Module, size: tuple[int, ...], per_element: int) -> None:
    layer, x = layer.to("meta"), torch.empty(size, device="meta", requires_grad=True)
    work = trace(lambda: layer(x).backward(torch.empty(size, device="meta")), training=True)
    assert work.by_phase()["backward"].vector_ops == per_element * x.numel()


def test_convolution_backward_reads_what_it_needs() -> None:
    x, conv = torch.empty(2, 3, 8, 8, device="meta"), nn.Conv2d(3, 5, 3, padding=1, device="meta")
    gradient, weight = 4 * 2 * 5 * 64, 4 * 5 * 27

    def backward(x: torch.Tensor) -> Any:
        work = trace(lambda: conv(x).backward(torch.empty(2, 5, 8, 8, device="meta")), training=True)
        return next(op for op in work.ops if op.name == "aten.convolution_backward")

    only_weight = backward(x)
    assert only_weight.bytes_read == gradient + 4 * x.numel()
    assert only_weight.bytes_written == weight + 4 * 5
    both = backward(x.requires_grad_())
    assert both.bytes_read == gradient + 4 * x.numel() + weight
    assert both.vector_ops == 2 * 5 * 64  # gradient of the bias


def test_saved_bytes_of_an_mlp_with_relu() -> None:
    """Saved: the input of each layer; ReLU keeps its result, which is the input of the second layer."""
    work = trace(mlp(nn.ReLU()), torch.randn(B, D), training=True)
    assert sorted(held.size_bytes for held in work.saved) == [4 * B * D, 4 * B * H]
    assert work.saved_by_module() == {"0": 4 * B * D, "1": 4 * B * H}
    assert work.saved_bytes == 4 * (B * D + B * H)


def test_saved_bytes_of_an_mlp_with_gelu() -> None:
    """GELU keeps its input, so the hidden layer is held twice."""
    assert trace(mlp(nn.GELU()), torch.randn(B, D), training=True).saved_bytes == 4 * (B * D + 2 * B * H)


def test_an_in_place_activation_saves_one_tensor() -> None:
    assert trace(mlp(nn.ReLU(inplace=True)), torch.randn(B, D), training=True).saved_bytes == 4 * (B * D + B * H)


def test_a_slice_saves_its_whole_storage_once() -> None:
    x = torch.randn(B, 4 * D, requires_grad=True)
    left, right = x[:, :D], x[:, D : 2 * D]
    assert trace(lambda: left * right, training=True).saved_bytes == 4 * B * 4 * D


def test_inference_saves_nothing() -> None:
    assert trace(mlp(nn.GELU()), torch.randn(B, D)).saved == ()


class Residual(nn.Module):
    """Convolution, batch norm, activation in place, attention, softmax: what a hybrid network saves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.token_norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.token_norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.gelu(x).mean(1)).softmax(-1)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.ReLU(inplace=True)])
def test_saved_bytes_are_what_the_allocator_holds(activation: nn.Module) -> None:
    model, x = mlp(activation), torch.randn(B, D)
    result = 4 * B * C
    saved = trace(model, x, training=True).saved_bytes
    assert saved - 4 * x.numel() + result == allocated(model, x)  # the input was there before, the result is not saved


def test_saved_bytes_of_a_network_are_what_the_allocator_holds() -> None:
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    held = allocated(model, x)
    saved = trace(model, x, training=True).saved_bytes
    assert saved - 4 * x.numel() == held  # softmax saves its result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_saves_what_its_allocator_holds_and_gives_the_table_of_meta() -> None:
    model, x = mlp(nn.GELU(), "cuda"), torch.randn(512, D, device="cuda")
    model(x)  # workspaces of the first call
    before = torch.cuda.memory_allocated()
    result = model(x)
    held = torch.cuda.memory_allocated() - before - 4 * result.numel()
    assert trace(model, x, training=True).saved_bytes - 4 * x.numel() == held
    meta = mlp(nn.GELU(), "meta")
    assert step(model, x).ops == step(meta, x.to("meta")).ops


def test_checkpointing_trades_memory_for_a_second_forward_pass() -> None:
    model = nn.Sequential(mlp(nn.GELU()))
    x = torch.randn(B, D, requires_grad=True)
    forward = trace(model, x).macs
    plain, again = step(model, x), step(lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert plain.macs == 3 * forward
    # the last product is not needed again: recomputation stops early once all saved tensors are back
    assert again.macs == 3 * forward + B * D * H
    assert trace(lambda: checkpoint(model, x, use_reentrant=False), training=True).saved_bytes == 4 * B * D
    recomputed = [op for op in again.ops if op.name == "aten.gelu" and op.phase == "backward"]
    assert [op.module for op in recomputed] == ["Sequential.0.1"]


def test_the_peak_is_that_of_one_step_when_each_step_frees_its_graph() -> None:
    model, x = mlp(nn.GELU()), torch.randn(B, D)

    def train(steps: int) -> Workload:
        def run() -> None:
            for _ in range(steps):
                model(x).sum().backward()

        return trace(run, training=True)

    one, three = train(1), train(3)
    assert three.saved_bytes == one.saved_bytes == 4 * (B * D + 2 * B * H)
    assert three.macs == 3 * one.macs
    shrinking = trace(lambda: [model(x[:rows].clone()).sum().backward() for rows in (B, B // 2)], training=True)
    assert shrinking.saved_bytes == one.saved_bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_attention_and_norms_are_fused_too(device: str, use_reentrant: bool) -> None:
    block, x = Block().to(device), torch.randn(2, 10, D, device=device, requires_grad=True)
    work = step(lambda x: checkpoint(block, x, use_reentrant=use_reentrant), x)
    names = [op.name for op in work.ops]
    assert names.count("aten.scaled_dot_product_attention") == names.count("aten._fused_rms_norm") == 2
    assert names.count("aten.scaled_dot_product_attention_backward") == 1
    assert "aten.bmm" not in names


def test_backward_operators_belong_to_the_module_that_made_the_node() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.Sequential(nn.GELU(), nn.LayerNorm(H)), nn.Linear(H, C)).to("meta")
    x = torch.empty(B, D, device="meta", requires_grad=True)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (self.body(x) * 2).sum()
            y.backward()
            return y

    loss = Loss()
    work = trace(loss, x, training=True)
    found = {(op.name, op.module) for op in work.ops if op.phase == "backward" and op.name != "aten.sum"}
    assert found == {
        ("aten.mul", ""),  # the factor 2
        ("aten.mm", "body.0"),
        ("aten.mm", "body.2"),
        ("aten.gelu_backward", "body.1.0"),
        ("aten.native_layer_norm_backward", "body.1.1"),
    }
    macs = {name: totals.macs for name, totals in work.by_module(2).items()}
    assert macs["body.0"] == 3 * B * D * H
    assert macs["body.2"] == 3 * B * H * C


def test_accumulating_gradients_belongs_to_the_owner_of_the_parameter() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(B, D)
    model(x).sum().backward()
    work = step(model, x)
    added = [op for op in work.ops if op.name == "aten.add_"]
    assert sorted(op.module for op in added) == ["Sequential.0"] * 2 + ["Sequential.2"] * 2
    assert sum(op.bytes_written for op in added) == work.parameter_bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("optimiser", "options", "tensors"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 1),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, 2),
        (torch.optim.AdamW, {"lr": 0.1}, 3),
    ],
)
def test_optimiser_steps(device: str, foreach: bool, optimiser: Any, options: dict[str, Any], tensors: int) -> None:
    model = mlp(nn.ReLU(), device)
    trainer = optimiser(model.parameters(), foreach=foreach, **options)
    x = torch.randn(B, D, device=device)
    model(x).sum().backward()
    trainer.step()  # creates the state
    work = trace(trainer.step, training=True)
    n = sum(p.numel() for p in model.parameters())
    assert work.flops == 0
    assert work.num_parameters == n
    # the gradient, the weights and the state are read, weights and state written, at least once
    assert work.totals.bytes_read >= 4 * n * (tensors + 1)
    assert work.totals.bytes_written >= 4 * n * tensors
    if options == {"lr": 0.1} and optimiser is torch.optim.SGD:
        assert work.vector_ops == 2 * n  # p + (-lr)·g
        assert (work.totals.bytes_read, work.totals.bytes_written) == (4 * 2 * n, 4 * n)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_one_kernel_optimisers(optimiser: Any) -> None:
    model = mlp(nn.ReLU())
    options = {"momentum": 0.9} if optimiser is torch.optim.SGD else {}
    trainer = optimiser(model.parameters(), lr=0.1, fused=True, **options)
    model(torch.randn(B, D)).sum().backward()
    trainer.step()
    work = trace(trainer.step, training=True)
    n, states = work.num_parameters, 1 if options else 2
    fused = next(op for op in work.ops if op.name.startswith("aten._fused_"))
    assert fused.vector_ops == (7 if options else 14) * n
    assert fused.bytes_written >= 4 * n * (1 + states)
    assert fused.bytes_read >= 4 * n * (2 + states)


def test_a_whole_training_step_lists_the_parameters_once() -> None:
    model = mlp(nn.GELU())
    trainer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(B, D), torch.randint(C, (B,))

    def train() -> None:
        trainer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.step()

    work = trace(train, training=True)
    assert work.num_parameters == D * H + H + H * C + C
    assert work.macs == 2 * B * D * H + 3 * B * H * C
