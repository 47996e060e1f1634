"""How much of its peaks a device reaches, per operation: the laws that a calibration fits (``calibration.operators`` of a device file).

An operation of class c in precision p takes t = max(C, M) + s min(C, M) + t0 with C = F / (P e u) + V / (R v) and M = B / (W b):

* e, v, b, t0: shares of the matrix rate P, the vector rate R and the bandwidth W, and the overhead per call; s: the part of the shorter of
  the two that is not hidden behind the longer (a kernel that loads, computes and stores in turn has 1);
* u, the use that a shape makes of the matrix units. Where the device has ``calibration.tile_half``, a product is cut into tiles of one of
  :data:`TILES`, perhaps split along k, and the tiles run in whole waves over ``compute.units``; a tile's speed falls with its edge over
  area, each tile waits ``k_half`` steps for its first operands, and adding up the parts of a split takes :data:`SPLIT_STEPS` more. The
  fastest cut counts, as a library's heuristics would choose.
  Elsewhere each dimension x of the product uses x / (x + x_half). Rows of k elements use k / (k + k_half) of the vector rate where a row
  has a block of threads of its own (:data:`ROW_COMPUTING`), of the bandwidth in other reductions, normalisations and gathers;
* W, the bandwidth for the operation's working set (the bytes it moves): a share 1 / (1 + (set / size)^4) of the bytes comes from each
  cache in ``calibration.caches``, with its usable size, the rest from DRAM.

Classes are split where kernels differ in kind, by what a trace tells of alignment: a convolution's channels not in whole groups of
:data:`CHANNEL_GROUP` (a stem), pictures of a 1 x 1 convolution or rows of a gather not in whole 16 bytes. Which form a law has was decided
by the error on micro-benchmarks left out of the fit (five folds); where the validation was wrong said where to look. No model's time is in
a fit (docs/calibration.md).

All functions are vectorised over n samples of the figures and over the rows of a workload, and monotone: a higher rate, bandwidth or
share never slows an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.hardware.arrays import Array, WorkloadArrays
from shared.hardware.device import DTYPES, Device

Get = Callable[[str], Array]  # path of a figure -> values (n,)

# Edges of the tiles of CUTLASS and cuBLAS kernels, the largest first.
TILES = (
    (256, 128),
    (128, 256),
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (64, 32),
    (32, 64),
    (32, 32),
    (128, 16),
    (16, 128),
)
SMALLEST = (16, 16)  # no tile is less
SPLITS = (1, 2, 4, 8, 16)  # along k
SPLIT = ("matmul", "conv1x1")  # classes whose kernels split
SPLIT_STEPS = 512  # of k, that adding up the parts of a split takes
CHANNEL_GROUP = 8  # channels that a kernel of a convolution takes at once
STEP = 16  # of k, what a matrix instruction takes
ROW_COMPUTING = ("layer_norm", "batch_norm")  # classes whose short rows cost arithmetic, not traffic
LIKE = {  # whose law holds where a class was not measured apart
    "conv1x1_odd": "conv1x1", "stem": "conv", "sort": "gather", "topk": "gather", "scatter": "gather", "division": "integer",
    "integer": "pointwise",
}  # fmt: skip
QUERY_TILE = 128  # rows of queries and keys of a tile of fused attention
SHARPNESS = 4.0  # of the edge of a cache

MATRIX = ("matmul", "conv", "conv1x1", "conv1x1_odd", "stem", "depthwise", "attention")
_SPECIAL = (
    "gelu",
    "sigmoid",
    "silu",
    "tanh",
    "exp",
    "log",
    "erf",
    "softplus",
    "mish",
    "sin",
    "cos",
    "pow",
    "elu",
    "sqrt",
)
_REDUCTION = (
    "norm",
    "mean",
    "sum",
    "adaptive_avg_pool",
    "amax",
    "amin",
    "argm",
    "var",
    "std",
    "max",
    "min",
    "cum",
    "loss",
    "prod",
)
_DIVISION = ("remainder", "fmod", "div", "floor_divide")
_SORT = ("sort", "argsort", "kthvalue", "median", "nanmedian", "mode", "_unique2", "unique_dim")
_SCATTER = ("index_put", "index_add", "index_copy", "index_fill", "index_reduce", "scatter")
_BINARY = ("add", "sub", "rsub", "mul", "div")
ROW_ALIGNMENT = 16  # bytes: rows of such a multiple are gathered as rows, others element by element


def operator_classes(arrays: WorkloadArrays) -> tuple[str, ...]:
    """The class of each traced operator: its kind, split where kernels differ in kind."""
    rows = zip(
        arrays.kind, arrays.name, arrays.shape, arrays.bytes_read, arrays.bytes_written, arrays.dtype, strict=True
    )
    return tuple(_operator_class(*row) for row in rows)


def _operator_class(kind: str, name: str, shape: Sequence[int], read: float, written: float, dtype: str) -> str:
    base = name.removeprefix("aten.").rstrip("_")
    if kind == "conv":
        return _conv_class(shape, read, dtype)
    if kind == "copy":  # clone is called where memory is to be laid out anew
        return "strided" if base == "clone" else "copy"
    if kind == "gather":
        if base == "topk" or base in _SORT:
            return "topk" if base == "topk" else "sort"
        if any(part in base for part in _SCATTER):
            return "scatter"
        whole = len(shape) == 4 and (shape[3] * _item_bytes(dtype)) % ROW_ALIGNMENT == 0
        return "gather_rows" if whole else "gather"
    if kind != "vector":
        return kind
    if "batch_norm" in base:
        return "batch_norm"
    if "layer_norm" in base or "rms_norm" in base:
        return "layer_norm"
    if "softmax" in base:
        return "softmax"
    if "pool" in base and "adaptive_avg" not in base:  # overlapping windows
        return "pool"
    if dtype.startswith(("int", "uint")):
        return "division" if base in _DIVISION else "integer"
    if any(part in base for part in _REDUCTION) and base not in ("maximum", "minimum"):
        return "reduction"
    if any(part in base for part in _SPECIAL) and not base.startswith("hard") and "relu" not in base:
        return "special"
    return "broadcast" if base in _BINARY and written < read < 2 * written else "pointwise"


def _conv_class(shape: Sequence[int], read: float, dtype: str) -> str:
    """Depthwise (any grouped), 1 x 1 without stride (its input is the left operand of the product), or any other."""
    if len(shape) < 4:
        return "conv"
    groups, m, n, k = shape[:4]
    if groups > 1:
        return "depthwise"
    if k % CHANNEL_GROUP:
        return "stem"
    operand = read / _item_bytes(dtype) - n * k
    if abs(operand / (m * k) - 1.0) >= 0.01:
        return "conv"
    whole = len(shape) < 5 or (shape[4] * _item_bytes(dtype)) % ROW_ALIGNMENT == 0
    return "conv1x1" if whole else "conv1x1_odd"


def _item_bytes(dtype: str) -> int:
    return {"float64": 8, "int64": 8, "float32": 4, "int32": 4}.get(dtype, 1 if "8" in dtype or dtype == "bool" else 2)


@dataclass(frozen=True, eq=False)
class Shares:
    """Per row (n, n_ops): shares of the matrix and vector rates, bandwidth (bytes/s), overhead (s), unhidden part, cache hits."""

    compute: Array
    vector: Array
    bandwidth_bytes_per_s: Array
    overhead_s: Array
    serial: Array
    cached: Array  # share of the bytes that comes from a cache


def has_laws(device: Device, arrays: WorkloadArrays) -> bool:
    """Whether the device has operator laws and the workload says of what kind its rows are."""
    return bool(device.calibration.operators) and bool(arrays.kind)


def measured_class(measured: Container[str], name: str) -> str:
    """The class whose law holds for ``name`` where only ``measured`` ones have a law."""
    while name not in measured and name in LIKE:
        name = LIKE[name]
    return name


def law_path(device: Device, name: str, dtype: str) -> str:
    """Path of the law of a class in a precision (torch's name or the data sheet's).

    Whole numbers move as single precision does. A class that was not measured apart has the law of the one that it is most like.

    Raises:
        UserError: it was not calibrated.
    """
    name = measured_class(device.calibration.operators, name)
    laws = device.calibration.operators.get(name)
    if laws is None:
        have = ", ".join(device.calibration.operators)
        raise UserError(f"device '{device.id}' was not calibrated for operators of class {name}: it has {have}")
    asked = "fp32" if dtype.startswith(("int", "uint", "bool")) and name not in MATRIX else DTYPES.get(dtype, dtype)
    if asked not in laws:
        raise UserError(f"device '{device.id}' was not calibrated for {name} in {asked}: it has {', '.join(laws)}")
    return f"calibration.operators.{name}.{asked}"


def shares(device: Device, arrays: WorkloadArrays, get: Get, level: str = "dram") -> Shares:
    """What the laws of ``device`` give for each row.

    Raises:
        UserError: a class of operators, or a precision of one, that was not calibrated.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(operator_classes(arrays), arrays.dtype, strict=True)):
        groups.setdefault(key, []).append(row)
    bandwidth, cached = _bandwidth(device, arrays, get, level)
    n, shapes, known = bandwidth.shape[0], arrays.shapes(), device.figures()
    compute, vector, overhead, serial = (np.ones((n, arrays.n_ops)) for _ in range(4))
    for (name, dtype), rows in groups.items():
        path = law_path(device, name, dtype)
        overhead[:, rows] = get(f"{path}.overhead")[:, None]
        bandwidth[:, rows] *= get(f"{path}.bandwidth")[:, None]
        for values, entry, default in ((vector, "vector", 1.0), (compute, "compute", 1.0), (serial, "serial", 0.0)):
            values[:, rows] = get(f"{path}.{entry}")[:, None] if f"{path}.{entry}" in known else default
        half = {x: get(f"{path}.{x}_half") for x in "mnk" if f"{path}.{x}_half" in known}
        if name in MATRIX:
            compute[:, rows] *= _use(device, shapes[rows], name, half, get)
        elif "k" in half:
            length = shapes[rows, 3]
            slowed = vector if name in ROW_COMPUTING else bandwidth
            slowed[:, rows] *= np.where(length > 0, length / (length + half["k"][:, None]), 1.0)
    return Shares(compute, vector, bandwidth, overhead, serial, cached)


