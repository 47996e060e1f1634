"""The five words that a claim can end with."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    REPLICATED = "replicated"
    DIRECTION = "direction only"
    NOT_REPLICATED = "not replicated"
    NOT_TESTED = "not tested"
    ERROR = "error"
