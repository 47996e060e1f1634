"""Expert caches on routing traces: what the cache baseline of Tab. 4 would cost with real instead of random routing.

A trace holds the experts of every token, shape (layers, images, tokens, K), integers in [0, N), distinct within a token. A token asks
for its K experts at once, so a cache never evicts an expert that the same token needs. Every image starts with an empty cache, since
a layer's experts take the place of the layer before. Misses are returned per layer and image, shape (layers, images).

Everything is vectorised over layers, images and tokens; LRU caches of all capacities come from one pass over stack distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from papers.m3vit import hardware
from papers.m3vit.counts import Encoder
from papers.m3vit.hardware import Accelerator
from shared.errors import UserError, unknown

Ints: TypeAlias = NDArray[np.signedinteger[Any]]
Order: TypeAlias = Literal["raster", "hilbert", "sorted"]
ORDERS: tuple[str, ...] = get_args(Order)


def random_routing(
    rng: np.random.Generator,
    *,
    layers: int,
    images: int,
    tokens: int,
    num_experts: int,
    top_k: int,
    skew: float = 0.0,
) -> Ints:
    """Random routing: every token draws K distinct experts, independently of all other tokens.

    ``skew`` is the standard deviation of the log-popularity of the experts of a layer: 0 is uniform, 1 makes a popular expert
    several times as likely as an unpopular one (Gumbel-top-k sampling without replacement).
    """
    popularity = skew * rng.standard_normal((layers, 1, 1, num_experts), dtype=np.float32)
    uniform = rng.random((layers, images, tokens, num_experts), dtype=np.float32)
    keys = popularity - np.log(-np.log(np.maximum(uniform, np.finfo(np.float32).tiny)))
    return np.argpartition(-keys, top_k - 1, axis=-1)[..., :top_k]


def expert_mask(trace: ArrayLike, num_experts: int) -> NDArray[np.bool_]:
    """Which experts each token uses, shape (layers, images, tokens, N). Raises UserError if the trace is not a valid routing."""
    routed = np.asarray(trace)
    if routed.ndim != 4 or routed.size == 0 or not np.issubdtype(routed.dtype, np.integer):
        raise UserError("a routing trace must be a non-empty integer array of shape (layers, images, tokens, K)")
    if routed.min() < 0 or routed.max() >= num_experts:
        raise UserError(
            f"the routing trace names experts outside 0 to {num_experts - 1}: set num_experts to the model's N"
        )
    mask = np.zeros((*routed.shape[:3], num_experts), dtype=np.bool_)
    np.put_along_axis(mask, routed, True, axis=-1)
    if np.any(mask.sum(-1) != routed.shape[-1]):
        raise UserError("the routing trace names an expert twice for one token: give K distinct experts a token")
    return mask


def queue_lengths(trace: ArrayLike, num_experts: int) -> Ints:
    """Tokens per expert, shape (layers, images, N); sums to K·T over the experts."""
    return expert_mask(trace, num_experts).sum(2)


def compulsory_misses(trace: ArrayLike, num_experts: int) -> Ints:
    """Distinct experts: what every cache loads at least, and exactly what the reordered design loads."""
    return expert_mask(trace, num_experts).any(2).sum(-1)


def previous_token_misses(trace: ArrayLike, num_experts: int) -> Ints:
    """Misses of a cache that holds exactly the experts of the previous token (room for K)."""
    mask = expert_mask(trace, num_experts)
    missed = mask.sum((2, 3))
    return missed - (mask[:, :, 1:] & mask[:, :, :-1]).sum((2, 3))


def stack_distances(trace: ArrayLike, num_experts: int) -> Ints:
    """Recency rank of each requested expert before its token, shape of the trace: 0 for the most recently used, N if never used.

    Experts used by the same token rank by index. An LRU cache with room for C experts misses where the distance is at least C.
    """
    mask = expert_mask(trace, num_experts)
    routed = np.asarray(trace)
    tokens = routed.shape[2]
    used = np.where(mask, np.arange(tokens, dtype=np.int32)[:, None], np.int32(-1))
    last = np.full_like(used, -1)  # token at which each expert was last used before the current one
    last[:, :, 1:] = np.maximum.accumulate(used, axis=2)[:, :, :-1]
    recency = last * num_experts - np.arange(num_experts, dtype=np.int32)
    requested = np.take_along_axis(recency, routed, axis=-1)
    distance = np.empty(routed.shape, dtype=np.int64)
    for k in range(routed.shape[-1]):  # one request of every token at a time bounds the memory to that of the mask
        distance[..., k] = (recency > requested[..., k, None]).sum(-1)
    return np.where(np.take_along_axis(last, routed, axis=-1) < 0, num_experts, distance)


def lru_miss_curve(trace: ArrayLike, num_experts: int) -> Ints:
    """Misses of LRU caches with room for C = K … N experts, shape (layers, images, N - K + 1)."""
    distances = stack_distances(trace, num_experts)
    capacities = range(distances.shape[-1], num_experts + 1)
    return np.stack([(distances >= capacity).sum((2, 3)) for capacity in capacities], axis=-1)


def lru_misses(trace: ArrayLike, num_experts: int, capacity: int) -> Ints:
    """Misses of an LRU cache with room for ``capacity`` experts; K gives the previous-token cache, N the compulsory misses."""
    top_k = np.shape(trace)[-1]
    if not top_k <= capacity <= num_experts:
        raise UserError(f"a cache of {capacity} experts must hold one token's {top_k} and at most all {num_experts}")
    return (stack_distances(trace, num_experts) >= capacity).sum((2, 3))


def pinned_misses(trace: ArrayLike, num_experts: int, capacity: int) -> Ints:
    """Misses when the ``capacity`` busiest experts of each layer (over all images of the trace) stay resident.

    The pinned experts are loaded once an image, if used; any other is loaded whenever a token asks for it.
    """
    if not 0 <= capacity <= num_experts:
        raise UserError(f"{capacity} pinned experts must lie between 0 and num_experts={num_experts}")
    mask = expert_mask(trace, num_experts)
    busiest = np.argsort(-mask.sum((1, 2)), axis=-1, kind="stable")[:, :capacity]
    pinned = np.zeros((mask.shape[0], 1, num_experts), dtype=np.bool_)
    np.put_along_axis(pinned, busiest[:, None, :], True, axis=-1)
    requests = mask.sum(2)
    return np.where(pinned, requests > 0, requests).sum(-1)


# --- token orders ---


def hilbert_order(height: int, width: int) -> Ints:
    """Visit order of a ``height`` x ``width`` patch grid along a Hilbert curve of the enclosing square, as raster indices."""
    bits = max(height - 1, width - 1, 1).bit_length()
    y, x = np.divmod(np.arange(height * width), width)
    index = np.zeros_like(x)
    side = 1 << bits
    half = side >> 1
    while half:
        right, lower = (x & half) > 0, (y & half) > 0
        index += half * half * ((3 * right) ^ lower)
        flip = ~lower & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(lower, x, y), np.where(lower, y, x)
        half >>= 1
    return np.argsort(index, kind="stable")


def reorder_tokens(trace: ArrayLike, num_experts: int, order: Order, grid: tuple[int, int]) -> Ints:
    """The trace with its tokens in another order; a class token, if there is one, stays first in ``hilbert``.

    ``raster`` is the model's own order. ``sorted`` puts tokens with equal expert sets together (lexicographic order of the
    sets, for each layer and image); like the queues of the reordered design it needs all routing decisions before the first
    expert runs. Raises UserError if the grid does not match the tokens.
    """
    routed = np.asarray(trace)
    if order == "raster":
        return routed
    if order == "hilbert":
        extra = routed.shape[2] - grid[0] * grid[1]
        if extra not in (0, 1):
            raise UserError(
                f"a {grid[0]} x {grid[1]} patch grid does not give the {routed.shape[2]} tokens of the trace"
            )
        path = hilbert_order(*grid)
        return routed[:, :, np.concatenate([np.arange(extra), path + extra])]
    if order == "sorted":
        mask = expert_mask(routed, num_experts)
        ranks = np.lexsort(tuple(~mask[..., expert] for expert in reversed(range(num_experts))), axis=-1)
        return np.take_along_axis(routed, ranks[..., None], axis=2)
    raise unknown("token order", order, ORDERS)


# --- the study ---


@dataclass(frozen=True)
class CacheResult:
    """One design on the images of a trace: means over images, of a whole frame (all MoE layers)."""

    design: str
    order: str
    capacity: int  # experts that fit on chip
    misses: float
    latency_s: float
    advantage: float  # latency over that of the reordered design on the same trace


def cache_study(
    trace: ArrayLike,
    encoder: Encoder,
    accelerator: Accelerator,
    *,
    grid: tuple[int, int],
    orders: Sequence[Order] = ("raster", "hilbert", "sorted"),
) -> list[CacheResult]:
    """Latency of the reordered design and of cache designs on the same routing; the first row is the reordered design.

    The layers of the trace must be the encoder's MoE layers. Caches: previous token (the baseline of Tab. 4), LRU with room for
    2K, the K or 2K busiest experts pinned. Loads of a cache are never overlapped, as in that baseline.
    """
    routed = np.asarray(trace)
    mask = expert_mask(routed, int(encoder.num_experts))
    layers, _, tokens, top_k = routed.shape
    n = mask.shape[-1]
    if layers != encoder.num_moe_blocks or top_k != encoder.top_k:
        raise UserError(
            f"the trace has {layers} layers with {top_k} experts a token, the encoder {encoder.num_moe_blocks} with {encoder.top_k}"
        )
    queues = np.moveaxis(mask.sum(2), 0, 1)
    reordered = np.mean(hardware.frame_latency(encoder, tokens, accelerator, design="reordered", queues=queues).total_s)
    loads = float(mask.any(2).sum(-1).sum(0).mean())
    results = [CacheResult("reordered", "raster", 2, loads, float(reordered), 1.0)]
    wide = min(2 * top_k, n)
    for order in orders:
        tokens_in_order = reorder_tokens(routed, n, order, grid)
        curve = lru_miss_curve(tokens_in_order, n)
        caches: list[tuple[str, int, Ints]] = [("previous token", top_k, curve[..., 0])]
        caches.append(("LRU", wide, curve[..., wide - top_k]))
        if order == "raster":  # pinned experts do not care about the order
            caches += [("pinned", c, pinned_misses(tokens_in_order, n, c)) for c in (top_k, wide)]
        for design, capacity, missed in caches:
            misses = missed.sum(0).mean()
            latency = hardware.frame_latency(
                encoder, tokens, accelerator, design="cached", misses=float(misses)
            ).total_s
            results.append(
                CacheResult(design, order, capacity, float(misses), float(latency), float(latency / reordered))
            )
    return results


def stall_probability(queues: ArrayLike, threshold_tokens: float) -> float:
    """Share of the non-empty queues that are shorter than the stall threshold."""
    lengths = np.asarray(queues)
    used = lengths > 0
    return float((used & (lengths < threshold_tokens)).sum() / max(int(used.sum()), 1))


def imbalance(queues: ArrayLike) -> NDArray[np.float64]:
    """Longest queue over the mean queue, per layer and image: 1 is perfect balance, N/K the worst."""
    lengths = np.asarray(queues, dtype=np.float64)
    return np.asarray(lengths.max(-1) / lengths.mean(-1))


def merge_queues(traces: Mapping[str, ArrayLike], num_experts: int) -> Ints:
    """Queues of several tasks joined per expert, shape (layers, images, N): each expert is loaded once for all tasks."""
    lengths = [queue_lengths(trace, num_experts) for trace in traces.values()]
    if len({entry.shape for entry in lengths}) != 1:
        raise UserError("the traces of the tasks must cover the same layers and images")
    return np.sum(lengths, axis=0)


def miss_ratio(trace: ArrayLike, num_experts: int) -> float:
    """Misses of the previous-token cache over their expectation under random routing: 1 is random, less is local."""
    _, _, tokens, top_k = np.shape(trace)
    random = hardware.expected_misses(Encoder(num_experts=num_experts, top_k=top_k), tokens)
    return float(previous_token_misses(trace, num_experts).mean() / random)


def scaled_advantage(ratio: float, encoder: Encoder, tokens: int, accelerator: Accelerator) -> float:
    """The advantage of reordering at another size if the routing had ``ratio`` times the misses of random routing there.

    Carries the locality of a small trained model over to the paper's size; that it carries over is an assumption.
    """
    misses = ratio * encoder.num_moe_blocks * hardware.expected_misses(encoder, tokens)
    cached = hardware.frame_latency(encoder, tokens, accelerator, design="cached", misses=misses).total_s
    return float(cached / hardware.frame_latency(encoder, tokens, accelerator, design="reordered").total_s)
