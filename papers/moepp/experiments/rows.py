"""The rows of Tab. 3 by the keys that claims.yaml uses."""

from __future__ import annotations

MODELS = {"06b": "0.6B", "1b": "1B", "7b": "7B"}
TAUS = {"010": 0.1, "025": 0.25, "050": 0.5, "075": 0.75, "100": 1.0}
ROWS = (*((model, tau) for model in ("06b", "1b") for tau in TAUS), ("7b", "075"))

MODELLED = (("06b", "075"), ("1b", "010"), ("1b", "075"), ("7b", "075"))  # the rows that the device model is judged on


def claims(prefix: str, rows: tuple[tuple[str, str], ...] = ROWS) -> list[str]:
    """Ids of the claims about ``rows``."""
    return [f"{prefix}_{model}_{tau}" for model, tau in rows]
