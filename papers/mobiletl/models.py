"""Networks: timm's by name, ProxylessNAS-Mobile, which timm lacks, and two small ones for training on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from shared.errors import UserError

# One string per stage, as timm writes them: kernel, stride, expansion, output channels.
_PROXYLESS_MOBILE = [  # mit-han-lab/tinyml, netaug/models/base/proxylessnas.py
    ["ds_r1_k3_s1_c16"],
    ["ir_r1_k5_s2_e3_c32", "ir_r1_k3_s1_e3_c32"],
    ["ir_r1_k7_s2_e3_c40", "ir_r1_k3_s1_e3_c40", "ir_r2_k5_s1_e3_c40"],
    ["ir_r1_k7_s2_e6_c80", "ir_r3_k5_s1_e3_c80"],
    ["ir_r1_k5_s1_e6_c96", "ir_r3_k5_s1_e3_c96"],
    ["ir_r1_k7_s2_e6_c192", "ir_r1_k7_s1_e6_c192", "ir_r2_k7_s1_e3_c192"],
    ["ir_r1_k7_s1_e6_c320"],
]
_TINY_V2 = [
    ["ir_r1_k3_s1_e4_c16"],
    ["ir_r1_k3_s2_e4_c24", "ir_r1_k3_s1_e4_c24"],
    ["ir_r1_k3_s1_e4_c32"],
    ["ir_r1_k3_s2_e4_c48", "ir_r2_k3_s1_e6_c48"],
]
# timm divides the squeeze ratio by the expansion, so 1.0 and 1.5 are a quarter of the expanded channels.
_TINY_V3 = [
    ["ir_r1_k3_s1_e4_c16_nr6"],
    ["ir_r1_k3_s2_e4_c24_nr6", "ir_r1_k5_s1_e4_c24_se1.0"],
    ["ir_r1_k5_s1_e4_c32_se1.0"],
    ["ir_r1_k5_s2_e4_c48_se1.0", "ir_r2_k5_s1_e6_c48_se1.5"],
]


def _proxyless_mobile(num_classes: int, in_chans: int) -> nn.Module:
    return EfficientNet(
        decode_arch_def(_PROXYLESS_MOBILE), num_classes, num_features=1280, in_chans=in_chans, stem_size=32, act_layer=nn.ReLU6
    )  # fmt: skip


def _tiny(arch: list[list[str]], activation: type[nn.Module], num_classes: int, in_chans: int) -> nn.Module:
    return EfficientNet(
        decode_arch_def(arch), num_classes, num_features=128, in_chans=in_chans, stem_size=16, act_layer=activation,
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels),
    )  # fmt: skip


_OWN: dict[str, Any] = {
    "proxyless_mobile": _proxyless_mobile,
    "tiny_v2": partial(_tiny, _TINY_V2, nn.ReLU6),
    "tiny_v3": partial(_tiny, _TINY_V3, nn.Hardswish),
}
_SHORT = {"mbv3_small": "mobilenetv3_small_100", "mbv3_large": "mobilenetv3_large_100", "mbv2": "mobilenetv2_100"}


def create(name: str, num_classes: int = 10, *, in_chans: int = 3, pretrained: bool = False) -> nn.Module:
    """A network by name: ``proxyless_mobile``, ``tiny_v2``, ``tiny_v3``, ``mbv2``, ``mbv3_small``, ``mbv3_large`` or any name of timm.

    Raises:
        UserError: timm has no such network, or the weights of one of ours are asked for.
    """
    if name in _OWN:
        if pretrained:
            raise UserError(f"there are no pretrained weights for {name}: train it, or choose a timm model")
        model: nn.Module = _OWN[name](num_classes, in_chans)
        return model
    name = _SHORT.get(name, name)
    if not timm.is_model(name):
        raise UserError(f"unknown model '{name}': choose one of {', '.join([*_OWN, *_SHORT])} or a model of timm")
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans)


def fig1_block(version: str) -> nn.Module:
    """The block of Fig. 1: 96 channels, expansion 6, 7 x 7 maps; ``v2`` with ReLU6, ``v3`` with Hard-Swish and squeeze-and-excitation.

    Raises UserError for another version.
    """
    from timm.models._efficientnet_blocks import InvertedResidual

    if version == "v2":
        return InvertedResidual(96, 96, dw_kernel_size=5, exp_ratio=6, act_layer=nn.ReLU6)
    if version == "v3":
        squeeze = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels)
        return InvertedResidual(96, 96, dw_kernel_size=5, exp_ratio=6, act_layer=nn.Hardswish, se_layer=squeeze)
    raise UserError(f"block version is '{version}': choose v2 or v3")
