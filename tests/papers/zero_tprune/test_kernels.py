"""The Triton kernels on a CPU, through Triton's interpreter, against the plain reference. It is chosen at import, hence the subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = """
import torch
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = True  # the interpreter has no bfloat16 product, which float32 is split into otherwise
from papers.zero_tprune import importance, kernels, selection
from papers.zero_tprune.plans import Layer, Rule
from papers.zero_tprune.pruner import _triton_select

def case(n, votes, prefix, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, n, 3, 2, 16).mul(1.5).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return selection.Tokens(q, k, v, torch.randn(2, n, 32), 0.25, prefix, min(prefix, 1))

for n, votes in ((70, 1), (70, 4), (131, 3), (260, 2)):  # two, three columns of tiles, and the streaming kernels
    seen = case(n, votes, 1, n)
    a = importance.attention(seen.q, seen.k, seen.scale)
    want = importance.wpr(a, importance.start_vector(n, 1), votes)
    got = kernels.votes(seen.q, seen.k, None, seen.scale, 1, votes)
    error = float((got - want).norm() / (want - 1).norm())
    assert error < (1e-5 if votes == 1 or n > 256 else 1e-3), (n, votes, error)

half = case(70, 1, 1, 7, torch.float16)
a = importance.attention(half.q, half.k, half.scale)
got = kernels.votes(half.q, half.k, None, half.scale, 1, 1)
assert float((got - importance.wpr(a, importance.start_vector(70, 1), 1)).abs().max()) < 2e-3

seen = case(70, 1, 1, 1)
row = kernels.class_attention(seen.q, seen.k, seen.scale)
assert torch.allclose(row, importance.attention(seen.q, seen.k, seen.scale)[:, :, 0], atol=1e-5)

for prefix in (0, 1, 5):
    seen = case(75, 3, prefix, prefix)
    for rule in (Rule(vhf=None), Rule(vhf=(0.01, 0.7)), Rule(heads="mean", vhf=None, order="i"), Rule(method="random"),
                 Rule(partition="seq_i", feature="key_mean", start="uniform"), Rule(vhf=(0.0, 1e-4), vhf_scale="sum1")):
        layer = Layer(1, 0.7, 8, 3)
        left = layer.kept(75 - prefix)
        flat = _triton_select(seen, layer, rule, left)
        rows = flat - torch.arange(2)[:, None] * 75
        assert torch.equal(rows, selection.select(seen, layer, rule)), (prefix, rule)
print("kernels agree")
"""


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels agree" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_the_gpu(dtype: torch.dtype) -> None:
    from papers.zero_tprune import importance, kernels

    for tokens, votes in ((197, 5), (119, 1), (577, 3)):
        q, k, _ = torch.randn(4, tokens, 3, 6, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        want = importance.wpr(importance.attention(q, k, 0.125), importance.start_vector(tokens, 1, "cuda"), votes)
        assert float((kernels.votes(q, k, None, 0.125, 1, votes) - want).norm() / (want - 1).norm()) < 1e-3
