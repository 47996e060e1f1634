"""Hash grids: published integers, closed forms, and one oracle for three forms."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from papers.switchnerf.hashgrid import GridSpec, HashEncoding, encode_reference, experts_of, hash_index
from shared.errors import UserError

HETERO = [GridSpec(4, 8, 64, 12), GridSpec(4, 12, 128, 12), GridSpec(4, 16, 256, 12), GridSpec(4, 32, 512, 11)]
NGP = GridSpec(16, 16, 2048, 19)


def test_hash_of_known_corners() -> None:
    corners = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 2, 3), (100, 200, 300)]
    index = hash_index(torch.tensor(corners)) % 2**19
    assert index.tolist() == [1, 489_905, 153_493, 339_493, 128_476, 110_768]


def test_wrapped_uint32_gives_the_same_index() -> None:
    corner = torch.randint(0, 100_000, (1000, 3), generator=torch.Generator().manual_seed(0))
    wrapped = []
    for x, y, z in corner.tolist():
        wrapped.append((x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % 2**19)
    assert (hash_index(corner) % 2**19).tolist() == wrapped


def test_instant_ngp_grid() -> None:
    levels = NGP.level_table()
    assert pytest.approx(1.381913, abs=1e-6) == NGP.growth
    assert [level.resolution for level in levels] == [
        16, 23, 31, 43, 59, 81, 112, 154, 213, 295, 407, 562, 777, 1073, 1483, 2048,
    ]  # fmt: skip
    assert NGP.entries == 6_098_120
    assert NGP.num_parameters == 12_196_240
    assert GridSpec(16, 16, 2048, 19, convention="torch").num_parameters == 16_777_216


@pytest.mark.parametrize(
    ("n_max", "parameters"), [(2**11, 12_196_240), (2**12, 12_599_920), (2**13, 13_074_912), (2**14, 13_288_400)]
)
def test_tables_of_config_a(n_max: int, parameters: int) -> None:
    assert GridSpec(16, 16, n_max, 19).num_parameters == parameters


@pytest.mark.parametrize("convention", ["tcnn", "torch"])
def test_constant_table_is_a_constant_field(convention: str) -> None:
    encoding = HashEncoding([GridSpec(5, 4, 100, 10, convention=convention)])  # type: ignore[arg-type]
    with torch.no_grad():
        encoding.table.copy_(torch.tensor([0.25, -3.0]).expand_as(encoding.table))
        out = encoding(torch.rand(50, 3))
    torch.testing.assert_close(out, torch.tensor([0.25, -3.0]).repeat(5).expand(50, 10))


def test_feature_at_a_vertex_is_its_entry() -> None:
    spec = GridSpec(1, 8, 8, 10, convention="torch")
    encoding = HashEncoding([spec])
    vertex = torch.tensor([[3, 5, 2], [0, 0, 1], [7, 8, 4]])
    expected = encoding.table[hash_index(vertex) % 1024]
    torch.testing.assert_close(encoding(vertex / 8.0), expected)


def test_dense_level_indexes_row_by_row() -> None:
    spec = GridSpec(1, 8, 8, 10)  # 8 vertices per axis: 512 entries
    encoding = HashEncoding([spec])
    vertex = torch.tensor([[3, 5, 2]])
    point = (vertex - 0.5) / 7.0  # scale 8 - 1, shift 0.5
    torch.testing.assert_close(encoding(point), encoding.table[[3 + 8 * (5 + 8 * 2)]])
    assert encoding.table.shape == (512, 2)


def test_upper_face_of_a_dense_level_stays_inside() -> None:
    encoding = HashEncoding([GridSpec(1, 8, 8, 10)])
    with torch.no_grad():
        out = encoding(torch.ones(1, 3))
    torch.testing.assert_close(
        out, encoding.table[[511]].detach()
    )  # position 7.5: both corners clamp to the last vertex


def test_linear_in_the_table_and_its_gradient() -> None:
    encoding = HashEncoding([GridSpec(3, 4, 20, 6)]).double()
    x = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = torch.randn(2, *encoding.table.shape, dtype=torch.float64).unbind()
    layout = encoding.layout
    torch.testing.assert_close(
        encode_reference(x, 2 * a + b, layout), 2 * encode_reference(x, a, layout) + encode_reference(x, b, layout)
    )
    assert torch.autograd.gradcheck(lambda t: encode_reference(x, t, layout), (a.requires_grad_(),))


def _segments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, 1000, 1000, 3017, 5000])  # an empty segment and odd ends
    return torch.rand(5000, 3, generator=torch.Generator().manual_seed(seed)), offsets


@pytest.mark.parametrize("convention", ["tcnn", "torch"])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_loops_match_the_reference(convention: str, threads: int) -> None:
    specs = [GridSpec(s.levels, s.n_min, s.n_max, s.log2_size, 2, convention) for s in HETERO]  # type: ignore[arg-type]
    x, offsets = _segments()
    fast, slow = HashEncoding(specs, "numba"), HashEncoding(specs, "reference")
    slow.load_state_dict(fast.state_dict())
    weight = torch.randn(5000, fast.width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = [encoding(x, offsets) for encoding in (fast, slow)]
        for out in outputs:
            (out * weight).sum().backward()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(fast.table.grad, slow.table.grad, atol=2e-4, rtol=1e-4)


def test_threads_do_not_change_the_bits() -> None:
    x, offsets = _segments()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.manual_seed(0)
        encoding = HashEncoding(HETERO, "numba")
        torch.set_num_threads(threads)
        encoding(x, offsets).square().sum().backward()
        torch.set_num_threads(before)
        results.append(encoding.table.grad)
    assert torch.equal(results[0], results[1])  # type: ignore[arg-type]


def test_segment_bounds_name_the_experts() -> None:
    assert experts_of(torch.tensor([0, 2, 2, 3]), 3).tolist() == [0, 0, 2]


def test_unequal_grids_and_missing_bounds_are_refused() -> None:
    with pytest.raises(UserError, match="same number of levels"):
        HashEncoding([GridSpec(4, 8, 64, 12), GridSpec(3, 8, 64, 12)])
    with pytest.raises(UserError, match="n_min <= n_max"):
        GridSpec(4, 64, 8, 12)
    with pytest.raises(ValueError, match="bounds"):
        HashEncoding(HETERO)(torch.rand(4, 3))
    with pytest.raises(ValueError, match="gradient for positions"):
        HashEncoding(HETERO[:1])(torch.rand(4, 3, requires_grad=True))


TRITON = """
import torch
from papers.switchnerf.hashgrid import GridSpec, HashEncoding
torch.manual_seed(0)
for convention in ("tcnn", "torch"):
    specs = [GridSpec(3, *r, 2, convention) for r in ((4, 16, 9), (6, 40, 9), (8, 100, 10))]
    offsets = torch.tensor([0, 300, 300, 700])
    x = torch.rand(700, 3)
    weight = torch.randn(700, 6)
    grads, outs = [], []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        encoding = HashEncoding(specs, backend)
        out = encoding(x, offsets)
        (out * weight).sum().backward()
        outs.append(out.detach()); grads.append(encoding.table.grad)
    torch.testing.assert_close(outs[0], outs[1], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)
print("equal")
"""


def test_triton_kernels_match_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "equal", result.stderr
