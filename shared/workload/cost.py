"""What one operator costs: :class:`Call`, :class:`Cost` and the registry of rules.

Conventions of all rules
------------------------
* FLOPs are those of matrix products, convolutions and attention alone, 2 per multiply-accumulate. Everything else is counted in
  *vector operations*: one per addition, multiplication, comparison or call of a function unit (exp, erf, tanh, sigmoid, sqrt,
  division, a random draw), per element. The two are never added up.
* Bytes are those of an unfused execution with no cache: each distinct operand is read once, each result is written once. A broadcast
  or expanded operand counts the elements that exist in memory, an in-place result counts as read and written.
* An operator without a rule is an error (:class:`UnknownOperator`), never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, overload

import torch

from shared.errors import UserError

KINDS = ("matmul", "conv", "attention", "vector", "gather", "copy")
"""matmul, conv, attention: FLOPs. vector: elementwise, normalisation, reduction, softmax, random numbers. gather: indexed reads and
writes, sorting, search. copy: copies, casts, padding, concatenation, fills."""


class UnknownOperator(UserError):
    """The trace met an operator that has no rule; :func:`register_rule` adds one."""

    def __init__(self, operator: str, module: str) -> None:
        self.operator, self.module = operator, module
        super().__init__(
            f"operator '{operator}' in module '{module or '(top level)'}' has no cost rule: add one with "
            f"shared.workload.register_rule('{operator}', lambda call: Cost(kind='vector', vector_ops=...))"
        )


@dataclass(frozen=True)
class Cost:
    """Cost of one call. ``None`` for bytes means: every operand once, every result once.

    ``shape``: (batch, m, n, k) of the matrix product that the FLOPs are of, for models of how well a shape uses the hardware: a
    convolution has its groups as batch and output pixels x channels out x (channels in x kernel) and, fifth, the output pixels of one
    picture; attention has heads x images as batch and queries x keys x head width. A reduction or normalisation of m rows of k elements
    has (1, m, 1, k), and so has a gather of m rows of k elements. Empty where there is none or several.
    """

    kind: str
    flops: int = 0
    vector_ops: int = 0
    bytes_read: int | None = None
    bytes_written: int | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is '{self.kind}', it must be one of {', '.join(KINDS)}")
        if min(self.flops, self.vector_ops, self.bytes_read or 0, self.bytes_written or 0) < 0:
            raise ValueError(f"a cost is negative: {self}")


@dataclass(frozen=True)
class FullCost:
    """Cost of one call, with all figures."""

    kind: str
    flops: int
    vector_ops: int
    bytes_read: int
    bytes_written: int
    shape: tuple[int, ...] = ()


def size_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory that a read of ``tensor`` touches: an expanded dimension (stride 0) and overlapping windows count once."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise UserError(f"a {tensor.layout} tensor cannot be traced: convert it to a dense tensor first")
    if tensor.numel() == 0:
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    elements = prod(size for size, stride in sizes if stride != 0)
    return min(elements * tensor.element_size(), tensor.untyped_storage().nbytes())


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors in arguments or results, lists and tuples included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _distinct(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Drop repeated views of the same memory (x * x reads x once)."""
    seen: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and not tensor.is_nested:
            key: tuple[Any, ...] = (
                tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            )  # fmt: skip
        else:
            key = (id(tensor),)
        seen.setdefault(key, tensor)
    return tuple(seen.values())


@dataclass(frozen=True)
class _Schema:
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    written: frozenset[str]  # arguments that are changed in place
    out: frozenset[str]  # arguments that are written and not read


@cache
def _schema(func: Any) -> _Schema:
    if not isinstance(func, torch._ops.OpOverload):  # a higher-order operator has no schema
        return _Schema((), {}, frozenset(), frozenset())
    arguments = func._schema.arguments
    return _Schema(
        tuple(a.name for a in arguments),
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        frozenset(a.name for a in arguments if a.is_out),
    )


