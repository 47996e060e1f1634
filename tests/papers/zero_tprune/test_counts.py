"""FLOPs to the last digit: the authors' integers, an independent counter (fvcore), and the counts of the other methods."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.zero_tprune.budget import solve, solve_latency, solve_tome
from papers.zero_tprune.counts import block_flops, flops, layer_flops, share
from papers.zero_tprune.plans import ATS, EViT, Layer, Rule, Schedule, ToMe, family, votes
from papers.zero_tprune.pruner import prune
from papers.zero_tprune.shape import DEIT_B, DEIT_S, DEIT_T, plain, shape_of
from shared.errors import UserError

PROTOTYPE = Schedule((Layer(3, 0.9), Layer(6, 0.8), Layer(9, 0.7)), Rule(method="random"))


@pytest.mark.parametrize(
    ("shape", "whole", "blocks", "pruned"),
    [
        (DEIT_T, 1_258_411_200, 1_229_128_704, 962_559_552),
        (DEIT_S, 4_608_338_304, 4_549_773_312, 3_554_802_816),
        (DEIT_B, 17_582_740_224, 17_465_610_240, 13_628_340_480),
    ],
)
def test_the_authors_integers(shape: Any, whole: int, blocks: int, pruned: int) -> None:
    assert flops(shape).total("model") == whole
    assert flops(shape).total("blocks") == blocks
    assert flops(shape, PROTOTYPE).total("model") == pruned
    assert PROTOTYPE.patches(12, 196) == (196,) * 3 + (176,) * 3 + (140,) * 3 + (98,) * 4


def test_without_layer_norm_the_whole_model_is_what_other_counters_print() -> None:
    norms = 5 * 197 * 384 * (2 * 12 + 1)
    assert flops(DEIT_S).total("model") - norms == 4_598_882_304


@pytest.mark.parametrize("plan", [None, PROTOTYPE, family(12, 196, 0.1).with_rule(method="random")])
def test_an_independent_counter_agrees_on_the_executed_model(plan: Schedule | None) -> None:
    analysis = pytest.importorskip("fvcore.nn")
    model = timm.create_model("deit_tiny_patch16_224").eval()
    for block in model.blocks:
        block.attn.fused_attn = False  # fvcore counts no fused attention
    images = torch.randn(1, 3, 224, 224)
    with prune(model, plan or Schedule(())):
        counter = (
            analysis.FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        )
        assert int(counter.total()) == flops(DEIT_T, plan).total("model")


def test_the_recalled_ablation_schedule() -> None:
    plan = family(12, 196, 0.1)
    assert [(layer.after, layer.drop, layer.iterations) for layer in plan.layers] == [
        (1, 10, 30),
        (3, 10, 5),
        (6, 10, 5),
        (9, 10, 1),
        (11, 10, 1),
    ]
    assert [1 + n for n in plan.patches(12, 196)][:12] == [197, 187, 187, 159, 159, 159, 119, 119, 119, 76, 76, 66]
    count = flops(DEIT_S, plan)
    assert count.blocks == 3_064_694_784
    assert count.total("blocks") / 1e9 == pytest.approx(3.078, abs=0.0005)
    averaged = flops(DEIT_S, plan.with_rule(feature="key_mean"))
    assert averaged.pruning / 1e6 == pytest.approx(4.3, abs=0.05)


def test_one_pruning_layer_by_hand() -> None:
    """197 tokens: I' is one vote on 197, ten leave, the match is 98 x 98 keys of 384, the I-stage votes five times on 187."""
    layer = Layer(3, 0.9, 10, 5)
    assert layer.kept(196) == 167  # floor(0.9 * 186)
    assert layer_flops(DEIT_S, layer, 196, Rule()) == 6 * 197**2 + 98 * 98 * 384 + 5 * 6 * 187**2
    assert layer_flops(DEIT_S, layer, 196, Rule(order="i")) == 5 * 6 * 197**2
    assert layer_flops(DEIT_S, layer, 196, Rule(method="random")) == 0


def test_the_other_methods() -> None:
    tome = ToMe((13,) * 12)
    assert [1 + n for n in tome.patches(12, 196)] == [197, 184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]
    merged = flops(DEIT_S, tome)
    assert (merged.total("model") - merged.pruning) / 1e9 == pytest.approx(2.708, abs=0.0005)
    eight = flops(DEIT_S, ToMe((8,) * 12))
    assert (eight.total("model") - eight.pruning) / 1e9 == pytest.approx(3.424, abs=0.0005)
    assert flops(DEIT_S, ToMe((0,) * 12)) == flops(DEIT_S)
    assert [1 + n for n in EViT(0.7).patches(12, 196)][::3][:4] == [197, 197, 139, 98]
    assert [1 + n for n in EViT(0.7).patches(12, 196)][-1] == 69
    norms = (
        sum(5 * 384 * (a + b) for a, b in zip(EViT(0.7).patches(12, 196), EViT(0.7).patches(12, 196)[1:], strict=False))
        + 5 * 384 * 24
        + 5 * 384 * 69
    )
    assert (flops(DEIT_S, EViT(0.7)).total("model") - norms) / 1e9 == pytest.approx(2.997, abs=0.0005)
    with pytest.raises(UserError, match="every image"):
        flops(DEIT_S, ATS(100))


