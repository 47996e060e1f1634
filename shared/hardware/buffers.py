"""On-chip memory of a design as a sum of named buffers, counted in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MIB = 2**20


@dataclass(frozen=True)
class Buffer:
    """``words`` words of ``bits`` bits."""

    words: int
    bits: int

    def __post_init__(self) -> None:
        if self.words < 0 or self.bits < 1:
            raise ValueError(f"a buffer has words >= 0 and bits >= 1, got {self.words} and {self.bits}")

    @property
    def size_bytes(self) -> float:
        """Size in bytes, not rounded up to a block of the fabric."""
        return self.words * self.bits / 8


@dataclass(frozen=True)
class Buffers:
    """The buffers of a design. Adding and dropping return a new object.

    >>> Buffers.of(16, weights=1024).add("scores", words=64, bits=32).size_bytes
    2304.0
    """

    buffers: Mapping[str, Buffer] = field(default_factory=dict)

    @classmethod
    def of(cls, bits: int, **words: int) -> Buffers:
        """Buffers of one word width: name = number of words."""
        return cls({name: Buffer(count, bits) for name, count in words.items()})

    def add(self, name: str, *, words: int, bits: int) -> Buffers:
        """With one more buffer. Raises ValueError for a name that is taken."""
        if name in self.buffers:
            raise ValueError(f"buffer '{name}' is there already")
        return Buffers({**self.buffers, name: Buffer(words, bits)})

    def without(self, name: str) -> Buffers:
        """Without one buffer. Raises KeyError for a name that is not there."""
        if name not in self.buffers:
            raise KeyError(name)
        return Buffers({other: buffer for other, buffer in self.buffers.items() if other != name})

    @property
    def size_bytes(self) -> float:
        """Total size, bytes."""
        return sum(buffer.size_bytes for buffer in self.buffers.values())

    @property
    def size_mib(self) -> float:
        """Total size in MiB (2**20 bytes)."""
        return self.size_bytes / MIB

    def fits(self, capacity_bytes: float) -> bool:
        """Whether all buffers fit into ``capacity_bytes`` at once. A count of words: blocks of a fabric can only be less full."""
        return self.size_bytes <= capacity_bytes

    def rows(self) -> list[dict[str, float | int | str]]:
        """One mapping per buffer, for a report's table."""
        return [
            {"buffer": name, "words": buffer.words, "bits": buffer.bits, "size_mib": buffer.size_bytes / MIB}
            for name, buffer in self.buffers.items()
        ]
