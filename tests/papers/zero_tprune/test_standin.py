"""Canvases, search and the ImageNet path."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from papers.zero_tprune import counts, digits, standin
from papers.zero_tprune.imagenet import accuracies, create, image_folder, loader
from papers.zero_tprune.plans import Schedule, ToMe, family
from papers.zero_tprune.pruner import prune
from papers.zero_tprune.search import ats_for_share, best_plan, correct, draw_schedule, draw_tome, draws, search
from papers.zero_tprune.shape import plain, shape_of
from shared.errors import UserError

SHAPE = plain("small", 6, 48, 3, side=8)


def silent(done: int, total: int) -> None:
    pass


def test_canvases_are_seeded_and_show_the_target() -> None:
    source = digits.load("digits", None, train=True)
    images, labels = source.canvases(16, torch.Generator().manual_seed(3))
    again, same = source.canvases(16, torch.Generator().manual_seed(3))
    assert images.shape == (16, 1, 40, 40)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    grey = images * digits.SCALE + digits.MEAN
    assert float(grey.amax(dim=(1, 2, 3)).min()) > 0.9  # every canvas holds a bright stroke


def test_training_and_test_digits_are_disjoint() -> None:
    train, test = digits.load("digits", None, train=True), digits.load("digits", None, train=False)
    assert len(train.labels) == 1400
    assert len(test.labels) == 397
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert not set(order[:1400].tolist()) & set(order[1400:].tolist())
    assert train.images.shape[1:] == (28, 28)
    assert float(train.images[:, :2].abs().max()) == 0.0  # the padding


def test_pasting_by_hand() -> None:
    piece = torch.arange(4.0).view(1, 2, 2) + 1
    canvas = digits._paste(piece, torch.tensor([3]), torch.tensor([37]))
    assert canvas.shape == (1, 40, 40)
    assert canvas[0, 3:5, 37:39].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert float(canvas.sum()) == 10.0
    assert digits._window(canvas, torch.tensor([3]), torch.tensor([36]), 3)[0].tolist() == [
        [0, 1, 2],
        [0, 3, 4],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_draws_meet_the_budget(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    schedules = draws(lambda g: draw_schedule(SHAPE, share, g), 6, generator)
    merges = draws(lambda g: draw_tome(SHAPE, share, g), 6, generator)
    assert len(schedules) == len(merges) == 6
    for plan in (*schedules, *merges):
        assert counts.share(SHAPE, plan) == pytest.approx(share, rel=0.0101)
    assert len(set(schedules)) == 6
    assert all(max(layer.after for layer in plan.layers) < 6 for plan in schedules)


class _Brightest(nn.Module):
    """A stand-in for a model that is right when the first pixel says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x[:, 0, 0, 0], x[:, 0, 0, 0]], dim=1)


def test_correct_counts_right_answers() -> None:
    images = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).view(5, 1, 1, 1)
    labels = torch.tensor([1, 0, 0, 0, 1])
    assert correct(_Brightest(), images, labels, batch=2).tolist() == [True, True, False, True, True]


