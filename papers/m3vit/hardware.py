"""The accelerator model of M³ViT (Sec. 3.2, Fig. 3 and 4, Tab. 4): latency, expert traffic, on-chip memory, energy.

One task, batch 1, encoder only, as in Tab. 4. Layers run one after the other and each keeps the whole multiplier array busy,
so a component takes MACs / rate. Three designs differ in how the experts of a layer reach the chip:

* ``resident``  - token by token, all experts of a layer on chip (the naive design of Sec. 3.2);
* ``cached``    - token by token, room for the experts of one token, every miss waits for its load (the FPGA baseline of Tab. 4);
* ``reordered`` - expert by expert over token queues, the next expert loads while the current one computes (the paper's).

Weights other than experts are the same in all designs; their loads are taken to hide behind the layer before, since the
published latency of the dense ViT leaves no room for them. All quantities may be numpy arrays (a design space in one call).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from papers.m3vit import counts
from papers.m3vit.counts import Count, Encoder
from shared.errors import UserError, unknown

Quantity: TypeAlias = float | NDArray[np.floating[Any]]
Design: TypeAlias = Literal["resident", "cached", "reordered"]
DESIGNS: tuple[str, ...] = get_args(Design)
MIB = 2**20


@dataclass(frozen=True)
class Accelerator:
    """Rates of an accelerator for batch-1 inference, in SI units.

    ``macs_per_s`` is the rate of linear layers, experts, router and convolutions; ``attention_macs_per_s`` that of the attention
    unit (projections and products), which has its own lanes per head (Fig. 3). ``router_drain_cycles`` is the pipeline drain
    after each token in the router.
    """

    macs_per_s: Quantity
    attention_macs_per_s: Quantity
    clock_hz: Quantity
    bandwidth_bytes_per_s: Quantity
    power_w: Quantity
    weight_bits: Quantity
    router_drain_cycles: Quantity

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = np.asarray(getattr(self, entry.name))
            low = 0.0 if entry.name == "router_drain_cycles" else np.finfo(float).tiny
            if not np.all(np.isfinite(value)) or np.any(value < low):
                raise UserError(
                    f"accelerator: {entry.name}={getattr(self, entry.name)} must be a positive finite number"
                )

    @classmethod
    def from_array(
        cls,
        *,
        macs_per_cycle: Quantity,
        attention_macs_per_cycle: Quantity,
        clock_hz: Quantity,
        bandwidth_bytes_per_s: Quantity,
        power_w: Quantity,
        weight_bits: Quantity,
        router_drain_cycles: Quantity,
    ) -> Accelerator:
        """An accelerator whose multiplier arrays do so many MACs per clock cycle."""
        return cls(
            macs_per_s=macs_per_cycle * clock_hz,
            attention_macs_per_s=attention_macs_per_cycle * clock_hz,
            clock_hz=clock_hz,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            power_w=power_w,
            weight_bits=weight_bits,
            router_drain_cycles=router_drain_cycles,
        )


@dataclass(frozen=True)
class Latency:
    """Latency of one frame by component, in seconds."""

    patch_embedding_s: Quantity
    attention_s: Quantity
    mlp_s: Quantity
    experts_s: Quantity
    router_s: Quantity
    exposed_load_s: Quantity  # waiting for expert weights

    @property
    def compute_s(self) -> Quantity:
        """All but the waiting."""
        return self.patch_embedding_s + self.attention_s + self.mlp_s + self.experts_s + self.router_s

    @property
    def total_s(self) -> Quantity:
        """Latency of the frame."""
        return self.compute_s + self.exposed_load_s


# --- one expert ---


def expert_bytes(encoder: Encoder, accelerator: Accelerator) -> Quantity:
    """S_e: weights and biases of one expert."""
    return counts.expert_parameters(encoder) * accelerator.weight_bits / 8.0


def load_s(encoder: Encoder, accelerator: Accelerator) -> Quantity:
    """l: time to load one expert from DRAM."""
    return expert_bytes(encoder, accelerator) / accelerator.bandwidth_bytes_per_s


def token_s(encoder: Encoder, accelerator: Accelerator) -> Quantity:
    """Time of one token in one expert: c_i = q_i · token_s for a queue of q_i tokens."""
    return 2.0 * encoder.dim * encoder.expert_hidden / accelerator.macs_per_s


def mean_queue(encoder: Encoder, tokens: Count) -> Quantity:
    """Tokens per expert under balanced routing."""
    return tokens * encoder.top_k / (1.0 * encoder.num_experts)


def stall_threshold_tokens(encoder: Encoder, accelerator: Accelerator) -> Quantity:
    """The queue length below which the next expert's load outlasts the current expert's computation."""
    return load_s(encoder, accelerator) / token_s(encoder, accelerator)


def critical_bandwidth_bytes_per_s(encoder: Encoder, tokens: Count, accelerator: Accelerator) -> Quantity:
    """BW*: the bandwidth below which loads stop hiding even under balanced routing."""
    return expert_bytes(encoder, accelerator) / (mean_queue(encoder, tokens) * token_s(encoder, accelerator))


def random_stall_probability(encoder: Encoder, tokens: Count, accelerator: Accelerator) -> Quantity:
    """Probability that an expert's queue is non-empty and below the threshold, under uniform random routing.

    A token picks a given expert with probability K/N, so a queue is Binomial(T, K/N).
    """
    threshold = np.ceil(stall_threshold_tokens(encoder, accelerator)) - 1.0
    share = encoder.top_k / (1.0 * encoder.num_experts)
    return np.clip(binom.cdf(threshold, tokens, share) - binom.pmf(0, tokens, share), 0.0, 1.0)


# --- expert schedules ---


def expected_misses(encoder: Encoder, tokens: Count) -> Quantity:
    """Misses of one MoE layer under uniform random routing when the cache holds the previous token's K experts.

    The first token misses K; an expert of any later token was used by the token before with probability K/N.
    """
    k, n = encoder.top_k, 1.0 * encoder.num_experts
    return k + (tokens - 1) * k * (1.0 - k / n)


def exposed_load_s(
    queues: ArrayLike, token_s: Quantity, load_s: Quantity, *, overlap: bool = True, first_load_exposed: bool = False
) -> NDArray[np.float64]:
    """Waiting of MoE layers that run expert by expert over real queues.

    ``queues`` holds the queue lengths, shape (…, N); empty experts are neither loaded nor computed, the others run in index
    order. With two buffers the next expert loads while the current one computes, so Σ_{i<M} max(l - c_i, 0) is waited for;
    without ``overlap`` every load is. The first load is prefetched while attention and router run, unless
    ``first_load_exposed``. Returns seconds, shape (…).
    """
    lengths = np.asarray(queues)
    used = lengths > 0
    last = lengths.shape[-1] - 1 - np.argmax(used[..., ::-1], axis=-1)
    followed = used & (np.arange(lengths.shape[-1]) < last[..., None])  # experts during which a further one loads
    waits = np.where(followed, np.maximum(load_s - lengths * token_s, 0.0) if overlap else load_s, 0.0).sum(-1)
    first = used.any(-1) * load_s if first_load_exposed else 0.0
    return np.asarray(waits + first, dtype=np.float64)


def double_buffer_s(
    queues: ArrayLike, token_s: Quantity, load_s: Quantity, *, overlap: bool = True, first_load_exposed: bool = False
) -> NDArray[np.float64]:
    """Time of MoE layers that run expert by expert: t = Σ_{i<M} max(c_i, l) + c_M (see :func:`exposed_load_s`)."""
    waits = exposed_load_s(queues, token_s, load_s, overlap=overlap, first_load_exposed=first_load_exposed)
    return np.asarray(np.sum(queues, axis=-1) * token_s + waits, dtype=np.float64)


def balanced_exposed_s(encoder: Encoder, tokens: Count, accelerator: Accelerator) -> Quantity:
    """Waiting of one reordered MoE layer when all N queues have the mean length (what real queues can only exceed)."""
    shortfall = load_s(encoder, accelerator) - mean_queue(encoder, tokens) * token_s(encoder, accelerator)
    return (1.0 * encoder.num_experts - 1.0) * np.maximum(shortfall, 0.0)


def compute_latency(encoder: Encoder, tokens: Count, accelerator: Accelerator) -> Latency:
    """Computation of one frame by component, without any waiting for experts (Sec. 3.2; the dense ViT of Tab. 4)."""
    macs = counts.encoder_macs(encoder, tokens)
    drain = encoder.num_moe_blocks * tokens * accelerator.router_drain_cycles / accelerator.clock_hz
    return Latency(
        patch_embedding_s=macs["patch_embedding"] / accelerator.macs_per_s,
        attention_s=(macs["projections"] + macs["attention_products"]) / accelerator.attention_macs_per_s,
        mlp_s=macs["mlp"] / accelerator.macs_per_s,
        experts_s=macs["experts"] / accelerator.macs_per_s,
        router_s=macs["router"] / accelerator.macs_per_s + drain,
        exposed_load_s=0.0,
    )


def frame_latency(
    encoder: Encoder,
    tokens: Count,
    accelerator: Accelerator,
    *,
    design: Design,
    misses: Quantity | None = None,
    queues: ArrayLike | None = None,
    overlap: bool = True,
    first_load_exposed: bool = False,
) -> Latency:
    """Latency of one frame in one of the three designs.

    ``misses`` of the whole frame for ``cached`` (default: the expectation under random routing); ``queues`` of all MoE layers,
    shape (…, layers, N), for ``reordered`` (default: balanced). A dense encoder waits for nothing in any design. Raises
    UserError for an unknown design.
    """
    if design not in DESIGNS:
        raise unknown("design", design, DESIGNS)
    parts = compute_latency(encoder, tokens, accelerator)
    layers, load = encoder.num_moe_blocks, load_s(encoder, accelerator)
    exposed: Quantity
    if layers == 0 or design == "resident":
        return parts
    if design == "cached":
        exposed = (layers * expected_misses(encoder, tokens) if misses is None else misses) * load
    elif queues is not None:
        per_token = token_s(encoder, accelerator)
        waiting = exposed_load_s(queues, per_token, load, overlap=overlap, first_load_exposed=first_load_exposed)
        exposed = waiting.sum(-1)
    else:
        waits = balanced_exposed_s(encoder, tokens, accelerator) if overlap else (encoder.num_experts - 1) * load
        exposed = layers * (waits + (load if first_load_exposed else 0.0))
    return replace(parts, exposed_load_s=exposed)


def decoder_latency_s(macs: Quantity, accelerator: Accelerator) -> Quantity:
    """A decoder of ``macs`` MACs at the rate of the multiplier array: what the published latency leaves out."""
    return macs / accelerator.macs_per_s


def energy_j(latency_s: Quantity, power_w: Quantity) -> Quantity:
    """E = P · t with constant power, as in Tab. 4 (10 W board, 295 W GPU limit)."""
    return latency_s * power_w


# --- all tasks of a frame ---


@dataclass(frozen=True)
class MultiTask:
    """Encoder latency and expert traffic of several tasks on one frame (reordered design, balanced queues)."""

    latency_s: Quantity
    traffic_bytes: Quantity


def multi_task(
    encoder: Encoder, tokens: Count, accelerator: Accelerator, *, tasks: int, share_prefix: bool, merge_queues: bool
) -> MultiTask:
    """Cost of ``tasks`` tasks of one image; a dense encoder needs one pass for all of them.

    ``share_prefix`` computes patch embedding, block 0 and the attention of block 1 once. ``merge_queues`` runs all tasks layer by
    layer and joins their queues, so that an expert is loaded once for all tasks; the token buffer then holds all tasks.
    """
    if tasks < 1:
        raise UserError(f"tasks={tasks} must be at least 1")
    passes = tasks if encoder.num_moe_blocks else 1
    load, per_token = load_s(encoder, accelerator), token_s(encoder, accelerator)
    compute = compute_latency(encoder, tokens, accelerator)
    rounds, joined = (1, passes) if merge_queues else (passes, 1)
    shortfall = load - joined * mean_queue(encoder, tokens) * per_token
    exposed = rounds * encoder.num_moe_blocks * (encoder.num_experts - 1) * np.maximum(shortfall, 0.0)
    saved: Quantity = 0.0
    if share_prefix:
        attention = counts.projection_macs(encoder, tokens) + counts.attention_product_macs(encoder, tokens)
        plain = counts.patch_embedding_macs(encoder, tokens) + counts.mlp_macs(encoder, tokens)
        once = 2.0 * attention / accelerator.attention_macs_per_s + plain / accelerator.macs_per_s
        saved = (passes - 1) * once
    loads = rounds * encoder.num_moe_blocks * encoder.num_experts
    return MultiTask(passes * compute.compute_s - saved + exposed, loads * expert_bytes(encoder, accelerator))


# --- on-chip memory ---


def memory_words(encoder: Encoder, tokens: Count, design: Design) -> dict[str, Count]:
    """On-chip words by buffer (Tab. 4, column "Memory"); ``tokens`` of the largest input, 1201 in the paper.

    All designs but ``resident`` reuse the dense MLP's buffer for the experts: it has room for at least two of them, which double
    buffering needs. The queues of the reordered design are not in the published sum; see :func:`queue_words`.
    """
    if design not in DESIGNS:
        raise unknown("design", design, DESIGNS)
    words: dict[str, Count] = {
        "attention_weights": counts.attention_parameters(encoder),
        "patch_embedding": counts.patch_embedding_parameters(encoder),
        "layer_norms": 4 * encoder.dim,
        "token_buffer": tokens * encoder.dim,
        "class_token": encoder.dim,
        "mlp_or_experts": counts.mlp_parameters(encoder),
    }
    if encoder.num_moe_blocks:
        held = encoder.num_experts if design == "resident" else 2
        experts = held * counts.expert_parameters(encoder)
        words["mlp_or_experts"] = np.maximum(words["mlp_or_experts"], experts)
        words["router"] = encoder.dim * encoder.num_experts
    return words


def memory_bytes(encoder: Encoder, tokens: Count, design: Design, word_bits: Quantity) -> Quantity:
    """On-chip bytes of a design."""
    return counts.sum_counts(memory_words(encoder, tokens, design)) * word_bits / 8.0


def queue_words(encoder: Encoder, tokens: Count) -> Count:
    """Token index and gate value of the N queues, each with room for all tokens: left out of the published memory."""
    return 2 * encoder.num_experts * tokens
