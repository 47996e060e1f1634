"""The layers that a network executes, with their shapes and what a way of transfer does to each (Sec. 3.5).

Traced with forward hooks, on the meta device if the network is there: a table that the accountings of :mod:`papers.mobiletl.accounting`
and :mod:`papers.mobiletl.flops` read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from papers.mobiletl.anatomy import BLOCKS, INTERNAL_NORMS, anatomy
from papers.mobiletl.convert import METHODS, THROUGH
from papers.mobiletl.layers import CODED, activation_name
from shared.errors import unknown

Kind = Literal["conv", "linear", "norm", "act", "se", "pool", "add"]
Role = Literal["frozen", "trained", "inner", "shift", "norm", "through", "2bit", "4bit"]


@dataclass(frozen=True)
class Layer:
    """One executed layer. Shapes include the batch; an ``se`` layer is the whole squeeze-and-excitation on its map."""

    path: str
    kind: Kind
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    block: str = ""  # path of the block that it belongs to
    internal: bool = False  # a norm or an activation inside a block
    activation: str = ""  # of an act; of an SE block's reduced vector
    gate: str = ""  # of an SE block
    weights: int = 0  # parameters with two or more dimensions
    vectors: int = 0  # biases, scales, shifts
    macs: int = 0
    groups: int = 1
    reduced: int = 0  # width of an SE block

    @property
    def batch(self) -> int:
        """Images."""
        return self.in_shape[0]

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.in_shape[1]

    @property
    def elements_in(self) -> int:
        """Elements of the input."""
        return _product(self.in_shape)

    @property
    def elements_out(self) -> int:
        """Elements of the output."""
        return _product(self.out_shape)


def trace_layers(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """Run ``module``, a plain timm network or one of its blocks, on zeros of ``input_shape`` and list its layers in order.

    Training flags, statistics and gradients stay as they are.
    """
    found: list[Layer] = []
    blocks = {name: child for name, child in module.named_modules() if isinstance(child, BLOCKS)}
    device = next(module.parameters()).device
    flags = {child: child.training for child in module.modules()}
    with ExitStack() as stack:
        for path, child in module.named_modules():
            hook = _hook(found, path, child, blocks)
            if hook is not None:
                stack.callback(child.register_forward_hook(hook).remove)
        module.eval()
        with torch.no_grad():
            module(torch.zeros(input_shape, device=device))
        for child, flag in flags.items():
            child.training = flag
    return tuple(layer for layer in found)


def _hook(found: list[Layer], path: str, module: nn.Module, blocks: dict[str, nn.Module]) -> Any:
    owner = next((name for name in blocks if not name or path == name or path.startswith(f"{name}.")), None)
    block = owner or ""
    inside_se = ".conv_reduce" in path or ".conv_expand" in path or ".se." in f".{path}."[:-1]
    if isinstance(module, SqueezeExcite):
        make = _se_layer
    elif inside_se:
        return None
    elif isinstance(module, nn.Conv2d | nn.Linear):
        make = _product_layer
    elif isinstance(module, nn.BatchNorm2d):
        make = _norm_layers
    elif path.endswith("act2"):
        make = _act_layer
    elif path.endswith("global_pool"):
        make = _pool_layer
    elif isinstance(module, BLOCKS) and module.has_skip:
        make = _add_layer
    else:
        return None
    internal = False
    if owner is not None and isinstance(module, nn.BatchNorm2d):
        names = next(names for kind, names in INTERNAL_NORMS.items() if isinstance(blocks[owner], kind))
        internal = path.rpartition(".")[2] in names

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend(make(path, module, tuple(inputs[0].shape), tuple(output.shape), block, internal))

    return hook


def _parameters(module: nn.Module) -> dict[str, int]:
    sizes = [(p.dim() > 1, p.numel()) for p in module.parameters()]
    return {"weights": sum(n for big, n in sizes if big), "vectors": sum(n for big, n in sizes if not big)}


def _product_layer(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, _: bool
) -> Iterator[Layer]:  # fmt: skip
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    weight = module.get_parameter("weight")
    macs = _product(shape_out) * weight[0].numel()
    kind: Kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
    yield Layer(path, kind, shape_in, shape_out, block, macs=macs, groups=groups, **_parameters(module))


def _norm_layers(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, internal: bool
) -> Iterator[Layer]:  # fmt: skip
    yield Layer(path, "norm", shape_in, shape_out, block, internal, **_parameters(module))
    name = activation_name(module.act)  # type: ignore[arg-type]
    if name != "identity":
        yield Layer(f"{path}.act", "act", shape_in, shape_out, block, internal, activation=name)


def _act_layer(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, _: bool
) -> Iterator[Layer]:  # fmt: skip
    if (name := activation_name(module)) != "identity":
        yield Layer(path, "act", shape_in, shape_out, block, activation=name)


def _se_layer(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, _: bool
) -> Iterator[Layer]:  # fmt: skip
    reduce, expand = module.get_submodule("conv_reduce"), module.get_submodule("conv_expand")
    reduced = reduce.get_parameter("weight").shape[0]
    macs = shape_in[0] * sum(conv.get_parameter("weight").numel() for conv in (reduce, expand))
    yield Layer(
        path, "se", shape_in, shape_out, block, activation=activation_name(module.get_submodule("act1")),
        gate=_gate_name(module.get_submodule("gate")), macs=macs, reduced=reduced, **_parameters(module),
    )  # fmt: skip


def _gate_name(module: nn.Module) -> str:
    name = type(module).__name__.lower().removesuffix("me")
    if name not in ("hardsigmoid", "sigmoid"):
        raise unknown("gate of a squeeze-and-excitation block", type(module).__name__, ("Hardsigmoid", "Sigmoid"))
    return name


def _pool_layer(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, _: bool
) -> Iterator[Layer]:  # fmt: skip
    yield Layer(path, "pool", shape_in, shape_out, block)


def _add_layer(
    path: str, module: nn.Module, shape_in: tuple[int, ...], shape_out: tuple[int, ...], block: str, _: bool
) -> Iterator[Layer]:  # fmt: skip
    yield Layer(f"{path}.add".lstrip("."), "add", shape_out, shape_out, block)


def roles(
    model: nn.Module,
    layers: tuple[Layer, ...],
    method: str,
    blocks: int = 0,
    *,
    act_backward: str = "step",
    inner_norm: str = "shift",
) -> tuple[Role, ...]:
    """What ``method`` does to each layer of a whole network; the options are those of :func:`papers.mobiletl.convert.adapt`.

    ``frozen``: nothing flows back through it. ``trained``: as usual. ``inner``: MobileTL's internal norms and activations;
    ``2bit``, ``4bit``: an internal activation that keeps a coarser derivative.
    ``shift``, ``norm``, ``through``: the backward pass goes through it, and of its parameters only norms' shifts, scales and shifts, or
    none are trained. Raises UserError for an unknown method or a ``blocks`` that the network does not have.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    parts = anatomy(model)
    top = parts.top(blocks)

    def role(layer: Layer) -> Role:
        if layer.path == parts.classifier or method == "ft_all":
            return "trained"
        if ".lite." in layer.path:
            return "trained"
        if method == "lite":
            is_lowest = layer.path.split(".")[0] in parts.stem or layer.block == parts.blocks[0]
            return "frozen" if is_lowest else "through"
        if method in THROUGH:
            return "norm" if method == "norm" else "shift"
        in_stem = layer.path.split(".")[0] in parts.stem
        below = not parts.trains_stem(blocks) if in_stem else bool(layer.block) and layer.block not in top
        if method == "last" or below:
            return "frozen"
        return _trained_role(layer, method, act_backward, inner_norm)

    return tuple(role(layer) for layer in layers)


