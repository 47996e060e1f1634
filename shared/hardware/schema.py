"""The sections of a device file. See :mod:`shared.hardware.figure` for what a figure carries.

Conventions: peaks are dense and count two operations per MAC; bandwidths are bytes per second in powers of ten; links are per
direction. What is unknown is absent. Where a source gives only a range, ``value`` is its middle.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from shared.errors import unknown
from shared.hardware.figure import (
    BytePerS,
    Bytes,
    Count,
    Figure,
    Fraction,
    Hertz,
    Joule,
    JoulePerByte,
    JoulePerOp,
    OpPerS,
    PerSecond,
    Ratio,
    Second,
    Section,
    Watt,
)

Kind = Literal["gpu", "soc", "cpu", "fpga", "npu", "ssd", "flash"]

BASE_PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int32", "int16", "int8", "int4")
_PRECISION = re.compile(rf"^(npu_|gpu_|cpu_)?({'|'.join(BASE_PRECISIONS)})(_tc|_vector|_acc16|_acc32)?$")
VECTOR = "vector"

OPERATOR_CLASSES = (
    *(
        "matmul",
        "conv",
        "conv1x1",
        "conv1x1_odd",
        "stem",
        "depthwise",
        "attention",
        "pointwise",
        "special",
        "strided",
        "batch_norm",
        "layer_norm",
    ),
    *(
        "softmax",
        "reduction",
        "pool",
        "broadcast",
        "integer",
        "division",
        "gather",
        "gather_rows",
        "scatter",
        "sort",
        "topk",
        "copy",
    ),
)

MEMORY_LEVELS = (
    *("dram", "sram", "flash", "l3", "l2", "l1", "l1d", "shared_memory", "lds", "registers"),
    *("cmem", "local", "tcm", "shram", "bram", "uram"),
)


def _precision(name: str) -> str:
    if name != VECTOR and not _PRECISION.match(name):
        raise ValueError(
            f"unknown precision '{name}': write {VECTOR} or one of {', '.join(BASE_PRECISIONS)}, with npu_, gpu_ or cpu_ before it "
            "for one processor of several and _tc, _vector, _acc16 or _acc32 after it"
        )
    return name


def _level(name: str) -> str:
    if name not in MEMORY_LEVELS:
        raise ValueError(str(unknown("memory level", name, MEMORY_LEVELS)))
    return name


def _operator_class(name: str) -> str:
    if name not in OPERATOR_CLASSES:
        raise ValueError(str(unknown("class of operators", name, OPERATOR_CLASSES)))
    return name


def _base_precision(name: str) -> str:
    if name not in BASE_PRECISIONS:
        raise ValueError(str(unknown("precision", name, BASE_PRECISIONS)))
    return name


Precision = Annotated[str, AfterValidator(_precision)]
BasePrecision = Annotated[str, AfterValidator(_base_precision)]
OperatorClass = Annotated[str, AfterValidator(_operator_class)]
Level = Annotated[str, AfterValidator(_level)]


class Compute(Section):
    """Number of units and their clock. ``units`` are what per-unit memories count: SMs, compute units."""

    units: Count | None = None
    cores: Count | None = None
    clock: Hertz | None = None
    macs_per_cycle: Count | None = None
    elementwise_units: Count | None = None


class Memory(Section):
    """One memory level. ``per_unit``: the size is that of one of ``compute.units``; ``usable``: what a design can take of ``size``."""

    technology: str = ""
    shared: bool = False
    per_unit: bool = False
    size: Bytes | None = None
    usable: Bytes | None = None
    bandwidth: BytePerS | None = None
    read_bandwidth: BytePerS | None = None
    write_bandwidth: BytePerS | None = None
    latency_cycles: Count | None = None


class Link(Section):
    """A link per direction; ``achieved`` is what large copies reach; ``energy`` is component scope."""

    bandwidth: BytePerS
    achieved: BytePerS | None = None
    energy: JoulePerByte | None = None


class CollectiveFit(Section):
    """An alpha-beta fit of all-reduce at one topology. ``alpha`` is the intercept of a whole call, ``bandwidth`` the bus bandwidth."""

    ranks: Count
    alpha: Second | None = None
    bandwidth: BytePerS
    fit_error_rel: Ratio | None = None


class Power(Section):
    """Power states. ``limit``: enforced; ``full_load``: measured, not enforced; the active floor belongs to the energy model."""

    limit: Watt | None = None
    idle: Watt | None = None
    active: Watt | None = None
    sleep: Watt | None = None
    full_load: Watt | None = None
    modes: list[Watt] = Field(default_factory=list)


class EnergyFigures(Section):
    """One additive model: floor x time + per_op x operations + per_byte x bytes. All its figures have the scope of its name.

    ``per_byte`` is keyed by memory level (``dram``, ``cmem_read``, ...), or ``storage`` for a storage device.
    """

    method: str = ""
    fit_error_rel: Ratio | None = None
    floor: Watt | None = None
    per_op: dict[Precision, JoulePerOp] = Field(default_factory=dict)
    per_byte: dict[str, JoulePerByte] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _levels(self) -> EnergyFigures:
        for name in self.per_byte:
            if name != "storage":
                _level(name.removesuffix("_read").removesuffix("_write"))
        return self

    def figures(self) -> list[Figure]:
        return [*([self.floor] if self.floor else []), *self.per_op.values(), *self.per_byte.values()]


class Energy(Section):
    """``board``: increments seen by a board sensor; ``component``: circuit energies at device or package scope.

    ``all_in_per_op`` is power over rate at full load: it includes the floor and is never added to anything.
    """

    board: EnergyFigures | None = None
    component: EnergyFigures | None = None
    all_in_per_op: dict[Precision, JoulePerOp] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_scope_each(self) -> Energy:
        for name, model, scopes in (
            ("board", self.board, ("board",)),
            ("component", self.component, ("device", "package")),
        ):
            for figure in model.figures() if model else []:
                if figure.scope not in scopes:
                    raise ValueError(
                        f"figures under {name} have scope {' or '.join(scopes)}, got {figure.scope}: scopes do not mix"
                    )
        return self


class OperatorLaw(Section):
    """Shares of the peaks that one class of operators reaches in one precision, see :mod:`shared.hardware.efficiency`.

    ``compute``: of the matrix rate; ``vector``: of the vector rate; ``bandwidth``: of the bandwidth for its working set; ``serial``: part
    of the shorter of computing and moving that is not hidden behind the longer; ``m_half``, ``n_half``, ``k_half``: length of a dimension
    at which half the rate is reached.
    """

    compute: Fraction | None = None
    vector: Fraction | None = None
    bandwidth: Ratio
    overhead: Second
    serial: Fraction | None = None
    m_half: Count | None = None
    n_half: Count | None = None
    k_half: Count | None = None


class Calibration(Section):
    """What silicon achieves. The latency model is t = max(F/(P e_f), B/(W e_b)) + t0 per call.

    ``operators``: laws by class of operator and precision in place of the one e_f, e_b and t0, with ``caches`` (levels of ``memory``) and
    ``tile_half``; used where a workload names the kinds and shapes of its rows. ``held_out_error_rel``: error on models outside the fit, of
    the laws where there are any; ``simple_error_rel``: of e_f, e_b and t0 alone where there are laws too; ``roofline_error_rel``: of the
    datasheet roofline alone; ``energy_error_rel``: of the energy model on models outside the fit.
    """

    method: str = ""
    compute_fraction: Fraction | None = None
    bandwidth_fraction: Fraction | None = None
    overhead: Second | None = None
    fit_error_rel: Ratio | None = None
    held_out_error_rel: Ratio | None = None
    roofline_error_rel: Ratio | None = None
    simple_error_rel: Ratio | None = None
    energy_error_rel: Ratio | None = None
    operators: dict[OperatorClass, dict[BasePrecision, OperatorLaw]] = Field(default_factory=dict)
    caches: list[Level] = Field(default_factory=list)
    tile_half: Count | None = None
    best_matmul: dict[Precision, Fraction] = Field(default_factory=dict)
    stream: dict[str, BytePerS] = Field(default_factory=dict)
    eager_overhead: dict[str, Second] = Field(default_factory=dict)


class Fabric(Section):
    """An FPGA's resources, as the chip has them."""

    dsp: Count
    lut: Count | None = None
    ff: Count | None = None
    bram36: Count | None = None
    uram: Count | None = None