def num_tiles(shapes: npt.NDArray[np.float64]) -> Array:
    """How many of the smallest tiles products of ``shapes`` (rows, 4) are cut into, at least one."""
    rows, columns = SMALLEST
    return np.maximum(shapes[:, 0] * np.ceil(shapes[:, 1] / rows) * np.ceil(shapes[:, 2] / columns), 1.0)


def _bandwidth(device: Device, arrays: WorkloadArrays, get: Get, level: str) -> tuple[Array, Array]:
    """Bytes/s for each row's working set, before the class's share, and the share of its bytes that caches hold."""
    main = get(device.bandwidth_path(level, "read")) * get("calibration.bandwidth_fraction")
    seconds = np.zeros((main.shape[0], arrays.n_ops))
    hit = np.zeros((main.shape[0], arrays.n_ops))
    caches = sorted(device.calibration.caches, key=device.size_bytes)
    for cache in caches:  # each holds what the smaller ones hold
        which = "usable" if device.memory[cache].usable else "size"
        units = device.size_bytes(cache) / device.figure(f"memory.{cache}.size").value
        size = units * get(f"memory.{cache}.{which}")
        inside = np.maximum(hit, 1.0 / (1.0 + (arrays.bytes_moved / size[:, None]) ** SHARPNESS))
        seconds += (inside - hit) / np.maximum(get(device.bandwidth_path(cache, "read")), main)[:, None]
        hit = inside
    seconds += (1.0 - hit) / main[:, None]
    return 1.0 / seconds, hit