def block_roles(
    layers: tuple[Layer, ...], method: str, *, act_backward: str = "step", inner_norm: str = "shift"
) -> tuple[Role, ...]:
    """The same for the layers of one trained block: ``ft_blocks`` or ``mobiletl``. Raises UserError for another method."""
    if method not in ("ft_blocks", "mobiletl"):
        raise unknown("method of a block", method, ("ft_blocks", "mobiletl"))
    return tuple(_trained_role(layer, method, act_backward, inner_norm) for layer in layers)


def _trained_role(layer: Layer, method: str, act_backward: str, inner_norm: str) -> Role:
    if method != "mobiletl" or not layer.internal:
        return "trained"
    if layer.kind == "act" and act_backward in CODED:
        return act_backward if layer.activation == "hard_swish" else "inner"  # type: ignore[return-value]
    is_switched_on = inner_norm == "shift" if layer.kind == "norm" else act_backward == "step"
    return "inner" if is_switched_on else "trained"


def trained_parameters(layers: tuple[Layer, ...], layer_roles: tuple[Role, ...]) -> int:
    """Number of parameters that are trained; an internal norm of MobileTL trains its shift alone."""
    return sum(_trained(layer, role) for layer, role in zip(layers, layer_roles, strict=True))


def _trained(layer: Layer, role: Role) -> int:
    if role == "trained":
        return layer.weights + layer.vectors
    if layer.kind != "norm" or role in ("frozen", "through"):
        return 0
    return layer.vectors if role == "norm" else layer.vectors // 2


def total_parameters(layers: tuple[Layer, ...]) -> int:
    """Number of all parameters."""
    return sum(layer.weights + layer.vectors for layer in layers)


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n
