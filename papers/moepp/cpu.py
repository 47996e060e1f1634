"""The forward pass on a CPU where no gradient is wanted: few calls, and memory that is there already.

At small sizes the matrix products are about half of a layer, so what surrounds them decides: K passes of ``max`` are faster than
``topk``, NumPy's radix sort than torch's, one SwiGLU than one for each expert, and products into used memory than into fresh pages.
Results are those of :func:`papers.moepp.routing.select` and :func:`papers.moepp.paths.sorted_loop`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from papers.moepp.paths import gated_sum

MAX_PASSES = 4  # more picks than that are faster through a partial sort
KEPT_BYTES = 32 << 20  # of scratch memory, per thread


def usable(x: Tensor) -> bool:
    """Whether this path may run: on a CPU, without gradients, not inside torch.compile."""
    return not (x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling())


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row in falling order and their columns, [T, K] each; of equal ones the first column."""
    if k > MAX_PASSES:
        found = torch.topk(values, k, dim=-1)
        return found.values, found.indices
    largest, where = [], []
    for index in range(k):
        value, column = values.max(-1, keepdim=True)
        largest.append(value)
        where.append(column)
        if index + 1 < k:
            values = values.scatter(-1, column, float("-inf"))
    return torch.cat(largest, -1), torch.cat(where, -1)


def softmax_of_few(values: Tensor) -> Tensor:
    """Softmax over a short last dimension whose first entry is the largest; torch's own starts a loop for every row."""
    e = torch.exp(values - values[..., :1])
    return e / e.sum(-1, keepdim=True)


def group(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Assignments sorted by FFN expert: their order [K·T], the place of each in it [T, K], and the rows of each expert."""
    keys = ids.reshape(-1).clamp(max=experts).to(torch.uint8 if experts < 256 else torch.int16)
    order = torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    return order, place.view_as(ids), torch.bincount(keys, minlength=experts)[:experts].tolist()


class _Workspace(threading.local):
    """Memory of one thread that outlives a call: fresh pages for every layer cost a quarter of its time."""

    kept: Tensor | None = None

    def take(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
        """Tensors of these shapes with undefined content, good until the next call. Large ones are not kept."""
        sizes = [-(-rows * columns * dtype.itemsize // 64) * 64 for rows, columns in shapes]
        if sum(sizes) > KEPT_BYTES:
            return [torch.empty(shape, dtype=dtype) for shape in shapes]
        if self.kept is None or self.kept.numel() < sum(sizes):
            with torch.inference_mode(False):  # memory made in inference mode could not be written outside of it
                self.kept = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = self.kept[: sum(sizes)].split(sizes)
        return [
            part.view(dtype)[: rows * columns].view(rows, columns)
            for part, (rows, columns) in zip(parts, shapes, strict=True)
        ]


_workspace = _Workspace()


def forward(x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Gated sum [T, d] of the FFN experts; arguments as in :mod:`papers.moepp.paths`."""
    experts, d, h = w_out.shape
    order, place, sizes = group(ids, experts)
    count = sum(sizes)
    if count == 0:
        return torch.zeros_like(x)
    rows, both, inner, out = _workspace.take([(count, d), (count, 2 * h), (count, h), (count, d)], x.dtype)
    torch.index_select(x, 0, torch.div(order[:count], ids.shape[1], rounding_mode="floor"), out=rows)
    for part, w, target in zip(rows.split(sizes), w_in.transpose(1, 2).unbind(), both.split(sizes), strict=True):
        torch.mm(part, w, out=target)
    gate, up = both.split(h, 1)
    torch.ops.aten.silu.out(gate, out=inner).mul_(up)
    for part, w, target in zip(inner.split(sizes), w_out.transpose(1, 2).unbind(), out.split(sizes), strict=True):
        torch.mm(part, w, out=target)
    return gated_sum(out, place, ids < experts, gates)