def _use(device: Device, shapes: npt.NDArray[np.float64], name: str, given: Mapping[str, Array], get: Get) -> Array:
    """Use of the matrix units (n, rows) by products of ``shapes`` (rows, 4); 1 where the shape is not known (zeros)."""
    known = shapes[:, 1] > 0
    batch, m, n, k = np.where(known[:, None], shapes, 1.0).T
    half = {x: given.get(x, np.zeros(1)) for x in "mnk"}
    if device.calibration.tile_half is None or name == "depthwise":
        use = np.ones((1, len(m)))
        for x, size in (("m", m), ("n", n), ("k", k)):
            use = use * (size / (size + half[x][:, None]))
        return np.where(known, use, 1.0)
    units, edge = get("compute.units"), get("calibration.tile_half")
    if name == "attention":
        tiles = batch * np.ceil(m / QUERY_TILE)
        steps = np.ceil(n / QUERY_TILE) * QUERY_TILE + half["k"][:, None]
        slots = np.ceil(tiles / units[:, None]) * units[:, None] * QUERY_TILE * steps
        return np.where(known, batch * m * n / slots, 1.0)
    best = np.full((max(len(units), len(edge)), len(m)), np.inf)
    for rows, columns in TILES:
        slow = 1.0 + edge[:, None] * (1.0 / rows + 1.0 / columns)
        slow = slow / (1.0 + edge[:, None] * (1.0 / TILES[0][0] + 1.0 / TILES[0][1]))
        tiles = batch * np.ceil(m / rows) * np.ceil(n / columns)
        for split in SPLITS if name in SPLIT else SPLITS[:1]:
            steps = np.ceil(k / split / STEP) * STEP + half["k"][:, None] + (SPLIT_STEPS if split > 1 else 0)
            waves = np.ceil(tiles * split / units[:, None])
            best = np.minimum(best, waves * units[:, None] * rows * columns * steps * slow)
    return np.where(known, batch * m * n * k / best, 1.0)
