"""A device as data: peak rates, memory levels, links, power and energy, each with source and uncertainty.

The files live in ``conf/device/<id>.yaml``; Hydra composes one as the group ``device``. Every accessor raises
:class:`~shared.errors.UserError` naming what the device does have; nothing falls back to a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from shared.errors import UserError, unknown
from shared.hardware.figure import Figure
from shared.hardware.schema import VECTOR, DeviceFile, Memory

DEVICE_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "device"

# torch's name -> the name that data sheets use. Names on the right are accepted too.
DTYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "uint8": "int8",
}

EnergyKind = Literal["board", "component"]


class Device(DeviceFile):
    """A validated device. Build one with :func:`load_device`."""

    def figures(self) -> dict[str, Figure]:
        """Every figure by its path in the file, e.g. ``memory.dram.bandwidth``."""
        return dict(self._figures)

    @cached_property
    def _figures(self) -> dict[str, Figure]:
        return dict(_walk(self, ""))

    def figure(self, path: str) -> Figure:
        """The figure at a path in the file. Raises UserError naming the nearest path."""
        if path not in self._figures:
            raise unknown(f"figure of device '{self.id}'", path, self._figures)
        return self._figures[path]

    def peak_key(self, dtype: str) -> str:
        """The key of ``peak`` that operations of ``dtype`` (torch's name or the data sheet's) run as; ``runs_as`` decides first."""
        asked = DTYPES.get(dtype, dtype)
        key = self.runs_as.get(asked, asked)
        if key not in self.peak:
            candidates = [name for name in self.peak if asked in name.split("_")]
            hint = (
                f"; say which with device.runs_as.{asked}=KEY, KEY among {', '.join(candidates)}" if candidates else ""
            )
            raise UserError(f"device '{self.id}' has no peak rate for {dtype}: it has {_names(self.peak)}{hint}")
        return key

    def op_per_s(self, dtype: str) -> float:
        """Dense peak of matrix operations in ``dtype``, op/s (2 per MAC)."""
        return self.peak[self.peak_key(dtype)].value

    def vector_key(self) -> str:
        """The key of the rate of element-wise operations: ``vector`` where the device has one, else the fp32 peak.

        On a GPU that is the rate of the vector units, whatever the data type: packed half-precision vector rates are not assumed.
        """
        for key in (VECTOR, "fp32"):
            if key in self.peak:
                return key
        raise UserError(
            f"device '{self.id}' has no rate for vector operations: its peaks are {_names(self.peak)}; add peak.{VECTOR} or peak.fp32"
        )

    def vector_op_per_s(self) -> float:
        """Peak of element-wise operations, op/s."""
        return self.peak[self.vector_key()].value

    def bandwidth_path(self, level: str = "dram", direction: Literal["read", "write"] | None = None) -> str:
        """Path of the bandwidth figure of a memory level."""
        memory = self._memory(level)
        names = ([f"{direction}_bandwidth"] if direction else []) + ["bandwidth"]
        for name in names:
            if getattr(memory, name) is not None:
                return f"memory.{level}.{name}"
        have = [n for n in ("bandwidth", "read_bandwidth", "write_bandwidth") if getattr(memory, n) is not None]
        raise UserError(f"device '{self.id}' has no {names[0]} for memory level {level}: it has {_names(have)} there")

    def bandwidth_bytes_per_s(self, level: str = "dram", direction: Literal["read", "write"] | None = None) -> float:
        """Peak bandwidth of a memory level, bytes/s."""
        return self.figure(self.bandwidth_path(level, direction)).value

    def size_bytes(self, level: str = "dram", *, usable: bool = False) -> float:
        """Capacity of a memory level over the whole device, bytes; ``usable``: what a design can take of it."""
        memory = self._memory(level)
        figure = memory.usable if usable else memory.size
        if figure is None:
            raise UserError(f"device '{self.id}' has no {'usable ' if usable else ''}size for memory level {level}")
        units = self.compute.units.value if memory.per_unit and self.compute.units else 1.0
        return figure.value * units

    def link_bytes_per_s(self, name: str, *, achieved: bool = False) -> float:
        """Bandwidth of a link per direction, bytes/s; ``achieved``: what large copies reach instead of the peak."""
        if name not in self.link:
            raise UserError(f"device '{self.id}' has no link {name}: it has {_names(self.link)}")
        figure = self.link[name].achieved if achieved else self.link[name].bandwidth
        if figure is None:
            raise UserError(f"device '{self.id}' has no achieved bandwidth for link {name}, only its peak")
        return figure.value

    def storage_bytes_per_s(self, pattern: str, *, write: bool = False) -> float:
        """Rate of a storage device for an access pattern, bytes/s."""
        rates = (self.storage.write if write else self.storage.read) if self.storage else {}
        if pattern not in rates:
            kind = "write" if write else "read"
            raise UserError(f"device '{self.id}' has no storage {kind} pattern {pattern}: it has {_names(rates)}")
        return rates[pattern].value

    def power_w(self, state: Literal["limit", "idle", "active", "sleep", "full_load"]) -> float:
        """Power in a state, watts; the figure's scope is in the file."""
        figure = getattr(self.power, state, None)
        if not isinstance(figure, Figure):
            have = [name for name, _ in _walk(self.power, "") if "." not in name]
            raise UserError(f"device '{self.id}' has no power figure {state}: it has {_names(have)}")
        return figure.value

    def energy_path(self, kind: EnergyKind, what: str, key: str = "") -> str:
        """Path of an energy figure: ``what`` is ``floor``, ``per_op`` (key: a peak's key) or ``per_byte`` (key: a memory level)."""
        path = f"energy.{kind}.{what}" + (f".{key}" if key else "")
        if path not in self._figures:
            have = [name for name in self._figures if name.startswith("energy.")]
            raise UserError(f"device '{self.id}' has no figure {path}: its energy figures are {_names(have)}")
        return path

    def energy_j_per_op(self, dtype: str, kind: EnergyKind) -> float:
        """Energy of one operation in ``dtype``, joules, at the scope of the model ``kind``."""
        return self.figure(self.energy_path(kind, "per_op", self.peak_key(dtype))).value

    def energy_j_per_byte(self, level: str, kind: EnergyKind) -> float:
        """Energy of one byte moved from or to a memory level, joules, at the scope of the model ``kind``."""
        return self.figure(self.energy_path(kind, "per_byte", level)).value

    def energy_floor_w(self, kind: EnergyKind) -> float:
        """Power of the active but unoccupied device in the model ``kind``, watts."""
        return self.figure(self.energy_path(kind, "floor")).value

    def _memory(self, level: str) -> Memory:
        if level not in self.memory:
            raise UserError(f"device '{self.id}' has no memory level {level}: it has {_names(self.memory)}")
        return self.memory[level]


