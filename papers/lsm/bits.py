"""Spike trains as packed bits: 32 inputs to a word, input 0 in the lowest bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORD = 32


def pack(spikes: Tensor) -> Tensor:
    """Spikes (..., n) of zeros and ones -> words (..., ceil(n / 32)) as int32; the padding is zero."""
    *shape, n = spikes.shape
    words = -(-n // WORD)
    if spikes.device.type == "cpu":
        packed = np.packbits(spikes.numpy().astype(bool), axis=-1, bitorder="little")
        padding = [(0, 0)] * len(shape) + [(0, 4 * words - packed.shape[-1])]
        return torch.from_numpy(np.ascontiguousarray(np.pad(packed, padding)).view(np.int32))
    padded = torch.nn.functional.pad(spikes.to(torch.uint8), (0, words * WORD - n)).reshape(*shape, words, 4, 8)
    weights = (1 << torch.arange(8, device=spikes.device)).to(torch.uint8)
    data = (padded * weights).sum(-1, dtype=torch.uint8)  # four little-endian bytes of each word
    return data.reshape(*shape, words * 4).contiguous().view(torch.int32)


def unpack(words: Tensor, n: int) -> Tensor:
    """The inverse: (..., W) words -> (..., n) uint8."""
    if words.device.type == "cpu":
        packed = np.ascontiguousarray(words.numpy()).view(np.uint8)
        return torch.from_numpy(np.unpackbits(packed, axis=-1, count=n, bitorder="little"))
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(-2)[..., :n].to(torch.uint8)
