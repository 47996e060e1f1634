"""The micro-benchmarks: single operators over seeded random shapes, none of them taken from a model of the validation.

A :class:`Point` is data (operator, sizes, precision); :func:`build` makes the module and its inputs on any device, so the same point is
timed on the silicon and traced on the meta device. Operators run as modules where PyTorch has one, as they do in models: the overhead of
a call includes that of a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Built = tuple[Callable[..., Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Point:
    """One operator at one size. ``sizes`` are what the builder of ``op`` takes."""

    op: str
    sizes: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Limits:
    """What one call may cost: keeps the whole calibration within its time and the machine's memory."""

    flops: float
    size_bytes: float


def _linear(m: int, n: int, k: int) -> tuple[nn.Module, list[tuple[int, ...]]]:
    return nn.Linear(k, n), [(m, k)]


def _conv(batch: int, c_in: int, c_out: int, size: int, kernel: int, stride: int, groups: int) -> Any:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False), [(batch, c_in, size, size)]


class _Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """``function(*inputs)``."""
        return self.function(*inputs)


def _rows(source: Tensor, index: Tensor) -> Tensor:
    return source[index]


_ELEMENTWISE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def _scattered(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    target[index] = rows
    return target


def _added(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return target.index_add_(0, index, rows)


_ROWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"scatter": _scattered, "add_rows": _added}
_KEYS: dict[str, Callable[[Tensor], Any]] = {"sort": lambda keys: torch.sort(keys, stable=True)}
_INTEGER: dict[str, Callable[[Tensor], Tensor]] = {
    "int_mul": lambda x: x * 2654435761,
    "int_xor": lambda x: x ^ 805459861,
    "int_mod": lambda x: x % 524287,
}


def build(point: Point, device: str) -> Built:
    """Module (evaluation mode) and inputs of a point on ``device``; random values, or none on ``meta``."""
    op, s = point.op, point.sizes
    dtype = DTYPES[point.dtype]
    with torch.device(device):
        if op == "gather":  # rows of a table, in random order
            rows, width, count = s
            index = torch.empty(count, dtype=torch.int64) if device == "meta" else torch.randint(rows, (count,))
            return _Function(_rows), (torch.randn(rows, width, dtype=dtype), index)
        if op in _ROWS:  # rows to random places of a table
            rows, width, count = s
            index = torch.empty(count, dtype=torch.int64) if device == "meta" else torch.randint(rows, (count,))
            return _Function(_ROWS[op]), (
                torch.randn(rows, width, dtype=dtype),
                index,
                torch.randn(count, width, dtype=dtype),
            )
        if op in _KEYS:  # few distinct numbers, as the experts of tokens are
            keys = torch.empty(s, dtype=torch.int64) if device == "meta" else torch.randint(64, s)
            return _Function(_KEYS[op]), (keys,)
        if op in _INTEGER:  # indices and hashes
            numbers = torch.empty(s, dtype=torch.int64) if device == "meta" else torch.randint(2**40, s)
            return _Function(_INTEGER[op]), (numbers,)
        module, shapes = _module(op, s)
        return module.to(dtype).eval(), tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def _module(op: str, s: Sequence[int]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    if op == "linear":
        return _linear(*s)
    if op == "bmm":
        batch, m, n, k = s
        return _Function(torch.bmm), [(batch, m, k), (batch, k, n)]
    if op == "conv":
        return _conv(*s)
    if op == "attention":
        batch, heads, length, width = s
        return _Function(F.scaled_dot_product_attention), [(batch, heads, length, width)] * 3
    if op in _ELEMENTWISE:
        return _ELEMENTWISE[op](), [tuple(s)]
    if op == "add":
        return _Function(torch.add), [tuple(s)] * 2
    if op == "scale":  # channels of a picture, as squeeze-and-excitation does
        return _Function(torch.mul), [tuple(s), (s[0], s[1], 1, 1)]
    if op == "batch_norm":
        return nn.BatchNorm2d(s[1]), [tuple(s)]
    if op == "layer_norm":
        return nn.LayerNorm(s[-1]), [tuple(s)]
    if op == "softmax":
        return nn.Softmax(-1), [tuple(s)]
    if op == "mean":
        return nn.AdaptiveAvgPool2d(1), [tuple(s)]
    if op == "sum":
        return _Function(lambda x: x.sum(1)), [tuple(s)]
    if op == "product":
        return _Function(lambda x: x.prod(-1)), [tuple(s)]
    if op == "topk":
        return _Function(lambda x: x.topk(2, -1)), [tuple(s)]
    if op == "compare":
        return _Function(lambda x: x > 0), [tuple(s)]
    if op == "max_pool":
        return nn.MaxPool2d(3, 2, 1), [tuple(s)]
    if op == "transpose":
        return _Function(lambda x: x.transpose(1, 2).contiguous()), [tuple(s)]
    if op == "cat":
        return _Function(lambda x, y: torch.cat((x, y), 1)), [tuple(s)] * 2
    raise ValueError(f"no micro-benchmark is called {op}")


def micro_benchmarks(dtypes: Sequence[str], limits: Limits, *, density: float = 1.0, seed: int = 0) -> list[Point]:
    """All points, in a random order so that slow drift of the machine does not fall on one operator alone.

    ``density`` multiplies the number of points of every operator.
    """
    rng = np.random.default_rng(seed)
    points: dict[Point, None] = {}
    for dtype in dtypes:
        for op, number, draw in _SAMPLERS:
            if op in (*_INTEGER, *_KEYS) and dtype != dtypes[0]:
                continue  # whole numbers have one precision
            kept, wanted = 0, round(density * number)
            for _ in range(100 * wanted):
                point = Point(op, tuple(int(size) for size in draw(rng)), dtype)
                if kept < wanted and point not in points and _fits(point, limits):
                    points[point] = None
                    kept += 1
    found = list(points)
    return [found[i] for i in rng.permutation(len(found))]


def _fits(point: Point, limits: Limits) -> bool:
    """Whether operations and memory stay within the limits; both are estimated from the sizes alone."""
    s, element = point.sizes, DTYPES[point.dtype].itemsize
    if point.op == "linear":
        flops, elements = 2 * math.prod(s), s[0] * s[1] + s[1] * s[2] + s[0] * s[2]
    elif point.op == "bmm":
        flops, elements = 2 * math.prod(s), s[0] * (s[1] * s[2] + s[2] * s[3] + s[1] * s[3])
    elif point.op == "conv":
        batch, c_in, c_out, size, kernel, stride, groups = s
        outputs = batch * c_out * (size // stride) ** 2
        flops, elements = 2 * outputs * c_in // groups * kernel**2, batch * c_in * size**2 + outputs
    elif point.op == "attention":
        flops, elements = 4 * s[0] * s[1] * s[2] ** 2 * s[3], 4 * math.prod(s)
    elif point.op in ("gather", *_ROWS):
        flops, elements = 0, s[0] * s[1] + 2 * s[1] * s[2]
    else:
        flops, elements = 0, (6 if point.op in _INTEGER else 3) * math.prod(s)
    return flops <= limits.flops and elements * element <= limits.size_bytes


Rng = np.random.Generator


def _log(rng: Rng, low: float, high: float, step: int = 1) -> int:
    """Log-uniform, a multiple of ``step``."""
    return max(step, round(math.exp(rng.uniform(math.log(low), math.log(high))) / step) * step)


def _step(rng: Rng) -> int:
    """Half of the widths are multiples of 64, as most networks have them."""
    return int(rng.choice([8, 64]))


def _draw_conv(rng: Rng) -> Iterator[int]:
    kernel = int(rng.choice([1, 1, 3, 3, 5]))
    stride, step = int(rng.choice([1, 1, 1, 2])), _step(rng)
    return iter(
        (_log(rng, 1, 256), _log(rng, 16, 1024, step), _log(rng, 16, 1024, step), _log(rng, 6, 120), kernel, stride, 1)
    )


def _draw_product(rng: Rng) -> Iterator[int]:
    step = _step(rng)
    return iter((_log(rng, 1, 256), _log(rng, 16, 1024, step), _log(rng, 16, 1024, step), _log(rng, 6, 120), 1, 1, 1))


def _draw_stem(rng: Rng) -> Iterator[int]:
    kernel = int(rng.choice([3, 5, 9]))
    return iter((_log(rng, 1, 256), 3, _log(rng, 16, 96, 8), _log(rng, 96, 320, 4), kernel, 2, 1))


def _draw_depthwise(rng: Rng) -> Iterator[int]:
    channels = _log(rng, 16, 1024, 8)
    kernel, stride = int(rng.choice([3, 3, 5])), int(rng.choice([1, 1, 2]))
    return iter((_log(rng, 1, 256), channels, channels, _log(rng, 6, 120), kernel, stride, channels))


def _draw_picture(rng: Rng) -> Iterator[int]:
    return iter((_log(rng, 1, 256), _log(rng, 8, 1024, 8), *[_log(rng, 6, 120)] * 2))


def _draw_tokens(rng: Rng) -> Iterator[int]:
    return iter((_log(rng, 1, 256), _log(rng, 16, 1024), _log(rng, 32, 4096, 8)))


def _draw_linear(rng: Rng) -> Iterator[int]:
    """Half of them with many rows, as batches of tokens or pixels have."""
    rows = _log(rng, 1024, 131072) if rng.random() < 0.5 else _log(rng, 1, 4096)
    step = _step(rng)
    return iter((rows, _log(rng, 32, 8192, step), _log(rng, 32, 8192, step)))


def _draw_gather(rng: Rng) -> Iterator[int]:
    """Half of them narrow, as embeddings of points have."""
    width = _log(rng, 2, 32, 2) if rng.random() < 0.5 else _log(rng, 32, 1024, 8)
    return iter((_log(rng, 1e3, 1e7), width, _log(rng, 1e3, 3e6)))


def _draw_rows(rng: Rng) -> Iterator[int]:
    return iter((_log(rng, 1e2, 1e6), _log(rng, 8, 1024, 8), _log(rng, 1e2, 1e6)))


_SAMPLERS: tuple[tuple[str, int, Callable[[Rng], Any]], ...] = (
    ("linear", 40, _draw_linear),
    ("bmm", 10, lambda rng: (_log(rng, 2, 512), _log(rng, 16, 1024, 8), _log(rng, 16, 1024, 8), _log(rng, 16, 1024, 8))),
    ("conv", 34, _draw_conv),
    ("conv", 10, _draw_product),
    ("conv", 6, _draw_stem),
    ("conv", 16, _draw_depthwise),
    ("attention", 14, lambda rng: (_log(rng, 1, 256), _log(rng, 2, 24), _log(rng, 48, 1200), int(rng.choice([32, 64, 64, 128])))),
    ("add", 8, _draw_tokens),
    ("relu", 4, _draw_picture),
    ("relu6", 4, _draw_picture),
    ("hardswish", 6, _draw_picture),
    ("scale", 7, _draw_picture),
    ("batch_norm", 9, _draw_picture),
    ("gelu", 7, _draw_tokens),
    ("silu", 4, _draw_tokens),
    ("sigmoid", 4, _draw_tokens),
    ("layer_norm", 10, _draw_tokens),
    ("softmax", 8, _draw_tokens),
    ("mean", 6, _draw_picture),
    ("sum", 5, lambda rng: (_log(rng, 1e3, 1e6), _log(rng, 2, 64), _log(rng, 2, 64, 2))),
    ("max_pool", 4, _draw_picture),
    ("transpose", 7, lambda rng: (_log(rng, 1, 256), _log(rng, 16, 1024), _log(rng, 2, 24), int(rng.choice([32, 64, 128])))),
    ("cat", 5, _draw_tokens),
    ("gather", 14, _draw_gather),
    ("scatter", 5, _draw_rows),
    ("add_rows", 5, _draw_rows),
    ("sort", 6, lambda rng: (_log(rng, 300, 3e6),)),
    ("topk", 5, lambda rng: (_log(rng, 100, 1e6), _log(rng, 4, 128, 4))),
    ("product", 4, lambda rng: (_log(rng, 1e3, 2e7), _log(rng, 2, 8))),
    ("compare", 3, _draw_tokens),
    ("int_mul", 3, _draw_tokens),
    ("int_xor", 3, _draw_tokens),
    ("int_mod", 3, _draw_tokens),
)  # fmt: skip
