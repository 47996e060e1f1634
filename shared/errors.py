"""Errors that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one clear sentence that says what to do; the runner prints it and exits with status 2."""


def unknown(what: str, name: object, allowed: Iterable[object]) -> UserError:
    """The error for a name that is not one of ``allowed``; names the nearest match first, then all allowed values."""
    options = sorted(str(option) for option in allowed)
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return UserError(
        f"unknown {what} '{name}': {hint}choose one of: {', '.join(options) if options else '(none exist)'}"
    )
