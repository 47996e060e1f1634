"""The encoder: a liquid of leaky integrate-and-fire neurons with random, never trained weights; its output is every neuron's spike count.

    u[t] = a u[t-1] (1 - s[t-1]) + W_in x[t] + W_rec s[t-1],   s[t] = [u[t] > V_th],   c = sum_t s[t]

The reset acts at the next step and does not block its input. With W = const G only V_th / const matters, so potentials are kept in
microsiemens and compared with that ratio: one liquid serves every const. Every back end rounds a·u and then the sum, never fused.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papers.lsm.bits import WORD, pack, unpack
from papers.lsm.weights import Weights
from shared.errors import UserError, unknown

BYTES_PER_WORD = 8  # spikes of a 64-bit word
PARTS_PER_THREAD = 4  # of a batch, so that a late thread does not hold up the rest
BACKENDS = ("auto", "dense", "gather", "events", "triton")


@dataclass(frozen=True)
class Trace:
    """Every step of an encoding: potentials (B, T, N) in µS and spikes (B, T, N)."""

    potentials: Tensor
    spikes: Tensor


@dataclass(frozen=True)
class Liquid:
    """A frozen liquid. ``threshold`` is V_th / const in µS; ``read_noise`` is the relative noise of a cell, drawn afresh at every read."""

    weights: Weights
    decay: float
    threshold: float
    read_noise: float = 0.0

    @classmethod
    def of(cls, weights: Weights, *, decay: float, v_th: float, const: float, read_noise: float = 0.0) -> Liquid:
        """From the paper's parameters: W = const G against V_th.

        Raises:
            UserError: const is not positive.
        """
        if const <= 0:
            raise UserError(f"const is {const}, it must be positive")
        return cls(weights, decay, v_th / const, read_noise)

    def encode(
        self, spikes: Tensor, *, backend: str = "auto", generator: torch.Generator | None = None, block: int = 250
    ) -> Tensor:
        """Counts (B, N) int16 of spike trains (B, T, n_in) of zeros and ones.

        ``auto`` takes the one-pass kernel on a GPU and the compiled event-driven one on a CPU (without numba: ``gather``). All give the
        same bits. Read noise needs ``dense`` (which ``auto`` then takes) and draws from ``generator``. ``block`` samples run at a time.

        Raises:
            UserError: unknown back end, one that does not fit the device, a package that is missing, or a wrong shape.
        """
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if spikes.ndim != 3 or spikes.shape[2] != self.weights.num_inputs:
            raise UserError(
                f"spikes must have the shape (batch, steps, {self.weights.num_inputs}), not {tuple(spikes.shape)}"
            )
        chosen = self._choose(backend, spikes.device.type)
        if spikes.shape[0] == 0 or spikes.shape[1] == 0:
            return torch.zeros(spikes.shape[0], self.weights.num_neurons, dtype=torch.int16, device=spikes.device)
        if chosen == "events":
            return self.encode_counting(spikes)[0]
        if chosen == "triton":
            from papers.lsm.gpu_kernel import encode_packed

            return encode_packed(pack(spikes), self.weights, self.decay, self.threshold)
        parts = []
        for start in range(0, len(spikes), block):
            part = spikes[start : start + block]
            run = self._gather if chosen == "gather" else self._dense
            parts.append(run(part, None, generator))
        return torch.cat(parts)

    def _choose(self, backend: str, device: str) -> str:
        if self.read_noise:
            if backend not in ("auto", "dense"):
                raise UserError(f"backend '{backend}' has no read noise: use backend=dense")
            return "dense"
        if backend == "auto":
            if device == "cuda":
                return "triton" if self.weights.num_neurons <= 256 and self.weights.num_inputs <= 256 else "dense"
            return "events" if find_spec("numba") else "gather"
        if backend == "events" and find_spec("numba") is None:
            raise UserError("backend 'events' needs the package numba: install it, or use backend=gather")
        if backend == "events" and device != "cpu":
            raise UserError("backend 'events' runs on the CPU: use backend=triton or dense for a GPU")
        return backend

    def encode_counting(self, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (B, N) of the event-driven kernel, and how many rows each sample added: times N, its synaptic operations."""
        data = spikes.to(torch.uint8)
        if missing := -data.shape[2] % BYTES_PER_WORD:
            data = torch.nn.functional.pad(data, (0, missing))
        words = np.ascontiguousarray(data.numpy()).view(np.uint64)
        return self._encode_events(np.zeros((*spikes.shape[:2], 4 * -(-spikes.shape[2] // WORD)), np.uint8), words)

    def encode_words(self, words: Tensor, *, generator: torch.Generator | None = None, block: int = 4000) -> Tensor:
        """As :meth:`encode`, of packed spike trains (B, T, W) on the CPU: the event-driven kernel reads them as they are."""
        if not self.read_noise and find_spec("numba") and words.numel():
            return self._encode_events(np.ascontiguousarray(words.numpy()).view(np.uint8))[0]
        parts = (unpack(part, self.weights.num_inputs) for part in words.split(block))
        return torch.cat([self.encode(part, generator=generator) for part in parts])

    def _encode_events(self, masks: NDArray[Any], spikes: NDArray[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Bits (B, T, bytes), filled here from ``spikes`` where given; as many threads as torch has share the batch."""
        from papers.lsm.event_kernel import encode_floats, encode_steps, pack_bytes

        e = self.weights.event_rows
        run = encode_steps if e.rows.dtype == np.int16 else encode_floats
        # In steps of the grid: a power of two scales potentials without rounding.
        decay, threshold = np.float32(self.decay), np.float32(self.threshold) * np.float32(e.steps_per_us)
        counts = np.empty((len(masks), self.weights.num_neurons), np.int16)
        added = np.empty(len(masks), np.int64)

        def part(chosen: slice) -> None:
            if spikes is not None:
                pack_bytes(spikes[chosen], masks[chosen])
            run(masks[chosen], e.rows, e.width, decay, threshold, e.groups, counts[chosen], added[chosen])

        threads = torch.get_num_threads()
        if threads == 1:
            part(slice(None))
        else:
            edges = np.linspace(0, len(masks), PARTS_PER_THREAD * threads + 1).astype(int)
            list(_pool(threads).map(part, map(slice, edges[:-1], edges[1:])))
        return torch.from_numpy(counts), torch.from_numpy(added)

    def trace(self, spikes: Tensor, *, generator: torch.Generator | None = None) -> Trace:
        """Potentials and spikes of every step, by the dense back end."""
        u: list[Tensor] = []
        s: list[Tensor] = []

        def record(potential: Tensor, fired: Tensor) -> None:
            u.append(potential)
            s.append(fired)

        self._dense(spikes, record, generator)
        return Trace(torch.stack(u, 1), torch.stack(s, 1).to(torch.uint8))

    def _dense(
        self, spikes: Tensor, record: Callable[[Tensor, Tensor], object] | None, generator: torch.Generator | None
    ) -> Tensor:
        """Matrix products of all rows at every step: the oracle, and the model of the array with its read noise."""
        w = self.weights.to(spikes.device)
        if not self.read_noise:
            return self._steps(spikes, lambda x, s: x @ w.input + s @ w.recurrent, record)
        columns = w.num_neurons
        inputs = torch.cat([w.input, w.input_power], 1)
        recurrent = torch.cat([w.recurrent, w.recurrent_power], 1)

        def noisy(x: Tensor, s: Tensor) -> Tensor:
            # Independent noise of every active cell adds up to one normal number with the summed variance.
            both = torch.addmm(x @ inputs, s, recurrent)
            mean, sd = both[:, :columns], both[:, columns:].sqrt_()
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            return mean.addcmul_(sd, noise, value=self.read_noise)

        return self._steps(spikes, noisy, record)

    def _gather(
        self, spikes: Tensor, record: Callable[[Tensor, Tensor], object] | None, generator: torch.Generator | None
    ) -> Tensor:
        """Rows of active inputs and spikes summed by ``embedding_bag``."""
        w = self.weights.to(spikes.device)

        def bag_sum(active: Tensor, rows: Tensor) -> Tensor:
            where = active.nonzero()
            ends = active.sum(1, dtype=torch.long).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
            return torch.nn.functional.embedding_bag(where[:, 1], rows, offsets, mode="sum")

        return self._steps(spikes, lambda x, s: bag_sum(x, w.input) + bag_sum(s, w.recurrent), record)

    def _steps(
        self,
        spikes: Tensor,
        current: Callable[[Tensor, Tensor], Tensor],
        record: Callable[[Tensor, Tensor], object] | None,
    ) -> Tensor:
        batch, steps, _ = spikes.shape
        u = torch.zeros(batch, self.weights.num_neurons, device=spikes.device)
        s, counts = torch.zeros_like(u), torch.zeros_like(u)
        decay, threshold = torch.tensor(self.decay).float(), torch.tensor(self.threshold).float()
        for t in range(steps):
            u.mul_(decay).mul_(1.0 - s).add_(current(spikes[:, t].float(), s))
            torch.gt(u, threshold, out=s)
            counts += s
            if record is not None:
                record(u.clone(), s.clone())
        return counts.to(torch.int16)


def firing_rate(counts: Tensor, steps: int) -> float:
    """Mean share of neuron-steps with a spike."""
    return float(counts.float().mean()) / steps


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
