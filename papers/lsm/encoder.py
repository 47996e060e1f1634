"""The encoder: a liquid of leaky integrate-and-fire neurons with random, never trained weights; its output is every neuron's spike count.

    u[t] = a u[t-1] (1 - s[t-1]) + W_in x[t] + W_rec s[t-1],   s[t] = [u[t] > V_th],   c = sum_t s[t]

The reset acts at the next step and does not block its input. With W = const G only V_th / const matters, so potentials are kept in
microsiemens and compared with that ratio: one liquid serves every const. Every back end rounds a·u and then the sum, never fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from papers.lsm.bits import pack
from papers.lsm.weights import BYTES_PER_WORD, Weights
from shared.errors import UserError, unknown

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
        self, spikes: Tensor, *, backend: str = "auto", generator: torch.Generator | None = None, block: int = 1000
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
        from papers.lsm.event_kernel import encode_floats, encode_steps

        _numba_threads()
        rows = np.zeros(len(spikes), np.int64)
        stacked, unit = self.weights.padded_rows
        data = spikes.to(torch.uint8)
        if missing := -data.shape[2] % BYTES_PER_WORD:
            data = torch.nn.functional.pad(data, (0, missing))
        counts = np.zeros((len(spikes), stacked.shape[1]), np.int16)
        run = encode_steps if stacked.dtype == np.int16 else encode_floats
        words = np.ascontiguousarray(data.numpy()).view(np.uint64)
        run(words, stacked, np.float32(unit), np.float32(self.decay), np.float32(self.threshold), counts, rows)
        return torch.from_numpy(counts[:, : self.weights.num_neurons].copy()), torch.from_numpy(rows)

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

        def current(x: Tensor, s: Tensor) -> Tensor:
            result = x @ w.input + s @ w.recurrent
            if self.read_noise:
                # Independent noise of every active cell adds up to one normal number with the summed variance.
                variance = x @ w.input_power + s @ w.recurrent_power
                noise = torch.randn(result.shape, generator=generator, device=result.device)
                result = result + self.read_noise * variance.sqrt() * noise
            return result

        return self._steps(spikes, current, record)

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
            u = u * decay * (1.0 - s) + current(spikes[:, t].float(), s)
            s = (u > threshold).float()
            counts += s
            if record is not None:
                record(u, s)
        return counts.to(torch.int16)


def firing_rate(counts: Tensor, steps: int) -> float:
    """Mean share of neuron-steps with a spike."""
    return float(counts.float().mean()) / steps


def _numba_threads() -> None:
    """Torch's number of threads, so that parallel jobs share the machine as they were told to."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(torch.get_num_threads(), most)))