class Cpu(Section):
    """The host processor of a system on chip."""

    type: str
    cores: Count
    clock: Hertz | None = None


class Storage(Section):
    """Rates of a storage device by access pattern."""

    read: dict[str, BytePerS]
    write: dict[str, BytePerS] = Field(default_factory=dict)
    random_read: PerSecond | None = None
    queues: Count | None = None


class Limits(Section):
    """Hard limits of the software stack."""

    npu_session_map: Bytes | None = None


class DeviceFile(Section):
    """A device file as written."""

    id: str
    title: str
    kind: Kind
    compute: Compute = Compute()
    peak: dict[Precision, OpPerS] = Field(default_factory=dict)
    sparse_peak: dict[Precision, OpPerS] = Field(default_factory=dict)
    runs_as: dict[str, str] = Field(default_factory=dict)  # precision asked for -> key of `peak` that it runs as
    memory: dict[Level, Memory] = Field(default_factory=dict)
    link: dict[str, Link] = Field(default_factory=dict)
    collective: dict[str, CollectiveFit] = Field(default_factory=dict)
    power: Power = Power()
    energy: Energy = Energy()
    calibration: Calibration = Calibration()
    fabric: Fabric | None = None
    cpu: Cpu | None = None
    storage: Storage | None = None
    storage_device: str | None = None  # id of the storage device built in
    battery: Joule | None = None
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> DeviceFile:
        for asked, key in self.runs_as.items():
            if asked not in BASE_PRECISIONS:
                raise ValueError(f"runs_as: {unknown('precision', asked, BASE_PRECISIONS)}")
            if key not in self.peak:
                raise ValueError(f"runs_as.{asked}: {unknown('peak', key, self.peak)}")
        storing = self.kind in ("ssd", "flash")
        if storing != (self.storage is not None):
            raise ValueError(f"a device of kind {self.kind} {'needs' if storing else 'has no'} section storage")
        if not storing and not self.peak:
            raise ValueError(f"a device of kind {self.kind} needs a peak rate in section peak")
        if any(memory.per_unit for memory in self.memory.values()) and self.compute.units is None:
            raise ValueError("a memory level with per_unit needs compute.units")
        for level in self.calibration.caches:
            memory = self.memory.get(level)
            if memory is None or memory.size is None or (memory.bandwidth is None and memory.read_bandwidth is None):
                raise ValueError(
                    f"calibration.caches names {level}, which needs a size and a bandwidth in section memory"
                )
        if self.calibration.operators and self.calibration.bandwidth_fraction is None:
            raise ValueError("calibration.operators needs calibration.bandwidth_fraction")
        if self.calibration.tile_half is not None and self.compute.units is None:
            raise ValueError("calibration.tile_half needs compute.units")
        floor = self.energy.board.floor if self.energy.board else None
        if floor and self.power.limit and floor.value >= self.power.limit.value:
            raise ValueError("energy.board.floor must lie below power.limit")
        return self
