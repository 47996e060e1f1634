"""The claims schema: what a claims.yaml may say, and the one sentence for what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.claims import Claim, Tolerance, load_claims
from shared.errors import UserError


def claim_data(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "id": "speedup",
        "statement": "the method is twice as fast",
        "value": 2.0,
        "unit": "ratio",
        "source": "abstract",
        "tag": "read",
        "evidence": "exact",
        "relation": "equals",
        "tolerance": {"rel": 0.05, "reason": "printed to two digits"},
        "neutral": 1.0,
        "control": {"set": {"model.on": False}, "means": "the idea is switched off"},
    }
    return {**data, **changes}


def write(path: Path, **changes: Any) -> Path:
    paper = {"title": "T", "authors": "A", "venue": "V", "year": 2022, "link": "none"}
    path.write_text(yaml.safe_dump({"paper": paper, "claims": [claim_data(**changes)]}))
    return path


def test_a_good_file_loads(tmp_path: Path) -> None:
    claims = load_claims(write(tmp_path / "claims.yaml")).by_id()
    assert claims["speedup"].value == 2.0
    assert claims["speedup"].tolerance is not None
    assert claims["speedup"].tolerance.absolute(2.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": "1e12"}, "speedup.value"),  # YAML 1.1 reads 1e12 as text
        ({"value": float("nan")}, "finite"),
        ({"value": None}, "needs a value"),
        ({"tolerance": None}, "needs a tolerance"),
        ({"tolerance": {"abs": 1.0, "rel": 0.1, "reason": "both at once"}}, "either abs or rel"),
        ({"tolerance": {"abs": -1.0, "reason": "a negative one"}}, "greater than or equal to 0"),
        ({"tolerance": {"abs": 1.0, "reason": "short"}}, "reason"),
        ({"relation": "between"}, "takes a value"),
        ({"relation": "ordering", "neutral": None}, "neutral"),
        ({"evidence": "guessed"}, "evidence"),
        ({"id": "Bad Id"}, "id"),
        ({"verdict": "replicated"}, "verdict"),  # nobody writes a verdict
        ({"control": None}, "control"),
        ({"control": {"set": {}, "means": "changes nothing"}}, "control.set"),
    ],
)
def test_a_bad_file_gives_one_sentence_with_the_place(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_claims(write(tmp_path / "claims.yaml", **changes))
    message = str(caught.value)
    assert words in message
    assert str(tmp_path / "claims.yaml") in message
    assert "\n" not in message


def test_broken_yaml_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text("claims: [a: b: c")
    with pytest.raises(UserError, match="not valid YAML"):
        load_claims(tmp_path / "claims.yaml")
    with pytest.raises(UserError, match="cannot read"):
        load_claims(tmp_path / "none.yaml")


def test_ids_are_unique(tmp_path: Path) -> None:
    data = yaml.safe_load(write(tmp_path / "claims.yaml").read_text())
    data["claims"].append(data["claims"][0])
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match="occurs twice"):
        load_claims(tmp_path / "claims.yaml")


def test_relative_tolerance_of_zero_target_is_unbounded() -> None:
    assert Tolerance(abs=0.1, reason="absolute, so no share").relative(0.0) == float("inf")
    assert Tolerance(abs=0.5, reason="half of a hundredth").relative(-50.0) == pytest.approx(0.01)


def test_a_claim_cannot_be_changed_after_loading() -> None:
    claim = Claim.model_validate(claim_data())
    with pytest.raises(Exception, match="frozen"):
        claim.value = 3.0  # type: ignore[misc]