class Call:
    """One executed operator: what a rule sees. Tensors may be on the meta device: use shapes, not values."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        self.func, self.out = func, out
        self.op = operator_name(func)
        self._schema = _schema(func)
        names = self._schema.names or tuple(str(i) for i in range(len(args)))
        self._given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument that the operator's schema calls ``name``, or its default."""
        return self._given[name] if name in self._given else self._schema.defaults.get(name, default)

    @cached_property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Distinct tensors that are read, in the order of the arguments."""
        return self.inputs_except()

    def inputs_except(self, *unread: str) -> tuple[torch.Tensor, ...]:
        """Distinct tensors that are read, leaving out arguments of which the operator uses the shape alone."""
        skip = self._schema.out.union(unread)
        return _distinct(tensors_in(value for name, value in self._given.items() if name not in skip))

    @cached_property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Distinct tensors that are written: results and arguments changed in place."""
        changed = (value for name, value in self._given.items() if name in self._schema.written)
        return _distinct(tensors_in((self.out, *changed)))

    @property
    def inplace(self) -> bool:
        """Whether the first argument is changed in place."""
        return bool(self._schema.names) and self._schema.names[0] in self._schema.written

    @property
    def dtype(self) -> torch.dtype:
        """The type that the operator computes in: the first floating-point operand, else the first operand, else the result."""
        tensors = self.inputs + self.outputs
        return next((t.dtype for t in tensors if t.is_floating_point() or t.is_complex()), tensors[0].dtype)

    def bytes_in(self, *unread: str) -> int:
        """Bytes of all distinct operands but ``unread``."""
        return sum(size_bytes(tensor) for tensor in self.inputs_except(*unread))

    def bytes_out(self) -> int:
        """Bytes of all results."""
        return sum(size_bytes(tensor) for tensor in self.outputs)

    def full(self, cost: Cost) -> FullCost:
        """``cost`` with the bytes that it leaves open: every operand once, every result once."""
        read = self.bytes_in() if cost.bytes_read is None else cost.bytes_read
        written = self.bytes_out() if cost.bytes_written is None else cost.bytes_written
        return FullCost(cost.kind, cost.flops, cost.vector_ops, read, written, cost.shape)


Rule = Callable[[Call], Cost]
_RULES: dict[str, Rule] = {}
_FALLBACKS: list[Callable[[Any], Rule | None]] = []


def operator_name(func: Any) -> str:
    """``aten.addmm`` for ``aten.addmm.default`` and its other overloads; also takes custom operators and names ('lib::op', 'lib.op')."""
    if isinstance(func, str):
        return func.replace("::", ".")
    func = getattr(func, "_opoverload", func)  # torch.library.custom_op
    return str(getattr(func, "overloadpacket", func))


@overload
def register_rule(op: Any, rule: Rule) -> Rule: ...
@overload
def register_rule(op: Any, rule: None = None) -> Callable[[Rule], Rule]: ...
def register_rule(op: Any, rule: Rule | None = None) -> Rule | Callable[[Rule], Rule]:
    """Say what an operator costs; a later rule for the same name takes its place.

    ``op``: an operator of ``torch.ops``, the result of ``torch.library.custom_op``, or a name: ``"mylib::op"`` for all overloads,
    ``"mylib::op.overload"`` for one. Use it as a function or, without ``rule``, as a decorator.
    """

    def add(function: Rule) -> Rule:
        _RULES[operator_name(op)] = function
        find_rule.cache_clear()
        return function

    return add if rule is None else add(rule)


def register_rules(names: Iterable[str], rule: Rule, prefix: str = "aten.") -> None:
    """The same rule for several ATen operators."""
    for name in names:
        register_rule(prefix + name, rule)


def register_fallback(find: Callable[[Any], Rule | None]) -> None:
    """A rule for a whole class of operators (by tag or name), asked when the operator has none of its own."""
    _FALLBACKS.append(find)
    find_rule.cache_clear()


@cache
def find_rule(func: Any) -> Rule | None:
    """The rule of an operator: overload first, then name, then in-place sibling of a named one, then class."""
    name = operator_name(func)
    overload_name = f"{name}.{getattr(func, '_overloadname', '')}"
    base = name.removesuffix("_") if not name.endswith("__") else name
    for key in (overload_name, name, base):
        if key in _RULES:
            return _RULES[key]
    return next((rule for find in _FALLBACKS if (rule := find(func)) is not None), None)
