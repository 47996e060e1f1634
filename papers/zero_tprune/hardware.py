"""Latency of a pruned ViT on a device: the operations of a forward pass, and what pruning adds, for the shared roofline.

Two ways of scoring: ``stored`` as the paper's cost implies (pruning blocks write their attention matrix, every vote reads it) and
``streamed`` as our kernels do it (attention stays fused, one pass over Q and K per stage). Per batch; 1 MAC = 2 FLOPs. Attention is fused
in all other blocks. The A100 of the paper ran FP32 without TF32: its 13.9 TFLOP/s are 71 % of the FP32 peak and 9 % of TF32's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from papers.zero_tprune.plans import ATS, EViT, Layer, Plan, Rule, Schedule, ToMe
from papers.zero_tprune.shape import Shape
from shared.errors import UserError, unknown
from shared.hardware import Achieved, Cost, Device, WorkloadArrays, cost

Scoring: TypeAlias = Literal["stored", "streamed"]
SIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
Row: TypeAlias = dict[str, Any]

# Operations per element, each one addition, multiplication or call of a function unit.
_NORM, _GELU, _SOFTMAX = 5, 10, 5
# Launches of the plain torch selection (papers/zero_tprune/selection.py), beside votes and similarity: heads, order, match, survivors.
AGGREGATE_LAUNCHES, MATCH_LAUNCHES, SURVIVOR_LAUNCHES = 8, 9, 5


@dataclass(frozen=True)
class Assumed:
    """What a device reaches of its peaks where it publishes no calibration: shares, and seconds per launch."""

    compute: float
    bandwidth: float
    overhead_s: float

    def complete(self, device: Device) -> Achieved:
        """The device's own calibration, completed by these."""
        known = device.calibration
        return Achieved(
            None if known.compute_fraction else self.compute,
            None if known.bandwidth_fraction else self.bandwidth,
            None if known.overhead else self.overhead_s,
        )