def test_shapes_read_off_models() -> None:
    with torch.device("meta"):
        assert shape_of(timm.create_model("deit_small_patch16_224"), DEIT_S.name) == DEIT_S
        distilled = shape_of(timm.create_model("deit_tiny_distilled_patch16_224"))
        siglip = shape_of(timm.create_model("vit_base_patch16_siglip_224"))
        registers = shape_of(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224))
    assert (distilled.prefix, distilled.readers, distilled.head) == (2, 2, 2 * 192 * 1000)
    assert (siglip.prefix, siglip.readers) == (0, 0)
    assert siglip.pool_token == 2 * 768 * 768 + 2 * 768
    assert (registers.prefix, registers.readers, registers.patches) == (5, 1, 256)


@pytest.mark.parametrize("target", [3.97, 3.40, 3.08, 2.97, 2.80, 2.50, 2.20])
def test_the_solver_meets_the_papers_budgets(target: float) -> None:
    assert flops(DEIT_S, solve(DEIT_S, target * 1e9)).total("blocks") / 1e9 == pytest.approx(target, rel=0.003)


def test_the_solver_says_what_it_can_reach() -> None:
    with pytest.raises(UserError, match="more than the unpruned"):
        solve(DEIT_S, 5e9)
    with pytest.raises(UserError, match="cannot be reached"):
        solve(DEIT_S, 0.1)
    with pytest.raises(UserError, match="must be positive"):
        solve(DEIT_S, -1)
    with pytest.raises(UserError, match="drop=40 alone"):
        solve(DEIT_S, 0.95, drop=40)


def test_solving_for_latency_uses_the_given_clock() -> None:
    """With a clock proportional to FLOPs both solvers agree."""
    plan = solve_latency(DEIT_S, 0.65, lambda p: float(flops(DEIT_S, p).total("blocks")))
    assert plan == solve(DEIT_S, 0.65)


def test_tome_solver_is_near_constant() -> None:
    plan = solve_tome(DEIT_S, 0.65)
    assert max(plan.merge) - min(plan.merge) <= 1
    assert share(DEIT_S, plan) == pytest.approx(0.65, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 60), st.floats(0.01, 1.0))
def test_layers_never_keep_more_and_never_nothing(patches: int, drop: int, keep: float) -> None:
    layer = Layer(1, keep, drop)
    assert 1 <= layer.kept(patches) <= patches
    assert layer.dropped(patches) <= patches // 2
    assert block_flops(DEIT_S, layer.kept(patches)) <= block_flops(DEIT_S, patches)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 0.3), st.floats(0.0, 0.3))
def test_more_pruning_never_costs_more(a: float, b: float) -> None:
    mild, strong = sorted((a, b))
    shape = plain("small", 8, 64, 4, side=10)
    assert flops(shape, family(8, 100, strong)).blocks <= flops(shape, family(8, 100, mild)).blocks


def test_a_stage_that_removes_nothing_costs_nothing() -> None:
    assert layer_flops(DEIT_S, Layer(3, 0.9999, 10), 10_000, Rule()) > layer_flops(
        DEIT_S, Layer(3, 1.0, 10), 10_000, Rule()
    )
    assert layer_flops(DEIT_S, Layer(3, 1.0 - 1e-12, 10), 196, Rule()) == layer_flops(
        DEIT_S, Layer(3, 1.0, 10), 196, Rule()
    )


def test_votes_by_depth() -> None:
    assert [votes(after, 12) for after in (1, 2, 3, 8, 9, 12)] == [30, 30, 5, 5, 1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layer(0), "numbered from 1"),
        (lambda: Layer(1, keep=0.0), "must lie in"),
        (lambda: Layer(1, drop=-1), "at least 0"),
        (lambda: Schedule((Layer(3), Layer(3))), "one per block"),
        (lambda: Rule(order="sis"), "unknown order 'sis'"),
        (lambda: Rule(order="si"), "no order to go by"),
        (lambda: Rule(vhf=(0.7, 0.01)), "interval"),
        (lambda: Schedule((Layer(13),)).patches(12, 196), "12 blocks"),
        (lambda: family(12, 196, 0.4), "must lie in"),
        (lambda: ToMe((1, 2)).patches(12, 196), "one per block"),
        (lambda: flops(DEIT_S).total("half"), "unknown FLOPs convention"),
    ],
)
def test_mistakes_get_one_clear_sentence(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
