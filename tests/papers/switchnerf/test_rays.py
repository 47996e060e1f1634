"""Encodings, cameras, samples and compositing, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.switchnerf.encodings import contract, frequency_encoding, spherical_harmonics, to_unit_cube, truncated_exp
from papers.switchnerf.losses import distortion_loss, interlevel_loss, psnr, ssim
from papers.switchnerf.rays import Altitude, Camera, Ellipsoid, Rays, compositing_weights, inverse_cdf, stratified


def test_frequency_encoding_has_no_pi() -> None:
    assert frequency_encoding(torch.zeros(1, 3), 12).shape == (1, 75)
    assert frequency_encoding(torch.zeros(1, 1), 2).tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0]]
    torch.testing.assert_close(
        frequency_encoding(torch.ones(1, 1), 2), torch.tensor([[1, math.sin(1), math.cos(1), math.sin(2), math.cos(2)]])
    )


def test_spherical_harmonics_are_orthonormal() -> None:
    # Mean over the sphere of Y_i Y_j is δ_ij / 4π; a product of Gauss-Legendre and a uniform circle integrates degree 6 exactly.
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * 2 * math.pi / 16
    z, p = np.meshgrid(nodes, phi, indexing="ij")
    r = np.sqrt(1 - z**2)
    d = torch.from_numpy(np.stack([r * np.cos(p), r * np.sin(p), z], -1)).view(-1, 3)
    w = torch.from_numpy(np.repeat(weights, 16) / 2 / 16)
    y = spherical_harmonics(d)
    torch.testing.assert_close(4 * math.pi * (y.T * w) @ y, torch.eye(16).double(), atol=1e-12, rtol=0)


def test_contraction() -> None:
    u = torch.tensor([[2.0, 0.0, 0.0], [0.3, -0.9, 0.1], [1.0, 0.5, -1.0], [math.inf, 0.0, 0.0]])
    expected = torch.tensor([[1.5, 0.0, 0.0], [0.3, -0.9, 0.1], [1.0, 0.5, -1.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(contract(u), expected)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_contraction_stays_in_its_cube_and_is_continuous(values: list[float]) -> None:
    u = torch.tensor(values, dtype=torch.float64)
    assert contract(u).abs().max() <= 2.0
    assert ((to_unit_cube(u) >= 0) & (to_unit_cube(u) <= 1)).all()
    size = u.abs().max()
    if size > 0:
        near = contract(u / size * (1 + 1e-9)) - contract(u / size * (1 - 1e-9))
        assert near.abs().max() < 1e-8


def test_truncated_exp_clamps_value_and_gradient() -> None:
    x = torch.tensor([0.0, 100.0], requires_grad=True)
    y = truncated_exp(x)
    y.sum().backward()
    assert y.tolist() == pytest.approx([1.0, math.exp(15)])
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1.0, math.exp(15)])


def test_camera_rays() -> None:
    pose = torch.tensor([[1.0, 0, 0, 7], [0, 1, 0, 8], [0, 0, 1, 9]])
    camera = Camera(4, 2, 2.0, 2.0, 2.0, 1.0, pose)
    direction = camera.directions()
    expected = torch.tensor([-0.75, 0.25, -1.0])  # first pixel: centre (0.5, 0.5), left of and above the axis
    torch.testing.assert_close(direction[0, 0], expected / expected.norm())
    assert camera.rays(0.1, 5.0).origin[3].tolist() == [7.0, 8.0, 9.0]
    small = camera.scaled(2)
    assert (small.width, small.height, small.fx, small.cx) == (2, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="scaled down by 3"):
        camera.scaled(3)


def _rays(origin: list[float], direction: list[float], near: float = 0.0, far: float = 100.0) -> Rays:
    d = torch.nn.functional.normalize(torch.tensor([direction], dtype=torch.float32), dim=-1)
    return Rays(
        torch.tensor([origin], dtype=torch.float32),
        d,
        torch.tensor([near]),
        torch.tensor([far]),
        torch.zeros(1, dtype=torch.int64),
    )


def test_altitude_planes() -> None:
    planes = Altitude(top=0.15, ground=0.0, axis=2, down=-1)  # z up
    falling = planes.bound(_rays([0, 0, 0.35], [0, 0, -1]))
    assert (falling.near.item(), falling.far.item()) == pytest.approx((0.2, 0.35))
    rising = planes.bound(_rays([0, 0, 0.05], [0, 0, 1.0]))
    assert (rising.near.item(), rising.far.item()) == (0.0, 100.0)
    mega = Altitude(top=-0.3, ground=0.2).bound(_rays([-0.5, 0, 0], [1.0, 0, 0]))  # x down
    assert (mega.near.item(), mega.far.item()) == pytest.approx((0.2, 0.7))


def test_ellipsoid_holds_all_cameras() -> None:
    positions = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 2.0, 1.0])
    region = Ellipsoid.around(positions, Altitude(-0.2, 0.4))
    assert region.unit(positions).norm(dim=-1).max() <= 1 / 1.1 + 1e-6
    sphere = Ellipsoid(torch.zeros(3), torch.ones(3))
    assert sphere.exit(_rays([0.5, 0, 0], [1.0, 0, 0])).item() == pytest.approx(0.5)


@given(sigma=st.floats(0.01, 20.0), length=st.floats(0.01, 3.0), cuts=st.integers(1, 40))
@settings(deadline=None)
def test_opacity_does_not_depend_on_the_subdivision(sigma: float, length: float, cuts: int) -> None:
    delta = torch.full((1, cuts), length / cuts, dtype=torch.float64)
    weights, through = compositing_weights(torch.full_like(delta, sigma), delta)
    assert weights.sum().item() == pytest.approx(1 - math.exp(-sigma * length), abs=1e-6)
    assert (weights.sum() + through).item() == pytest.approx(1.0, abs=1e-6)


def test_samples_follow_the_weights() -> None:
    edges = stratified(torch.tensor([2.0]), torch.tensor([6.0]), 4, jitter=False)
    assert edges.tolist() == [[2, 3, 4, 5, 6]]
    drawn = inverse_cdf(edges, torch.tensor([[0.0, 1.0, 0.0, 1.0]]), 4, jitter=False)
    torch.testing.assert_close(drawn, torch.tensor([[3.25, 3.75, 5.25, 5.75]]))
    jittered = stratified(torch.tensor([2.0]), torch.tensor([6.0]), 100, jitter=True)
    assert (jittered.diff(dim=-1) >= 0).all()
    assert (jittered[0, 0], jittered[0, -1]) != (2.0, 6.0)
    assert jittered.min() >= 2.0
    assert jittered.max() <= 6.0


def test_interlevel_loss() -> None:
    edges, weights = torch.tensor([[0.0, 0.25, 0.5, 1.0]]), torch.tensor([[0.2, 0.5, 0.3]])
    assert interlevel_loss(edges, weights, edges, weights).item() == 0.0
    proposal = torch.zeros(
        1, 1, requires_grad=True
    )  # one interval that claims nothing is there: w²/w summed, 3 intervals
    loss = interlevel_loss(edges, weights, torch.tensor([[0.0, 1.0]]), proposal)
    assert loss.item() == pytest.approx(1.0 / 3, abs=1e-5)
    loss.backward()
    assert proposal.grad is not None
    assert proposal.grad.item() < 0  # more weight would lower the loss


def test_distortion_loss() -> None:
    one = torch.tensor([[0.0, 0.3, 0.5, 1.0]])
    assert distortion_loss(one, torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(0.2 / 3)
    eps = 1e-7
    two = torch.tensor([[0.1, 0.1 + eps, 0.7, 0.7 + eps]])
    assert distortion_loss(two, torch.tensor([[0.5, 0.0, 0.5]])).item() == pytest.approx(0.6 / 2, abs=1e-5)


def test_metrics() -> None:
    image = torch.rand(16, 16, 3)
    assert psnr(torch.full_like(image, 0.5), torch.full_like(image, 0.6)) == pytest.approx(20.0, abs=1e-5)
    assert ssim(image, image) == pytest.approx(1.0)
    assert ssim(image, 1 - image) < 0.5
