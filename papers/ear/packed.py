"""Binary hypervectors in packed 64-bit words: Hamming similarity by XOR and popcount, D / 8 bytes a vector instead of 4 D.

For vectors of signs the cosine is 1 - 2 h / D with the Hamming distance h, so packed search gives the same order as the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
Counts = NDArray[np.int64]


def pack(vectors: Tensor) -> Words:
    """Signs (n, D) -> words (n, ceil(D / 64)); positive entries are ones, the padding is zero in every vector."""
    bits = np.packbits(vectors.numpy() > 0, axis=1)
    padding = -bits.shape[1] % 8
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, padding)))).view(np.uint64)


def hamming(queries: Words, exemplars: Words) -> Counts:
    """Differing bits (B, K) of packed vectors (B, W) and (K, W)."""
    return _kernel()(queries, exemplars)


def cosine_packed(queries: Words, exemplars: Words, dim: int) -> NDArray[np.float64]:
    """Cosines (B, K) of the sign vectors behind the words."""
    return 1 - 2 * hamming(queries, exemplars) / dim


@cache
def _kernel() -> Callable[[Words, Words], Counts]:
    """XOR and popcount in one loop, compiled at the first call: three passes of NumPy over temporaries take seven times as long."""
    import numba

    # Bit counts within ever wider fields (SWAR); LLVM turns this into the vector popcount of the processor where it has one.
    pairs, nibbles, low = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
    ones, one, two, four, top = np.uint64(0x0101010101010101), np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)

    @numba.njit
    def count(queries: Words, exemplars: Words) -> Counts:
        distances = np.empty((len(queries), len(exemplars)), np.int64)
        for row in range(len(queries)):
            for column in range(len(exemplars)):
                total = np.int64(0)
                for word in range(queries.shape[1]):
                    x = queries[row, word] ^ exemplars[column, word]
                    x -= (x >> one) & pairs
                    x = (x & nibbles) + ((x >> two) & nibbles)
                    x = (x + (x >> four)) & low
                    total += np.int64((x * ones) >> top)
                distances[row, column] = total
        return distances

    return count
