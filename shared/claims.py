"""Claims: a paper's numbers as data, read from ``papers/<name>/claims.yaml``.

``claims.yaml`` is the only home of a published number. Tables, cards, plots and tests are made from it. How a number becomes a
verdict is in :mod:`shared.judge`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared.errors import UserError

Scale = Literal["smoke", "reduced", "full"]
Tag = Literal["read", "page", "derived", "fit", "recalled"]


def _number(value: object) -> object:
    """Reject booleans and the strings that plain YAML makes of ``1e12``: a silent string is a silent unit slip."""
    if isinstance(value, str):
        raise ValueError(f"'{value}' is text, not a number (YAML needs a point and a sign: 1.0e+12)")
    if isinstance(value, bool) or (isinstance(value, (int, float)) and not math.isfinite(value)):
        raise ValueError(f"{value} is not a finite number")
    return value


Number = Annotated[float, BeforeValidator(_number)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tolerance(_Strict):
    """How far our number may lie from the published one, and why that far."""

    abs: Number | None = Field(default=None, ge=0)
    rel: Number | None = Field(default=None, ge=0)
    reason: str = Field(min_length=10)

    @model_validator(mode="after")
    def _one_of_two(self) -> Tolerance:
        if (self.abs is None) == (self.rel is None):
            raise ValueError("a tolerance is either abs or rel")
        return self

    def absolute(self, target: float) -> float:
        """The allowed distance from ``target``, in the claim's unit."""
        return self.abs if self.abs is not None else (self.rel or 0.0) * abs(target)

    def relative(self, target: float) -> float:
        """The allowed distance as a share of ``target``; infinite for a target of zero."""
        return self.absolute(target) / abs(target) if target else math.inf


class Control(_Strict):
    """The negative control: config overrides that switch the paper's idea off. With them the claim must fail."""

    set: dict[str, Any] = Field(min_length=1)
    means: str = Field(min_length=10)


class Published(_Strict):
    """A number of the paper that an experiment takes as an input."""

    value: Any
    unit: str
    source: str
    tag: Tag


class Claim(_Strict):
    """One number, or one ordering, that a paper states (``claim``) or that we state about it (``finding``)."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    ref: str = ""
    kind: Literal["claim", "finding"] = "claim"
    statement: str = Field(min_length=10)
    headline: bool = False  # shown in the table of the README
    value: Number | tuple[Number, Number] | None
    unit: str
    source: str
    tag: Tag
    evidence: Literal["exact", "measured", "trained", "modelled"]
    relation: Literal["equals", "at_least", "at_most", "between", "ordering"]
    tolerance: Tolerance | None = None
    neutral: Number | None = None  # the value that means "no effect"
    conditions: dict[str, Any] = {}
    size_comparable_at: tuple[Scale, ...] = ("smoke", "reduced", "full")
    control: Control | None = None
    no_control: str | None = None  # why a claim has no switch, where it has none
    used_in_fit: str | None = None
    not_testable: str | None = None
    depends_on: tuple[str, ...] = ()  # config and device figures that `sensitivity=true` moves

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if self.relation == "ordering":
            if self.neutral is None:
                raise ValueError("an ordering needs `neutral`, the value that means no effect")
        elif self.value is None:
            raise ValueError(f"relation '{self.relation}' needs a value")
        elif self.tolerance is None:
            raise ValueError(f"relation '{self.relation}' needs a tolerance with its reason")
        if (self.relation == "between") != isinstance(self.value, tuple):
            raise ValueError("relation 'between' takes a value [low, high], the others a single number")
        if isinstance(self.value, tuple) and self.value[0] > self.value[1]:
            raise ValueError("value [low, high] has low above high")
        if not self.not_testable and (self.control is None) == (self.no_control is None):
            raise ValueError("a claim has either a control or a `no_control` reason")
        return self


class Paper(_Strict):
    """Who wrote the paper and where it is."""

    title: str
    authors: str
    venue: str
    year: int
    link: str
    code: str = ""
    licence_note: str = ""


class ClaimsFile(_Strict):
    """The contents of a ``claims.yaml``."""

    paper: Paper
    published: dict[str, Published] = {}
    claims: list[Claim] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> ClaimsFile:
        seen: set[str] = set()
        for claim in self.claims:
            if claim.id in seen:
                raise ValueError(f"claim id '{claim.id}' occurs twice")
            seen.add(claim.id)
        return self

    def by_id(self) -> dict[str, Claim]:
        return {claim.id: claim for claim in self.claims}


def load_claims(path: Path) -> ClaimsFile:
    """Read and check a ``claims.yaml``.

    Raises:
        UserError: the file is missing, is not YAML, or breaks the schema; the sentence names the file and the place.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; every paper folder holds a claims.yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; mend the file") from error
    try:
        return ClaimsFile.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error, data)}; mend the file") from error


def _first_problem(error: ValidationError, data: object) -> str:
    """One sentence for the first of pydantic's complaints, with the claim's id in place of its number."""
    problem = error.errors()[0]
    place = list(problem["loc"])
    if len(place) > 1 and place[0] == "claims" and isinstance(place[1], int) and isinstance(data, dict):
        entry = data["claims"][place[1]]
        place[1] = entry.get("id", place[1]) if isinstance(entry, dict) else place[1]
    where = ".".join(str(part) for part in place) or "top level"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
