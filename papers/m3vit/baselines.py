"""MACs and parameters of the encoder-focused ResNet baselines of Tab. 1 and 2, from explicit layer lists.

The networks are those of the public multi-task code that the paper builds on: a dilated ResNet (output stride 8), one
DeepLab head (ASPP with 256 channels, then a 3x3 convolution) per task, and between the stages

* STL-B, MTL-B: nothing;
* MTAN: per task and stage an attention of two 1x1 convolutions, shared bottlenecks that refine the masked features;
* Cross-Stitch: one encoder per task, a channel-wise weighted sum after each stage;
* NDDR-CNN: one encoder per task, a 1x1 convolution over the concatenated features after the stem and each stage.

Only convolutions count (1 MAC = one multiply-add), as for the ViT rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from papers.m3vit.counts import Dataset
from shared.errors import UserError, unknown

STAGES = ("layer1", "layer2", "layer3", "layer4")
HEAD_CHANNELS = 256


@dataclass(frozen=True)
class Conv:
    """A convolution on an output of ``height`` x ``width`` pixels."""

    in_channels: int
    out_channels: int
    kernel: int
    height: int
    width: int
    bias: bool = False
    batch_norm: bool = True

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.in_channels * self.out_channels * self.kernel**2 * self.height * self.width

    @property
    def parameters(self) -> int:
        """Weights, bias, and scale and shift of the BatchNorm that follows."""
        weights = self.in_channels * self.out_channels * self.kernel**2
        return weights + self.bias * self.out_channels + 2 * self.batch_norm * self.out_channels

    @property
    def statistics(self) -> int:
        """Running mean and variance of the BatchNorm that follows."""
        return 2 * self.batch_norm * self.out_channels


@dataclass(frozen=True)
class Stage:
    """A stage of a ResNet: its convolutions and the shape of its output."""

    layers: tuple[Conv, ...]
    channels: int
    height: int
    width: int


def macs(layers: Iterable[Conv]) -> int:
    """Sum of the MACs of a layer list."""
    return sum(layer.macs for layer in layers)


def parameters(layers: Iterable[Conv], statistics: bool = False) -> int:
    """Sum of the parameters of a layer list, with the BatchNorm statistics on request."""
    return sum(layer.parameters + (layer.statistics if statistics else 0) for layer in layers)


def bottleneck(in_channels: int, planes: int, height: int, width: int, stride: int, shortcut: bool) -> list[Conv]:
    """1x1, 3x3 (strided), 1x1 to ``4 * planes`` channels; ``height`` x ``width`` is the input size."""
    h, w, out = height // stride, width // stride, 4 * planes
    layers = [Conv(in_channels, planes, 1, height, width), Conv(planes, planes, 3, h, w), Conv(planes, out, 1, h, w)]
    return [*layers, Conv(in_channels, out, 1, h, w)] if shortcut else layers


def basic_block(in_channels: int, planes: int, height: int, width: int, stride: int, shortcut: bool) -> list[Conv]:
    """3x3 (strided), 3x3; ``height`` x ``width`` is the input size."""
    h, w = height // stride, width // stride
    layers = [Conv(in_channels, planes, 3, h, w), Conv(planes, planes, 3, h, w)]
    return [*layers, Conv(in_channels, planes, 1, h, w)] if shortcut else layers


_BLOCKS: Mapping[int, tuple[bool, tuple[int, int, int, int]]] = {18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3))}


def resnet(depth: int, height: int, width: int, output_stride: int = 8) -> dict[str, Stage]:
    """The stages ``conv`` (7x7 stem), ``layer1`` … ``layer4`` of a ResNet.

    ``output_stride`` 8 replaces the strides of the last two stages by dilation, which keeps their resolution; 32 is the
    classification network. Raises UserError for another depth, stride, or a size that the stride does not divide.
    """
    if depth not in _BLOCKS:
        raise unknown("ResNet depth", depth, _BLOCKS)
    if output_stride not in (8, 16, 32) or height % output_stride or width % output_stride:
        raise UserError(f"output_stride={output_stride} must be 8, 16 or 32 and divide the image {height} x {width}")
    bottlenecks, repeats = _BLOCKS[depth]
    build, expansion = (bottleneck, 4) if bottlenecks else (basic_block, 1)
    stem = Conv(3, 64, 7, height // 2, width // 2)
    stages = {"conv": Stage((stem,), 64, height // 4, width // 4)}  # max pooling with stride 2 follows the stem
    channels, h, w, reached = 64, height // 4, width // 4, 4
    for index, (name, blocks) in enumerate(zip(STAGES, repeats, strict=True)):
        planes = 64 * 2**index
        layers: list[Conv] = []
        for block in range(blocks):
            first = block == 0
            stride = 2 if first and index > 0 and reached < output_stride else 1
            shortcut = first and (stride != 1 or channels != expansion * planes)
            layers += build(channels, planes, h, w, stride, shortcut)
            h, w, channels, reached = h // stride, w // stride, expansion * planes, reached * stride
        stages[name] = Stage(tuple(layers), channels, h, w)
    return stages


def deeplab_head(in_channels: int, out_channels: int, height: int, width: int) -> list[Conv]:
    """ASPP (1x1, three dilated 3x3, pooled 1x1, 1x1 projection), 3x3, 1x1 to the output channels."""
    c = HEAD_CHANNELS
    return [
        Conv(in_channels, c, 1, height, width),
        *3 * [Conv(in_channels, c, 3, height, width)],
        Conv(in_channels, c, 1, 1, 1),
        Conv(5 * c, c, 1, height, width),
        Conv(c, c, 3, height, width),
        Conv(c, out_channels, 1, height, width, bias=True, batch_norm=False),
    ]


def mtan_attention(stages: Mapping[str, Stage]) -> list[Conv]:
    """MTAN for ONE task: the attention of each stage and the refinement that feeds the next.

    From the second stage on, the attention sees the shared features and the refined features of the stage before; a
    refinement works at the resolution of its own stage, and the first is pooled afterwards.
    """
    layers: list[Conv] = []
    for index, name in enumerate(STAGES):
        stage = stages[name]
        c, h, w = stage.channels, stage.height, stage.width
        layers += [Conv(c if index == 0 else 2 * c, c // 4, 1, h, w, bias=True), Conv(c // 4, c, 1, h, w, bias=True)]
        if index < 3:
            layers += bottleneck(c, stages[STAGES[index + 1]].channels // 4, h, w, stride=1, shortcut=True)
    return layers


def nddr_fusion(stages: Mapping[str, Stage], tasks: int, fused: Sequence[str]) -> list[Conv]:
    """NDDR-CNN for ALL tasks: after each stage in ``fused``, per task a 1x1 convolution over all tasks' features."""
    return [
        Conv(tasks * stages[name].channels, stages[name].channels, 1, stages[name].height, stages[name].width)
        for name in fused
        for _ in range(tasks)
    ]


