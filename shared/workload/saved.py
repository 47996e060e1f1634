"""What autograd saves for the backward pass, through PyTorch's saved-tensor hooks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.workload.table import Held


class _Kept:
    """Stands in the graph for a saved tensor; the graph drops it when the backward pass has used it."""

    def __init__(self, tensor: torch.Tensor, storage: int, tracker: SavedTracker) -> None:
        self.tensor, self._storage, self._tracker = tensor, storage, tracker

    def __del__(self) -> None:
        self._tracker.release(self._storage)


class SavedTracker:
    """Counts each storage once, whole, from the first tensor that is saved on it until the last is dropped.

    Tensors whose storage is in ``persistent`` (parameters, buffers) are held anyway and do not count.
    """

    def __init__(self, persistent: set[int], module: Callable[[], str]) -> None:
        self._persistent, self._module = persistent, module
        self._uses: dict[int, int] = {}
        self._events: list[tuple[int, Held | None]] = []  # storage, and what it holds; None: released

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        storage = tensor.untyped_storage()
        key = storage._cdata  # an address that no other storage has while this one is held
        if key in self._persistent:
            return tensor
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            self._events.append(
                (key, Held(self._module(), storage.nbytes() // tensor.element_size(), storage.nbytes()))
            )
        return _Kept(tensor, key, self)

    @staticmethod
    def _unpack(kept: torch.Tensor | _Kept) -> torch.Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    def release(self, storage: int) -> None:
        """One saved tensor on this storage was dropped."""
        self._uses[storage] -= 1
        if self._uses[storage] == 0:
            self._events.append((storage, None))

    def peak(self) -> tuple[Held, ...]:
        """What was held at the moment when most bytes were held."""
        live: dict[int, Held] = {}
        total = best = best_step = 0
        for step, (storage, held) in enumerate(self._events):
            if held is None:
                total -= live.pop(storage).size_bytes
                continue
            live[storage] = held
            total += held.size_bytes
            if total > best:
                best, best_step = total, step + 1
        live = {}
        for storage, held in self._events[:best_step]:
            if held is None:
                live.pop(storage)
            else:
                live[storage] = held
        return tuple(live.values())
