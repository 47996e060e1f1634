"""The Triton kernels on a CPU, through Triton's interpreter, against the loop. It is chosen at import, hence the subprocess."""

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
from papers.moepp import kernels
from papers.moepp.kernels import Gemm, Mix, Plan
from papers.moepp.layer import MoEPlusPlus
from papers.moepp.routing import Experts, Routing
from papers.moepp.synthetic import exact_routing

torch.manual_seed(0)

# Counting sort: rows of an expert are contiguous, aligned and in order; zero-computation assignments have none.
ids = exact_routing(70, 2, Experts(5, 2, 1, 1), 0.75).int()
place = kernels.sort_assignments(ids, 5, 16)
position = place.position.view(70, 2)
assert bool(((position >= 0) == (ids < 5)).all())
start = 0
for expert in range(5):
    token, choice = torch.where(ids == expert)
    assert position[token, choice].tolist() == list(range(start, start + len(token)))
    assert place.token_of_row[start : start + len(token)].tolist() == token.tolist()
    assert int(place.ends[expert]) == start + len(token)
    tiles = -(-len(token) // 16)
    assert place.tile_expert[start // 16 : start // 16 + tiles].tolist() == [expert] * tiles
    start += 16 * tiles
assert int(place.tile_count) == start // 16 <= place.tiles

# Router: logits with the residual, gates and picks; mixtral gates sum to one.
x, w, before, residual = torch.randn(33, 48), torch.randn(9, 48) / 7, torch.randn(33, 9), torch.randn(9, 9) / 9
logits, gates, picked = kernels.route(x, w, 2, before, residual)
want = x @ w.t() + before @ residual.t()
torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
p, best = torch.softmax(want, -1).topk(2)
assert torch.equal(best.int(), picked)
torch.testing.assert_close(gates, p)
torch.testing.assert_close(kernels.route(x, w, 2, renormalise=True)[1].sum(1), torch.ones(33))

# Whole layers: gate and up projection apart or joint, and torch's grouped product.
first = [Gemm(16, 16, 32, 4, 2, joint=joint) for joint in (True, False)]  # 48 columns are no multiple of 32
plans = [Plan("fused", one, Gemm(16, 32, 16, 4, 2)) for one in first]
# Last tiles in halves, with and without columns to spare, and a combine that holds a whole token.
plans += [Plan("fused", Gemm(32, 16, 32, 4, 2, joint=True, halves=True), Gemm(32, 32, 16, 4, 2, halves=True), Mix(2, 64, 4))]
for tokens, d, h, experts in ((70, 48, 32, Experts(4, 2, 1, 1)), (33, 32, 48, Experts(3)), (40, 64, 32, Experts(5, 1, 2, 1))):
    layer = MoEPlusPlus(d, h, experts.ffn, n_constant=experts.constant, n_copy=experts.copy, n_zero=experts.zero, path="loop")
    x, gates = torch.randn(tokens, d), torch.rand(tokens, 2)
    ids = exact_routing(tokens, 2, experts, 0.75)
    ids[3] = experts.total  # dropped by capacity
    with torch.no_grad():
        want = layer.compute(x, ids, gates)
        pair = () if layer.constants is None else (layer.constants.weight, layer.constants.vector)
        for how in [*plans, Plan("grouped_mm", first[0], plans[0].second)] if tokens == 70 else plans:
            got = kernels.forward(x, ids.int(), gates, layer.w_in, layer.w_out, *(pair or (None, None)), experts.copy, how=how)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)

# The module takes the fused path with and without gradients, and both agree with the loop.
layer = MoEPlusPlus(32, 32, 4, path="fused")
x = torch.randn(24, 32, requires_grad=True)
with torch.no_grad():
    quiet = layer(x)
loud = layer(x)
torch.testing.assert_close(loud.y, quiet.y, atol=1e-5, rtol=1e-4)
grads = []
for path in ("fused", "loop"):
    layer.path = path
    layer.zero_grad()
    x.grad = None
    layer(x).y.square().sum().backward()
    grads.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
for a, b in zip(*grads, strict=True):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
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


def test_a_plan_has_one_height_of_tiles() -> None:
    from papers.moepp.kernels import Gemm, Plan

    with pytest.raises(ValueError, match="same tiles"):
        Plan("fused", Gemm(128, 64, 64, 4, 2), Gemm(64, 64, 64, 4, 2))


@pytest.mark.parametrize(
    ("tokens", "share", "height", "halves"),
    [(65_536, 1.0, 128, False), (65_536, 2 / 7, 128, True), (4096, 1.0, 128, True), (256, 1.0, 64, False)],
)
def test_tiles_follow_the_rows_of_an_expert(tokens: int, share: float, height: int, halves: bool) -> None:
    """16 experts, top-2: 8192, 2341, 512 and 32 rows each."""
    from papers.moepp.kernels import plan

    how = plan(tokens, 2, 16, 1536, 4096, torch.bfloat16, share)
    assert (how.first.bm, how.second.bm) == (height, height)
    assert how.first.halves is halves
    assert how.second.halves is halves


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [100, 5000])
def test_kernels_on_the_gpu(dtype: torch.dtype, tokens: int) -> None:
    from papers.moepp.layer import MoEPlusPlus
    from papers.moepp.routing import Experts
    from papers.moepp.synthetic import exact_routing

    torch.manual_seed(0)
    layer = MoEPlusPlus(256, 512, 8, path="loop").to("cuda", dtype)
    x, gates = torch.randn(tokens, 256, device="cuda", dtype=dtype), torch.rand(tokens, 2, device="cuda")
    ids = exact_routing(tokens, 2, Experts(8, 2, 1, 1), 0.75).to("cuda")
    with torch.no_grad():
        want = layer.compute(x, ids, gates).float()
        layer.path = "fused"
        torch.cuda.set_sync_debug_mode("error")
        got = layer.compute(x, ids, gates)
        torch.cuda.set_sync_debug_mode("default")
    error = float((got.float() - want).norm() / want.norm())
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)
