"""The fixed encoder of EAR: taps of a frozen network, pooled to a cacheable size (abstract: "a fixed DNN feature encoder").

Adaptors sit on top, so no gradient ever crosses the encoder and the taps of an image are computed once. Any timm network that
gives features serves (ResNet, MobileNetV2, EfficientNet, DeiT), and so does a module of one's own that returns a list of taps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError

TAP_SIDE = 7  # taps are average-pooled to at most 7 x 7 before they are cached
STAND_IN_CHANNELS = (12, 24, 48, 96)

# Four stages of each network, as timm counts them, and the taps of a plain vision transformer by block.
TIMM_STAGES = {"resnet": (1, 2, 3, 4), "mobilenetv2": (0, 1, 2, 3, 4), "efficientnet": (0, 1, 2, 3, 4)}
DEIT_BLOCKS = (3, 7, 11)


class FrozenEncoder(nn.Module):
    """A network that never changes: ``eval`` for good, no gradients, taps pooled to at most ``side`` x ``side``.

    Args:
        taps: a module that maps images to a list of feature maps (B, c, h, w).
        channels: c of each tap.
        mean, std: what images in [0, 1] are normalised with, per channel; none for a network without normalisation.
    """

    def __init__(
        self,
        taps: nn.Module,
        channels: Sequence[int],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        side: int | None = TAP_SIDE,
    ) -> None:
        super().__init__()
        self.taps, self.channels, self.side = taps, tuple(channels), side
        self.register_buffer("mean", None if mean is None else torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", None if std is None else torch.tensor(list(std or ())).view(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in evaluation mode whatever is asked: batch statistics belong to the encoder and are never updated."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, channels, H, W) in [0, 1] -> taps (B, c_l, h_l, w_l)."""
        if self.mean is not None:
            images = (images - self.mean) / self.std
        maps = list(self.taps(images))
        if [m.shape[1] for m in maps] != list(self.channels):
            raise UserError(
                f"the encoder gives taps with {[m.shape[1] for m in maps]} channels, but channels={list(self.channels)} was declared"
            )
        return [pool_to(m, self.side) for m in maps] if self.side else maps

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 256) -> list[Tensor]:
        """Taps of many images, without gradients."""
        parts = [self(images[i : i + batch]) for i in range(0, len(images), batch)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def fingerprint(self) -> str:
        """A hash of all weights and statistics: equal before and after adaptation."""
        return hashlib.sha256("".join(tensor_hashes(self).values()).encode()).hexdigest()


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """A hash of each tensor of a module's state."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in module.state_dict().items()
    }


def pool_to(tap: Tensor, side: int) -> Tensor:
    """Average-pool a feature map to at most ``side`` x ``side``; a smaller one stays as it is."""
    height, width = tap.shape[-2:]
    if height <= side and width <= side:
        return tap
    return F.adaptive_avg_pool2d(tap, (min(height, side), min(width, side)))


# --- the small encoder of the stand-in ---


class _Block(nn.Module):
    """Basic residual block; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class SmallEncoder(nn.Module):
    """The stand-in's network: a stride-2 stem and four residual blocks; 174,094 parameters with a head of ten classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        c = STAND_IN_CHANNELS
        self.stem = nn.Sequential(nn.Conv2d(1, c[0], 3, 2, 1, bias=False), nn.BatchNorm2d(c[0]), nn.ReLU())
        widths, strides = (c[0], *c), (1, 2, 2, 1)
        self.blocks = nn.ModuleList(_Block(widths[i], widths[i + 1], strides[i]) for i in range(4))
        self.head = nn.Linear(c[-1], classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Grey images (B, 1, H, W) -> the four taps."""
        x, taps = self.stem(images), []
        for block in self.blocks:
            x = block(x)
            taps.append(x)
        return taps

    def classify(self, images: Tensor) -> Tensor:
        """Logits of the pre-training task."""
        return self.head(self(images)[-1].mean((2, 3)))


# --- timm encoders ---


class _TransformerTaps(nn.Module):
    """Patch tokens after some blocks of a vision transformer, as feature maps."""

    def __init__(self, net: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        self.net, self.blocks = net, tuple(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(
            self.net.forward_intermediates(
                images, indices=list(self.blocks), intermediates_only=True, output_fmt="NCHW"
            )
        )


def timm_encoder(
    name: str, *, pretrained: bool = False, side: int | None = TAP_SIDE, image_size: int = 224
) -> FrozenEncoder:
    """A frozen timm encoder with its stage outputs as taps.

    Raises:
        UserError: timm has no such model, or it is of a family whose taps are not known here.
    """
    import timm

    if name not in timm.list_models():
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise UserError(f"timm has no model '{name}'" + (f"; close ones: {', '.join(close)}" if close else ""))
    family = next((f for f in TIMM_STAGES if name.startswith(f)), None)
    if family:
        net = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=TIMM_STAGES[family])
        channels, config = net.feature_info.channels(), net.pretrained_cfg
        taps: nn.Module = net
    elif name.startswith(("deit", "vit")):
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size)
        channels, config = [net.embed_dim] * len(DEIT_BLOCKS), net.pretrained_cfg
        taps = _TransformerTaps(net, DEIT_BLOCKS)
    else:
        raise UserError(
            f"the taps of '{name}' are not known: families are {', '.join(TIMM_STAGES)}, deit, vit; "
            "or give EAR a module of your own that returns a list of feature maps"
        )
    return FrozenEncoder(taps, channels, mean=config["mean"], std=config["std"], side=side)
