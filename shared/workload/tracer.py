"""Trace a model on any device: :func:`trace` runs it once and books every operator that PyTorch dispatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import UserError
from shared.workload import rules_matmul, rules_memory, rules_vector  # noqa: F401  (they register their rules)
from shared.workload.attention import fused_attention
from shared.workload.cost import Call, FullCost, UnknownOperator, find_rule, operator_name, tensors_in
from shared.workload.fused import Recorder, fused_rms_norm
from shared.workload.modules import ModuleTracker
from shared.workload.rules_memory import FREE
from shared.workload.saved import SavedTracker
from shared.workload.table import Op, Phase, Workload

Model = TypeVar("Model", bound=nn.Module)


_NEEDS_VALUES = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))
_ATTENTION, _RMS_NORM = F.scaled_dot_product_attention, (F.rms_norm, torch.rms_norm)


class NeedsValues(UserError):
    """The model does on the meta device what takes the values of a tensor (``nonzero``, ``item``, a boolean mask)."""

    def __init__(self, what: str, module: str) -> None:
        super().__init__(
            f"{what} in module '{module or '(top level)'}' cannot run on the meta device, where tensors have no values: "
            "trace the model on a real device, or rewrite this step with shapes that do not depend on the data"
        )  # fmt: skip


class _Dispatch(TorchDispatchMode):
    """Books every operator below autograd."""

    supports_higher_order_operators = True

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self.modules = modules
        self.ops: list[Op] = []
        self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        module, is_backward = self.modules.locate()
        if (rule := find_rule(func)) is not None:
            out = self._run(func, args, kwargs, module)
            call = Call(func, args, kwargs, out)
            if call.inputs or call.outputs:
                self._book(call.op, module, is_backward, call.dtype, call.full(rule(call)))
            return out
        if operator_name(func) in FREE:
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            with self:  # composite operators arrive whole in inference mode
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        raise UnknownOperator(operator_name(func), module)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], module: str) -> Any:
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            on_meta = any(tensor.is_meta for tensor in tensors_in((*args, *kwargs.values())))
            if on_meta and (
                isinstance(error, NotImplementedError) or _NEEDS_VALUES.intersection(getattr(func, "tags", ()))
            ):
                raise NeedsValues(f"operator '{operator_name(func)}'", module) from error
            raise

    def record(self, name: str, dtype: torch.dtype, cost: FullCost) -> None:
        """Book an operator that the dispatcher does not see as one."""
        self._book(name, *self.modules.locate(), dtype, cost)

    def _book(self, name: str, module: str, is_backward: bool, dtype: torch.dtype, cost: FullCost) -> None:
        phase: Phase = "backward" if is_backward else "forward"
        figures = (cost.flops, cost.vector_ops, cost.bytes_read, cost.bytes_written)
        self.ops.append(
            Op(name, module, cost.kind, phase, str(dtype).removeprefix("torch."), *figures, shape=cost.shape)
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operators run without being booked; what they save is not counted."""
        before, self.is_paused = self.is_paused, True
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                yield
        finally:
            self.is_paused = before


class _Functions(TorchFunctionMode):
    """Sees calls above autograd: those that run as one kernel, and the parameters that operators use.

    This mode is off inside torch functions that are written in Python, such as multi-head attention and ``backward`` (which recomputes
    checkpoints), so the functions are replaced where they are looked up as well; the mode finds those that were imported by name. It
    also keeps transformer layers off their inference path, whose operators fuse a whole layer and cannot be counted by part.
    """

    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch
        recorder = Recorder(dispatch.record, dispatch.paused)
        self._attention = partial(fused_attention, recorder)
        self._rms_norm = partial(fused_rms_norm, recorder)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._call(func, *args, **(kwargs or {}))

    def _call(self, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self._dispatch.is_paused:
            return func(*args, **kwargs)
        for tensor in tensors_in((*args, *kwargs.values())):
            if isinstance(tensor, nn.Parameter):
                self._dispatch.modules.see_parameter(tensor)
        if func is _ATTENTION:
            return self._attention(*args, **kwargs)
        if func in _RMS_NORM:
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """The mode, and the functions replaced in their modules."""
        with ExitStack() as stack:
            for place, name in ((F, "scaled_dot_product_attention"), (F, "rms_norm"), (torch, "rms_norm")):
                stack.enter_context(patch.object(place, name, partial(self._call, getattr(place, name))))
            stack.enter_context(self)
            yield


def _owner(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a bound method such as ``model.forward_features``."""
    while isinstance(model, partial):
        model = model.func
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def _unchanged(model: Callable[..., Any], training: bool) -> Iterator[None]:
    """Train or eval mode for a module; flags, buffers and random state are as before afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    buffers = [
        (b, b.clone()) for module in modules for b in module.buffers(recurse=False) if training and not b.is_meta
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            for module in modules:
                module.training = training
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def trace(model: Callable[..., Any], *inputs: Any, training: bool = False, **kwargs: Any) -> Workload:
    """Run ``model(*inputs, **kwargs)`` once and return the table of what was executed.

    Args:
        model: a module, or any callable that runs torch operators: a method of a module, a whole training step. A module lists all its
            parameters; a callable lists those that are used.
        inputs, kwargs: what the model takes. On the meta device no memory and no arithmetic is needed.
        training: a module runs in train mode and gradients are recorded, which fills ``saved``; a callable that runs a backward pass
            needs it. Otherwise the module runs in eval mode, without gradients. To keep the modes that modules are in (a frozen
            batch norm, say) pass a callable: ``trace(lambda x: model(x), x, training=True)``.

    The modes, buffers and the random state are put back afterwards; what a callable changes itself (gradients, weights) stays.

    Raises:
        UnknownOperator: an operator has no rule (see :func:`register_rule`).
        UserError: the model asks for the value of a meta tensor, or model and inputs are not on the same device.
    """
    root = model if isinstance(model, nn.Module) else None
    if root is not None and any(p.is_meta for p in root.parameters()):
        for tensor in tensors_in((*inputs, *kwargs.values())):
            if not tensor.is_meta:
                raise UserError(
                    f"the model is on the meta device, an input of shape {tuple(tensor.shape)} is not: move it there too"
                )
    tracker = ModuleTracker(_owner(model) if root is None else root, lists_all=root is not None)
    dispatch = _Dispatch(tracker)
    saved = SavedTracker(tracker.persistent_storages, lambda: tracker.current)
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model, training))
        stack.enter_context(torch.set_grad_enabled(training))
        if training:
            stack.enter_context(saved.hooks())
        stack.enter_context(tracker)
        stack.enter_context(dispatch)
        stack.enter_context(_Functions(dispatch).everywhere())
        try:
            model(*inputs, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            if "meta tensor" in str(error) or "meta device" in str(error):
                raise NeedsValues("an operator", tracker.current) from error
            raise
    return Workload(tuple(dispatch.ops), tracker.parameters, tracker.buffers, saved.peak())


def meta_model(factory: Callable[..., Model], *args: Any, **kwargs: Any) -> Model:
    """``factory(*args, **kwargs)`` built on the meta device: a model of any size without memory.

    Example: ``meta_model(timm.create_model, "deit_small_patch16_224")``.
    """
    with torch.device("meta"):
        return factory(*args, **kwargs)
