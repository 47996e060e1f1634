"""SynthRoom: a procedural indoor scene with exact dense labels, a stand-in for NYUD-v2 and PASCAL-Context that needs no download.

A ray-cast room (floor, ceiling, three walls) with textured panels and 2–6 objects. A scene is a pure function of an integer seed; the
resolution only samples it. Panels (rugs, pictures) change semantics and edges but not depth or normals, which makes tasks disagree:
``panels`` is the knob for that conflict. World axes: x right, y up, z into the room; metres. Everything here is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError

Array = NDArray[np.float64]

FLOOR, WALL, CEILING, SPHERE, BOX, CYLINDER, PANEL = range(7)  # semantic classes
BACKGROUND, SPHERE_UPPER, SPHERE_LOWER, BOX_TOP, BOX_SIDE, CYLINDER_TOP, CYLINDER_SIDE = range(7)  # parts

CEILING_HEIGHT = 2.8
PANEL_OFFSET = 0.001
NOISE = 0.03
SALIENT_SHARE = 12 / 64**2  # an object smaller than 12 of 64x64 pixels cannot be salient

_FLOOR_ID, _CEILING_ID, _LEFT_ID, _RIGHT_ID, _BACK_ID, _PANEL_ID, _OBJECT_ID = 0, 1, 2, 3, 4, 8, 64  # surface ids


@dataclass(frozen=True)
class Camera:
    """Pinhole camera: position, orthonormal axes and vertical field of view (rad)."""

    position: Array
    right: Array
    up: Array
    forward: Array
    fov: float

    def rays(self, image: tuple[int, int]) -> Array:
        """Directions (H·W, 3) through the pixel centres, of length 1 along ``forward``: the ray parameter is the depth."""
        height, width = image
        tangent = np.tan(self.fov / 2)
        x = ((2 * np.arange(width) + 1) / width - 1) * (tangent * width / height)
        y = (1 - (2 * np.arange(height) + 1) / height) * tangent
        rays = self.forward + x[None, :, None] * self.right + y[:, None, None] * self.up
        return rays.reshape(-1, 3)


@dataclass(frozen=True)
class Scene:
    """Image (H, W, 3) uint8 and labels (H, W, …)."""

    image: NDArray[np.uint8]
    semseg: NDArray[np.uint8]
    parts: NDArray[np.uint8]
    sal: NDArray[np.uint8]  # 0 or 1
    normals: NDArray[np.float32]  # camera axes: right, up, towards the viewer
    edge: NDArray[np.uint8]  # 1 where the right or the lower neighbour is another surface
    depth: NDArray[np.float32]  # metres along the optical axis
    surface: NDArray[np.uint8]  # which plane, panel or object
    camera: Camera

    def labels(self) -> dict[str, NDArray[np.generic]]:
        """Image and labels by the names of the tasks."""
        names = ("image", "semseg", "parts", "sal", "normals", "edge", "depth")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Texture:
    kind: int  # 0 plain, 1 stripes, 2 checker
    frequency: float  # per metre
    colours: Array  # (2, 3)

    @classmethod
    def draw(cls, rng: np.random.Generator, colours: Array) -> _Texture:
        return cls(int(rng.integers(3)), rng.uniform(1.5, 5.0), colours)

    def albedo(self, *coordinates: Array) -> Array:
        """Colours (P, 3) at surface coordinates of (P,) each."""
        if self.kind == 0:
            return np.broadcast_to(self.colours[0], (len(coordinates[0]), 3))
        cells = np.floor(coordinates[0] * self.frequency)
        for coordinate in coordinates[1:] if self.kind == 2 else ():
            cells = cells + np.floor(coordinate * self.frequency)
        return self.colours[cells.astype(np.int64) & 1]


class _Canvas:
    """Nearest hit per ray, with what the shader and the labels need."""

    def __init__(self, camera: Camera, rays: Array) -> None:
        self.camera, self.rays = camera, rays
        self.depth = np.full(len(rays), np.inf)
        self.surface = np.zeros(len(rays), np.uint8)
        self.semseg = np.zeros(len(rays), np.uint8)
        self.parts = np.zeros(len(rays), np.uint8)
        self.normal = np.zeros((len(rays), 3))
        self.albedo = np.zeros((len(rays), 3))

    def points(self, where: NDArray[np.intp]) -> Array:
        """World points (n, 3) of the hits so far."""
        return self.camera.position + self.depth[where, None] * self.rays[where]


def render(seed: int, image: tuple[int, int], panels: tuple[int, int] = (1, 3)) -> Scene:
    """The scene of ``seed`` at ``image`` (height, width), with ``panels`` (fewest, most) of them. Raises UserError for bad sizes."""
    if min(image) < 1:
        raise UserError(f"image is {image}: both sides must be at least 1 pixel")
    if not 0 <= panels[0] <= panels[1] <= _OBJECT_ID - _PANEL_ID:
        raise UserError(f"panels is {panels}: give (fewest, most) with 0 <= fewest <= most <= {_OBJECT_ID - _PANEL_ID}")
    # One stream each, so that the number of panels or the resolution changes nothing else.
    room_rng, panel_rng, object_rng, noise_rng = (np.random.default_rng([seed, stream]) for stream in range(4))
    camera = _camera(room_rng)
    canvas = _Canvas(camera, camera.rays(image))
    half_left, half_right, back = room_rng.uniform(2.0, 3.5), room_rng.uniform(2.0, 3.5), room_rng.uniform(4.0, 7.0)
    light = np.array([room_rng.uniform(-1, 1), CEILING_HEIGHT - 0.2, room_rng.uniform(1.0, back - 1.0)])
    brightness = room_rng.uniform(0.7, 1.2)
    with np.errstate(divide="ignore", invalid="ignore"):
        _draw_room(canvas, room_rng, -half_left, half_right, back)
        colours = _draw_objects(canvas, object_rng, back)
        # after the objects, so that a rug does not hide the lowest millimetre of one
        _draw_panels(canvas, panel_rng, int(panel_rng.integers(panels[0], panels[1] + 1)), half_left, half_right, back)
    to_light = light - canvas.points(np.arange(len(canvas.depth)))
    lambert = np.einsum("ij,ij->i", canvas.normal, to_light) / np.sqrt(np.einsum("ij,ij->i", to_light, to_light))
    shaded = canvas.albedo * ((0.35 + 0.65 * np.maximum(lambert, 0.0)) * brightness)[:, None]
    noisy = shaded + NOISE * noise_rng.standard_normal(shaded.shape)
    surface = canvas.surface.reshape(image)
    axes = np.stack([camera.right, camera.up, -camera.forward], 1)
    return Scene(
        image=(np.clip(noisy, 0.0, 1.0) * 255).round().astype(np.uint8).reshape(*image, 3),
        semseg=canvas.semseg.reshape(image),
        parts=canvas.parts.reshape(image),
        sal=_salient(surface, colours),
        normals=(canvas.normal @ axes).astype(np.float32).reshape(*image, 3),
        edge=_edges(surface),
        depth=canvas.depth.astype(np.float32).reshape(image),
        surface=surface,
        camera=camera,
    )


def _camera(rng: np.random.Generator) -> Camera:
    fov, height, pitch, yaw = (
        np.radians(rng.uniform(50, 70)),
        rng.uniform(1.2, 1.8),
        *np.radians([rng.uniform(-20, -5), rng.uniform(-25, 25)]),
    )
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    return Camera(np.array([0.0, height, 0.0]), right, np.cross(forward, right), forward, float(fov))


def _draw_room(canvas: _Canvas, rng: np.random.Generator, left: float, right: float, back: float) -> None:
    """Floor, ceiling, side walls, back wall. From inside, a ray meets one plane per axis; the nearest of the three counts."""
    textures = [_Texture.draw(rng, rng.uniform(0.15, 0.95, (2, 3))) for _ in range(5)]
    rays, position = canvas.rays, canvas.camera.position
    across = np.where(rays[:, 0] > 0, right, left) / rays[:, 0]
    upright = (np.where(rays[:, 1] > 0, CEILING_HEIGHT, 0.0) - position[1]) / rays[:, 1]
    ahead = np.where(rays[:, 2] > 0, back / rays[:, 2], np.inf)
    distances = np.stack([across, upright, ahead])
    axis = distances.argmin(0)
    canvas.depth = distances.min(0)
    positive = rays > 0
    ids = np.stack(
        [
            np.where(positive[:, 0], _RIGHT_ID, _LEFT_ID),
            np.where(positive[:, 1], _CEILING_ID, _FLOOR_ID),
            np.full(len(rays), _BACK_ID),
        ]
    )
    canvas.surface = np.take_along_axis(ids, axis[None], 0)[0].astype(np.uint8)
    planes = (
        (_FLOOR_ID, FLOOR, (0, 1, 0), (0, 2)),
        (_CEILING_ID, CEILING, (0, -1, 0), (0, 2)),
        (_LEFT_ID, WALL, (1, 0, 0), (2, 1)),
        (_RIGHT_ID, WALL, (-1, 0, 0), (2, 1)),
        (_BACK_ID, WALL, (0, 0, -1), (0, 1)),
    )
    for texture, (surface, semseg, normal, (u, v)) in zip(textures, planes, strict=True):
        where = np.flatnonzero(canvas.surface == surface)
        points = canvas.points(where)
        canvas.semseg[where], canvas.normal[where] = semseg, normal
        canvas.albedo[where] = texture.albedo(points[:, u], points[:, v])


def _draw_panels(
    canvas: _Canvas, rng: np.random.Generator, count: int, half_left: float, half_right: float, back: float
) -> None:
    """Rugs and pictures, 1 mm off their plane, earlier ones on top. Rugs stay where a ray's extra depth is below 5 mm."""
    rays, position = canvas.rays, canvas.camera.position
    for number in range(count):
        texture = _Texture.draw(rng, rng.uniform(0.15, 0.95, (2, 3)))
        if rng.random() < 0.5:
            half, plane, axes = rng.uniform(0.3, 0.9, 2), _FLOOR_ID, [0, 2]
            centre = np.array([rng.uniform(-1.5, 1.5), rng.uniform(1.5, min(4.0, back - half[1]))])
            distance = (PANEL_OFFSET - position[1]) / rays[:, 1]
        else:
            half, plane, axes = np.array([rng.uniform(0.25, 0.7), rng.uniform(0.2, 0.5)]), _BACK_ID, [0, 1]
            centre = np.array([rng.uniform(half[0] - half_left, half_right - half[0]), rng.uniform(1.0, 2.0)])
            distance = (back - PANEL_OFFSET) / rays[:, 2]
        on_plane = np.flatnonzero(canvas.surface == plane)
        spots = (position + distance[on_plane, None] * rays[on_plane])[:, axes] - centre
        inside = (np.abs(spots) < half).all(1)
        where = on_plane[inside]
        canvas.depth[where] = distance[where]
        canvas.surface[where], canvas.semseg[where] = _PANEL_ID + number, PANEL
        canvas.albedo[where] = texture.albedo(spots[inside, 0], spots[inside, 1])


