"""The encoder on a GPU in one pass: a persistent Triton kernel whose programs each carry a tile of samples through all time steps.

Potentials, spikes and counts stay in registers; inputs arrive as packed bits and are unpacked in registers; weights are integers of
1/64 µS in float16, which the tensor cores multiply by zeros and ones and add in float32 without rounding. No fused multiply-add in the
update, so the spikes are those of the CPU back ends bit for bit.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from papers.lsm.bits import WORD
from papers.lsm.weights import STEPS_PER_MICROSIEMENS, Weights
from shared.errors import UserError

MAX_NEURONS = 256
MAX_INPUTS = 256
MAX_COUNT = 2048  # counts are kept in float16


@triton.jit(do_not_specialize=["zero"])
def _liquid(
    words, w_in, w_rec, counts, batch, steps, neurons, decay, threshold, zero,
    WORDS: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    # Recurrent weights stay in shared memory. Input weights do not fit beside them: an offset of t * zero, whose zero the compiler does
    # not know, keeps their loads inside the loop, where they come from the second-level cache.
    k = tl.arange(0, N)
    recurrent = tl.load(w_rec + k[:, None] * N + k[None, :])
    place = tl.arange(0, CHUNK * 32)
    shift = tl.arange(0, 32)
    for tile in range(tl.program_id(0), tl.cdiv(batch, TILE), tl.num_programs(0)):
        sample = tile * TILE + tl.arange(0, TILE)
        exists = (sample < batch)[:, None]
        base = words + sample.to(tl.int64)[:, None] * steps * WORDS + tl.arange(0, CHUNK)[None, :]
        u = tl.zeros([TILE, N], tl.float32)
        s = tl.zeros([TILE, N], tl.float16)
        total = tl.zeros([TILE, N], tl.float16)
        for t in range(steps):
            if RESIDENT:
                current = tl.dot(s, recurrent)
            else:
                current = tl.dot(s, tl.load(w_rec + t * zero + k[:, None] * N + k[None, :]))
            for c in tl.static_range(0, WORDS, CHUNK):
                word = tl.load(base + t * WORDS + c, mask=exists, other=0)
                bits = (word[:, :, None] >> shift[None, None, :]) & 1
                x = tl.reshape(bits, [TILE, CHUNK * 32]).to(tl.float16)
                rows = tl.load(w_in + t * zero + (c * 32 + place)[:, None] * N + k[None, :])
                current = tl.dot(x, rows, current)
            u = tl.where(s > 0, 0.0, u * decay) + current
            s = (u > threshold).to(tl.float16)
            total += s
        out = counts + sample.to(tl.int64)[:, None] * neurons + k[None, :]
        tl.store(out, total.to(tl.int16), mask=exists & (k < neurons)[None, :])


@dataclass(frozen=True)
class Launch:
    """Samples of a tile, input words of a product, warps and software stages of a program."""

    tile: int = 64
    chunk: int = 2
    warps: int = 8
    stages: int = 1
    resident: bool = True  # recurrent weights stay in shared memory


DEFAULT = Launch()


def encode_packed(words: Tensor, weights: Weights, decay: float, threshold: float, launch: Launch = DEFAULT) -> Tensor:
    """Counts (B, N) int16 of packed spike trains (B, T, W); ``threshold`` in µS as in :class:`papers.lsm.encoder.Liquid`.

    Raises:
        UserError: more neurons, inputs or steps than one tile holds, or a threshold that silent neurons would exceed.
    """
    batch, steps, width = words.shape
    neurons = weights.num_neurons
    if neurons > MAX_NEURONS or weights.num_inputs > MAX_INPUTS or steps > MAX_COUNT:
        raise UserError(
            f"the one-pass kernel holds {MAX_INPUTS} inputs, {MAX_NEURONS} neurons and {MAX_COUNT} steps, "
            f"not {weights.num_inputs}, {neurons} and {steps}: use backend=dense"
        )
    if threshold < 0:
        raise UserError(f"the threshold is {threshold}, the one-pass kernel needs one that is not negative")
    padded_words = max(launch.chunk, triton.next_power_of_2(width))
    if padded_words != width:
        words = torch.nn.functional.pad(words, (0, padded_words - width))
    n = max(16, triton.next_power_of_2(neurons))
    w_in, w_rec = _steps(weights.input, padded_words * WORD, n), _steps(weights.recurrent, n, n)
    counts = torch.empty(batch, neurons, dtype=torch.int16, device=words.device)
    programs = min(triton.cdiv(batch, launch.tile), _processors(words.device))
    _liquid[(programs,)](
        words.contiguous(), w_in.to(words.device), w_rec.to(words.device), counts, batch, steps, neurons,
        float(decay), float(threshold) * STEPS_PER_MICROSIEMENS, 0,
        WORDS=padded_words, CHUNK=launch.chunk, N=n, TILE=launch.tile, RESIDENT=launch.resident,
        num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return counts


def _steps(weights: Tensor, rows: int, columns: int) -> Tensor:
    """Weights as integers of the grid in float16, padded with zeros."""
    steps = (weights * STEPS_PER_MICROSIEMENS).to(torch.float16)
    return torch.nn.functional.pad(steps, (0, columns - weights.shape[1], 0, rows - weights.shape[0])).contiguous()


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
