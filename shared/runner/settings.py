"""The keys that every run has, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.claims import Claim
from shared.errors import UserError, unknown
from shared.runner.environment import num_cores

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """The runner's own part of the config."""

    paper: str
    scale: str
    device: str
    seed: int
    num_seeds: int
    claims: tuple[str, ...] | None  # None: all
    force: bool
    control: bool
    sensitivity: bool
    strict: bool
    cache: Path
    threads: int
    workers: int
    tracking: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of trained experiments: disjoint between base seeds, so that a sweep over ``seed`` never repeats one."""
        return tuple(range(self.seed * self.num_seeds, (self.seed + 1) * self.num_seeds))


def read_settings(config: Config) -> Settings:
    """Check the runner's keys.

    Raises:
        UserError: names the key and what it may be.
    """
    threads = _whole(config, "threads", minimum=1)
    workers = config["workers"]
    if workers == "auto":
        workers = max(1, num_cores() // threads)
    else:
        workers = _whole(config, "workers", minimum=1, words="'auto' or ")
    if config["device"].get("id") is None:
        raise UserError("the device has no `id`: it must equal the name of its file in conf/device")
    return Settings(
        paper=config["paper"]["name"],
        scale=config["scale"]["name"],
        device=config["device"]["id"],
        seed=_whole(config, "seed", minimum=0),
        num_seeds=_whole(config["scale"], "num_seeds", minimum=1, prefix="scale."),
        claims=_claim_ids(config["claims"]),
        force=_flag(config, "force"),
        control=_flag(config, "control"),
        sensitivity=_flag(config, "sensitivity"),
        strict=_flag(config, "strict"),
        cache=Path(config["cache"]),
        threads=threads,
        workers=workers,
        tracking=config["tracking"]["mode"],
    )


def select_claims(claims: Mapping[str, Claim], asked: tuple[str, ...] | None) -> list[Claim]:
    """The claims asked for, in the order of claims.yaml.

    Raises:
        UserError: an id that the paper does not have.
    """
    for claim_id in asked or ():
        if claim_id not in claims:
            raise unknown("claim", claim_id, claims)
    return [claim for claim_id, claim in claims.items() if asked is None or claim_id in asked]


def with_overrides(config: Config, overrides: Mapping[str, Any], why: str) -> dict[str, Any]:
    """A copy of ``config`` with dotted keys replaced.

    Raises:
        UserError: a key that does not exist, with ``why`` it was asked for.
    """
    result: dict[str, Any] = dict(config)
    for dotted, value in overrides.items():
        node = result
        *parents, last = dotted.split(".")
        for part in parents:
            child = node.get(part)
            if not isinstance(child, Mapping):
                raise UserError(f"{why} sets '{dotted}', but the config has no '{part}'")
            node[part] = dict(child)
            node = node[part]
        if last not in node:
            raise UserError(
                f"{why} sets '{dotted}', but the config has no such key; there are: {', '.join(map(str, node))}"
            )
        node[last] = value
    return result


def _claim_ids(value: Any) -> tuple[str, ...] | None:
    if value == "all":
        return None
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UserError(f"claims={value} is neither 'all' nor a list of claim ids; write claims=[first,second]")


def _whole(config: Config, key: str, *, minimum: int, words: str = "", prefix: str = "") -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{prefix}{key}={value} must be {words}a whole number of at least {minimum}")
    return value


def _flag(config: Config, key: str) -> bool:
    if not isinstance(config[key], bool):
        raise UserError(f"{key}={config[key]} must be true or false")
    return bool(config[key])
