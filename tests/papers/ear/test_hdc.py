"""Facts about hypervectors that hold whatever the data: isometry, bundling, signs, order, packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.ear.hdc import (
    HDFF,
    HDEncoder,
    HDSettings,
    bundle,
    cosine,
    grid_pool,
    hadamard_transform,
    orthogonal_rows,
    remember,
    sign,
)
from papers.ear.packed import cosine_packed, hamming, pack
from shared.errors import UserError


def _taps(n: int, channels: tuple[int, ...] = (12, 24), side: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, c, side, side, generator=generator) for c in channels]


@given(rows=st.integers(1, 40), extra=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_orthonormal_rows_keep_inner_products(rows: int, extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = orthogonal_rows(rows, rows + extra, generator)
    u = torch.randn(6, rows, generator=generator)
    assert torch.allclose((u @ p) @ (u @ p).T, u @ u.T, atol=1e-5 * max(1.0, float((u @ u.T).abs().max())))


@pytest.mark.parametrize("projection", ["joint", "hadamard"])
def test_joint_projection_is_the_cosine_of_concatenated_taps(projection: str) -> None:
    encoder = HDEncoder((12, 24), HDSettings(dim=256, grid=2, projection=projection))
    taps = _taps(8)
    q = encoder(taps)
    plain = torch.cat(encoder.descriptors(taps), 1)
    assert torch.allclose(q @ q.T, cosine(plain, plain), atol=1e-5)


def test_independent_projections_add_noise_of_one_over_sqrt_dim() -> None:
    dim, n = 1024, 400
    generator = torch.Generator().manual_seed(0)
    p = orthogonal_rows(20, dim, generator)
    w = orthogonal_rows(30, dim, generator)
    u, v = F.normalize(torch.randn(n, 20), dim=1) @ p, F.normalize(torch.randn(n, 30), dim=1) @ w
    cross = (u @ v.T).flatten()
    assert abs(float(cross.mean())) < 0.005
    assert float(cross.std()) == pytest.approx(1 / math.sqrt(dim), rel=0.1)


@given(st.integers(0, 7))
@settings(max_examples=8, deadline=None)
def test_hadamard_is_an_orthonormal_involution(log_n: int) -> None:
    h = hadamard_transform(torch.eye(1 << log_n, dtype=torch.float64))
    assert torch.allclose(h @ h.T, torch.eye(1 << log_n, dtype=torch.float64))
    assert torch.allclose(h.abs(), torch.full_like(h, 2 ** (-log_n / 2)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_grid_pool_is_adaptive_pooling(height: int, width: int, grid: int) -> None:
    tap = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(tap, grid).flatten(1)
    assert torch.allclose(grid_pool(tap, grid), expected, atol=1e-6)


def test_hadamard_refuses_other_lengths() -> None:
    with pytest.raises(UserError, match="power of two"):
        hadamard_transform(torch.zeros(2, 12))


def test_cosine_of_a_bundle_to_a_member() -> None:
    m, dim = 16, 200_000
    x = sign(torch.randn(m, dim, generator=torch.Generator().manual_seed(1)))
    member = cosine(x[:1], bundle(x, torch.zeros(m, dtype=torch.long), 1))
    assert float(member) == pytest.approx(1 / math.sqrt(m), abs=0.01)


@pytest.mark.parametrize(("m", "agreement"), [(3, 0.75), (5, 0.6875), (7, 0.65625)])
def test_majority_agreement(m: int, agreement: float) -> None:
    x = sign(torch.randn(m, 100_000, generator=torch.Generator().manual_seed(m)))
    majority = sign(x.sum(0))
    assert float((majority == x[0]).float().mean()) == pytest.approx(agreement, abs=0.01)


@pytest.mark.parametrize(("rho", "expected"), [(0.5, 0.3333), (0.8, 0.5903), (0.9, 0.7129)])
def test_signs_follow_the_arcsine_law(rho: float, expected: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x, z = torch.randn(1, 400_000, generator=generator), torch.randn(1, 400_000, generator=generator)
    y = rho * x + math.sqrt(1 - rho**2) * z
    assert float(cosine(sign(x), sign(y))) == pytest.approx(expected, abs=0.006)
    assert float(cosine(x, sign(x))) == pytest.approx(math.sqrt(2 / math.pi), abs=0.003)


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_cosine_is_the_dense_one(dim: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = sign(torch.randn(n, dim, generator=generator)), sign(torch.randn(k, dim, generator=generator))
    dense = (a @ b.T / dim).numpy()
    assert np.allclose(cosine_packed(pack(a), pack(b), dim), dense, atol=1e-6)
    agreement = (a[:, None] == b[None]).float().mean(-1).numpy()
    assert np.allclose(1 - hamming(pack(a), pack(b)) / dim, agreement, atol=1e-6)  # Hamming similarity = (1 + cos) / 2
    assert np.allclose(agreement, (1 + dense) / 2, atol=1e-6)


def test_packed_blocks_agree_with_one_block() -> None:
    x = sign(torch.randn(300, 2048))
    whole = hamming(pack(x), pack(x[:80]))
    single = np.concatenate([hamming(pack(x[i : i + 1]), pack(x[:80])) for i in range(300)])
    assert np.array_equal(whole, single)


def test_bundling_is_order_free_incremental_and_local_to_a_class() -> None:
    q, labels = torch.randn(60, 64), torch.arange(60) % 3
    whole = bundle(q, labels, 4)
    halves = bundle(q[:30], labels[:30], 4) + bundle(q[30:], labels[30:], 4)
    shuffled = torch.randperm(60)
    assert torch.allclose(whole, halves, atol=1e-5)
    assert torch.allclose(whole, bundle(q[shuffled], labels[shuffled], 4), atol=1e-5)
    more = bundle(torch.cat([q, torch.randn(5, 64)]), torch.cat([labels, torch.full((5,), 3)]), 4)
    assert torch.equal(
        more[:3], bundle(torch.cat([q, torch.zeros(5, 64)]), torch.cat([labels, torch.full((5,), 3)]), 4)[:3]
    )


def test_one_hot_classes_are_separated() -> None:
    q, labels = torch.eye(6).repeat(5, 1), torch.arange(6).repeat(5)
    assert (cosine(q, bundle(q, labels, 6)).argmax(1) == labels).all()


@given(st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_scaling_an_exemplar_changes_no_prediction(factor: float) -> None:
    q, c = torch.randn(40, 32, generator=torch.Generator().manual_seed(3)), torch.randn(5, 32)
    scaled = c.clone()
    scaled[2] *= factor
    assert torch.equal(cosine(q, c).argmax(1), cosine(q, scaled).argmax(1))


def test_a_loud_tap_drowns_raw_sums_but_not_normalised_ones() -> None:
    taps = _taps(6)
    loud = [taps[0] * 100, taps[1]]
    l2, raw = (HDEncoder((12, 24), HDSettings(dim=256, norm=n)) for n in ("l2", "raw"))
    assert torch.allclose(l2(taps), l2(loud), atol=1e-6)
    assert not torch.allclose(raw(taps), raw(loud), atol=0.05)


def test_centring_removes_what_it_says() -> None:
    taps = _taps(50)
    channel = HDEncoder((12, 24), HDSettings(dim=64, grid=1, center="channel", norm="raw")).fit(taps)
    assert all(float(u.mean(0).abs().max()) < 1e-6 for u in channel.descriptors(taps))
    scalar = HDEncoder((12, 24), HDSettings(dim=64, grid=1, center="scalar", norm="raw")).fit(taps)
    for u, tap in zip(scalar.descriptors(taps), taps, strict=True):
        assert float(u.mean()) == pytest.approx(0, abs=1e-6)
        assert torch.allclose(u, tap.mean((2, 3)) - tap.mean(), atol=1e-6)


def test_hdff_pools_by_maximum_and_sums_raw_vectors() -> None:
    taps = _taps(5)
    encoder = HDEncoder((12, 24), HDSettings(**{**HDFF.__dict__, "dim": 256})).fit(taps)
    q = encoder(taps)
    expected = sum((t.amax((2, 3)) - t.mean()).square().sum(1) for t in taps)
    cross = 2 * (
        encoder.descriptors(taps)[0] @ encoder.matrix[:12] * (encoder.descriptors(taps)[1] @ encoder.matrix[12:])
    ).sum(1)
    assert torch.allclose(q.square().sum(1), expected + cross, rtol=1e-4)


def test_threshold_is_the_percentile_of_images_that_were_not_bundled() -> None:
    generator = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(400, 64, generator=generator), dim=1)
    memory = remember(q, torch.arange(400) % 2, 3, held_out_fraction=0.25, percentile=5)
    assert len(memory.held_out) == 100
    assert memory.seen.tolist() == [True, True, False]
    below = float((memory.held_out < memory.threshold).float().mean())
    assert below == pytest.approx(0.05, abs=0.011)
    inside = memory.score(q).mean()  # mostly bundled images: more familiar than the held-out ones
    assert float(inside) > memory.mean


def test_too_few_images_and_unknown_settings() -> None:
    with pytest.raises(UserError, match="too few to hold"):
        remember(torch.randn(5, 8), torch.zeros(5, dtype=torch.long), 2)
    with pytest.raises(UserError, match="unknown projection"):
        HDSettings(projection="fourier")  # type: ignore[arg-type]


def test_torchhd_agrees() -> None:
    torchhd = pytest.importorskip("torchhd")
    x = torchhd.random(7, 512)
    ours = bundle(torch.as_tensor(x).float(), torch.zeros(7, dtype=torch.long), 1)[0]
    assert torch.equal(ours, torch.as_tensor(torchhd.multiset(x)).float())
    y = torchhd.random(3, 512)
    theirs = torch.as_tensor(torchhd.cosine_similarity(x, y)).float()
    assert torch.allclose(cosine(torch.as_tensor(x).float(), torch.as_tensor(y).float()), theirs, atol=1e-5)
