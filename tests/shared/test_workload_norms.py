"""RMS norm is one kernel on every device, with the values of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.workload import trace

TOKENS, D = 10, 16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rms_norm_forward_and_backward(device: str) -> None:
    layer = nn.RMSNorm(D, device=device)
    x = torch.randn(2, 5, D, device=device, requires_grad=True)
    work = trace(lambda: layer(x).backward(torch.ones_like(x)), training=True)
    n = TOKENS * D
    forward, back = (op for op in work.ops if op.kind == "vector")
    assert (forward.name, back.name) == ("aten._fused_rms_norm", "aten._fused_rms_norm_backward")
    assert (forward.module, back.module) == ("RMSNorm", "RMSNorm")
    assert forward.vector_ops == 4 * n  # square, add, scale, weight
    assert (forward.bytes_read, forward.bytes_written) == (4 * (n + D), 4 * (n + TOKENS))  # 1/rms of each token
    assert back.vector_ops == 9 * n
    assert (back.bytes_read, back.bytes_written) == (4 * (2 * n + D + TOKENS), 4 * (n + D))
    assert work.saved_bytes == 4 * (n + TOKENS)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("through", ["backward", "autograd"])
def test_gradients_are_those_of_torch(weighted: bool, through: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, D, requires_grad=True)
    weight = torch.rand(D, requires_grad=True) if weighted else None
    inputs = [t for t in (x, weight) if t is not None]
    found: list[tuple[torch.Tensor, ...]] = []

    def step() -> None:
        loss = (F.rms_norm(x, (D,), weight) * torch.arange(float(D))).sum()
        if through == "backward":
            for t in inputs:
                t.grad = None
            loss.backward()
            found.append(tuple(t.grad for t in inputs if t.grad is not None))
        else:
            found.append(torch.autograd.grad(loss, inputs))

    step()
    work = trace(step, training=True)
    assert [op.name for op in work.ops].count("aten._fused_rms_norm_backward") == 1
    assert [op.name for op in work.ops].count("aten._fused_rms_norm") == 1
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch says so, too
def test_two_types_run_in_pieces_as_torch_does() -> None:
    x, weight = torch.randn(TOKENS, D, dtype=torch.bfloat16), torch.ones(D)
    work = trace(F.rms_norm, x, (D,), weight)
    assert "aten._fused_rms_norm" not in work.by_op()
    assert "aten.rsqrt" in work.by_op()
