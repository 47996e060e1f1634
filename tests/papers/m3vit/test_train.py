"""Training runs: paired arms, reproducible and resumable results, pre-training, distillation, traces."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from papers.m3vit.dataset import Batches, scenes
from papers.m3vit.model import SYNTHROOM_TASKS, MultiTaskModel
from papers.m3vit.moe import cv_squared
from papers.m3vit.options import ModelOptions
from papers.m3vit.tam import TAM
from papers.m3vit.train import ARMS, MODEL_FILE, build, evaluate, load_model, routing_trace, train_run
from shared.errors import UserError

SHAPE = {"dim": 16, "depth": 4, "heads": 2, "patch": 4, "decoder_width": 8}
TASKS = ["semseg", "parts", "sal", "normals", "edge"]


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


def run(workdir: Path, arm: str = "multi", tasks: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of a few steps; ``changes`` go to the train options unless they are arguments of train_run."""
    arguments = {key: changes.pop(key) for key in ("progress", "save", "seed", "model", "data") if key in changes}
    data = {"image": 16, "num_train": 16, "num_val": 8, **arguments.pop("data", {})}
    job = {
        "arm": arm,
        "tasks": tasks or TASKS,
        "seed": 0,
        "model": SHAPE,
        "train": {"steps": 6, "batch": 8, "warmup_steps": 2, **changes},
        "data": data,
        "threads": 1,
        **arguments,
    }
    return pickle.loads(pickle.dumps(train_run))(**job, workdir=workdir)


