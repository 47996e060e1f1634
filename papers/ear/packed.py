"""Binary hypervectors in packed 64-bit words: Hamming similarity by XOR and popcount, D / 8 bytes a vector instead of 4 D.

For vectors of signs the cosine is 1 - 2 h / D with the Hamming distance h, so packed search gives the same order as the dense one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
_BLOCK_WORDS = 1 << 15  # XOR results stay in the first-level cache or close to it


def pack(vectors: Tensor) -> Words:
    """Signs (n, D) -> words (n, ceil(D / 64)); positive entries are ones, the padding is zero in every vector."""
    bits = np.packbits(vectors.numpy() > 0, axis=1)
    padding = -bits.shape[1] % 8
    return np.ascontiguousarray(np.pad(bits, ((0, 0), (0, padding)))).view(np.uint64)


def hamming(queries: Words, exemplars: Words) -> NDArray[np.int64]:
    """Differing bits (B, K) of packed vectors."""
    n, words = queries.shape
    result = np.empty((n, len(exemplars)), np.int64)
    rows = max(1, _BLOCK_WORDS // max(1, exemplars.size))
    for start in range(0, n, rows):
        differing = np.bitwise_xor(queries[start : start + rows, None], exemplars[None])
        # Counts of up to 64 fit a byte, so four-byte sums of a byte matrix by a product with ones run on vector units.
        counts = np.bitwise_count(differing)
        result[start : start + rows] = counts.reshape(-1, words).sum(1, dtype=np.uint32).reshape(-1, len(exemplars))
    return result


def cosine_packed(queries: Words, exemplars: Words, dim: int) -> NDArray[np.float64]:
    """Cosines (B, K) of the sign vectors behind the words."""
    return 1 - 2 * hamming(queries, exemplars) / dim
