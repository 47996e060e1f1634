"""Config sections as the objects that the library takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papers.zero_tprune.hardware import Assumed
    from papers.zero_tprune.plans import Rule


def rule_of(section: Any) -> Rule:
    """``rule`` of the config. Raises UserError for a value that does not exist."""
    from papers.zero_tprune.plans import Rule

    values = dict(section)
    values["vhf"] = None if values["vhf"] is None else (float(values["vhf"][0]), float(values["vhf"][1]))
    return Rule(**values)


def assumed_of(section: Any) -> Assumed:
    """``hardware.assumed`` of the config."""
    from papers.zero_tprune.hardware import Assumed

    return Assumed(**dict(section.assumed))
