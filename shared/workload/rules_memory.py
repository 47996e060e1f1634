"""Rules of what moves data: copies and fills, gathers and scatters, sorting and search; and the operators that cost nothing.

Gathers and scatters have no cache: every gathered element is read once per use, every scattered element is written once, and read
before that if it accumulates. A scatter that is not in place copies its first operand as well.
"""

from __future__ import annotations

from math import ceil, log2, prod
from typing import Any

import torch

from shared.workload.cost import Call, Cost, Rule, register_rules, size_bytes

VIEWS = frozenset(
    "aten." + name
    for name in (
        "alias", "as_strided", "detach", "diagonal", "expand", "imag", "permute", "real", "select", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_complex", "view_as_real",
        "_conj", "_neg_view", "_reshape_alias", "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes",
        "lift_fresh",
        "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_",
    )
)  # fmt: skip
"""Operators that only make a new view of the same memory."""

BOOKKEEPING = frozenset(
    [f"aten.{name}" for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_efficientzerotensor",
        "is_same_size", "record_stream", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_contiguous", "size",
        "stride", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_has_compatible_shallow_copy_type", "_version",
    )] + ["prim.device", "profiler._record_function_enter_new", "profiler._record_function_exit"]
)  # fmt: skip
"""Allocation without a fill, questions about shapes, assertions on the host: no memory traffic."""

FREE = VIEWS | BOOKKEEPING

COPIES = (
    "clone", "_to_copy", "_conj_physical", "cat", "stack", "_chunk_cat", "split_with_sizes_copy", "constant_pad_nd", "roll", "flip",
    "rot90", "tril", "triu", "repeat", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "select_backward",
    "slice_backward", "diagonal_backward", "select_scatter", "slice_scatter", "diagonal_scatter", "as_strided_scatter", "view_copy",
    "lift", "lift_fresh_copy", "block_diag", "complex", "view_as_complex_copy", "expand_copy", "_pin_memory",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *(f"{kind}{n}d{way}" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3) for way in ("", "_backward")),
)  # fmt: skip

FILLS = (
    "zero_", "zero", "fill_", "fill", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "arange", "linspace", "logspace", "eye", "scalar_tensor", "tril_indices", "triu_indices", "hann_window",
    "_foreach_zero_",
)  # fmt: skip


def _fill(call: Call) -> Cost:
    return Cost("copy", bytes_read=0)


def _copy_into(call: Call) -> Cost:
    """``copy_``: the target is written, not read."""
    return Cost("copy", bytes_read=call.bytes_in("self"))


def _to_host(call: Call) -> Cost:
    """One number is handed to Python."""
    return Cost("copy", bytes_read=call.inputs[0].element_size(), bytes_written=0)


def _add_windows(call: Call) -> Cost:
    """Overlapping windows are added up (col2im, the backward pass of unfold and of padding): one addition per element of a window."""
    elements = call.inputs[0].numel()
    read = size_bytes(call.inputs[0])
    return Cost("vector", vector_ops=elements, bytes_read=read)


def _gather(source: str) -> Rule:
    """One element of ``source`` is read for each element of the result."""

    def rule(call: Call) -> Cost:
        table, elements = call.arg(source), call.outputs[0].numel()
        read = elements * table.element_size() + call.bytes_in(source)
        return Cost("gather", bytes_read=read, shape=_gathered_rows(call, table, elements))

    return rule


