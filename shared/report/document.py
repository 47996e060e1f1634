"""The result document: written to and read from ``results.json``, the stable interface for machines.

Keys stand in the order given here; NaN never reaches the file, and an infinite interval end (one seed) is written as null.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import write_whole
from shared.report.format import VERDICTS

SCHEMA_VERSION = 1

_DOCUMENT_KEYS = (
    *("schema_version", "paper", "title", "scale", "device", "seed", "config", "environment", "started", "seconds"),
    *("claims", "measurements", "pictures", "notes"),
)
_CLAIM_KEYS = (
    *("id", "ref", "kind", "statement", "source", "tag", "evidence", "relation", "paper_value", "stated_value"),
    *("value", "unit", "ci_low", "ci_high", "n_seeds", "values", "tolerance", "neutral", "verdict", "reason"),
    *("suspicious", "conditions", "control", "experiment", "seconds", "from_cache", "note", "sensitivity"),
)
_SORTED = ("config", "environment")
_REQUIRED = {
    "paper": str,
    "scale": str,
    "device": str,
    "seed": int,
    "config": dict,
    "environment": dict,
    "claims": list,
}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_json(document: Mapping[str, Any], path: Path | str) -> Path:
    """Write the document atomically: a reader sees the old file or the new one, never a part, also after a crash.

    Raises :class:`UserError` for a value that JSON cannot hold (naming the field) and for a folder that cannot be written.
    """
    text = json.dumps(plain(document), ensure_ascii=False, allow_nan=False, indent=2)
    return write_atomic(path, text + "\n")


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the stable key order, tuples as lists and infinite interval ends as None; the argument is left as it is."""
    copied = {key: _plain(value, key) for key, value in document.items()}
    for key in _SORTED:
        if key in copied:
            copied[key] = _sorted(copied[key])
    copied["claims"] = [_ordered(claim, _CLAIM_KEYS) for claim in copied.get("claims", [])]
    return _ordered(copied, _DOCUMENT_KEYS)


def load_results(path: Path | str) -> dict[str, Any]:
    """Read a results.json that :func:`write_json` wrote.

    Raises :class:`UserError` for a file that is missing, unreadable, cut off, of another schema version or not a result.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the path of a results.json that run.py printed"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): it is damaged; run the paper again to write it anew"
        ) from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UserError(
            f"{path} is not a result: it has no schema_version; give the path of a results.json that run.py printed"
        )
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version!r}, this version reads {SCHEMA_VERSION}: run the paper again to write it anew"
        )
    for key, kind in _REQUIRED.items():
        if key not in document or not isinstance(document[key], kind) or isinstance(document[key], bool):
            raise UserError(
                f"{path} is not a complete result: '{key}' must be a {kind.__name__}; run the paper again to write it anew"
            )
    for index, claim in enumerate(document["claims"]):
        if not isinstance(claim, dict) or not isinstance(claim.get("id"), str) or claim.get("verdict") not in VERDICTS:
            raise UserError(
                f"{path}: claims[{index}] needs an id and a verdict that is one of: {', '.join(VERDICTS)}; "
                "run the paper again to write it anew"
            )
    return document


def write_atomic(path: Path | str, content: str | bytes) -> Path:
    """Write to a temporary file in the same folder, flush it to the disk, then rename. Text is UTF-8.

    Raises :class:`UserError` with the path and what to do when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    try:
        write_whole(path, data)
    except OSError as error:
        advice = "free some space" if error.errno in _FULL else "make the folder writable"
        raise UserError(
            f"cannot write {path}: {error.strerror}; {advice} or choose another folder with out=DIR"
        ) from error
    return path


def _plain(value: Any, field: str) -> Any:
    """``value`` in the types of JSON; raises :class:`UserError` with ``field`` where it has none."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value) and field.endswith((".ci_low", ".ci_high")):
            return None
        if not math.isfinite(value):
            raise UserError(
                f"the result has {value} in {field}, which results.json cannot hold: mend the experiment that yields it"
            )
        return value
    if isinstance(value, str):
        if not _is_unicode(value):
            raise UserError(
                f"the result has text in {field} that is not valid Unicode: mend the experiment that yields it"
            )
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UserError(
                    f"the result has the key {key!r} in {field}, and keys must be text: mend the experiment that yields it"
                )
        return {key: _plain(item, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{field}[{index}]") for index, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item(), field)  # a scalar of numpy or torch
    raise UserError(
        f"the result has a {type(value).__name__} in {field}, which results.json cannot hold: "
        "use numbers, text, lists and dictionaries"
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _ordered(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Known keys in the order of ``keys``, then the others by name."""
    others = sorted(key for key in mapping if key not in keys)
    return {key: mapping[key] for key in [*(key for key in keys if key in mapping), *others]}


def _sorted(value: Any) -> Any:
    """Dictionaries at every depth sorted by key."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value