def _draw_objects(canvas: _Canvas, rng: np.random.Generator, back: float) -> Array:
    """2–6 spheres, boxes and cylinders that stand on the floor. Returns their base colours (n, 3)."""
    count = int(rng.integers(2, 7))
    colours = rng.uniform(0.1, 1.0, (count, 3))
    for number, colour in enumerate(colours):
        kind = (SPHERE, BOX, CYLINDER)[rng.integers(3)]
        x, z = rng.uniform(-1.6, 1.6), rng.uniform(1.8, min(5.0, back - 0.6))
        texture = _Texture.draw(rng, np.stack([colour, 0.6 * colour]))
        if kind == SPHERE:
            radius = rng.uniform(0.2, 0.55)
            base = np.array([x, radius, z])
            hit = _hit_sphere(canvas, base, radius)
        elif kind == BOX:
            half = rng.uniform([0.15, 0.2, 0.15], [0.5, 0.6, 0.5])
            base = np.array([x, half[1], z])
            hit = _hit_box(canvas, base, half, rng.uniform(0.0, np.pi))
        else:
            radius, height = rng.uniform(0.15, 0.4), rng.uniform(0.4, 1.3)
            base = np.array([x, 0.0, z])
            hit = _hit_cylinder(canvas, base, radius, height)
        distance, where, normal, parts = hit
        canvas.depth[where] = distance
        canvas.surface[where], canvas.semseg[where] = _OBJECT_ID + number, kind
        canvas.normal[where], canvas.parts[where] = normal, parts
        spots = canvas.points(where) - base
        canvas.albedo[where] = texture.albedo(spots[:, 1], spots[:, 0], spots[:, 2])
    return colours