def _gathered_rows(call: Call, table: torch.Tensor, elements: int) -> tuple[int, ...]:
    """(1, rows, 1, width) where whole rows of the first dimension are picked."""
    indices = call.arg("indices")
    first = (
        len(indices) == 1 and indices[0] is not None if isinstance(indices, list | tuple) else call.arg("dim", 0) == 0
    )
    width = prod(table.shape[1:])
    if not first or not elements or call.op in ("aten.gather", "aten.take"):
        return ()
    return (1, elements // width, 1, width)


def _indexed_elements(tensor: torch.Tensor, indices: Any) -> int:
    """Elements of ``tensor[indices]``; a boolean mask stands for as many indices as it has true values."""
    dim, kept, shapes = 0, 1, []
    for index in indices:
        if index is None:
            kept, dim = kept * tensor.shape[dim], dim + 1
        elif index.dtype in (torch.bool, torch.uint8):
            shapes.append((int(torch.count_nonzero(index)),))
            dim += index.dim()
        else:
            shapes.append(tuple(index.shape))
            dim += 1
    return prod(torch.broadcast_shapes(*shapes)) * kept * prod(tensor.shape[dim:])


def _scatter(call: Call) -> Cost:
    """Index and source are read, as many elements written; read, added and written where values accumulate."""
    target, index = call.arg("self"), call.arg("index")
    source: Any = next((call.arg(name) for name in ("source", "src", "values") if call.arg(name) is not None), None)
    name = call.op.removeprefix("aten.")
    accumulates = bool(call.arg("accumulate")) or call.arg("reduce") is not None or "_add" in name
    if "index_put" in name:
        elements = _indexed_elements(target, call.arg("indices"))
    elif name.startswith("index_fill"):
        elements = target.numel() // max(target.shape[call.arg("dim")], 1) * index.numel()
    elif name.startswith("index_"):
        elements = source.numel()
    else:
        elements = index.numel()
    moved = elements * target.element_size()
    source_bytes = min(moved, size_bytes(source)) if source is not None else 0
    read = call.bytes_in("self", "source", "src", "values") + source_bytes + moved * accumulates
    copied = 0 if call.inplace else size_bytes(target)
    return Cost("gather", vector_ops=elements * accumulates, bytes_read=read + copied, bytes_written=moved + copied)


def _masked_scatter(call: Call) -> Cost:
    """The mask is scanned; at most every element is replaced."""
    return Cost("gather", vector_ops=call.arg("mask").numel())


def _add_rows(call: Call) -> Cost:
    """Gradient of an embedding (bag): the table is cleared, then a row is read, added and written per index."""
    table, indices = call.outputs[0], call.arg("indices")
    elements = indices.numel() * table.shape[1]
    rows = elements * table.element_size()
    return Cost("gather", vector_ops=elements, bytes_read=call.bytes_in() + rows, bytes_written=call.bytes_out() + rows)


def _embedding_bag(call: Call) -> Cost:
    weight, indices = call.arg("weight"), call.arg("indices")
    elements = indices.numel() * weight.shape[1]
    read = elements * weight.element_size() + call.bytes_in("weight")
    return Cost("gather", vector_ops=elements, bytes_read=read, bytes_written=size_bytes(call.out[0]))


def _nll(call: Call) -> Cost:
    """One log-probability is read per target; the gradient is a cleared tensor with one entry per target."""
    target = call.arg("target")
    element = call.arg("self").element_size()
    read = call.bytes_in("self") + (0 if "backward" in call.op else target.numel() * element)
    return Cost("gather", vector_ops=target.numel(), bytes_read=read)


def _grid_sample(call: Call) -> Cost:
    """Weights and taps of every point (4 or 8, or 1 for nearest): read and blended, in the backward pass added to the gradient."""
    x, grid = call.arg("input"), call.arg("grid")
    dims = grid.shape[-1]
    taps = 1 if call.arg("interpolation_mode") == 1 else 2**dims
    samples = grid.numel() // dims * x.shape[1]
    moved = samples * taps * x.element_size()
    if "backward" not in call.op:
        return Cost("gather", vector_ops=samples * (2 * taps - 1), bytes_read=moved + size_bytes(grid))
    for_input, for_grid = call.arg("output_mask")
    times = for_input + for_grid
    read = size_bytes(call.arg("grad_output")) + size_bytes(grid) + moved * times
    return Cost("gather", 0, 2 * samples * taps * times, read, call.bytes_out() + moved * for_input)


def _sort(call: Call) -> Cost:
    """n·⌈log2 n⌉ comparisons for a sort along n elements, n·⌈log2 k⌉ to keep the best k in a heap, n for one order statistic."""
    x = call.arg("self")
    length = x.numel() if "unique" in call.op or x.dim() == 0 else x.shape[call.arg("dim", -1)]
    if call.op == "aten.topk":
        length = call.arg("k")
    elif call.op in ("aten.kthvalue", "aten.median", "aten.nanmedian"):
        length = 2
    return Cost("gather", vector_ops=x.numel() * ceil(log2(max(length, 2))))


def _search(call: Call) -> Cost:
    """⌈log2(n + 1)⌉ comparisons per value, each with an element that is read."""
    edges_name = "boundaries" if "bucketize" in call.op else "sorted_sequence"
    edges = call.arg(edges_name)
    values = call.arg("self")
    probes = ceil(log2(edges.shape[-1] + 1)) * (values.numel() if isinstance(values, torch.Tensor) else 1)
    return Cost("gather", vector_ops=probes, bytes_read=probes * edges.element_size() + call.bytes_in(edges_name))


def _scan(call: Call) -> Cost:
    """Every element is looked at once: nonzero, masked_select, bincount, histc, repeat_interleave."""
    return Cost("gather", vector_ops=call.inputs[0].numel())


register_rules(COPIES, lambda call: Cost("copy"))
register_rules(FILLS, _fill)
register_rules(["copy_", "copy", "_foreach_copy_"], _copy_into)
register_rules(["_local_scalar_dense"], _to_host)
register_rules(
    [
        "col2im",
        "unfold_backward",
        *(f"{kind}_pad{n}d_backward" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    ],
    _add_windows,
)
register_rules(["gather", "index_select", "index", "_unsafe_index", "take"], _gather("self"))
register_rules(["embedding"], _gather("weight"))
register_rules(
    ["scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce", "index_put",
     "_index_put_impl", "_unsafe_index_put", "put"], _scatter,
)  # fmt: skip
register_rules(["masked_scatter"], _masked_scatter)
register_rules(["embedding_dense_backward", "_embedding_bag_backward", "_embedding_bag_dense_backward"], _add_rows)
register_rules(["_embedding_bag", "_embedding_bag_forward_only"], _embedding_bag)
register_rules(["nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"], _nll)
register_rules(
    ["grid_sampler_2d", "grid_sampler_3d", "grid_sampler_2d_backward", "grid_sampler_3d_backward"], _grid_sample
)
register_rules(["sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "_unique2", "unique_dim"], _sort)
register_rules(["searchsorted", "bucketize"], _search)
register_rules(
    [
        "nonzero",
        "nonzero_static",
        "masked_select",
        "bincount",
        "histc",
        "repeat_interleave",
        "unique_consecutive",
        "multinomial",
    ],
    _scan,
)
