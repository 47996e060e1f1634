"""Pictures for the report: unseen views beside the truth, the expert map, and a flight as an animated PNG.

``python -m papers.switchnerf.pictures city_hmohe.npz MACHINE`` draws what a training run on the large city kept into ``measured/``.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from papers.switchnerf import city as scene
from papers.switchnerf.jobs import renderer_of, sampling_of
from papers.switchnerf.render import expert_map, render_image, render_path

# Okabe-Ito: told apart by people with colour-blindness too
PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (120, 120, 120),
)
FRAME_MS = 120


@dataclass(frozen=True)
class Drawn:
    """PNG bytes."""

    views: bytes
    experts: bytes | None
    flight: bytes


def city_pictures(seed: int, arm: str, checkpoint: Path, cfg: Any) -> Drawn:
    """Pictures of a renderer trained by :func:`papers.switchnerf.jobs.fit_images`."""
    p, t = cfg.pictures, cfg.tier1
    built = scene.build_city(seed)
    renderer = renderer_of(arm, sampling_of(t.proposal_samples, t.samples))
    renderer.load_state_dict(torch.load(checkpoint, weights_only=True))
    renderer.eval()
    columns = []
    for camera in scene.cameras(built, max(t.test_views, 1), 1000 + seed, p.pixels)[:4]:
        image, _ = render_image(renderer, camera, 0.0, 10.0, altitude=scene.ALTITUDE, batch=4096)
        rays = camera.rays(0.0, 10.0)
        truth = scene.cast(built, rays.origin, rays.direction)[0].view_as(image)
        columns.append(torch.cat([image, truth]))
    frames = render_path(renderer, scene.fly_over(built, p.frames, p.pixels), 0.0, 10.0, altitude=scene.ALTITUDE)
    field = renderer.network
    experts = None
    if not hasattr(field, "config") or len(field.config.experts) > 1:
        chosen = expert_map(renderer, 0.03, p.map_pixels, torch.zeros(2), torch.full((2,), built.extent))
        experts = png(torch.cat([colours(chosen), from_above(built, p.map_pixels)], 1), 2)
    return Drawn(png(torch.cat(columns, 1), 3), experts, animation(list(frames), 4))


def from_above(built: scene.City, size: int) -> Tensor:
    """The city seen vertically from above (size, size, 3), row = y as in :func:`expert_map`."""
    line = (torch.arange(size) + 0.5) / size * built.extent
    y, x = torch.meshgrid(line, line, indexing="ij")
    origin = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)
    down = torch.tensor([0.0, 0.0, -1.0]).expand_as(origin)
    return scene.cast(built, origin, down)[0].view(size, size, 3)


def colours(chosen: Tensor) -> Tensor:
    """Expert numbers (H, W) as colours (H, W, 3) in [0, 1]."""
    palette = torch.tensor(PALETTE, dtype=torch.float32) / 255
    return palette[chosen.long() % len(PALETTE)]


def _image(pixels: Tensor, zoom: int) -> Image.Image:
    array = (255 * pixels.clamp(0, 1)).round().byte().numpy()
    return Image.fromarray(np.repeat(np.repeat(array, zoom, 0), zoom, 1))


def png(pixels: Tensor, zoom: int = 1) -> bytes:
    """A picture (H, W, 3) in [0, 1], every pixel ``zoom`` wide."""
    file = io.BytesIO()
    _image(pixels, zoom).save(file, "PNG", optimize=True)
    return file.getvalue()


def animation(frames: list[Tensor], zoom: int = 1) -> bytes:
    """Frames (H, W, 3) as an endlessly repeated animated PNG."""
    images = [_image(frame, zoom) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0)
    return file.getvalue()


def sheet(file: Path) -> bytes:
    """Unseen views of the large city, rendered above and true below, and beside them the expert map as seen from above."""
    kept = np.load(file)
    numbers = sorted(name.removeprefix("image") for name in kept.files if name.startswith("image"))
    columns = [np.concatenate([kept[f"image{i}"], kept[f"truth{i}"]]) for i in numbers]
    views = torch.from_numpy(np.concatenate(columns, 1)).float() / 255
    if "experts" not in kept:
        return png(views)
    chosen = colours(torch.from_numpy(kept["experts"]))
    height = views.shape[0]
    row = (torch.arange(height) * chosen.shape[0]) // height
    return png(torch.cat([views, chosen[row][:, row]], 1))


def flight(file: Path, frames: int = 8, pixels: int = 144) -> bytes:
    """The flight over the large city as a small animated PNG."""
    kept = torch.from_numpy(np.load(file)["flight"]).float() / 255
    some = kept[torch.linspace(0, len(kept) - 1, min(frames, len(kept))).long()].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(some, (pixels, pixels), mode="area")
    return animation(list(small.permute(0, 2, 3, 1)), 2)


if __name__ == "__main__":
    source, machine = Path(sys.argv[1]), sys.argv[2]
    folder = Path(__file__).parent / "measured"
    (folder / f"city_{machine}.png").write_bytes(sheet(source))
    (folder / f"flight_{machine}.png").write_bytes(flight(source))
