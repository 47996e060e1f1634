"""The paper in the suite: every claim of the paper is there, none is settled twice, and fitted numbers are not judged."""

from __future__ import annotations

import io
from collections import Counter

from shared.experiment import Measurement
from shared.judge import Situation, judge
from shared.runner.papers import load_paper
from shared.verdict import Verdict


def test_every_headline_claim_of_the_paper_is_in_the_file() -> None:
    refs = {claim.ref for claim in load_paper("lsm").claims_file.claims}
    assert {f"H{i}" for i in range(1, 17)} <= refs


def test_every_claim_is_settled_by_one_experiment() -> None:
    paper = load_paper("lsm")
    settled = Counter(claim for experiment in paper.experiments for claim in experiment.claims)
    assert set(settled) == {claim.id for claim in paper.claims_file.claims}
    assert set(settled.values()) == {1}


def test_a_number_that_was_fitted_is_not_judged() -> None:
    claims = load_paper("lsm").claims_file.by_id()
    for name in ("energy_atv", "weight_sd"):
        target = claims[name].value
        assert isinstance(target, float)
        assert judge(claims[name], Measurement(name, target), Situation("reduced", "any")).verdict == Verdict.NOT_TESTED
    # The other energy ratio is predicted and may be judged.
    assert claims["energy_btv"].used_in_fit is None


def test_stand_ins_never_replicate_a_size() -> None:
    for claim in load_paper("lsm").claims_file.claims:
        if claim.evidence == "trained" and claim.kind == "claim":
            assert claim.size_comparable_at == (), claim.id


def test_pictures_are_images() -> None:
    from PIL import Image

    from papers.lsm import pictures
    from papers.lsm.weights import gaussian

    drawn = [
        pictures.event_frames(0),
        pictures.raster(gaussian(256, 40, 0), decay=0.9, v_th=5.0, const=0.07, seed=0),
        pictures.confusion([[3, 1], [0, 0]], ["a", "b"]),
        pictures.pair_grid([(1, 2), (1, 3), (2, 3)], [0.5, 0.6, 1.0]),
    ]
    for png in drawn:
        assert min(Image.open(io.BytesIO(png)).size) > 50
