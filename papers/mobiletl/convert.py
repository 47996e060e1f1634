"""``mobiletl(model, blocks=k)`` and the ways of transfer that it is compared with (Sec. 3.1, 3.5)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from papers.mobiletl.anatomy import INTERNAL_NORMS, Anatomy, anatomy, conv_norm_pairs
from papers.mobiletl.block import FusedInvertedResidual, FusedRecomputingInvertedResidual, can_fuse
from papers.mobiletl.functional import TWO_VALUED
from papers.mobiletl.layers import (
    CODED,
    RECOMPUTING,
    FrozenConv2d,
    FrozenNormAct,
    HardSigmoid,
    PackedActivation,
    ShiftNormAct,
    activation_name,
    quantise,
)
from papers.mobiletl.tinytl import add_lite_residuals
from shared.errors import UserError, unknown

Model = TypeVar("Model", bound=nn.Module)
Method = Literal["ft_all", "ft_blocks", "mobiletl", "last", "bias", "norm", "lite", "lite_bias"]
METHODS: tuple[str, ...] = get_args(Method)
ACT_BACKWARD = ("step", "exact", *CODED)
THROUGH = (
    "bias",
    "norm",
    "lite",
    "lite_bias",
)  # these train parts of the whole network, so a graph runs through all of it


@dataclass(frozen=True)
class Adaptation:
    """How a model was converted; stands in the model's attribute ``adaptation``."""

    method: Method
    blocks: int
    act_backward: str = "step"
    inner_norm: Literal["shift", "full"] = "shift"
    recompute: bool = False


def mobiletl(
    model: Model, blocks: int, *, act_backward: str = "step", inner_norm: str = "shift", recompute: bool = False
) -> Model:  # fmt: skip
    """A copy of a pre-trained network, ready to train its last ``blocks`` inverted residual blocks and its head in little memory.

    The stem and the other blocks are folded, stored in int8 and run without a graph. In the trained blocks the internal norms keep
    their scale and statistics and train their shift; the derivative of the internal activations is a step, kept as packed bits.

    Args:
        model: a timm network of inverted residual blocks, with the classifier of the new task.
        blocks: how many blocks to train, counted from the output; 0 trains the head alone, all of them the stem too.
        act_backward: ``step``; ``exact`` for the activations' own derivative; ``2bit`` or ``4bit`` for that of Hard-Swish in few levels.
        inner_norm: ``shift``, or ``full`` for internal norms trained as usual with batch statistics.
        recompute: compute the expanded maps again in the backward pass; needs ``inner_norm="shift"``.

    Raises:
        UserError: not such a network, or arguments out of range.
    """
    return adapt(model, "mobiletl", blocks, act_backward=act_backward, inner_norm=inner_norm, recompute=recompute)


def adapt(
    model: Model,
    method: str,
    blocks: int = 0,
    *,
    act_backward: str = "step",
    inner_norm: str = "shift",
    recompute: bool = False,
    resolution: int = 224,
) -> Model:
    """A copy of ``model`` set up for a way of transfer.

    ``mobiletl`` and ``ft_blocks`` train the last ``blocks`` blocks and the head on top of the same frozen int8 part; ``ft_all`` trains
    everything, ``last`` the classifier, ``bias`` all norms' shifts (frozen statistics, as TinyTL-B) and ``norm`` their scales and
    shifts (batch statistics), ``lite`` and ``lite_bias`` TinyTL's side modules without and with all shifts; these with the classifier
    and with convolutions on the int8 grid. The other options are
    :func:`mobiletl`'s. ``resolution`` is the images' side, which the side modules' kernels are fitted to.
    """
    for name, value, allowed in (
        ("method", method, METHODS),
        ("act_backward", act_backward, ACT_BACKWARD),
        ("inner_norm", inner_norm, ("shift", "full")),
    ):
        if value not in allowed:
            raise unknown(name, value, allowed)
    if act_backward in CODED and inner_norm != "shift":
        raise UserError(f"act_backward={act_backward} needs inner_norm='shift'")
    if recompute and (inner_norm != "shift" or method != "mobiletl"):
        raise UserError(
            "recompute=True needs method 'mobiletl' with inner_norm='shift': batch statistics would be updated twice"
        )
    model = copy.deepcopy(model)
    parts = anatomy(model)
    trained = parts.top(blocks)
    if method in THROUGH:
        _round_convolutions(model)
        _train_norms(model, with_scale=method == "norm", with_shift=method != "lite")
        if method.startswith("lite"):
            add_lite_residuals(model, parts.blocks, resolution)
    elif method != "ft_all":
        if method == "last":
            frozen = [*parts.stem, *parts.blocks, *parts.head]
        else:
            frozen = [path for path in parts.blocks if path not in trained]
            frozen += () if parts.trains_stem(blocks) else parts.stem
        _freeze(model, frozen)
    if method == "mobiletl":
        for path in trained:
            convert_block(model, path, act_backward=act_backward, inner_norm=inner_norm, recompute=recompute)
        for path in parts.head:
            _pack_exact(model.get_submodule(path))
    model.adaptation = Adaptation(method, blocks, act_backward, inner_norm, recompute)  # type: ignore[arg-type]
    return model