def without_clock(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_repeats_bit_for_bit_and_is_json(tmp_path: Path, arm: str) -> None:
    first, second = run(tmp_path / "1", arm), run(tmp_path / "2", arm)
    assert without_clock(json.loads(json.dumps(first))) == without_clock(second)
    assert set(first["metrics"]) == set(TASKS)
    assert [entry[0] for entry in first["losses"]] == [1, 2, 3, 4, 5, 6]
    assert first["seconds"] > 0
    assert without_clock(run(tmp_path / "3", arm, seed=1))["metrics"] != first["metrics"]


@pytest.mark.parametrize("arm", ["multi", "stl"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, arm: str) -> None:
    def kill(done: int, total: int) -> None:
        if done == 10:
            raise Killed

    expected = run(tmp_path / "whole", arm, ["semseg", "edge"], pretrain_steps=6)
    with pytest.raises(Killed):
        run(tmp_path / "killed", arm, ["semseg", "edge"], pretrain_steps=6, progress=kill)
    seen: list[tuple[int, int]] = []
    resumed = run(
        tmp_path / "killed", arm, ["semseg", "edge"], pretrain_steps=6, progress=lambda *now: seen.append(now)
    )
    assert seen[0][0] > 6  # pre-training was not repeated
    assert seen[-1][0] == seen[-1][1] == (18 if arm == "stl" else 12)
    assert without_clock(resumed) == without_clock(expected)


def test_router_noise_repeats_too(tmp_path: Path) -> None:
    noisy = {**SHAPE, "noise": 4.0}
    first, second = run(tmp_path / "1", model=noisy), run(tmp_path / "2", model=noisy)
    assert without_clock(first) == without_clock(second)
    assert first["losses"] != run(tmp_path / "3")["losses"]


def test_arms_start_from_the_same_weights() -> None:
    shape = ModelOptions(**SHAPE)
    dense, multi, lone = (
        build(router, tasks, shape, 16, seed=3).state_dict()
        for router, tasks in (("none", TASKS), ("multi", TASKS), ("none", ["edge"]))
    )
    moe_only = {name for name in multi if name not in dense}
    assert all(".mlp." in name for name in moe_only)
    assert all(torch.equal(dense[name], multi[name]) for name in multi if name in dense)
    assert all(torch.equal(dense[name], value) for name, value in lone.items())


def test_training_lowers_the_loss_of_every_arm(tmp_path: Path) -> None:
    for arm in ARMS:
        losses = run(tmp_path / arm, arm, ["semseg", "depth"], steps=60, data={"num_train": 8}, batch=8, lr=3e-3)[
            "losses"
        ]
        assert losses[-1][1] < 0.8 * losses[0][1], arm


def test_balance_loss_evens_out_the_experts(tmp_path: Path) -> None:
    def unevenness(weight: float) -> float:
        result = run(tmp_path / str(weight), steps=40, balance_weight=weight, lr=3e-3)
        return float(cv_squared(torch.tensor(result["routing"]["usage"])).mean())

    assert unevenness(1.0) < 0.5 * unevenness(0.0)


def test_statistics_add_up(tmp_path: Path) -> None:
    routing = run(tmp_path, tasks=["semseg", "edge"])["routing"]
    usage, gate_sum = np.array(routing["usage"]), np.array(routing["gate_sum"])
    assert usage.shape == (2, 2, 16)  # MoE layers, tasks, experts
    np.testing.assert_allclose(usage.sum(-1), 1.0, rtol=1e-5)
    assert ((gate_sum > 4 / 16) & (gate_sum < 1)).all()
    assert np.array(run(tmp_path, "single")["routing"]["usage"]).shape == (2, 1, 16)
    assert run(tmp_path, "dense")["routing"] == {"usage": [], "gate_sum": []}


def test_pretraining_moves_the_encoder_and_all_tasks_start_from_its_router(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", steps=1, warmup_steps=0, lr=1e-12, save=True)
    trained = run(tmp_path / "pre", steps=1, warmup_steps=0, lr=1e-12, save=True, pretrain_steps=5)
    frozen = load_model(tmp_path / "plain" / MODEL_FILE).state_dict()
    assert plain["notes"] == trained["notes"] == []
    for layer in (1, 3):
        routers = load_model(tmp_path / "pre" / MODEL_FILE).backbone.blocks[layer].mlp.router.weight
        torch.testing.assert_close(routers, routers[:1].expand_as(routers), atol=1e-6, rtol=0)
        other = frozen[f"backbone.blocks.{layer}.mlp.router.weight"]
        assert not torch.allclose(other, other[:1].expand_as(other), atol=1e-3)


def test_pretraining_is_shared_by_the_networks_of_single_tasks(tmp_path: Path) -> None:
    run(tmp_path, "stl", ["semseg", "edge"], steps=1, warmup_steps=0, lr=1e-12, pretrain_steps=5)

    def encoder(folder: str, prefix: str) -> dict[str, torch.Tensor]:
        weights = torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)["model"]
        return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}

    pretrained = encoder("pretrain", "backbone.")
    for task in ("semseg", "edge"):
        for name, value in encoder(task, "0.backbone.").items():
            torch.testing.assert_close(value, pretrained[name], atol=1e-6, rtol=0)


def test_pretraining_learns_which_objects_are_visible(tmp_path: Path) -> None:
    # The head reads the class token; if it could not learn, its encoder would start the tasks no better than at random.
    run(tmp_path, pretrain_steps=60, lr=3e-3, steps=1, data={"num_train": 8})
    losses = torch.load(tmp_path / "pretrain" / "checkpoint.pt", weights_only=True)["losses"]
    assert losses[-5:].mean() < 0.6 * losses[:5].mean()


def test_scaled_experts_start_n_over_k_larger() -> None:
    plain, scaled = (
        build("multi", TASKS, ModelOptions(**SHAPE, scale_experts=scale), 16, 0).state_dict() for scale in (False, True)
    )
    for name, value in plain.items():
        factor = 4.0 if name.endswith(("experts.weight2", "experts.bias2")) else 1.0
        assert torch.equal(scaled[name], factor * value), name


def test_saved_model_is_the_evaluated_one(tmp_path: Path) -> None:
    result = run(tmp_path, save=True)
    model = load_model(tmp_path / MODEL_FILE)
    assert not model.training
    data = Batches(scenes(range(1_000_000, 1_000_008), (16, 16)), 8, seed=0)
    assert evaluate(model, data) == result["metrics"]


@pytest.mark.parametrize("router", ["single", "task_cond", "multi"])
def test_routing_trace_is_the_routing(router: str) -> None:
    model = build(router, TASKS, ModelOptions(**SHAPE), 16, seed=0)
    images = torch.randn(3, 3, 16, 16)
    trace = routing_trace(model, images, "normals")
    assert trace.shape == (2, 3, 17, 4)
    assert model.training
    with torch.no_grad():
        _, routings = model.eval().forward_with_routing(images, ["normals"])
    assert np.array_equal(trace[1], routings[1].experts.view(3, 17, 4).numpy())
    assert np.array_equal(routing_trace(model, images[1:2], "normals")[:, 0], trace[:, 1])
    assert (np.sort(trace, -1)[..., 1:] != np.sort(trace, -1)[..., :-1]).all()  # K different experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "mutli"}, "multi"),
        ({"tasks": ["semsg"]}, "semseg"),
        ({"learning_rate": 0.1}, r"train\.learning_rate.*weight_decay"),
        ({"steps": 0}, r"train\.steps"),
        ({"model": {**SHAPE, "heads": 3}}, "heads"),
        ({"loss_weights": {"edges": 1.0}}, "edge"),
        ({"distillation": (2,)}, "levels 0 to 0"),
        ({"batch": 17}, "training scenes"),
    ],
)
def test_bad_options_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, **changes)