_Hit = tuple[Array, NDArray[np.intp], Array, NDArray[np.intp]]  # distance (n,), rays hit (n,), normal (n, 3), part (n,)


def _hit_sphere(canvas: _Canvas, centre: Array, radius: float) -> _Hit:
    rays, offset = canvas.rays, canvas.camera.position - centre
    a = np.einsum("ij,ij->i", rays, rays)
    half_b = rays @ offset
    distance = (-half_b - np.sqrt(half_b**2 - a * (offset @ offset - radius**2))) / a  # NaN where the ray misses
    where = np.flatnonzero((distance > 0) & (distance < canvas.depth))
    distance = distance[where]
    normal = (offset + distance[:, None] * rays[where]) / radius
    return distance, where, normal, np.where(normal[:, 1] >= 0, SPHERE_UPPER, SPHERE_LOWER)


def _hit_box(canvas: _Canvas, centre: Array, half: Array, yaw: float) -> _Hit:
    """Slab test in the box's own axes."""
    axes = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    rays, origin = canvas.rays @ axes.T, axes @ (canvas.camera.position - centre)
    near = (-np.sign(rays) * half - origin) / rays
    far = (np.sign(rays) * half - origin) / rays
    entry = near.max(1)
    where = np.flatnonzero((entry > 0) & (entry <= far.min(1)) & (entry < canvas.depth))
    face = near[where].argmax(1)
    normal = -np.sign(rays[where, face])[:, None] * axes[face]
    return entry[where], where, normal, np.where(face == 1, BOX_TOP, BOX_SIDE)


