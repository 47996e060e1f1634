"""EAR as a library: growth, prediction, what it reduces to, saving and loading, caches and boards that refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from papers.ear import glyphs
from papers.ear.domains import DOMAINS, shift
from papers.ear.ear import EAR, EARSettings
from papers.ear.encoder import STAND_IN_CHANNELS, FrozenEncoder, SmallEncoder
from papers.ear.feature_cache import check_fits, image_bytes, plan_cache
from papers.ear.hdc import HDSettings
from papers.ear.learner import TrainSettings, new_net, train_net
from papers.ear.search import SearchSettings
from shared.errors import UserError

RESNET50 = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
HD = HDSettings(dim=512, grid=2)


def _encoder() -> FrozenEncoder:
    torch.manual_seed(0)
    return FrozenEncoder(SmallEncoder(), STAND_IN_CHANNELS)


def _settings(**changes: object) -> EARSettings:
    base = {
        "detector": HD,
        "head": HDSettings(dim=512, grid=2, seed=1),
        "train": TrainSettings(epochs=2, batch=32),
        "architecture": "conv/8-id-id-id",
    }
    return EARSettings(**{**base, **changes})  # type: ignore[arg-type]


def _ear(**changes: object) -> EAR:
    return EAR(_encoder(), classes=10, settings=_settings(**changes), image_shape=(1, 20, 20))


def _digits(domain: str, n: int = 320, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = glyphs.draw(glyphs.DIGITS, n, 20, seed)
    return shift(images, domain, seed), labels


def test_one_domain_is_the_plain_classifier_bit_for_bit() -> None:
    images, labels = _digits("clean")
    ear = _ear()
    ear.fit_domain(images, labels)
    taps = ear.encoder.features(images)
    s = ear.settings
    from papers.ear.adaptors import Architecture

    net = new_net(Architecture.parse(s.architecture or ""), STAND_IN_CHANNELS, 10, s.head, s.seed)
    train_net(net, taps, labels, s.train, seed=s.seed)
    assert torch.equal(ear.predict(images).logits, net.evaluate(taps))


def test_grows_at_a_shift_and_routes_it() -> None:
    ear = _ear()
    ear.fit_domain(*_digits("clean"), "clean")
    calm, shifted = _digits("clean", seed=5)[0], _digits("invert", seed=6)
    assert not ear.observe(calm).grow
    assert ear.observe(shifted[0]).grow
    ear.fit_domain(*shifted, "invert")
    assert not ear.observe(_digits("invert", seed=7)[0]).grow
    routed = ear.predict(_digits("invert", seed=8)[0]).domains
    assert (routed == 1).float().mean() > 0.9


def test_all_mode_never_answers_with_a_class_that_no_task_saw() -> None:
    images, labels = _digits("clean")
    ear = _ear(rebundle=True)
    for low in (0, 4):
        chosen = (labels >= low) & (labels < low + 2)
        ear.fit_domain(images[chosen], labels[chosen])
    answers = ear.predict(images, "all")
    assert set(answers.labels.tolist()) <= {0, 1, 4, 5}
    assert all(
        (label in (4, 5)) == (task == 1)
        for label, task in zip(answers.labels.tolist(), answers.domains.tolist(), strict=True)
    )


def test_saved_state_comes_back_and_grows_by_files(tmp_path: Path) -> None:
    ear = _ear()
    ear.fit_domain(*_digits("clean"))
    ear.save(tmp_path)
    first = (tmp_path / "domain0000.pt").read_bytes()
    ear.fit_domain(*_digits("invert", seed=1))
    ear.save(tmp_path)
    assert (tmp_path / "domain0000.pt").read_bytes() == first
    assert len(first) < 300_000  # the projection, which all domains share, is not in it
    again = EAR.load(tmp_path, _encoder(), image_shape=(1, 20, 20))
    probe = _digits("rot", seed=2)[0]
    assert torch.equal(ear.predict(probe).logits, again.predict(probe).logits)
    assert again.observe(probe) == ear.observe(probe)
    assert again.num_params_added == ear.num_params_added
    torch.manual_seed(9)
    other = FrozenEncoder(SmallEncoder(), STAND_IN_CHANNELS)
    with pytest.raises(UserError, match="encoder differs"):
        EAR.load(tmp_path, other, image_shape=(1, 20, 20))
    with pytest.raises(UserError, match="holds no saved EAR"):
        EAR.load(tmp_path / "nowhere", other, image_shape=(1, 20, 20))


def test_search_picks_within_the_budget() -> None:
    images, labels = _digits("clean")
    ear = _ear(architecture=None, search=SearchSettings(max_params=9_000, candidates=3), train=TrainSettings(epochs=0))
    domain = ear.fit_domain(images, labels)
    assert domain.net.adaptor.architecture.params(STAND_IN_CHANNELS) <= 9_000


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 10, 3, 2)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


def test_a_module_of_ones_own() -> None:
    ear = EAR(_Own(), ["first", "second"], classes=4, image_shape=(3, 32, 32))
    assert ear.encoder.channels == (6, 10)
    with pytest.raises(UserError, match="unknown tap layer"):
        EAR(_Own(), ["third"], classes=4, image_shape=(3, 32, 32))
    with pytest.raises(UserError, match="needs taps"):
        EAR(_Own(), classes=4, image_shape=(3, 32, 32))
    with pytest.raises(UserError, match="a tap is"):
        EAR(_Own(), ["head"], classes=4, image_shape=(3, 32, 32))


def test_refusals() -> None:
    ear = _ear()
    with pytest.raises(UserError, match="knows no domain"):
        ear.predict(torch.rand(2, 1, 20, 20))
    with pytest.raises(UserError, match="labels must be"):
        ear.fit_domain(torch.rand(20, 1, 20, 20), torch.full((20,), 10))
    with pytest.raises(UserError, match="at least 2"):
        EAR(_encoder(), classes=1, image_shape=(1, 20, 20))


def test_feature_cache_of_resnet50() -> None:
    assert image_bytes(RESNET50) == 4 * 1_505_280
    assert image_bytes(RESNET50, 7) == 4 * 188_160
    assert plan_cache(1000, RESNET50, 8e9).side is None
    assert plan_cache(1000, RESNET50, 4e9).side == 7  # native taps take 6.02 GB
    assert plan_cache(1000, RESNET50, 3e8).side == 4
    assert plan_cache(1000, RESNET50, 2e7).side == 1
    with pytest.raises(UserError, match="use at most 65 images"):
        plan_cache(1000, RESNET50, 1e6)
    with pytest.raises(UserError, match="build the encoder with side=7"):
        check_fits(1000, RESNET50, 4e9)
    tight = EAR(_encoder(), classes=10, settings=_settings(), image_shape=(1, 20, 20), memory_bytes=1e6)
    with pytest.raises(UserError, match="build the encoder with side=2"):
        tight.fit_domain(*_digits("clean"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_domains_keep_the_range_and_the_seed(domain: str) -> None:
    images = glyphs.draw(glyphs.DIGITS, 6, 20, 0)[0]
    shown = shift(images, domain, 3)
    assert shown.shape == images.shape
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert torch.equal(shown, shift(images, domain, 3))
    assert (domain == "clean") == torch.equal(shown, images)


def test_domains_by_hand() -> None:
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1.0
    edge = shift(step, "edge", 0)
    assert edge[0, 0, 4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]  # Sobel / 4 of a unit step is one on both sides of it
    assert torch.equal(shift(shift(step, "invert", 0), "invert", 0), step)
    assert torch.equal(shift(step, "rot", 0)[0, 0], step[0, 0].rot90(1, (0, 1)))
    with pytest.raises(UserError, match="unknown domain"):
        shift(step, "fog", 0)


def test_glyphs_are_ink_on_black_and_separable_by_eye_of_a_nearest_mean() -> None:
    images, labels = glyphs.draw(glyphs.DIGITS, 1500, 20, 1, spread=0.3)
    assert torch.bincount(labels, minlength=10).min() > 100
    means = torch.stack([images[:1200][labels[:1200] == k].mean(0) for k in range(10)]).flatten(1)
    distances = torch.cdist(images[1200:].flatten(1), means)
    assert (distances.argmin(1) == labels[1200:]).float().mean() > 0.7