def test_a_loss_that_blows_up_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+ .*seed 0"):
        run(tmp_path, lr=1e30)


# --- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_trains_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    plain, distilled = run(tmp_path / "1", save=True), run(tmp_path / "2", distillation=(0,), save=True)
    assert distilled["parameters"] == plain["parameters"]
    assert distilled["losses"][0][1] > plain["losses"][0][1]  # the extra terms
    assert distilled["metrics"] != plain["metrics"]
    weights = torch.load(tmp_path / "2" / MODEL_FILE, weights_only=True)["weights"]
    assert set(weights) == set(torch.load(tmp_path / "1" / MODEL_FILE, weights_only=True)["weights"])


@pytest.mark.parametrize(
    ("num_tasks", "shares"), [(2, [0.5, 0.5]), (4, [0.25] * 4), (5, [0.25, 0.25, 1 / 6, 1 / 6, 1 / 6])]
)
def test_tam_weights_of_the_tasks(num_tasks: int, shares: list[float]) -> None:
    tasks = dict(list(SYNTHROOM_TASKS.items())[:num_tasks])
    tam = TAM(tasks, 4, (0, 1), stages=3)
    level = tam.levels["1"]
    torch.nn.init.zeros_(level.balance[2].weight)  # batch norm after it gives zeros, the sigmoid one half
    inputs: list[torch.Tensor] = []
    level.attention.register_forward_hook(lambda module, args, output: inputs.extend([args[0], output]))
    level.heads["parts"].register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    stages = {task: [torch.ones(2, 4, 4 * 2**i, 8 * 2**i) for i in range(3)] for task in tasks}
    outputs = tam(stages, (32, 64))
    assert inputs[0].shape[-2:] == (16, 32)  # level 1: after the third convolution
    torch.testing.assert_close(inputs[0].mean((0, 2, 3)), torch.tensor(shares).repeat_interleave(4))
    torch.testing.assert_close(inputs[2], (1 + inputs[1]).repeat(1, num_tasks, 1, 1))  # F_t (1 + M), F_t = 1
    assert len(outputs) == 2
    for predictions in outputs:
        assert {task: tuple(p.shape) for task, p in predictions.items()} == {
            task: (2, channels, 32, 64) for task, channels in tasks.items()
        }


def test_single_task_request_runs_only_its_decoder() -> None:
    model = build("multi", TASKS, ModelOptions(**SHAPE), 16, seed=0)
    calls: list[str] = []
    for task, decoder in model.decoders.items():
        decoder.register_forward_hook(lambda module, args, output, task=task: calls.append(task))
    assert isinstance(model, MultiTaskModel)
    model(torch.randn(1, 3, 16, 16), ["sal"])
    assert calls == ["sal"]
