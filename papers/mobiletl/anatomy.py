"""Where a timm network of inverted residual blocks has its stem, its blocks and its head (Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import Tensor, nn

from papers.mobiletl.layers import Adapted
from shared.errors import UserError

BLOCKS = (InvertedResidual, DepthwiseSeparableConv, EdgeResidual)

# A block's internal norms: all but the last one.
INTERNAL_NORMS: dict[type[nn.Module], tuple[str, ...]] = {
    InvertedResidual: ("bn1", "bn2"),
    DepthwiseSeparableConv: ("bn1",),
    EdgeResidual: ("bn1",),
}
# Which norm follows which convolution.
_PAIRS: dict[type[nn.Module], dict[str, str]] = {
    InvertedResidual: {"conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"},
    DepthwiseSeparableConv: {"conv_dw": "bn1", "conv_pw": "bn2"},
    EdgeResidual: {"conv_exp": "bn1", "conv_pwl": "bn2"},
    ConvBnAct: {"conv": "bn1"},
}


@dataclass(frozen=True)
class Anatomy:
    """Paths of a network's parts, in the order of the forward pass."""

    stem: tuple[str, ...]
    blocks: tuple[str, ...]  # from the input to the output
    head: tuple[str, ...]  # what follows the last block, without the classifier
    classifier: str

    def top(self, k: int) -> tuple[str, ...]:
        """The k blocks nearest to the output. Raises UserError for a k that the network does not have."""
        if not 0 <= k <= len(self.blocks):
            raise UserError(
                f"blocks is {k}: this network has {len(self.blocks)} blocks, choose 0 to {len(self.blocks)}"
            )
        return self.blocks[len(self.blocks) - k :]

    def trains_stem(self, k: int) -> bool:
        """With all blocks trained nothing is left to freeze: the stem is trained too."""
        return k == len(self.blocks)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a timm MobileNetV2/V3, EfficientNet, MNASNet or any other network of these blocks.

    Raises UserError for a network that is not built of them.
    """
    stages = getattr(model, "blocks", None)
    if not isinstance(stages, nn.Sequential) or not hasattr(model, "conv_stem") or not hasattr(model, "classifier"):
        raise UserError(
            f"{type(model).__name__} is not a network of inverted residual blocks: give a timm MobileNetV2, MobileNetV3, EfficientNet or "
            "MNASNet, for instance timm.create_model('mobilenetv3_small_100')"
        )
    blocks: list[str] = []
    head: list[str] = []
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage):
            if type(block) in BLOCKS or isinstance(block, Adapted):
                if head:
                    raise UserError(
                        f"{type(model).__name__} has a block after its head convolution, which is not supported"
                    )
                blocks.append(f"blocks.{i}.{j}")
            elif isinstance(block, ConvBnAct) and blocks:
                head.append(f"blocks.{i}.{j}")
            else:
                raise UserError(
                    f"blocks.{i}.{j} is a {type(block).__name__}, which MobileTL has no rule for: it adapts inverted residuals"
                )
    if any(getattr(model.get_submodule(path), "conv_s2d", None) is not None for path in blocks):
        raise UserError("blocks with a space-to-depth convolution are not supported")
    head += [name for name in ("conv_head", "bn2", "norm_head", "act2") if hasattr(model, name)]
    return Anatomy(("conv_stem", "bn1"), tuple(blocks), tuple(head), "classifier")


def conv_norm_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every (parent, convolution's name, name of the norm that follows it) inside a network, a block or a convolution layer."""
    for parent in module.modules():
        pairs = dict(_PAIRS.get(type(parent), {}))
        if hasattr(parent, "conv_stem") and isinstance(getattr(parent, "bn1", None), nn.BatchNorm2d):
            pairs["conv_stem"] = "bn1"
            if isinstance(getattr(parent, "bn2", None), nn.BatchNorm2d):
                pairs["conv_head"] = "bn2"
        for conv, norm in pairs.items():
            yield parent, conv, norm


def forward_to(model: nn.Module, x: Tensor, blocks: int) -> Tensor:
    """Run the stem and all but the last ``blocks`` blocks: (N, 3, H, W) -> the map that the first trained block reads."""
    parts = anatomy(model)
    for path in (*parts.stem, *parts.blocks[: len(parts.blocks) - len(parts.top(blocks))]):
        x = model.get_submodule(path)(x)
    return x


def forward_from(model: nn.Module, x: Tensor, blocks: int) -> Tensor:
    """The rest of the network on a map that :func:`forward_to` gave: logits (N, classes).

    The frozen part is a fixed function of the image, so without random augmentation its maps can be computed once and reused.
    """
    parts = anatomy(model)
    for path in parts.top(blocks):
        x = model.get_submodule(path)(x)
    if hasattr(model, "bn2"):  # EfficientNet: the head convolution comes before the pooling
        x = model.bn2(model.conv_head(x))
    else:
        for path in parts.head:
            if path.startswith("blocks."):
                x = model.get_submodule(path)(x)
    out: Tensor = model.forward_head(x)  # type: ignore[operator]
    return out
