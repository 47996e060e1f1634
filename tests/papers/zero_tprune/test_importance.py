"""Votes, heads and matching against closed forms worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.zero_tprune.importance import attention, head_mask, over_heads, start_vector, start_weights, wpr
from papers.zero_tprune.matching import duplicates, groups, rank_order, similarity
from papers.zero_tprune.plans import Layer, Rule
from papers.zero_tprune.selection import Tokens, head_scores, scores, select


def random_attention(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=-1)


def tokens_of(seed: int, n: int, prefix: int = 1, heads: int = 3, images: int = 2) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(images, heads, n, 8, generator=generator) for _ in range(3))
    return Tokens(q, k, v, torch.randn(images, n, 24, generator=generator), 8**-0.5, prefix, min(prefix, 1))


# --- WPR ---


def test_two_tokens_by_hand() -> None:
    """A = [[0.9, 0.1], [0.5, 0.5]]: one vote from uniform gives the column means, many the fixed point (5/6, 1/6)."""
    a = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert wpr(a, half, 1).tolist() == pytest.approx([0.7, 0.3])
    assert wpr(a, half, 60).tolist() == pytest.approx([5 / 6, 1 / 6])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 10_000), st.booleans())
def test_votes_keep_the_sum(n: int, iterations: int, seed: int, weighted: bool) -> None:
    s = wpr(random_attention(seed, 2, n, n).double(), start_vector(n, int(weighted)).double(), iterations)
    assert torch.allclose(s.mean(dim=-1), torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_special_graphs() -> None:
    n = 7
    start = start_vector(n, 1)
    assert torch.allclose(wpr(torch.full((n, n), 1 / n), start, 1), torch.ones(n))
    assert torch.equal(wpr(torch.eye(n), start, 5), start)
    permutation = torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    doubly = 0.5 * permutation + 0.5 / n
    assert torch.allclose(wpr(doubly, start_vector(n, 0), 9), torch.ones(n), atol=1e-6)


def test_many_votes_forget_the_start() -> None:
    a = random_attention(0, 30, 30).double()
    assert torch.allclose(
        wpr(a, start_vector(30, 1).double(), 200), wpr(a, start_vector(30, 0).double(), 200), atol=1e-9
    )


def test_one_vote_of_an_enormous_class_token_is_its_row() -> None:
    """The bridge to Top-K: with all the weight on the class token, one vote is the attention that it pays."""
    a = random_attention(1, 20, 20)
    start = torch.zeros(20)
    start[0] = 1e6
    assert torch.equal(rank_order(wpr(a, start, 1)[None]), rank_order(a[0][None]))


def test_start_vector() -> None:
    heavy, light = start_weights(197, 1)
    assert heavy / light == pytest.approx(14.036, abs=0.001)
    s = start_vector(197, 1)
    assert float(s[0] / s.sum()) == pytest.approx(math.sqrt(197) / (math.sqrt(197) + 196), rel=1e-5)
    assert float(s[0] / s.sum()) == pytest.approx(0.0668, abs=0.0001)
    assert float(s.mean()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(start_vector(5, 0), torch.ones(5))


def test_the_transposed_vote_ranks_nothing() -> None:
    a, s = random_attention(2, 30, 30).double(), start_vector(30, 1).double()
    given = s
    for _ in range(100):
        given = a @ given
    assert float(given.std()) < 1e-6
    assert float(wpr(a, s, 100).std()) > 0.01


# --- heads ---


def test_root_mean_square_of_two_heads() -> None:
    s = torch.tensor([[[0.8, 0.1, 0.1], [0.1, 0.45, 0.45]]])
    every = torch.ones(1, 2, dtype=torch.bool)
    rms, mean = over_heads(s, every)[0], over_heads(s, every, "mean")[0]
    assert rms.tolist() == pytest.approx([0.5701, 0.3260, 0.3260], abs=1e-4)
    assert mean.tolist() == pytest.approx([0.45, 0.275, 0.275])
    assert float(rms[0] / rms[1]) == pytest.approx(1.75, abs=0.01)
    assert torch.allclose(over_heads(s[:, :1], every[:, :1]), s[:, 0])


def test_variance_filter() -> None:
    """Head 0 is flat (variance 0), head 1 has patches 0.5, 1.5 (variance 0.25), head 2 has 0, 4 (variance 4); token 0 is the prefix."""
    s = torch.tensor([[[1.0, 1.0, 1.0], [9.0, 0.5, 1.5], [1.0, 0.0, 4.0]]])
    assert head_mask(s, 1, (0.01, 0.7)).tolist() == [[False, True, False]]
    assert head_mask(s, 1, (0.0, 100.0)).tolist() == [[True, True, True]]
    assert head_mask(s, 1, (50.0, 60.0)).tolist() == [[True, True, True]]  # none would pass: all do
    assert head_mask(s, 1, None).tolist() == [[True, True, True]]
    assert head_mask(s, 1, (0.01, 0.7), "sum1").tolist() == [[False, True, True]]  # variances 0, 0.0278, 0.444


def test_scores_of_sum_one_cannot_reach_the_lower_bound() -> None:
    n = 197
    most = torch.zeros(n)
    most[5] = n
    assert float((most / n).var(correction=0)) == pytest.approx((1 - 1 / n) / n)
    assert (1 - 1 / n) / n < 0.01


# --- S-stage ---


def test_a_copy_of_a_more_important_token_is_dropped() -> None:
    key = torch.eye(6)[None]
    key[0, 5] = key[0, 0]  # the least important token copies the most important one
    order = torch.arange(6)[None]
    assert duplicates(key, order, 1, "seq_u", "cos").tolist() == [[5]]


def test_a_pair_inside_one_half_is_not_found() -> None:
    key = torch.eye(6)[None].clone()
    key[0, 5] = key[0, 4]  # both unimportant
    assert duplicates(key, torch.arange(6)[None], 1, "seq_u", "cos").tolist() == [
        [3]
    ]  # all similarities are 0: the first of equals
    assert duplicates(key, torch.arange(6)[None], 1, "none", "cos").tolist() == [[5]]


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 30), st.integers(0, 1000))
def test_which_half_loses(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, order = torch.randn(1, n, 5, generator=generator), torch.randperm(n, generator=generator)[None]
    drop = 1 + seed % (n // 2)
    top = set(order[0, : math.ceil(n / 2)].tolist())
    gone = duplicates(key, order, drop, "seq_u", "cos")[0].tolist()
    assert len(set(gone)) == drop
    assert not top & set(gone)
    bottom = set(order[0, n // 2 :].tolist())
    assert not bottom & set(duplicates(key, order, drop, "seq_i", "cos")[0].tolist())
    assert torch.equal(duplicates(7.5 * key, order, drop, "seq_u", "cos"), duplicates(key, order, drop, "seq_u", "cos"))


def test_groups_and_metrics() -> None:
    order = torch.tensor([[3, 1, 0, 2, 4]])
    assert [g.tolist() for g in groups(order, "seq_u")] == [[[2, 4]], [[3, 1, 0]]]
    assert [g.tolist() for g in groups(order, "seq_i")] == [[[3, 1]], [[0, 2, 4]]]
    assert [g.tolist() for g in groups(order, "alternate")] == [[[1, 3]], [[0, 2, 4]]]
    a, b = groups(order, "random", torch.Generator().manual_seed(0))
    assert sorted(torch.cat([a, b], 1)[0].tolist()) == [0, 1, 2, 3, 4]
    x, y = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0], [0.0, 0.0]]])
    assert similarity(x, y, "cos")[0, 0].tolist() == pytest.approx([24 / 25, 0.0])
    assert similarity(x, y, "dot")[0, 0].tolist() == pytest.approx([24.0, 0.0])
    assert similarity(x, y, "l1")[0, 0].tolist() == pytest.approx([-2.0, -7.0])
    assert similarity(x, y, "l2")[0, 0].tolist() == pytest.approx([-math.sqrt(2), -5.0])


# --- a whole layer ---


def test_the_subgraph_is_the_softmax_over_the_survivors() -> None:
    seen = tokens_of(0, 12)
    index = torch.tensor([[0, 1, 4, 7, 9], [0, 2, 3, 8, 11]])
    a = attention(seen.q, seen.k, seen.scale)
    got = head_scores(a, index, seen, Rule(), 3)
    rows = index[:, None, :, None].expand(-1, 3, -1, 8)
    fresh = attention(seen.q.gather(2, rows), seen.k.gather(2, rows), seen.scale)
    assert torch.allclose(got, wpr(fresh, start_vector(5, 1), 3), atol=1e-6)


@pytest.mark.parametrize("order", ["isi", "is", "i", "s"])
def test_every_order_removes_the_same_number(order: str) -> None:
    seen = tokens_of(1, 41)
    index = select(seen, Layer(1, 0.8, 6, 4), Rule(order=order))
    assert index.shape == (2, 1 + 27)  # floor(0.8 * 34)
    assert torch.equal(index[:, 0], torch.zeros(2, dtype=torch.long))
    assert bool((index.diff(dim=1) > 0).all())  # original order, no repeats


@pytest.mark.parametrize("partition", ["alternate", "random"])
def test_matching_without_a_ranking(partition: str) -> None:
    index = select(tokens_of(2, 41), Layer(1, 0.8, 6, 4), Rule(order="si", partition=partition))
    assert index.shape == (2, 28)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_permuting_the_patches_permutes_the_survivors(seed: int) -> None:
    seen = tokens_of(seed, 25, images=1)
    shuffle = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(24, generator=torch.Generator().manual_seed(seed))]
    )
    moved = Tokens(
        seen.q[:, :, shuffle], seen.k[:, :, shuffle], seen.v[:, :, shuffle], seen.x[:, shuffle], seen.scale, 1, 1
    )
    layer = Layer(1, 0.7, 4, 3)
    before, after = select(seen, layer, Rule(vhf=None))[0], select(moved, layer, Rule(vhf=None))[0]
    assert sorted(shuffle[after].tolist()) == sorted(before.tolist())


def test_class_attention_is_the_one_vote_limit_of_the_layer() -> None:
    seen = tokens_of(3, 30, heads=1)
    kept = select(seen, Layer(1, 0.5), Rule(method="cls"))
    a = attention(seen.q, seen.k, seen.scale)
    best = a[:, 0, 0, 1:].topk(14).indices.sort(dim=-1).values + 1
    assert torch.equal(kept[:, 1:], best)
    everyone = torch.arange(30).expand(2, -1)
    assert scores(a, everyone, seen, Rule(vhf=None), 1).shape == (2, 29)