def cross_stitch_macs(stages: Mapping[str, Stage], tasks: int) -> int:
    """Multiply-adds of the cross-stitch units of all tasks: one per channel, pixel and pair of tasks."""
    return sum(tasks**2 * stages[name].channels * stages[name].height * stages[name].width for name in STAGES)


METHODS = ("stl", "mtl", "mtan", "cross_stitch", "nddr")
NDDR_STAGES = ("conv", *STAGES)  # as configured in the public code


def baseline_macs(
    method: str,
    data: Dataset,
    *,
    all_tasks: bool = False,
    nddr_stages: Sequence[str] = NDDR_STAGES,
    skip_other_attention: bool = False,
) -> float:
    """MACs of a ResNet baseline on one image.

    For one task (the default) a head is the mean over the tasks; Cross-Stitch and NDDR-CNN need the encoders of all
    tasks even then, because their features mix. The MTAN of the public code evaluates the attention of all tasks;
    ``skip_other_attention`` counts the one that a single task needs. The cross-stitch units are left out: their share
    is below 0.1 %. Raises UserError for an unknown method.
    """
    if method not in METHODS:
        raise unknown("baseline", method, METHODS)
    stages = resnet(data.resnet_depth, data.height, data.width)
    tasks, last = len(data.task_channels), stages["layer4"]
    encoder = sum(macs(stage.layers) for stage in stages.values())
    outputs = data.task_channels.values()
    heads = sum(macs(deeplab_head(last.channels, channels, last.height, last.width)) for channels in outputs)
    head = heads if all_tasks else heads / tasks
    if method in ("cross_stitch", "nddr"):
        fusion = macs(nddr_fusion(stages, tasks, nddr_stages)) if method == "nddr" else 0
        return tasks * encoder + fusion + head
    if method == "stl" and all_tasks:
        return tasks * encoder + head
    if method == "mtan":
        attended = 1 if skip_other_attention and not all_tasks else tasks
        return encoder + attended * macs(mtan_attention(stages)) + head
    return encoder + head
