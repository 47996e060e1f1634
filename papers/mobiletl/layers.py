"""The layers that MobileTL puts in place of a network's own: shift-only norms, int8 frozen convolutions, blocks that recompute.

All keep the parameter names of the layers that they replace, so the adapted parts of a converted model load into the plain model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from papers.mobiletl.functional import (
    STEP_ACTIVATIONS,
    TWO_VALUED,
    activate,
    coded_hard_swish,
    hard_sigmoid,
    packed_act,
    shift_act,
    shift_norm,
)
from shared.errors import UserError

INT8_MAX = 127
CODED = {"2bit": 2, "4bit": 4}  # values of act_backward that keep a coarse derivative, and its bits

_ACTIVATION_NAMES = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "Hardswish": "hard_swish",
    "HardSwish": "hard_swish",
    "HardSwishMe": "hard_swish",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
    "Identity": "identity",
}


def activation_name(module: nn.Module) -> str:
    """What an activation module computes: one of STEP_ACTIVATIONS or ``identity``. Raises UserError for any other."""
    name = _ACTIVATION_NAMES.get(type(module).__name__)
    if name is None:
        raise UserError(
            f"no step stands in for the derivative of {type(module).__name__}: MobileTL knows {', '.join(STEP_ACTIVATIONS)}; "
            "adapt such a model with method='ft_blocks'"
        )
    return name


class ShiftNormAct(nn.Module):
    """Norm and activation inside a block: frozen scale and statistics in every mode, a trained shift (Sec. 3.2, 3.3).

    ``act_backward="step"`` keeps one bit per element for the backward pass; ``"exact"`` keeps what the activation's own derivative
    needs; ``"2bit"`` and ``"4bit"`` keep as many bits of Hard-Swish's derivative (ReLU and ReLU6 need one, exactly). The forward pass
    is the base network's with frozen statistics, bit for bit on CPU.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: nn.Module, act_backward: str = "step") -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise UserError(
                "MobileTL freezes a norm's scale and running statistics, but this norm has none: use an affine BatchNorm2d"
            )
        self.bias = nn.Parameter(norm.bias.detach().clone())
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("running_mean", norm.running_mean.detach().clone())
        self.register_buffer("running_var", norm.running_var.detach().clone())
        self.eps = norm.eps
        self.activation = activation_name(activation)
        self.act_backward = act_backward
        if act_backward in CODED and self.activation == "silu":
            raise UserError(
                "act_backward 2bit and 4bit are for Hard-Swish, this network has SiLU: choose step or exact"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        constants = (self.running_mean, self.running_var, self.eps)
        if self.act_backward == "step" and self.activation != "identity":
            return shift_act(x, self.weight, self.bias, *constants, self.activation)
        u = shift_norm(x, self.weight, self.bias, *constants)
        if self.activation == "identity":
            return u
        if self.act_backward in CODED:
            if self.activation in TWO_VALUED:
                return packed_act(u, self.activation, step=False)
            return coded_hard_swish(u, CODED[self.act_backward])
        return activate(u, self.activation)

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, eps={self.eps}, activation={self.activation}, act_backward={self.act_backward}"


class HardSigmoid(nn.Module):
    """Hard sigmoid whose backward pass needs only its result."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return hard_sigmoid(x)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per output channel: ``(q, scale)`` with weight ≈ q · scale, error at most scale / 2."""
    flat = weight.detach().flatten(1)
    scale = (flat.abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(weight.dtype).tiny)
    q = torch.round(flat / scale[:, None]).to(torch.int8).view_as(weight)
    return q, scale.view(-1, *(1,) * (weight.dim() - 1))


class FrozenConv2d(nn.Module):
    """A convolution stored in int8 (one scale per output channel) that nothing trains, with a frozen norm folded into it.

    The weights are expanded for each call. The layer has buffers only, so no graph is recorded through it.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        if type(conv) is not nn.Conv2d:
            raise UserError(
                f"{type(conv).__name__} layers cannot be frozen in int8: choose a timm model with plain padding (no 'tf_')"
            )
        weight = conv.weight.detach()
        bias = torch.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach()
        if norm is not None:
            a = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
            weight = weight * a.view(-1, 1, 1, 1)
            bias = norm.bias.detach() + (bias - norm.running_mean) * a
        q, scale = quantise(weight)
        self.register_buffer("weight_int8", q)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias.clone())
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        weight = self.weight_int8 * self.scale
        return F.conv2d(
            x, weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding, self.dilation, self.groups
        )


class FrozenNormAct(nn.Module):
    """What is left of a norm that was folded into the convolution before it: its activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out: Tensor = self.act(x)
        return out


class PackedActivation(nn.Module):
    """An activation that keeps one bit per element: a step for its derivative, or the exact derivative of ReLU and ReLU6."""

    def __init__(self, activation: nn.Module, *, step: bool) -> None:
        super().__init__()
        self.activation = activation_name(activation)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Any dense shape."""
        return packed_act(x, self.activation, step=self.step)

    def extra_repr(self) -> str:
        return f"{self.activation}, step={self.step}"


class Adapted:
    """Marks a block that was converted in place: a timm block by its parameters and its results."""


class Recomputing(Adapted, nn.Module):
    """A block whose expanded maps are computed again in the backward pass: kept are its input and the last norm's input.

    The internal norms use frozen statistics, so the second forward pass gives the same numbers and changes nothing.
    """

    conv_names: tuple[str, ...] = ()
    last_norm: str = ""

    def _expanded(self, x: Tensor) -> Tensor:
        for name in self.conv_names:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        if torch.is_grad_enabled():
            z = checkpoint(self._expanded, x, use_reentrant=False, preserve_rng_state=False)
        else:
            z = self._expanded(x)
        out: Tensor = getattr(self, self.last_norm)(z)
        return self.drop_path(out) + x if self.has_skip else out


class RecomputingInvertedResidual(Recomputing, InvertedResidual):
    """MBConv with recomputed maps."""

    conv_names = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl")
    last_norm = "bn3"


class RecomputingDepthwiseSeparable(Recomputing, DepthwiseSeparableConv):
    """Depthwise-separable block with recomputed maps."""

    conv_names = ("conv_dw", "bn1", "aa", "se", "conv_pw")
    last_norm = "bn2"


class RecomputingEdgeResidual(Recomputing, EdgeResidual):
    """Fused MBConv with recomputed maps."""

    conv_names = ("conv_exp", "bn1", "aa", "se", "conv_pwl")
    last_norm = "bn2"


RECOMPUTING: dict[type[nn.Module], type[nn.Module]] = {
    InvertedResidual: RecomputingInvertedResidual,
    DepthwiseSeparableConv: RecomputingDepthwiseSeparable,
    EdgeResidual: RecomputingEdgeResidual,
}