def load_device(source: str | Path | Mapping[str, Any]) -> Device:
    """A device from its id (``conf/device/<id>.yaml``), a path to a YAML file, or a mapping (Hydra's ``cfg.device``).

    Raises UserError with one sentence naming the file or device, the key and what is allowed.
    """
    if isinstance(source, Mapping):
        data = _plain(source)
        return _validated(data, f"device '{data['id']}'" if isinstance(data.get("id"), str) else "the device")
    if isinstance(source, str) and not source.endswith((".yaml", ".yml")):
        if source not in list_devices():
            raise unknown("device", source, list_devices())
        return _from_id(source)
    return _from_file(Path(source))


def list_devices() -> tuple[str, ...]:
    """Ids of all devices in ``conf/device``, sorted."""
    return tuple(sorted(path.stem for path in DEVICE_FOLDER.glob("*.yaml")))


@cache
def _from_id(device_id: str) -> Device:
    return _from_file(DEVICE_FOLDER / f"{device_id}.yaml")


def _from_file(path: Path) -> Device:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read device file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"device file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"device file {path} must hold a mapping that starts with id, title and kind")
    device = _validated(data, f"device file {path.name}")
    if device.id != path.stem:
        raise UserError(f"device file {path.name}: id must be the file's name, {path.stem}, got {device.id}")
    return device


def _validated(data: Mapping[str, Any], where: str) -> Device:
    try:
        return Device.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "missing":
            message = "is missing"
        elif first["type"] == "float_type":
            message = f"must be a number, got {first['input']!r} (YAML wants a point and a signed exponent: 1.0e+12)"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{where}: {key + ' ' if first['type'] == 'missing' else key + ': ' if key else ''}{message}"
        ) from None


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Figure]]:
    if isinstance(node, Figure):
        yield prefix, node
        return
    if isinstance(node, BaseModel):
        items: list[tuple[Any, Any]] = [(name, getattr(node, name)) for name in type(node).model_fields]
    elif isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return
    for name, child in items:
        yield from _walk(child, f"{prefix}.{name}" if prefix else str(name))


def _plain(node: Any) -> Any:
    """Mappings and sequences of any kind (OmegaConf's too) as dicts and lists."""
    if isinstance(node, Mapping):
        return {str(key): _plain(node[key]) for key in node}
    if isinstance(node, (str, bytes)) or not hasattr(node, "__iter__"):
        return node
    return [_plain(child) for child in node]


def _names(names: Any) -> str:
    return ", ".join(names) or "nothing"
