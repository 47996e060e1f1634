"""The traced work: :class:`Op` rows in a :class:`Workload`, with the memory that weights and saved activations take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Op:
    """One operator, executed ``count`` times; all other figures are those of one execution.

    ``phase`` is backward for what the autograd engine runs (recomputation included), forward for everything else, the optimiser
    included. ``module`` is the dotted path of the module that ran it ('' outside all modules), in the backward pass of the module
    whose forward pass made the graph node. ``shape`` is (batch, m, n, k) of a matrix product, see :class:`~shared.workload.Cost`.
    """

    name: str
    module: str
    kind: str
    phase: Phase
    dtype: str
    flops: int
    vector_ops: int
    bytes_read: int
    bytes_written: int
    count: int = 1
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that outlives an operator: a parameter, a buffer, or a storage that autograd saved (``name`` is then its module)."""

    name: str
    num_elements: int
    size_bytes: int


@dataclass(frozen=True)
class Totals:
    """Sums over rows. FLOPs of matrix products, convolutions and attention; vector operations of the rest."""

    num_ops: int
    flops: int
    vector_ops: int
    bytes_read: int
    bytes_written: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates: FLOPs / 2."""
        return self.flops // 2

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


class CostArrays(TypedDict):
    """The rows as columns of equal length, for a vectorised cost model. Figures are per call and float64, exact up to 2^53.

    ``dtype_id`` indexes ``dtypes``, the distinct types in the order of first appearance.
    """

    name: tuple[str, ...]
    module: tuple[str, ...]
    kind: tuple[str, ...]
    dtype: tuple[str, ...]
    flops: npt.NDArray[np.float64]
    vector_ops: npt.NDArray[np.float64]
    bytes_read: npt.NDArray[np.float64]
    bytes_written: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]
    dtype_id: npt.NDArray[np.intp]
    dtypes: tuple[str, ...]
    shape: tuple[tuple[int, ...], ...]


def _totals(ops: Iterable[Op]) -> Totals:
    num = flops = vector = read = written = 0
    for op in ops:
        num += op.count
        flops += op.count * op.flops
        vector += op.count * op.vector_ops
        read += op.count * op.bytes_read
        written += op.count * op.bytes_written
    return Totals(num, flops, vector, read, written)


def _below(path: str, name: str) -> bool:
    return not path or name == path or name.startswith(path + ".")


@dataclass(frozen=True, repr=False)
class Workload:
    """Operators in the order of execution, and what has to be held in memory beside them.

    ``parameters`` and ``buffers`` list each storage once; ``saved`` is what autograd held for the backward pass at the moment when it
    held most (each storage once and whole, inputs included, parameters and buffers not).
    """

    ops: tuple[Op, ...] = ()
    parameters: tuple[Held, ...] = ()
    buffers: tuple[Held, ...] = ()
    saved: tuple[Held, ...] = ()

    @cached_property
    def totals(self) -> Totals:
        """Sums over all rows."""
        return _totals(self.ops)

    @property
    def flops(self) -> int:
        """FLOPs of matrix products, convolutions and attention (2 per MAC); vector operations are not in it."""
        return self.totals.flops

    @property
    def macs(self) -> int:
        """Multiply-accumulates: FLOPs / 2."""
        return self.totals.macs

    @property
    def vector_ops(self) -> int:
        """Operations of everything that is not a matrix product, a convolution or attention, and of softmax inside attention."""
        return self.totals.vector_ops

    @property
    def bytes(self) -> int:
        """Bytes read and written, unfused and without a cache."""
        return self.totals.bytes

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(held.num_elements for held in self.parameters)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(held.size_bytes for held in self.parameters)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(held.size_bytes for held in self.buffers)

    @property
    def saved_bytes(self) -> int:
        """Bytes of activations that autograd holds for the backward pass, at the peak; 0 for an inference trace."""
        return sum(held.size_bytes for held in self.saved)

    def by_kind(self) -> dict[str, Totals]:
        """Totals of each kind of operator, in the order of first appearance."""
        return self._group(lambda op: op.kind)

    def by_phase(self) -> dict[str, Totals]:
        """Totals of the forward and the backward pass."""
        return self._group(lambda op: op.phase)

    def by_op(self) -> dict[str, Totals]:
        """Totals of each operator."""
        return self._group(lambda op: op.name)

    def by_module(self, depth: int = 1) -> dict[str, Totals]:
        """Totals of each module, paths cut after ``depth`` names; '' is what the root module runs itself."""
        return self._group(lambda op: ".".join(op.module.split(".")[:depth]))

    def saved_by_module(self, depth: int = 1) -> dict[str, int]:
        """Bytes of ``saved`` by the module that saved a storage first, paths cut after ``depth`` names."""
        sizes: dict[str, int] = {}
        for held in self.saved:
            key = ".".join(held.name.split(".")[:depth])
            sizes[key] = sizes.get(key, 0) + held.size_bytes
        return sizes

    def _group(self, key: Callable[[Op], str]) -> dict[str, Totals]:
        groups: dict[str, list[Op]] = {}
        for op in self.ops:
            groups.setdefault(key(op), []).append(op)
        return {name: _totals(ops) for name, ops in groups.items()}

    def within(self, path: str) -> Workload:
        """The part that runs in the module at ``path`` and below, with the parameters, buffers and saved activations of that part."""
        parts = (
            tuple(held for held in group if _below(path, held.name))
            for group in (self.parameters, self.buffers, self.saved)
        )
        return Workload(tuple(op for op in self.ops if _below(path, op.module)), *parts)

    def compressed(self) -> Workload:
        """Rows of the same operator, phase, type and cost merged into one with the sum of their counts; all totals stay.

        The module of a merged row is the longest path that its rows share.
        """
        merged: dict[tuple[Any, ...], Op] = {}
        for op in self.ops:
            key = (
                op.name,
                op.kind,
                op.phase,
                op.dtype,
                op.flops,
                op.vector_ops,
                op.bytes_read,
                op.bytes_written,
                op.shape,
            )
            if (first := merged.get(key)) is None:
                merged[key] = op
            else:
                merged[key] = replace(first, count=first.count + op.count, module=_shared_path(first.module, op.module))
        return replace(self, ops=tuple(merged.values()))

    def __add__(self, other: Workload) -> Workload:
        """Two parts of one system, one after the other; both sets of parameters, buffers and saved activations are held."""
        if not isinstance(other, Workload):
            return NotImplemented
        return Workload(
            self.ops + other.ops, self.parameters + other.parameters, self.buffers + other.buffers, self.saved + other.saved
        )  # fmt: skip

    def __mul__(self, times: int) -> Workload:
        """The same work ``times`` over, on the same parameters and with the same saved activations."""
        if not isinstance(times, int):
            return NotImplemented
        if times < 1:
            raise ValueError(f"a workload can be repeated once or more, not {times} times")
        return replace(self, ops=tuple(replace(op, count=op.count * times) for op in self.ops))

    __rmul__ = __mul__

    def arrays(self) -> CostArrays:
        """The rows as columns, see :class:`CostArrays`."""
        dtypes = {name: i for i, name in enumerate(dict.fromkeys(op.dtype for op in self.ops))}
        return CostArrays(
            name=tuple(op.name for op in self.ops),
            module=tuple(op.module for op in self.ops),
            kind=tuple(op.kind for op in self.ops),
            dtype=tuple(op.dtype for op in self.ops),
            flops=np.array([op.flops for op in self.ops], dtype=np.float64),
            vector_ops=np.array([op.vector_ops for op in self.ops], dtype=np.float64),
            bytes_read=np.array([op.bytes_read for op in self.ops], dtype=np.float64),
            bytes_written=np.array([op.bytes_written for op in self.ops], dtype=np.float64),
            count=np.array([op.count for op in self.ops], dtype=np.int64),
            dtype_id=np.array([dtypes[op.dtype] for op in self.ops], dtype=np.intp),
            dtypes=tuple(dtypes),
            shape=tuple(op.shape for op in self.ops),
        )

    def to_dict(self) -> dict[str, Any]:
        """Totals and compressed rows as JSON values."""
        return {
            "flops": self.flops, "macs": self.macs, "vector_ops": self.vector_ops,
            "bytes_read": self.totals.bytes_read, "bytes_written": self.totals.bytes_written,
            "num_parameters": self.num_parameters, "parameter_bytes": self.parameter_bytes, "buffer_bytes": self.buffer_bytes,
            "saved_bytes": self.saved_bytes,
            "ops": [{field: getattr(op, field) for field in Op.__slots__} for op in self.compressed().ops],
        }  # fmt: skip

    def table(self, by: Literal["module", "kind", "op", "phase"] = "module", depth: int = 1) -> Table:
        """A rich table of totals, one row per module (paths cut after ``depth`` names), kind, operator or phase, and their sum."""
        groups = self.by_module(depth) if by == "module" else getattr(self, f"by_{by}")()
        saved = f", {self.saved_bytes / 1e6:,.3f} MB saved for backward" if self.saved else ""
        table = Table(title=f"{self.num_parameters:,} parameters, {self.parameter_bytes / 1e6:,.3f} MB{saved}")
        table.add_column(by, overflow="fold")
        for heading in ("calls", "MMAC", "M vector ops", "MB read", "MB written"):
            table.add_column(heading, justify="right")
        for name, totals in (*groups.items(), ("total", self.totals)):
            if name == "total":
                table.add_section()
            figures = (totals.macs, totals.vector_ops, totals.bytes_read, totals.bytes_written)
            table.add_row(name or "(top level)", f"{totals.num_ops:,}", *(f"{figure / 1e6:,.3f}" for figure in figures))
        return table

    def __repr__(self) -> str:
        totals = self.totals
        return f"Workload({totals.num_ops} calls, {totals.flops:.4g} FLOPs, {totals.bytes:.4g} bytes, {self.num_parameters} parameters)"

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120).print(self.table())
        return text.getvalue().rstrip()


def _shared_path(a: str, b: str) -> str:
    shared = []
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)
