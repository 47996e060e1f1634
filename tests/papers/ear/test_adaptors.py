"""Adaptors: counts against the built modules, the size of the space, and what stays frozen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.ear.adaptors import Adaptor, Architecture, Op, search_space
from papers.ear.encoder import (
    STAND_IN_CHANNELS,
    FrozenEncoder,
    SmallEncoder,
    pool_to,
    timm_encoder,
)
from papers.ear.frozen import check_frozen
from papers.ear.search import SearchSettings, draw_candidates
from shared.errors import UserError
from shared.workload import trace

SPACE = search_space(4, (1 / 8, 1 / 2))


def test_space_and_published_counts() -> None:
    assert len(SPACE) == len({str(a) for a in SPACE}) == 4095
    conv = Op("conv", 1 / 8)
    assert [conv.params(c) for c in STAND_IN_CHANNELS] == [484, 1398, 5388, 21144]
    assert Architecture.uniform("conv", 4, 1 / 8).params(STAND_IN_CHANNELS) == 28414
    lin = Op("lin", 1 / 16)
    assert [lin.params(c) for c in (256, 512, 1024, 2048)] == [9248, 34880, 135296, 532736]
    assert Architecture.uniform("lin", 4, 1 / 16).macs((256, 512, 1024, 2048), [49] * 4) == 34_119_680


@given(st.sampled_from(SPACE))
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_the_module(architecture: Architecture) -> None:
    sides = (7, 5, 3, 3)
    adaptor = Adaptor(architecture, STAND_IN_CHANNELS).eval()
    assert sum(p.numel() for p in adaptor.parameters()) == architecture.params(STAND_IN_CHANNELS)
    taps = [torch.randn(1, c, s, s) for c, s in zip(STAND_IN_CHANNELS, sides, strict=True)]
    assert trace(adaptor, taps).macs == architecture.macs(STAND_IN_CHANNELS, [s * s for s in sides])
    for op, tap, out in zip(architecture.ops, taps, adaptor(taps), strict=True):
        assert (out is None) == (op.kind == "skip")
        assert out is None or out.shape == tap.shape
    assert Architecture.parse(str(architecture)) == architecture


def test_bottleneck_has_at_least_two_channels() -> None:
    assert Op("lin", 1 / 16).bottleneck(16) == 2
    assert Op("lin", 1 / 8).bottleneck(12) == 2


def test_refusals() -> None:
    with pytest.raises(UserError, match="skips every tap"):
        Architecture.uniform("skip", 4)
    with pytest.raises(UserError, match="unknown adaptor op"):
        Op("mlp", 0.5)
    with pytest.raises(UserError, match="for 4 taps, the encoder has 2"):
        Adaptor(Architecture.uniform("id", 4), (8, 8))
    with pytest.raises(UserError, match="no adaptor has"):
        draw_candidates(STAND_IN_CHANNELS, SearchSettings(min_params=10**8), 0)


def test_candidates_stay_in_the_band_and_depend_on_the_seed() -> None:
    band = SearchSettings(min_params=12_000, max_params=25_000, candidates=30)
    chosen = draw_candidates(STAND_IN_CHANNELS, band, 0)
    assert len(set(chosen)) == 30
    assert all(12_000 <= a.params(STAND_IN_CHANNELS) <= 25_000 for a in chosen)
    assert chosen == draw_candidates(STAND_IN_CHANNELS, band, 0) != draw_candidates(STAND_IN_CHANNELS, band, 1)


def test_stand_in_encoder_counts() -> None:
    net = SmallEncoder(10)
    assert sum(p.numel() for p in net.parameters()) == 174_094
    work = trace(net.classify, torch.zeros(1, 1, 28, 28))
    assert work.macs == 3_505_776
    taps = FrozenEncoder(net, STAND_IN_CHANNELS)(torch.zeros(2, 1, 28, 28))
    assert [tuple(t.shape[1:]) for t in taps] == [(12, 7, 7), (24, 7, 7), (48, 4, 4), (96, 4, 4)]


def test_frozen_encoder_cannot_be_put_into_training() -> None:
    encoder = FrozenEncoder(SmallEncoder(), STAND_IN_CHANNELS)
    before = encoder.fingerprint()
    encoder.train()
    encoder(torch.rand(8, 1, 20, 20))
    assert encoder.fingerprint() == before
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_nothing_old_is_touched_and_the_controls_show() -> None:
    ok = check_frozen(seed=0, images=96)
    assert (ok.changed_tensors, ok.with_gradient, ok.changed_logits) == (0, 0, 0)
    assert ok.compared_logits == 3 * 96
    assert check_frozen(seed=0, images=96, train_encoder=True).changed_tensors > 30
    assert check_frozen(seed=0, images=96, share_adaptor=True).changed_logits > 90


def test_pool_to_leaves_small_taps_alone() -> None:
    small = torch.rand(1, 3, 5, 5)
    assert pool_to(small, 7) is small
    assert pool_to(torch.rand(1, 3, 14, 14), 7).shape[-2:] == (7, 7)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("mobilenetv2_100", (16, 24, 32, 96, 320)),
        ("efficientnet_b0", (16, 24, 40, 112, 320)),
        ("deit_tiny_patch16_224", (192, 192, 192)),
    ],
)
def test_timm_taps(name: str, channels: tuple[int, ...]) -> None:
    encoder = timm_encoder(name, image_size=64)
    taps = encoder.features(torch.rand(1, 3, 64, 64))
    assert tuple(t.shape[1] for t in taps) == encoder.channels == channels
    assert all(t.shape[-1] <= 7 for t in taps)


def test_unknown_timm_models() -> None:
    with pytest.raises(UserError, match="timm has no model 'resnet999'"):
        timm_encoder("resnet999")
    with pytest.raises(UserError, match="taps of 'mixer_b16_224' are not known"):
        timm_encoder("mixer_b16_224")
