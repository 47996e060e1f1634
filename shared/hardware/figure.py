"""A published figure: value, unit, source, trust and, for energies and powers, scope.

Every number of ``conf/device/*.yaml`` is one :class:`Figure`. ``tag`` says how the number came about: ``read`` (seen in a public
repository), ``page`` (seen on a public page), ``derived`` (computed from tagged figures), ``fit`` (fitted to a public measured data
set), ``measured`` (by this suite on the machine, see :mod:`shared.calibrate`) or ``recalled`` (unchecked: verify before a claim's
verdict rests on it). ``scope`` says what an energy or power includes: ``device`` (a chip's array and I/O), ``package`` (chip and
memory), ``board`` (what an on-board sensor sees) or ``wall``. The same DRAM bit costs four times as much at ``board`` as at ``device``
scope, so scopes are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from shared.errors import unknown

Tag = Literal["read", "page", "derived", "fit", "measured", "recalled"]
Scope = Literal["device", "package", "board", "wall"]

# Unit -> what no device lies outside of. A figure in G, M or k units falls out of its range and is refused.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "op/s": (1e6, 1e18),
    "B/s": (1e6, 1e15),
    "B": (1e2, 1e16),
    "Hz": (1e4, 1e11),
    "W": (1e-4, 1e5),
    "J": (1e-3, 1e9),
    "J/op": (1e-16, 5e-9),
    "J/B": (1e-15, 1e-7),
    "s": (1e-10, 10.0),
    "1/s": (1.0, 1e12),
    "count": (1.0, 1e12),
    "ratio": (1e-6, 10.0),
}
SCOPED = ("W", "J/op", "J/B")


class Section(BaseModel):
    """Base of all file sections: frozen, strict types, and an unknown key is an error that lists the keys allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"must be a mapping with keys among: {', '.join(cls.model_fields)}")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(str(unknown("key", key, cls.model_fields)))
        return data


class Figure(Section):
    """One number. Its uncertainty is either ``rel_unc`` (relative, symmetric) or the pair ``lo``, ``hi``; 0 means exact."""

    value: float
    unit: str
    source: str
    tag: Tag
    scope: Scope | None = None
    rel_unc: float | None = None
    lo: float | None = None
    hi: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Figure:
        if self.unit not in PLAUSIBLE:
            raise ValueError(str(unknown("unit", self.unit, PLAUSIBLE)))
        low, high = PLAUSIBLE[self.unit]
        for name, number in (("value", self.value), ("lo", self.lo), ("hi", self.hi)):
            if number is not None and not low <= number <= high:
                raise ValueError(
                    f"{name} {number:g} {self.unit} lies outside {low:g} to {high:g} {self.unit}: "
                    "write it in the unit without prefix"
                )
        if not self.source.strip():
            raise ValueError("source must say where the value is from")
        if (self.scope is None) == (self.unit in SCOPED):
            needs = "needs" if self.unit in SCOPED else "cannot have"
            raise ValueError(f"a figure in {self.unit} {needs} a scope (device, package, board or wall)")
        if self.rel_unc is not None and (self.lo is not None or self.hi is not None):
            raise ValueError("give either rel_unc or lo and hi, not both")
        if self.rel_unc is None:
            if self.lo is None or self.hi is None:
                raise ValueError("uncertainty missing: give rel_unc, or lo and hi")
            if not self.lo <= self.value <= self.hi:
                raise ValueError(f"needs lo <= value <= hi, got {self.lo:g}, {self.value:g}, {self.hi:g}")
        elif not 0 <= self.rel_unc < 1:
            raise ValueError(f"rel_unc must be in [0, 1), got {self.rel_unc:g}: write lo and hi for more")
        return self

    @property
    def low(self) -> float:
        """Lower end of the uncertainty, in ``unit``."""
        return self.lo if self.lo is not None else self.value * (1 - (self.rel_unc or 0.0))

    @property
    def high(self) -> float:
        """Upper end of the uncertainty, in ``unit``."""
        return self.hi if self.hi is not None else self.value * (1 + (self.rel_unc or 0.0))


def _in(unit: str) -> AfterValidator:
    def check(figure: Figure) -> Figure:
        if figure.unit != unit:
            raise ValueError(f"unit must be {unit}, got {figure.unit}")
        return figure

    return AfterValidator(check)


OpPerS = Annotated[Figure, _in("op/s")]
BytePerS = Annotated[Figure, _in("B/s")]
Bytes = Annotated[Figure, _in("B")]
Hertz = Annotated[Figure, _in("Hz")]
Watt = Annotated[Figure, _in("W")]
Joule = Annotated[Figure, _in("J")]
JoulePerOp = Annotated[Figure, _in("J/op")]
JoulePerByte = Annotated[Figure, _in("J/B")]
Second = Annotated[Figure, _in("s")]
PerSecond = Annotated[Figure, _in("1/s")]
Count = Annotated[Figure, _in("count")]
Ratio = Annotated[Figure, _in("ratio")]


def _fraction(figure: Figure) -> Figure:
    if figure.high > 1.2 or figure.value > 1:
        raise ValueError(f"an achieved fraction lies in (0, 1], got {figure.value:g}: write 0.8 for 80 %")
    return figure


Fraction = Annotated[Figure, _in("ratio"), AfterValidator(_fraction)]
