"""Which module runs an operator: the stack of module calls in the forward pass, the graph node in the backward pass."""

from __future__ import annotations

from bisect import bisect_right
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from shared.workload.table import Held


def _held(name: str, tensor: torch.Tensor) -> Held:
    return Held(name, tensor.numel(), tensor.numel() * tensor.element_size())


class ModuleTracker:
    """Paths of modules, parameters and buffers while a model runs.

    ``root``, if given, has its children's paths in it. A module from elsewhere is named by its class, below the module that calls it.
    ``lists_all``: all parameters of the root count, otherwise those that operators use.
    """

    def __init__(self, root: nn.Module | None, lists_all: bool) -> None:
        self._names: dict[int, str] = {}
        self._parameter_names: dict[int, str] = {}
        self._known: list[nn.Module] = []  # keeps the ids above valid
        self._stack: list[tuple[nn.Module, str, bool]] = []
        self._parameters: dict[int, tuple[str, torch.Tensor]] = {}
        self._buffers: dict[int, tuple[str, torch.Tensor]] = {}
        self._nodes: list[int] = []  # sequence numbers of graph nodes, rising, and the module that made each
        self._node_modules: list[str] = []
        self.persistent_storages: set[int] = set()
        if root is not None:
            self._name(root, "")
            for parameter in root.parameters() if lists_all else ():
                self.see_parameter(parameter)

    def _name(self, module: nn.Module, path: str) -> None:
        self._known.append(module)
        for name, child in module.named_modules(prefix=path):
            self._names.setdefault(id(child), name)
        for name, parameter in module.named_parameters(prefix=path):
            self._parameter_names.setdefault(id(parameter), name)
        for name, buffer in module.named_buffers(prefix=path):
            self._hold(self._buffers, buffer, name)

    def _hold(self, group: dict[int, tuple[str, torch.Tensor]], tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.persistent_storages:
            self.persistent_storages.add(storage)
            group[id(tensor)] = (name, tensor)

    def see_parameter(self, parameter: nn.Parameter) -> None:
        """Note a parameter that an operator uses, whether or not a module owns it."""
        if id(parameter) not in self._parameters and not isinstance(parameter, nn.UninitializedParameter):
            name = self._parameter_names.get(id(parameter)) or ".".join(filter(None, (self.current, "parameter")))
            self._hold(self._parameters, parameter, name)

    @property
    def parameters(self) -> tuple[Held, ...]:
        """Parameters of all modules met and of all operators run, each storage once."""
        return tuple(_held(name, tensor) for name, tensor in self._parameters.values())

    @property
    def buffers(self) -> tuple[Held, ...]:
        """Buffers of all modules met, each storage once."""
        return tuple(_held(name, tensor) for name, tensor in self._buffers.values())

    @property
    def current(self) -> str:
        """Path of the module whose forward pass runs now."""
        return self._stack[-1][1] if self._stack else ""

    def locate(self) -> tuple[str, bool]:
        """Module of the operator that runs now, and whether the autograd engine runs it."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            number = torch.autograd._get_sequence_nr() - 1  # the node of this operator was made just before
            if not self._nodes or number > self._nodes[-1]:
                self._nodes.append(number)
                self._node_modules.append(self.current)
            return self.current, False
        if self._stack and self._stack[-1][2]:  # recomputed by a checkpoint
            return self.current, True
        if (variable := getattr(node, "variable", None)) is not None:  # accumulates the gradient of a leaf
            name = self._parameters.get(id(variable), ("", None))[0]
            return name.rpartition(".")[0], True
        place = bisect_right(self._nodes, node._sequence_nr()) - 1
        return (self._node_modules[place] if place >= 0 else ""), True

    def _enter(self, module: nn.Module, _args: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            base = ".".join(filter(None, (self.current, type(module).__name__)))
            taken = set(self._names.values())
            name = next(n for i in range(1, len(taken) + 3) if (n := base if i == 1 else f"{base}_{i}") not in taken)
            self._name(module, name)
        self._stack.append((module, name, torch._C._current_autograd_node() is not None))

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        # Not called when forward raises, so the stack still names the place; entries left by an exception that was caught go now.
        while self._stack and self._stack.pop()[0] is not module:
            pass

    def __enter__(self) -> ModuleTracker:
        self._hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:  # fmt: skip
        for hook in self._hooks:
            hook.remove()