def _hit_cylinder(canvas: _Canvas, base: Array, radius: float, height: float) -> _Hit:
    """An upright cylinder on the floor: its mantle, or its lid where the camera looks down on it."""
    rays, offset = canvas.rays, canvas.camera.position - base
    across, start = rays[:, [0, 2]], offset[[0, 2]]
    a = np.einsum("ij,ij->i", across, across)
    half_b = across @ start
    side = (-half_b - np.sqrt(half_b**2 - a * (start @ start - radius**2))) / a
    level = offset[1] + side * rays[:, 1]
    side = np.where((level >= 0) & (level <= height), side, np.inf)
    lid = (height - offset[1]) / rays[:, 1]
    spots = start + lid[:, None] * across
    lid = np.where((rays[:, 1] < 0) & (np.einsum("ij,ij->i", spots, spots) <= radius**2), lid, np.inf)
    distance = np.minimum(side, lid)
    where = np.flatnonzero((distance > 0) & (distance < canvas.depth))
    distance, on_lid = distance[where], lid[where] < side[where]
    mantle = (start + distance[:, None] * across[where]) / radius
    normal = np.zeros((len(where), 3))
    normal[:, 0], normal[:, 2] = mantle[:, 0], mantle[:, 1]
    normal[on_lid] = (0.0, 1.0, 0.0)
    return distance, where, normal, np.where(on_lid, CYLINDER_TOP, CYLINDER_SIDE)


def _edges(surface: NDArray[np.uint8]) -> NDArray[np.uint8]:
    edge = np.zeros(surface.shape, bool)
    edge[:, :-1] |= surface[:, :-1] != surface[:, 1:]
    edge[:-1] |= surface[:-1] != surface[1:]
    return edge.astype(np.uint8)


def _salient(surface: NDArray[np.uint8], colours: Array) -> NDArray[np.uint8]:
    """Mask of the visible object whose base colour is farthest from the mean of the other visible ones; empty if none is visible."""
    pixels = np.bincount(surface.ravel(), minlength=_OBJECT_ID + len(colours))[_OBJECT_ID:]
    visible = np.flatnonzero(pixels >= SALIENT_SHARE * surface.size)
    if len(visible) == 0:
        return np.zeros(surface.shape, np.uint8)
    seen = colours[visible]
    others = (seen.sum(0) - seen) / max(len(seen) - 1, 1)
    salient = visible[np.linalg.norm(seen - others, axis=1).argmax()]
    return (surface == _OBJECT_ID + salient).astype(np.uint8)
