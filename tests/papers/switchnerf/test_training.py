"""Training: it learns, a killed run resumes to the same bits, and what it draws has the right shape."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from papers.switchnerf import city as scene
from papers.switchnerf.arms import ARMS, arm, num_parameters
from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import CONFIG_S, HMoHE, Proposal
from papers.switchnerf.jobs import CHECKPOINT, StepLog, fit_images, fit_surface
from papers.switchnerf.pictures import PALETTE, animation, city_pictures, colours, from_above
from papers.switchnerf.rays import Rays
from papers.switchnerf.render import HMoHERenderer, ProposalSampling, render_image
from papers.switchnerf.train import train_renderer
from shared.errors import UserError
from shared.training import fit

SURFACE: dict[str, Any] = {"seed": 0, "batch": 512, "lr": 1e-2, "train_rays": 4000, "test_rays": 800}


def _nothing(done: int, total: int) -> None:
    pass


def test_a_hash_field_learns_the_surface(tmp_path: Path) -> None:
    short = fit_surface(arm="hetero", steps=2, progress=_nothing, workdir=tmp_path / "a", **SURFACE)
    long = fit_surface(arm="hetero", steps=60, progress=_nothing, workdir=tmp_path / "b", **SURFACE)
    assert long["psnr"] > short["psnr"] + 3
    assert sum(long["expert_share"]) == pytest.approx(1.0)
    assert 0 <= long["drop_rate"][1] <= 1
    assert long["cpu_s"] > 0


def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    whole = fit_surface(arm="hetero", steps=9, progress=_nothing, workdir=tmp_path / "a", **SURFACE)
    defaults: Any = fit.__kwdefaults__
    with monkeypatch.context() as patch:
        patch.setitem(defaults, "checkpoint_every_s", 0.0)
        with pytest.raises(Killed):
            fit_surface(arm="hetero", steps=9, progress=kill, workdir=tmp_path / "b", **SURFACE)
    resumed = fit_surface(arm="hetero", steps=9, progress=_nothing, workdir=tmp_path / "b", **SURFACE)
    for key in ("psnr", "validation_psnr", "expert_share", "drop_rate"):
        assert resumed[key] == whole[key]


def test_renderer_training_and_pictures(tmp_path: Path) -> None:
    job: dict[str, Any] = {"seed": 0, "arm": "hetero", "batch": 128, "lr": 1e-2, "views": 4, "test_views": 2, "pixels": 16,
                           "proposal_samples": 16, "samples": 8}  # fmt: skip
    short = fit_images(steps=1, progress=_nothing, workdir=_made(tmp_path / "w" / "a"), **job)
    long = fit_images(steps=60, progress=_nothing, workdir=_made(tmp_path / "w" / "b"), **job)
    assert long["psnr"] > short["psnr"] + 1
    cfg = SimpleNamespace(
        pictures=SimpleNamespace(frames=3, pixels=8, map_pixels=12),
        tier1=SimpleNamespace(test_views=2, proposal_samples=16, samples=8),
    )
    drawn = city_pictures(0, "hetero", tmp_path / "w" / "b" / CHECKPOINT, cfg)
    with Image.open(BytesIO(drawn.flight)) as flight:
        assert getattr(flight, "n_frames", 1) == 3
    assert drawn.experts is not None
    with Image.open(BytesIO(drawn.experts)) as experts:
        assert experts.size == (48, 24)


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_the_public_trainer_fits_one_colour() -> None:
    torch.manual_seed(0)
    field = HMoHE(CONFIG_S)
    renderer = HMoHERenderer(
        field, [Proposal(GridSpec(2, 4, 8, 8))], torch.zeros(3), torch.ones(3), ProposalSampling((8,), 4)
    )
    n = 64
    rays = Rays(torch.zeros(n, 3), torch.nn.functional.normalize(torch.randn(n, 3), dim=-1), torch.full((n,), 0.1),
                torch.ones(n), torch.zeros(n, dtype=torch.int64))  # fmt: skip
    target = torch.tensor([0.8, 0.1, 0.3]).expand(n, 3)
    seen: list[int] = []
    found = train_renderer(
        renderer, lambda step: (rays, target), steps=150, on_step=lambda step, out: seen.append(step)
    )
    assert found.losses[-1] < found.losses[0]
    assert seen == list(range(150))
    torch.testing.assert_close(renderer.eval()(rays).colour, target, atol=0.05, rtol=0)
    renderer.train()
    camera = scene.cameras(scene.build_city(0), 1, 0, 4)[0]
    image, depth = render_image(renderer, camera, 0.1, 1.0)
    assert image.shape == (4, 4, 3)
    assert depth.shape == (4, 4)
    assert renderer.training


def test_arms() -> None:
    assert num_parameters("single_equal") == pytest.approx(num_parameters("hetero"), rel=0.3)
    for name in ARMS:
        arm(name).build()
    with pytest.raises(UserError, match="unknown arm"):
        arm("heteroo")


def test_step_log_ends() -> None:
    log = StepLog(4)
    for step in range(4):
        log.note(step, float(step))
    assert log.ends(2) == [0.5, 2.5]


def test_colours_and_animation() -> None:
    chosen = torch.tensor([[0, 1], [2, 3]])
    assert (255 * colours(chosen)[1, 0]).round().int().tolist() == list(PALETTE[2])
    frames = [torch.zeros(2, 2, 3), torch.ones(2, 2, 3)]
    with Image.open(BytesIO(animation(frames, 2))) as picture:
        assert (picture.size, getattr(picture, "n_frames", 1)) == ((4, 4), 2)
    above = from_above(scene.build_city(0), 8)
    assert above.shape == (8, 8, 3)
    assert above.std() > 0
