"""What a cost model needs to know of a workload: one row per operation, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WorkloadArrays:
    """A table of operations. All arrays have shape (n_ops,); numbers are **per call**, and a row is called ``count`` times.

    Args:
        name: what the row is called in reports.
        dtype: torch's name of the type that the matrix operations run in (``float32``, ``bfloat16``, ``int8``, ...).
        flops: operations of matrix units (2 per MAC).
        vector_ops: element-wise operations, run on the vector units.
        bytes_read, bytes_written: traffic with the memory level that the operation works from.
        count: number of calls, at least 1. Rows that launch nothing (views) do not belong into the table.
        kind, shape: kind of the operator and (batch, m, n, k) of its matrix product (see :class:`shared.workload.Cost`), as traced; empty
            where the rows are written by hand, and such a workload is costed without the laws of :mod:`shared.hardware.efficiency`.
    """

    name: tuple[str, ...]
    dtype: tuple[str, ...]
    flops: Array
    vector_ops: Array
    bytes_read: Array
    bytes_written: Array
    count: npt.NDArray[np.int64]
    kind: tuple[str, ...] = ()
    shape: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.name)
        for field in ("flops", "vector_ops", "bytes_read", "bytes_written"):
            values = np.asarray(getattr(self, field), dtype=np.float64)
            if values.shape != (n,):
                raise ValueError(f"{field} must have shape ({n},), got {values.shape}")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{field} must be finite and not negative")
            object.__setattr__(self, field, values)
        count = np.asarray(self.count)
        if len(self.dtype) != n or count.shape != (n,):
            raise ValueError(f"dtype and count must have one entry for each of the {n} rows")
        if len(self.kind) not in (0, n) or len(self.shape) not in (0, n) or (self.kind and not self.shape):
            raise ValueError(f"kind and shape must both be given, with one entry for each of the {n} rows, or neither")
        if n == 0 or not np.issubdtype(count.dtype, np.integer) or (count < 1).any():
            raise ValueError("a workload has at least one row, and count holds integers of at least 1")
        object.__setattr__(self, "count", count.astype(np.int64))

    @classmethod
    def from_workload(cls, workload: Any) -> WorkloadArrays:
        """From any object whose ``arrays()`` returns a mapping with this class's fields."""
        arrays: Mapping[str, Any] = workload.arrays()
        return cls(
            name=tuple(arrays["name"]),
            dtype=tuple(arrays["dtype"]),
            flops=arrays["flops"],
            vector_ops=arrays["vector_ops"],
            bytes_read=arrays["bytes_read"],
            bytes_written=arrays["bytes_written"],
            count=arrays["count"],
            kind=tuple(arrays.get("kind", ())),
            shape=tuple(arrays.get("shape", ())),
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> WorkloadArrays:
        """From one mapping per row; ``name`` and ``dtype`` are required, a number left out is 0 and ``count`` is 1."""
        numbers = {
            field: np.array([row.get(field, 0.0) for row in rows], dtype=np.float64)
            for field in ("flops", "vector_ops", "bytes_read", "bytes_written")
        }
        return cls(
            name=tuple(str(row["name"]) for row in rows),
            dtype=tuple(str(row["dtype"]) for row in rows),
            flops=numbers["flops"],
            vector_ops=numbers["vector_ops"],
            bytes_read=numbers["bytes_read"],
            bytes_written=numbers["bytes_written"],
            count=np.array([row.get("count", 1) for row in rows], dtype=np.int64),
        )

    @property
    def n_ops(self) -> int:
        """Number of rows."""
        return len(self.name)

    @property
    def bytes_moved(self) -> Array:
        """Bytes read and written per call, shape (n_ops,)."""
        return self.bytes_read + self.bytes_written

    def shapes(self) -> Array:
        """(batch, m, n, k) of each row, (n_ops, 4); zeros where a row has none."""
        return np.array([shape[:4] if len(shape) >= 4 else (0, 0, 0, 0) for shape in self.shape], dtype=np.float64)

    def total(self, field: str) -> float:
        """Sum over all calls of ``flops``, ``vector_ops``, ``bytes_read``, ``bytes_written`` or ``bytes_moved``."""
        return float(getattr(self, field) @ self.count)