def forward_rows(shape: Shape, plan: Plan | None, batch: int, dtype: str, scoring: Scoring = "streamed") -> list[Row]:
    """All operations of one forward pass on ``batch`` images.

    Raises:
        UserError: a plan without a fixed cost (ATS), or an unknown type or way of scoring.
    """
    if dtype not in SIZE_BYTES:
        raise unknown("dtype", dtype, SIZE_BYTES)
    if scoring not in ("stored", "streamed"):
        raise unknown("scoring", scoring, ("stored", "streamed"))
    if isinstance(plan, ATS):
        raise UserError("ATS keeps a different number of tokens for every image: it has no fixed latency")
    plan = plan or Schedule(())
    patches = plan.patches(shape.depth, shape.patches)
    inside = isinstance(plan, ToMe | EViT)
    layers = {layer.after: layer for layer in plan.layers} if isinstance(plan, Schedule) else {}
    ops = _Rows(batch, dtype)
    pixels = shape.embed // (shape.patches * shape.dim)
    ops.linear("patch embedding", shape.patches, pixels, shape.dim)
    ops.pointwise("positions", (shape.patches + shape.prefix) * shape.dim, 2, 1)
    for number in range(1, shape.depth + 1):
        tokens, after = patches[number - 1] + shape.prefix, patches[number] + shape.prefix
        layer = layers.get(number)
        prunes = layer is not None and after < tokens
        ranked = prunes and isinstance(plan, Schedule) and plan.rule.method == "zero_tprune"
        attend(ops, shape, tokens, stored=bool(ranked) and scoring == "stored")
        if isinstance(plan, ToMe) and after < tokens:
            tome(ops, shape, tokens, after)
        if isinstance(plan, EViT) and after < tokens:
            top_k(ops, shape, tokens, after)
        mlp(ops, shape, after if inside else tokens)
        if layer is not None and prunes and isinstance(plan, Schedule):
            prune_layer(ops, shape, layer, plan.rule, patches[number - 1], scoring)
    last = patches[-1] + shape.prefix
    ops.pointwise("final norm", last * shape.final_norm + shape.pooled_norm, 1, 1, per_element=_NORM)
    if shape.pool_token or shape.pool_fixed:
        ops.add("pool", 2 * (last * shape.pool_token + shape.pool_fixed), 0, last * shape.dim, shape.dim)
    ops.linear("head", 1, shape.dim, shape.head // shape.dim)
    return ops.rows


def arrays(shape: Shape, plan: Plan | None, batch: int, dtype: str, scoring: Scoring = "streamed") -> WorkloadArrays:
    """:func:`forward_rows` for :func:`shared.hardware.cost`."""
    return WorkloadArrays.from_rows(forward_rows(shape, plan, batch, dtype, scoring))


def latency(
    shape: Shape,
    plan: Plan | None,
    device: Device,
    batch: int,
    dtype: str,
    assumed: Assumed,
    scoring: Scoring = "streamed",
) -> Cost:
    """Cost of one forward pass on a device. Raises UserError where the device has no rate for ``dtype``."""
    return cost(arrays(shape, plan, batch, dtype, scoring), device, achieved=assumed.complete(device), energy="none")


def latency_function(
    shape: Shape, device: Device, batch: int, dtype: str, assumed: Assumed, scoring: Scoring = "streamed"
) -> Callable[[Plan | None], float]:
    """Seconds per batch of any plan on a device: what :func:`papers.zero_tprune.budget.solve_latency` needs."""
    return lambda plan: latency(shape, plan, device, batch, dtype, assumed, scoring).latency_s


class _Rows:
    """Collects operations; counts are per image, rows are per batch."""

    def __init__(self, batch: int, dtype: str) -> None:
        self.batch, self.dtype, self.size = batch, dtype, SIZE_BYTES[dtype]
        self.rows: list[Row] = []

    def add(
        self,
        name: str,
        flops: float,
        vector: float,
        read: float,
        written: float,
        *,
        weights: float = 0.0,
        launches: int = 1,
    ) -> None:
        """One kernel; ``read``, ``written`` in values per image, ``weights`` in values once; split evenly over ``launches`` calls."""
        self.rows.append({
            "name": name, "dtype": self.dtype, "flops": self.batch * flops / launches, "vector_ops": self.batch * vector / launches,
            "bytes_read": (self.batch * read + weights) * self.size / launches,
            "bytes_written": self.batch * written * self.size / launches, "count": launches,
        })  # fmt: skip

    def linear(self, name: str, rows: float, inputs: float, outputs: float) -> None:
        """A linear layer; the bias is free."""
        self.add(name, 2 * rows * inputs * outputs, 0, rows * inputs, rows * outputs, weights=inputs * outputs)

    def pointwise(
        self, name: str, elements: float, reads: float, writes: float, *, per_element: float = 1, launches: int = 1
    ) -> None:
        """An element-wise kernel that reads and writes ``elements`` values so many times."""
        self.add(name, 0, per_element * elements, reads * elements, writes * elements, launches=launches)


def attend(ops: _Rows, shape: Shape, tokens: int, *, stored: bool) -> None:
    """Norm, attention and residual; ``stored``: the attention matrix goes through memory."""
    width, scores = tokens * shape.attention_dim, shape.heads * tokens * tokens
    ops.pointwise("norm", tokens * (shape.block_norm - shape.dim), 1, 1, per_element=_NORM)
    ops.linear("qkv", tokens, shape.dim, 3 * shape.attention_dim)
    product = 2 * tokens * tokens * shape.attention_dim
    if stored:
        ops.add("q·kᵀ", product, 0, 2 * width, scores)
        ops.add("softmax", 0, _SOFTMAX * scores, scores, scores)
        ops.add("a·v", product, 0, scores + width, width)
    else:
        ops.add("attention", 2 * product, _SOFTMAX * scores, 3 * width, width)
    ops.linear("projection", tokens, shape.attention_dim, shape.dim)
    ops.pointwise("add", tokens * shape.dim, 2, 1)


def mlp(ops: _Rows, shape: Shape, tokens: int) -> None:
    """Norm, MLP and residual. Its linear layers are booked as one in and one out."""
    weights = shape.block_linear - 4 * shape.dim * shape.attention_dim
    ops.pointwise("norm", tokens * shape.dim, 1, 1, per_element=_NORM)
    first = (
        weights * shape.hidden / (shape.hidden + shape.dim) if weights != 2 * shape.dim * shape.hidden else weights / 2
    )
    ops.add("fc1", 2 * tokens * first, 0, tokens * shape.dim, tokens * shape.hidden, weights=first)
    ops.pointwise("gelu", tokens * shape.hidden, 1, 1, per_element=_GELU)
    ops.add(
        "fc2", 2 * tokens * (weights - first), 0, tokens * shape.hidden, tokens * shape.dim, weights=weights - first
    )
    ops.pointwise("add", tokens * shape.dim, 2, 1)


def prune_layer(ops: _Rows, shape: Shape, layer: Layer, rule: Rule, patches: int, scoring: Scoring) -> None:
    """What one pruning layer adds: votes, matching, and the gather of the survivors."""
    left = layer.kept(patches)
    if rule.method == "truncate":
        return
    if rule.method == "zero_tprune":
        drop = layer.dropped(patches) if rule.order in ("isi", "si", "is", "s") else 0
        tokens = patches + shape.prefix
        if drop:
            votes(ops, shape, tokens, 1, scoring)
            match(ops, shape, patches, scoring)
        if left < patches - drop:
            votes(ops, shape, tokens - drop, layer.iterations, scoring)
    elif rule.method == "cls":
        ops.add("class attention", 2 * patches * shape.attention_dim, 0, patches * shape.attention_dim, patches)
    ops.add("survivors", 0, patches, patches, left, launches=1 if scoring == "streamed" else SURVIVOR_LAUNCHES)
    ops.pointwise("gather", (left + shape.prefix) * shape.dim, 1, 1)


def votes(ops: _Rows, shape: Shape, tokens: int, iterations: int, scoring: Scoring) -> None:
    """WPR, and VHF and EIR over the heads."""
    scores = shape.heads * tokens * tokens
    if scoring == "stored":
        ops.add(
            "votes",
            0,
            2 * scores * iterations,
            scores * iterations,
            shape.heads * tokens * iterations,
            launches=iterations,
        )
        ops.pointwise("heads", shape.heads * tokens, 1, 1, per_element=8, launches=AGGREGATE_LAUNCHES)
        return
    product = 2 * tokens * tokens * shape.attention_dim
    vector = (_SOFTMAX + 2) * scores + 2 * scores * (iterations - 1)
    ops.add("votes", product, vector, 2 * tokens * shape.attention_dim, shape.heads * tokens)


def match(ops: _Rows, shape: Shape, patches: int, scoring: Scoring) -> None:
    """Cosine similarity of two halves of the keys and the best match of each."""
    half, other = patches // 2, patches - patches // 2
    keys = patches * shape.attention_dim
    if scoring == "stored":
        ops.pointwise("split and normalise", keys, 2, 2, per_element=3, launches=MATCH_LAUNCHES)
        ops.add("similarity", 2 * half * other * shape.attention_dim, half * other, keys, half * other)
        return
    ops.add("match", 2 * half * other * shape.attention_dim, half * other + 2 * keys, keys, patches)


def tome(ops: _Rows, shape: Shape, tokens: int, after: int) -> None:
    """Matching of two halves on mean keys, and the merge: six passes over the tokens in some twenty launches, as in its public code."""
    half = tokens // 2
    ops.pointwise("mean keys", tokens * shape.attention_dim, 1, 1 / shape.heads, launches=3)
    ops.add(
        "similarity",
        2 * half * (tokens - half) * shape.head_dim,
        half * (tokens - half),
        tokens * shape.head_dim,
        half * (tokens - half),
    )
    ops.add("order", 0, half * (tokens - half), half * (tokens - half), half, launches=6)
    ops.pointwise("merge", after * shape.dim, 3, 3, launches=10)


def top_k(ops: _Rows, shape: Shape, tokens: int, after: int) -> None:
    """The class token's attention and the gather."""
    ops.add("class attention", 2 * tokens * shape.attention_dim, 0, tokens * shape.attention_dim, tokens)
    ops.add("order", 0, tokens, tokens, after, launches=SURVIVOR_LAUNCHES)
    ops.pointwise("gather", after * shape.dim, 1, 1)


def breakdown(cost_: Cost, images: int) -> Mapping[str, float]:
    """Microseconds per image by operation name."""
    totals: dict[str, float] = {}
    for name, seconds in zip(cost_.name, cost_.op_latency_s, strict=True):
        totals[name] = totals.get(name, 0.0) + 1e6 * float(seconds) / images
    return totals
