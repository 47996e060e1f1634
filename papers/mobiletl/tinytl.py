"""TinyTL's lite residuals (Cai et al., NeurIPS 2020), the side modules that the paper compares with, on timm's blocks.

Beside each frozen block runs a small one at half the resolution: average pooling, a grouped convolution, norm, ReLU, a pointwise
convolution, a norm whose scale starts at 0, bilinear upsampling. They are trained from scratch here ("RandomL"), with all shifts or
without; TinyTL also pre-trains them, and replaces batch norms by group norms, which we do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import BatchNormAct2d, make_divisible
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import Tensor, nn

from papers.mobiletl.layers import Adapted

GROUPS = 2
MAX_KERNEL = 5


class LiteResidual(nn.Module):
    """The side module of a block with ``channels_in`` -> ``channels_out`` and ``stride``."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, kernel: int = MAX_KERNEL) -> None:
        super().__init__()
        middle = make_divisible(channels_in, 8)
        self.conv1 = nn.Conv2d(channels_in, middle, kernel, stride, kernel // 2, groups=GROUPS, bias=False)
        self.norm1 = BatchNormAct2d(middle, act_layer=nn.ReLU)
        self.conv2 = nn.Conv2d(middle, channels_out, 1, bias=False)
        self.norm2 = BatchNormAct2d(channels_out, apply_act=False)
        nn.init.zeros_(self.norm2.weight)  # the network starts as it was

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, C, H, W) -> (N, C', *size)."""
        pooled = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        side = self.norm2(self.conv2(self.norm1(self.conv1(pooled))))
        return F.interpolate(side, size=size, mode="bilinear", align_corners=False)


class _WithLite(Adapted, nn.Module):
    lite: LiteResidual

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        out: Tensor = super().forward(x)
        return out + self.lite(x, (out.shape[2], out.shape[3]))


class LiteInvertedResidual(_WithLite, InvertedResidual):
    """MBConv with a lite residual."""


class LiteDepthwiseSeparable(_WithLite, DepthwiseSeparableConv):
    """Depthwise-separable block with a lite residual."""


class LiteEdgeResidual(_WithLite, EdgeResidual):
    """Fused MBConv with a lite residual."""


_LITE: dict[type[nn.Module], type[nn.Module]] = {
    InvertedResidual: LiteInvertedResidual,
    DepthwiseSeparableConv: LiteDepthwiseSeparable,
    EdgeResidual: LiteEdgeResidual,
}
_ENDS: dict[type[nn.Module], tuple[str, str]] = {
    InvertedResidual: ("conv_pw", "conv_pwl"),
    DepthwiseSeparableConv: ("conv_dw", "conv_pw"),
    EdgeResidual: ("conv_exp", "conv_pwl"),
}


def add_lite_residuals(model: nn.Module, paths: Sequence[str], resolution: int) -> None:
    """Give the blocks at ``paths``, all of a timm network's, a lite residual each, in place; results stay as they were at first.

    The kernel is the largest odd one up to 5 that fits on the pooled map of a square image of ``resolution`` pixels.
    """
    side = -(-resolution // model.get_submodule("conv_stem").stride[0])  # type: ignore[index,operator]
    for path in paths:
        block = model.get_submodule(path)
        first, last = (getattr(block, name) for name in _ENDS[type(block)])
        strides: list[int] = [conv.stride[0] for conv in block.modules() if isinstance(conv, nn.Conv2d)]
        pooled = max(side // 2, 1)
        kernel = min(MAX_KERNEL, pooled - (pooled + 1) % 2)
        lite = LiteResidual(first.in_channels, last.out_channels, max(strides), max(kernel, 1)).to(first.weight)
        block.add_module("lite", lite)
        block.__class__ = _LITE[type(block)]
        side = -(-side // max(strides))
