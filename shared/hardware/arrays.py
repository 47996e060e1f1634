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
    """

    name: tuple[str, ...]
    dtype: tuple[str, ...]
    flops: Array
    vector_ops: Array
    bytes_read: Array
    bytes_written: Array
    count: npt.NDArray[np.int64]

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
            **{field: arrays[field] for field in ("flops", "vector_ops", "bytes_read", "bytes_written", "count")},
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> WorkloadArrays:
        """From one mapping per row; ``name`` and ``dtype`` are required, a number left out is 0 and ``count`` is 1."""
        return cls(
            name=tuple(str(row["name"]) for row in rows),
            dtype=tuple(str(row["dtype"]) for row in rows),
            **{
                field: np.array([row.get(field, 0.0) for row in rows], dtype=np.float64)
                for field in ("flops", "vector_ops", "bytes_read", "bytes_written")
            },
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

    def total(self, field: str) -> float:
        """Sum over all calls of ``flops``, ``vector_ops``, ``bytes_read``, ``bytes_written`` or ``bytes_moved``."""
        return float(getattr(self, field) @ self.count)
