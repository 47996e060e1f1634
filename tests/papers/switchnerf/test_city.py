"""The procedural city: its drawing order, and ray casting against all boxes at once."""

from __future__ import annotations

from pathlib import Path

import torch

from papers.switchnerf.city import (
    ALTITUDE,
    GROUND_PHASE,
    SKY,
    build_city,
    cameras,
    cast,
    image_set,
    look,
    shade,
    surface_samples,
)
from papers.switchnerf.city import GROUND as GROUND_COLOUR


def test_number_of_boxes() -> None:
    city = build_city(0)
    assert city.num_boxes == 131
    assert city.height.shape == (12, 12)
    assert build_city(0, districts=4, lots=12).height.shape == (48, 48)


def test_ray_casting_equals_a_search_over_all_boxes() -> None:
    city = build_city(3)
    g = torch.Generator().manual_seed(0)
    n = 4000
    origin = torch.rand(n, 3, generator=g) * torch.tensor([1.4, 1.4, 0.35]) + torch.tensor([-0.2, -0.2, 0.145])
    direction = torch.nn.functional.normalize(torch.randn(n, 3, generator=g) * torch.tensor([1.0, 1.0, 0.5]), dim=-1)
    colour, depth = cast(city, origin, direction)
    full = city.height.flatten() > 0
    low = torch.nn.functional.pad(city.low.flatten(0, 1)[full], (0, 1))
    high = torch.cat([city.high.flatten(0, 1)[full], city.height.flatten()[full][:, None]], -1)
    first, second = (low - origin[:, None]) / direction[:, None], (high - origin[:, None]) / direction[:, None]
    near, far = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
    boxes = torch.where((near < far) & (near > 0), near, torch.inf).amin(-1)
    ground = torch.where(direction[:, 2] < 0, -origin[:, 2] / direction[:, 2], torch.inf)
    torch.testing.assert_close(depth, torch.minimum(boxes, ground))
    assert (depth < ground).float().mean() > 0.05  # the test sees boxes, ground and sky
    sky = torch.isinf(depth)
    assert 0.1 < sky.float().mean() < 0.9
    torch.testing.assert_close(colour[sky], torch.tensor(SKY).expand(int(sky.sum()), 3))


def test_ground_colour_by_hand() -> None:
    city = build_city(0)
    point = torch.tensor([[0.0, 0.0, 0.0]])
    up = torch.tensor([[0.0, 0.0, 1.0]])
    phase, base = torch.full((1, 2), GROUND_PHASE), torch.tensor([GROUND_COLOUR])
    got = shade(city, point, up, base, phase, torch.ones(1, dtype=torch.bool))
    s = 0.5 + 0.25 * torch.tensor(0.3).sin() ** 2 + 0.25 * torch.tensor(0.6).sin()
    light = 0.35 + 0.65 * 0.88 / torch.tensor([0.4, 0.25, 0.88]).norm()
    torch.testing.assert_close(got, base * s * light)


def test_details_of_districts() -> None:
    city = build_city(0, districts=4)
    xy = torch.tensor([[0.1, 0.1], [0.1, 0.6], [0.6, 0.1], [0.6, 0.6], [1.1, 1.6]])
    assert city.detail(xy).tolist() == [0, 1, 2, 3, 1]


def test_surface_samples_lie_on_surfaces_of_the_square() -> None:
    point, direction, colour = surface_samples(build_city(0), 2000, 1)
    assert 1000 < len(point) < 2000
    assert point[:, :2].min() >= 0
    assert point[:, :2].max() <= 1
    assert point[:, 2].min() > -1e-5
    assert point[:, 2].max() <= 0.14
    assert (direction[:, 2] < 0).all()
    assert colour.min() >= 0
    assert colour.max() <= 1


def test_cameras_look_down_with_orthonormal_axes() -> None:
    views = cameras(build_city(0), 5, 0, 16)
    for view in views:
        axes = view.pose[:, :3]
        torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-6, rtol=0)
        assert torch.linalg.det(axes) > 0
        assert view.directions()[8, 8, 2] < -0.7
    one = torch.tensor([0.0])
    assert torch.allclose(look(one, one, one, one, one)[0, :, 2], torch.tensor([-1.0, 0, 0]), atol=1e-6)


def test_images_are_cast_once(tmp_path: Path) -> None:
    city = build_city(0)
    views = cameras(city, 2, 0, 8)
    first = image_set(city, views, tmp_path)
    (file,) = tmp_path.iterdir()
    torch.save(torch.zeros(128, 3), file)  # a second call must read, not cast
    assert torch.equal(image_set(city, views, tmp_path).colour, torch.zeros(128, 3))
    assert not torch.equal(image_set(build_city(1), views, tmp_path).colour, torch.zeros(128, 3))
    surface = first.rays.at(first.rays.far[:, None])[:, 0, 2]
    assert torch.allclose(surface, torch.tensor(ALTITUDE.ground), atol=1e-5)