def parameter_groups(
    model: nn.Module, lr: float, *, classifier_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: trained weights (decayed), norms and biases (not decayed), the classifier at its own rate."""
    weights: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    classifier: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (classifier if name.startswith("classifier.") else vectors if parameter.dim() < 2 else weights).append(
                parameter
            )
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "norms_and_biases", "params": vectors, "lr": lr, "weight_decay": 0.0},
        {"name": "classifier", "params": classifier, "lr": classifier_lr or lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def adapted_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and the running statistics of norms that use batch statistics.

    The names are the original network's, so the result also loads into the plain network (``load_state_dict(…, strict=False)``).
    """
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            state.update({f"{path}.{name}": buffer.clone() for name, buffer in module.named_buffers(recurse=False)})
    return state


def load_adapted(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`adapted_state_dict` gave into a model that was converted in the same way.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    expected = adapted_state_dict(model)
    if wrong := sorted(set(expected) ^ set(state)):
        raise UserError(f"the adapted parts do not fit: '{wrong[0]}' is {'missing' if wrong[0] in expected else 'not trained here'}; "
                        "convert the model with the same method and blocks")  # fmt: skip
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"'{name}' has shape {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} here: use the same model"
            )
    model.load_state_dict(state, strict=False)


def _freeze(model: nn.Module, paths: list[str]) -> None:
    """Fold, quantise and freeze the parts at ``paths``."""
    inside = tuple(f"{path}." for path in paths)
    names = {module: name for name, module in model.named_modules()}

    def frozen(module: nn.Module) -> bool:
        return names[module] in paths or names[module].startswith(inside)

    for parent, conv_name, norm_name in list(conv_norm_pairs(model)):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        if frozen(conv):
            setattr(parent, conv_name, FrozenConv2d(conv, norm))
            setattr(parent, norm_name, FrozenNormAct(norm.act))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in names and frozen(child):
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, FrozenConv2d(child))
                elif name == "drop_path":
                    setattr(parent, name, nn.Identity())
    for path in paths:
        if any(True for _ in model.get_submodule(path).parameters()):
            raise UserError(
                f"'{path}' has layers that cannot be frozen in int8: {type(model.get_submodule(path)).__name__}"
            )


def convert_block(model: nn.Module, path: str, *, act_backward: str, inner_norm: str, recompute: bool) -> None:
    """Turn the block at ``path`` into a MobileTL block, in place; the options are :func:`mobiletl`'s."""
    block = model.get_submodule(path)
    for name in INTERNAL_NORMS[type(block)]:
        norm = getattr(block, name)
        if inner_norm == "shift":
            setattr(block, name, ShiftNormAct(norm, norm.act, act_backward))
        elif act_backward == "step":
            norm.act = PackedActivation(norm.act, step=True)
    gate = getattr(getattr(block, "se", None), "gate", None)
    if type(gate).__name__.lower() == "hardsigmoid":
        block.se.gate = HardSigmoid()
    if can_fuse(block):
        block.__class__ = FusedRecomputingInvertedResidual if recompute else FusedInvertedResidual
    elif recompute:
        block.__class__ = RECOMPUTING[type(block)]


def _pack_exact(head: nn.Module) -> None:
    """The head's ReLU or ReLU6 keeps its exact derivative, in one bit where torch keeps a float."""
    for norm in [module for module in head.modules() if isinstance(module, nn.BatchNorm2d)]:
        if activation_name(norm.act) in TWO_VALUED:
            norm.act = PackedActivation(norm.act, step=False)


def _round_convolutions(model: nn.Module) -> None:
    """Put every convolution's weights onto the int8 grid that a device would store; a graph runs through them, so they stay float."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            q, scale = quantise(module.weight)
            module.weight.data = q * scale


def _train_norms(model: nn.Module, *, with_scale: bool, with_shift: bool = True) -> None:
    """Freeze all but the classifier and the norms; without the scale, all norms keep their statistics and the exact activation."""
    parts: Anatomy = anatomy(model)
    model.requires_grad_(False)
    model.get_submodule(parts.classifier).requires_grad_(True)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if with_scale:
                    child.requires_grad_(True)
                else:
                    setattr(parent, name, ShiftNormAct(child, child.act, "exact"))
                    getattr(parent, name).bias.requires_grad_(with_shift)
