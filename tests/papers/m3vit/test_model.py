"""Backbone, decoders, multi-task model: parameter and operation counts, task paths, symmetries."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from papers.m3vit.model import (
    PASCAL_TASKS,
    SYNTHROOM_TASKS,
    Backbone,
    Decoder,
    MultiTaskModel,
    ViTConfig,
    initialise,
    preset,
)
from shared.errors import UserError

PASCAL, NYUD = (512, 512), (480, 640)


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(image: tuple[int, int], router: str, num_tasks: int = 1) -> Backbone:
    with torch.device("meta"):
        return Backbone(preset("small", image, router=router), num_tasks)


def micro(router: str = "multi", seed: int = 0, **changes: object) -> MultiTaskModel:
    config = preset("micro", (32, 32), dim=16, depth=4, patch=8, heads=2, router=router, **changes)
    model = MultiTaskModel(config, SYNTHROOM_TASKS, decoder_width=8).double()
    initialise(model, seed)
    return model.eval()


@pytest.mark.parametrize(
    ("image", "router", "num_tasks", "expected"),
    [
        (PASCAL, "none", 1, 21_982_848),
        (NYUD, "none", 1, 22_050_432),
        (PASCAL, "single", 1, 43_315_584),
        (PASCAL, "multi", 1, 43_315_584),
        (PASCAL, "multi", 5, 43_463_040),
    ],
)
def test_backbone_parameters(image: tuple[int, int], router: str, num_tasks: int, expected: int) -> None:
    assert num_parameters(small(image, router, num_tasks)) == expected


def test_deit_small_parameters() -> None:
    with torch.device("meta"):
        backbone = Backbone(preset("small", (224, 224), router="none"), 1)
    final_norm_and_head = 2 * 384 + 384 * 1000 + 1000
    assert num_parameters(backbone) + final_norm_and_head == 22_050_664


@pytest.mark.parametrize("channels", [1, 3, 21, 40])
def test_decoder_parameters(channels: int) -> None:
    assert num_parameters(Decoder(384, 256, 16, channels)) == 2_658_305 + 257 * (channels - 1)


@pytest.mark.parametrize(
    ("image", "router", "gmacs"),
    [(PASCAL, "none", 31.749), (PASCAL, "multi", 31.787), (NYUD, "none", 39.149), (NYUD, "multi", 39.193)],
)
def test_encoder_operations(image: tuple[int, int], router: str, gmacs: float) -> None:
    backbone = small(image, router, 5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, *image, device="meta"), [2])
    macs = counter.get_total_flops() / 2  # 1 MAC = 2 FLOPs
    t, d = image[0] * image[1] // 256 + 1, 384
    block = 4 * t * d * d + 2 * t * t * d + 8 * t * d * d
    expected = 12 * block + (t - 1) * 768 * d + (6 * t * d * 16 if router == "multi" else 0)
    assert macs == expected
    assert round(macs / 1e9, 3) == gmacs


def test_decoder_operations() -> None:
    with torch.device("meta"):
        decoder, tokens = Decoder(384, 256, 16, 21).eval(), torch.empty(1, 1025, 384)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = decoder(tokens, (32, 32))
    assert out.shape == (1, 21, 512, 512)
    n = 1024
    expected = n * 9 * 384 * 256 + (4 + 16 + 64) * n * 9 * 256**2 + 64 * n * 256 * 21
    assert counter.get_total_flops() == 2 * expected


def test_single_task_request_runs_one_router_and_one_decoder() -> None:
    with torch.device("meta"):
        model = MultiTaskModel(preset("small", PASCAL, router="multi"), PASCAL_TASKS).eval()
        images = torch.empty(1, 3, *PASCAL)
    flops = {}
    for tasks in (["semseg"], list(PASCAL_TASKS)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = model(images, tasks)
        flops[len(tasks)] = counter.get_total_flops()
        assert list(outputs) == tasks
    assert round(flops[1] / 2e9, 2) == round(31.787 + 51.99, 2)
    # five passes would be 5·31.787 G; patch embedding, block 0 and the attention of block 1 are shared: 17.3 G less
    decoders = sum(1024 * 64 * 256 * c for c in PASCAL_TASKS.values()) + 5 * (
        1024 * 9 * 384 * 256 + 84 * 1024 * 9 * 256**2
    )
    assert round((5 * 31.7868 - (flops[5] / 2 - decoders) / 1e9), 1) == 17.3


@pytest.mark.parametrize(("router", "gmacs"), [("none", 290.50), ("single", 290.54)])
def test_models_without_task_routing_encode_once_for_all_tasks(router: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = MultiTaskModel(preset("small", PASCAL, router=router), PASCAL_TASKS).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *PASCAL, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 2) == gmacs


def test_decoder_drops_the_class_token_and_keeps_the_grid() -> None:
    decoder = micro("none").decoders["semseg"]
    tokens = torch.randn(1, 43, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = decoder(tokens, (6, 7))
        other_class = torch.cat([torch.randn(1, 1, 16, dtype=torch.float64), tokens[:, 1:]], 1)
        assert torch.equal(decoder(other_class, (6, 7)), plain)
        tokens[:, 1 + 7 * 5 + 6] += torch.randn(16, dtype=torch.float64)  # row 5, column 6: the lower right corner
        change = (decoder(tokens, (6, 7)) - plain).abs().sum(1)[0]
    assert change[-4:, -4:].min() > 0
    assert change[:24, :24].max() == 0  # three tokens away, beyond what the convolutions reach


@pytest.mark.parametrize("router", ["none", "single", "multi", "task_cond"])
def test_tasks_together_equal_tasks_one_by_one(router: str) -> None:
    model = micro(router)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        together = model(images, ["normals", "edge", "semseg"])
        assert list(together) == ["normals", "edge", "semseg"]
        for task, prediction in together.items():
            assert prediction.shape == (3, SYNTHROOM_TASKS[task], 32, 32)
            torch.testing.assert_close(model(images, [task])[task], prediction, rtol=1e-12, atol=1e-12)


def test_multi_gate_with_equal_routers_is_the_single_router_model() -> None:
    single, multi = micro("single"), micro("multi")
    weights = multi.state_dict()
    for name, value in single.state_dict().items():
        weights[name].copy_(value.expand_as(weights[name]))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for task in SYNTHROOM_TASKS:
            assert torch.equal(single(images, [task])[task], multi(images, [task])[task])


def test_routers_of_different_tasks_route_differently() -> None:
    model = micro("multi")
    _, routings = model.forward_with_routing(torch.randn(2, 3, 32, 32, dtype=torch.float64), ["semseg", "edge"])
    assert len(routings) == 2  # blocks 1 and 3
    assert routings[0].experts.shape == (2, 2 * 17, 4)
    assert not torch.equal(routings[0].experts[0], routings[0].experts[1])


def test_permuting_patches_permutes_the_tokens_without_position_embedding() -> None:
    model = micro("multi").backbone
    torch.nn.init.zeros_(model.position)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    patches = images.view(1, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(16, 3, 8, 8)
    order = torch.randperm(16)
    shuffled = patches[order].view(1, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 32, 32)
    with torch.no_grad():
        tokens, permuted = model(images, [0])[0], model(shuffled, [0])[0]
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted[:, 0], tokens[:, 0], rtol=1e-12, atol=1e-12)


def test_odd_blocks_are_moe() -> None:
    backbone = small(PASCAL, "multi", 2)
    assert [i for i, block in enumerate(backbone.blocks) if block.is_moe] == [1, 3, 5, 7, 9, 11]


def test_weights_of_equal_name_and_shape_are_equal_across_arms() -> None:
    dense, multi = micro("none").state_dict(), micro("multi").state_dict()
    shared = [n for n in dense if n in multi and dense[n].shape == multi[n].shape]
    assert {"backbone.blocks.0.mlp.fc1.weight", "decoders.edge.head.weight", "backbone.position"} <= set(shared)
    assert all(torch.equal(dense[n], multi[n]) for n in shared)
    assert not torch.equal(dense["backbone.blocks.0.mlp.fc1.weight"], dense["backbone.blocks.2.mlp.fc1.weight"])
    other = micro("none", seed=1).state_dict()
    assert not torch.equal(other["backbone.position"], dense["backbone.position"])


def test_decoder_upsampling_is_bilinear_in_training_too() -> None:
    model = micro("none").train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    trained = model(images, ["normals"])["normals"]
    with torch.no_grad():
        plain = model(images, ["normals"])["normals"]
    torch.testing.assert_close(trained, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "gated"}, "task_cond"),
        ({"image": (60, 64)}, "multiple of the patch"),
        ({"heads": 5}, "divisible by heads"),
        ({"top_k": 17}, "top_k"),
        ({"patch": 6, "image": (60, 60)}, "power of two"),
    ],
)
def test_bad_configurations_are_explained(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViTConfig(**{**vars(preset("micro", (64, 64))), **changes})


def test_unknown_task_names_the_choices() -> None:
    with pytest.raises(UserError, match="semseg"):
        micro()(torch.randn(1, 3, 32, 32, dtype=torch.float64), ["semsg"])