def test_the_best_plan_is_chosen_by_accuracy() -> None:
    model = standin.build(0).eval()
    images = torch.randn(8, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    plans = [family(6, 64, 0.3), Schedule(())]
    with torch.no_grad():
        labels = model(images).argmax(dim=-1)  # what the unpruned model says is the truth here
    with prune(model, Schedule(())) as pruner:
        assert best_plan(pruner, plans[::-1], images, labels) == Schedule(())
    found = search(model, images, labels, 0.7, number=3)
    assert counts.share(shape_of(model), found) == pytest.approx(0.7, rel=0.0101)
    with pytest.raises(UserError, match="milder cut"):
        search(model, images, labels, 0.01, number=1)


def test_ats_is_tuned_to_the_budget() -> None:
    model = standin.build(0).eval()
    images = torch.randn(8, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    with prune(model, Schedule(())) as pruner:
        plan, got = ats_for_share(pruner, shape_of(model), images, 0.7)
    assert got == pytest.approx(0.7, abs=0.05)
    assert plan.first == 2


def test_jobs_are_deterministic_and_resume(tmp_path: Path) -> None:
    common: dict[str, Any] = {"seed": 3, "source": "digits", "root": None, "progress": silent}
    evaluation: dict[str, Any] = {
        "test_images": 12,
        "calibration_images": 6,
        "draws_per_method": 1,
        "shares": [0.65],
        "curve": [0.8],
        "scorer": "wpr",
    }
    outputs = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        trained = standin.train_seed(steps=4, batch=4, lr=1e-3, workdir=folder, **common)
        assert (
            standin.train_seed(steps=4, batch=4, lr=1e-3, workdir=folder, **common) == trained
        )  # the checkpoint is complete
        found = standin.evaluate_seed(
            checkpoint=str(folder / standin.CHECKPOINT), workdir=folder, **evaluation, **common
        )
        outputs.append(json.dumps([trained, found], sort_keys=True))
    assert outputs[0] == outputs[1]
    accuracy = json.loads(outputs[0])[1]["shares"]["0.65"]["accuracy"]
    assert {"random", "class row", "full", "tome constant", "tome searched", "ats"} <= set(accuracy)
    assert set(json.loads(outputs[0])[1]["shares"]["0.8"]["accuracy"]) == {
        "random",
        "class row",
        "full",
        "tome constant",
    }


def test_optimisers_as_one_resume_where_they_stopped() -> None:
    """Momenta are saved and restored: a copy that loads them takes the same next step, one that does not takes another."""

    def parts(weights: list[nn.Parameter]) -> standin.All:
        return standin.All(torch.optim.Muon(weights[:1], lr=0.1), torch.optim.AdamW(weights[1:], lr=0.1))

    def step(weights: list[nn.Parameter], optimizer: standin.All, seed: int) -> None:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        sum((w * torch.randn(w.shape, generator=generator)).sum() for w in weights).backward()  # type: ignore[union-attr]
        optimizer.step()

    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    optimizer = parts(weights)
    step(weights, optimizer, 0)
    copies = [[nn.Parameter(w.detach().clone()) for w in weights] for _ in range(2)]
    resumed, fresh = parts(copies[0]), parts(copies[1])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, one in ((weights, optimizer), (copies[0], resumed), (copies[1], fresh)):
        step(some, one, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, copies[1], strict=True))


def test_the_control_ranks_by_chance() -> None:
    assert {rule.method for rule in standin.rules("random").values()} == {"random"}
    assert {rule.method for rule in standin.rules("wpr").values()} == {"zero_tprune"}


# --- real images ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    for number, name in enumerate(("n01", "n02", "n03")):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(
                0,
                255,
                (50 + 10 * i, 70, 3),
                generator=torch.Generator().manual_seed(10 * number + i),
                dtype=torch.uint8,
            )
            Image.fromarray(pixels.numpy()).save(tmp_path / "val" / name / f"{i}.JPEG")
    return tmp_path


def test_accuracy_on_a_folder_of_images(folder: Path) -> None:
    model = create("test_vit", num_classes=3)
    batches = loader(image_folder(folder), model, batch=4)
    images, labels = next(iter(batches))
    assert images.shape == (4, 3, 160, 160)  # the model's own size
    assert labels.tolist() == [0, 0, 1, 1]
    hits = accuracies(model, batches, {"unpruned": None, "pruned": family(6, 100, 0.2), "tome": ToMe((4,) * 6)})
    assert all(found.shape == (6,) for found in hits.values())
    with torch.no_grad():
        direct = torch.cat([model(x).argmax(-1) == y for x, y in batches])
    assert torch.equal(hits["unpruned"], direct)
    assert len(loader(image_folder(folder), model, batch=4, limit=3).dataset) == 3


def test_weights_from_a_file(tmp_path: Path) -> None:
    model = create("test_vit", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    other = create("test_vit", str(tmp_path / "w.pth"))  # three classes, as the file says
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="another model's"):
        create("test_vit", str(tmp_path / "w.pth"), num_classes=5)
    with pytest.raises(UserError, match="does not exist"):
        create("test_vit", str(tmp_path / "no.pth"))
    (tmp_path / "bad.pth").write_text("nothing")
    with pytest.raises(UserError, match="no state dict"):
        create("test_vit", str(tmp_path / "bad.pth"))


def test_wrong_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model 'vit_nothing'"):
        create("vit_nothing")
    with pytest.raises(UserError, match="no images under"):
        image_folder(tmp_path)
