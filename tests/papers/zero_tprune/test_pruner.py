"""``prune`` on real timm models: identity, reversal, switching, families, errors, compilation, and the methods inside blocks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import timm
import torch

from papers.zero_tprune import ATS, EViT, Layer, Pruner, Rule, Schedule, ToMe, family, prune
from papers.zero_tprune.inside import sample
from papers.zero_tprune.matching import take
from shared.errors import UserError

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "img_size": 64,
    "patch_size": 8,
    "num_classes": 10,
}
PLAN = Schedule((Layer(1, drop=6, iterations=3), Layer(3, 0.6, 4, 2)))  # 64 -> 58 -> 54 -> 32 patches


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.mul_(6.0)  # attention that prefers some tokens
    return model


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_keeping_everything_is_bit_identical() -> None:
    model, x = vit(), images()
    before = model(x)
    with prune(model, Schedule((Layer(1), Layer(2, 1.0, 0, 30), Layer(4)))):
        assert torch.equal(model(x), before)
    with prune(model, ToMe((0,) * 4)):
        assert torch.equal(model(x), before)


def test_pruning_is_reversible_and_touches_no_weight() -> None:
    model, x = vit(), images()
    before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    pruner = prune(model, PLAN)
    assert isinstance(pruner, Pruner)
    assert model.forward_features(x).shape == (2, 1 + 32, 32)
    assert not torch.equal(model(x), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    pruner.remove()
    pruner.remove()
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    with pytest.raises(UserError, match="was removed"):
        pruner.plan = PLAN


def test_switching_between_calls() -> None:
    model, x = vit(), images()
    pruner = prune(model, PLAN)
    first = model(x)
    pruner.plan = Schedule((Layer(2, 0.5),))
    second = model(x)
    assert model.forward_features(x).shape[1] == 33
    pruner.plan = PLAN
    assert torch.equal(model(x), first)
    assert prune(model, Schedule((Layer(2, 0.5),))) is pruner
    assert torch.equal(model(x), second)
    pruner.plan = ToMe((4, 4, 4, 4))
    assert model.forward_features(x).shape[1] == 1 + 48
    pruner.plan = PLAN
    assert torch.equal(model(x), first)
    pruner.remove()


def test_survivors_are_rows_of_the_blocks_output() -> None:
    """The pruned output of a block holds its own rows, unchanged and in order, at the recorded places."""
    model, x = vit(), images()
    full: list[torch.Tensor] = []
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: full.append(output))
    model(x)
    handle.remove()
    seen: list[torch.Tensor] = []
    with prune(model, Schedule((Layer(1, 0.5, 5, 3),))) as pruner:
        handle = model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with pruner.record() as record:
            model(x)
        handle.remove()
    assert record.after == [1]
    kept = record.tokens[0]
    assert kept.shape == (2, 29)
    assert torch.equal(seen[0][:, 1:], take(full[0][:, 1:], kept))
    assert torch.equal(seen[0][:, 0], full[0][:, 0])


def test_record_follows_tokens_through_layers_and_reports_filtered_heads() -> None:
    model, x = vit(), images()
    with prune(model, PLAN.with_rule(vhf=(0.0, 1e9))) as pruner:
        with pruner.record() as record:
            recorded = model(x)
        assert torch.equal(recorded, model(x))
        pruner.plan = PLAN.with_rule(vhf=(1e8, 1e9))
        with pruner.record() as strict:
            model(x)
    assert [kept.shape[1] for kept in record.tokens] == [58, 32]
    for earlier, later in zip(record.tokens[0], record.tokens[1], strict=True):
        assert set(later.tolist()) <= set(earlier.tolist()) <= set(range(64))
    assert all(float(share.max()) == 0.0 for share in record.heads_filtered)
    assert all(float(share.min()) == 1.0 for share in strict.heads_filtered)
    with (
        prune(model, ToMe((1,) * 4)) as pruner,
        pytest.raises(UserError, match="works with a Schedule"),
        pruner.record(),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"reg_tokens": 4}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"class_token": False, "global_pool": "map"}, 0),
        ({"pre_norm": True, "qk_norm": True, "init_values": 1e-4}, 1),
        ({"qkv_bias": False, "no_embed_class": True, "reg_tokens": 2}, 3),
        ({"num_heads": 4, "mlp_ratio": 2.0, "block_fn": timm.models.vision_transformer.ResPostBlock}, 1),
    ],
)
def test_the_plain_family(options: dict[str, Any], prefix: int) -> None:
    model, x = vit(**options), images()
    with prune(model, PLAN):
        assert model.forward_features(x).shape == (2, prefix + 32, 32)
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"]
)
def test_registered_models(name: str) -> None:
    model = timm.create_model(name, depth=3, embed_dim=48, num_heads=3).eval()
    with prune(model, Schedule((Layer(1, drop=10), Layer(2, 0.7)))):
        out = model(images(1, 224))
        assert torch.isfinite(out).all()
        assert model.forward_features(images(1, 224)).shape[1] == model.num_prefix_tokens + 130  # floor(0.7 * 186)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "vit_base_patch16_xp_224", "resnet18"]
)
def test_other_backbones_get_a_clear_error(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match="Take a "):
        prune(model, PLAN)


def test_plans_that_do_not_fit() -> None:
    model = vit(class_token=False, global_pool="avg")
    pruner = prune(model, PLAN)
    before = pruner.plan
    for plan, words in (
        (Schedule((Layer(5),)), "4 blocks"),
        (PLAN.with_rule(start="cls"), "start=cls needs a class token"),
        (PLAN.with_rule(method="cls"), "method=cls needs a class token"),
        (EViT(0.5, (2,)), "no class token"),
        (ATS(10, 2), "no class token"),
        (ToMe((1,)), "one per block"),
    ):
        with pytest.raises(UserError, match=words):
            pruner.plan = plan
        assert pruner.plan is before
    pruner.remove()
    with pytest.raises(UserError, match="unknown backend"):
        prune(vit(), PLAN, backend="cuda")  # type: ignore[arg-type]
    with prune(vit(), PLAN, backend="triton") as pruner, pytest.raises(UserError, match="not on a CUDA device"):
        pruner.model(images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_batches(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    with prune(model, PLAN):
        for count in (1, 3):
            out = model(images(count).to(dtype))
            assert out.dtype == dtype
            assert out.shape == (count, 10)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = vit().double(), images(3).double()
    with prune(model, PLAN):
        together = model(x)
        for row in range(3):
            assert torch.allclose(model(x[row : row + 1])[0], together[row], atol=1e-10)


def test_gradients_reach_the_weights() -> None:
    model, x = vit(), images()
    with prune(model, PLAN), torch.enable_grad():
        model(x).sum().backward()
    assert float(model.patch_embed.proj.weight.grad.abs().sum()) > 0


def test_compiled_models_follow_the_plan_without_recompiling_for_known_ones() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x, counter = vit(), images(), CompileCounter()
    other = Schedule((Layer(2, 0.5),))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with prune(model, PLAN) as pruner:
        for plan in (PLAN, other, PLAN, other, Schedule(())):
            pruner.plan = plan
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert counter.frame_count == 3


def test_a_compiled_wrapper_is_pruned_and_a_copy_is_independent() -> None:
    model, x = vit(), images()
    before = model(x)
    pruner = prune(torch.compile(model, backend="eager"), PLAN)
    assert pruner.model is model
    twin = copy.deepcopy(model)
    assert prune(twin, Schedule((Layer(2, 0.5),))) is not pruner
    assert model.forward_features(x).shape[1] == 33
    assert twin.forward_features(x).shape[1] == 33
    pruner.remove()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


def test_a_dropped_model_is_freed() -> None:
    model = vit()
    prune(model, PLAN)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_random_uses_the_same_counts_and_its_seed() -> None:
    model, x = vit(), images()
    with prune(model, PLAN.with_rule(method="random", seed=1)) as pruner:
        first = model(x)
        assert model.forward_features(x).shape[1] == 33
        assert torch.equal(model(x), first)
        pruner.plan = PLAN.with_rule(method="random", seed=2)
        assert not torch.equal(model(x), first)
        pruner.plan = PLAN.with_rule(method="truncate")
        assert model.forward_features(x).shape[1] == 33


# --- methods inside blocks ---


def test_tome_merges_identical_tokens_without_changing_anything() -> None:
    """On patches that are all alike, merging with size-weighted attention is exact: the class token cannot tell."""
    model = vit(pos_embed="none").double()
    x = torch.ones(1, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    with prune(model, ToMe((16, 8, 4, 2))) as pruner:
        assert torch.allclose(model(x), before, atol=1e-9)
        assert model.forward_features(x).shape[1] == 1 + 34
        pruner.plan = ToMe((16, 8, 4, 2), proportional=False)
        assert not torch.allclose(model(x), before, atol=1e-9)


def test_what_is_no_plan_or_no_model() -> None:
    model = vit()
    with prune(model, Schedule(())), pytest.raises(UserError, match=r"0\.65 is no plan: give solve"):
        prune(model, 0.65)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a name: give the model"):
        prune("deit_tiny_patch16_224", Schedule(()))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"give what it wraps, its \.module"):
        prune(torch.nn.DataParallel(model), Schedule(()))


def test_tome_takes_half_at_most() -> None:
    model = vit()
    with prune(model, ToMe((1000, 0, 0, 0))):
        assert model.forward_features(images()).shape[1] == 1 + 32


def test_evit_counts() -> None:
    model = vit()
    with prune(model, EViT(0.7, (2, 3))):
        assert model.forward_features(images()).shape[1] == 1 + 32  # ceil(0.7 * 64) = 45, ceil(0.7 * 45) = 32


def test_ats_samples_by_quantile() -> None:
    """Quantiles 1/8, 3/8, 5/8, 7/8 of (0.5, 0.25, 0.25): patch 0 twice, then 1 and 2."""
    index, real = sample(torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), 4)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert real.tolist() == [[True, True, True], [True, False, False]]


def test_ats_masks_the_padding() -> None:
    """Each image alone gives what it gives in a batch, though the batch is as wide as its widest image."""
    model, x = vit().double(), images(3).double()
    with prune(model, ATS(20, 2)) as pruner:
        together = model(x)
        counts = torch.stack(pruner.kept_tokens())
        assert counts.shape == (5, 3)
        assert bool((counts.diff(dim=0) <= 0).all())
        assert int(counts[0].min()) == 64
        assert int(counts[-1].max()) <= 20
        for row in range(3):
            assert torch.allclose(model(x[row : row + 1])[0], together[row], atol=1e-9)


def test_the_family_on_a_model() -> None:
    model = vit()
    with prune(model, family(4, 64, 0.2, rule=Rule(vhf=None))):
        assert torch.isfinite(model(images())).all()
