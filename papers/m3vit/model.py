"""M³ViT (Sec. 3.1, Supp. A.1): a ViT whose odd blocks hold task-routed experts, and one decoder per task.

``MultiTaskModel(preset("small", (512, 512)), PASCAL_TASKS)`` is the paper's headline model. ``router="none"`` gives the dense M-ViT,
``"single"``, ``"multi"`` and ``"task_cond"`` the three variants of Tab. 3. Distillation between decoders, for training only, is in
:mod:`papers.m3vit.tam`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.m3vit.moe import Experts, MoE, Router, Routing, TaskConditionedRouter, TaskEmbedding
from shared.errors import UserError, unknown

# Output channels per task, in the papers' order of tasks.
PASCAL_TASKS = {"semseg": 21, "normals": 3, "human_parts": 7, "sal": 1, "edge": 1}
NYUD_TASKS = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
SYNTHROOM_TASKS = {"semseg": 7, "parts": 7, "sal": 1, "normals": 3, "edge": 1, "depth": 1}

ROUTERS = ("none", "single", "multi", "task_cond")


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the backbone. ``router="none"`` is a dense ViT; otherwise odd blocks have experts of ``expert_hidden``."""

    image: tuple[int, int]  # height, width
    patch: int
    dim: int
    depth: int
    heads: int
    router: str = "multi"
    mlp_ratio: int = 4
    num_experts: int = 16
    top_k: int = 4
    expert_hidden: int = 0  # 0: D, so that K·h = 4D
    noise: float = 0.0  # σ of the router noise in training

    def __post_init__(self) -> None:
        """Raises UserError for shapes that do not fit together."""
        if self.router not in ROUTERS:
            raise unknown("router", self.router, ROUTERS)
        if any(side <= 0 or side % self.patch for side in self.image):
            raise UserError(f"image {self.image} must be a multiple of the patch, {self.patch}, on both sides")
        if self.patch < 2 or self.patch & (self.patch - 1):
            raise UserError(f"patch is {self.patch}: the decoder doubles the resolution, so it must be a power of two")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"top_k is {self.top_k}: choose 1 to num_experts ({self.num_experts})")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def tokens(self) -> int:
        """T: patches and the class token."""
        return self.grid[0] * self.grid[1] + 1


# Tab. A.1 and the authors' configs: 12 heads for small, where DeiT-S has 6. `micro` is ours, for training without a GPU.
_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"patch": 16, "dim": 192, "depth": 12, "heads": 3},
    "small": {"patch": 16, "dim": 384, "depth": 12, "heads": 12},
    "base": {"patch": 16, "dim": 768, "depth": 12, "heads": 12},
    "micro": {"patch": 8, "dim": 64, "depth": 6, "heads": 4},
}


def preset(size: str, image: tuple[int, int], **changes: Any) -> ViTConfig:
    """The paper's ``tiny``, ``small``, ``base``, or our ``micro`` at an image size, with fields of :class:`ViTConfig` replaced."""
    if size not in _PRESETS:
        raise unknown("model size", size, _PRESETS)
    fields: dict[str, Any] = {"image": image, **_PRESETS[size], **changes}
    return ViTConfig(**fields)


class Attention(nn.Module):
    """Multi-head self-attention, scaled by 1/√(head width) (Eq. 1 prints √C; the authors' code scales per head)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """The dense MLP of even blocks, hidden width 4D."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; ``mlp`` is dense or a :class:`MoE`."""

    def __init__(self, dim: int, heads: int, mlp: Mlp | MoE) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    @property
    def is_moe(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return isinstance(self.mlp, MoE)

    def forward(self, x: Tensor, tasks: Sequence[int] | None, copies: int = 1) -> tuple[Tensor, Routing | None]:
        """Rows (R, T, D) -> (copies·R, T, D), and the routing of a MoE block.

        The rows of a MoE block are those of the first task, then of the second, … (one group if ``tasks`` is None). The first MoE
        block is where tasks part: with ``copies`` it repeats its rows after the attention, once per task.
        """
        x = x + self.attention(self.norm1(x))
        normalised = self.norm2(x)
        if copies > 1:
            x, normalised = x.repeat(copies, 1, 1), normalised.repeat(copies, 1, 1)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(normalised), None
        groups = len(tasks) if tasks is not None else 1
        y, routing = self.mlp(normalised.view(groups, -1, x.shape[-1]), tasks)
        return x + y.view_as(x), routing


class Backbone(nn.Module):
    """Patch embedding, class token, positions, blocks; odd blocks are MoE unless the router is ``none``. No final norm."""

    def __init__(self, config: ViTConfig, num_tasks: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.position = nn.Parameter(torch.empty(1, config.tokens, config.dim))
        embedding = TaskEmbedding(num_tasks) if config.router == "task_cond" else None
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, self._mlp(index, num_tasks, embedding)) for index in range(config.depth)
        )
        self.reset_parameters()

    def _mlp(self, index: int, num_tasks: int, embedding: TaskEmbedding | None) -> Mlp | MoE:
        config = self.config
        if config.router == "none" or index % 2 == 0:
            return Mlp(config.dim, config.mlp_ratio * config.dim)
        experts = Experts(config.dim, config.expert_hidden or config.dim, config.num_experts)
        if embedding is not None:
            return MoE(
                experts, TaskConditionedRouter(config.dim, config.num_experts, embedding), config.top_k, config.noise
            )
        router = Router(config.dim, config.num_experts, num_tasks if config.router == "multi" else 1)
        return MoE(experts, router, config.top_k, config.noise)

    def reset_parameters(self) -> None:
        """Class token and positions: normal, 0.02, cut at 2."""
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    @property
    def depends_on_task(self) -> bool:
        """Whether tasks need passes of their own."""
        return self.config.router in ("multi", "task_cond")

    def forward(self, images: Tensor, tasks: Sequence[int] | None = None) -> tuple[Tensor, list[Routing]]:
        """Images (B, 3, H, W) -> tokens (G·B, T, D), task by task, and one routing per MoE block.

        G is 1 unless the routing depends on the task. What lies before the first router (patch embedding, block 0, the attention of
        block 1) is then computed once for all tasks. ``tasks=None`` is the model before tasks exist (pre-training).
        """
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        tasks = tasks if self.depends_on_task else None
        copies = len(tasks) if tasks is not None else 1
        routings: list[Routing] = []
        for block in self.blocks:
            x, routing = block(x, tasks, 1 if routings or not block.is_moe else copies)
            if routing is not None:
                routings.append(routing)
        return x, routings


@lru_cache(maxsize=32)
def _doubling(size: int, dtype: torch.dtype) -> Tensor:
    """Matrix (2·size, size) of bilinear doubling without aligned corners: weights 3/4 and 1/4, the border repeated."""
    unit = torch.eye(size, dtype=dtype, device="cpu")[None]
    return F.interpolate(unit, scale_factor=2, mode="linear", align_corners=False)[0].T.contiguous()


def double_resolution(x: Tensor) -> Tensor:
    """Bilinear ×2 of (B, C, H, W). In training on a CPU, narrow maps take two matrix products: six times faster than the kernel."""
    if x.device.type == "cpu" and x.requires_grad and x.shape[1] < 16:
        rows, columns = _doubling(x.shape[2], x.dtype), _doubling(x.shape[3], x.dtype)
        return rows @ x.contiguous() @ columns.T
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """Progressive upsampling (PUP): log2(patch) times [conv3×3, BN, ReLU, ×2], the 1×1 head before the last ×2 (Supp. A.1)."""

    def __init__(self, dim: int, width: int, patch: int, channels: int) -> None:
        super().__init__()
        stages = int(math.log2(patch))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convs = nn.ModuleList(nn.Conv2d(dim if i == 0 else width, width, 3, padding=1) for i in range(stages))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(stages))
        self.head = nn.Conv2d(width, channels, 1)

    def features(self, tokens: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """Tokens (B, T, D), class token first -> the features after each stage, at 1/patch, 2/patch, … 1/2 of the image side."""
        x = (
            self.norm(tokens[:, 1:]).unflatten(1, grid).permute(0, 3, 1, 2)
        )  # channels last: no copy, faster convolutions
        stages: list[Tensor] = []
        for conv, bn in zip(self.convs, self.bns, strict=True):
            stages.append(F.relu(bn(conv(double_resolution(stages[-1]) if stages else x))))
        return stages

    def predict(self, features: Tensor) -> Tensor:
        """The last stage's features -> (B, C, H, W)."""
        return double_resolution(self.head(features))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, T, D) -> (B, C, H, W)."""
        return self.predict(self.features(tokens, grid)[-1])


class MultiTaskModel(nn.Module):
    """Backbone and one decoder per task (name -> output channels)."""

    def __init__(self, config: ViTConfig, tasks: Mapping[str, int], decoder_width: int = 256) -> None:
        super().__init__()
        self.config = config
        self.tasks = tuple(tasks)
        self.decoder_width = decoder_width
        self.backbone = Backbone(config, len(tasks))
        self.decoders = nn.ModuleDict(
            {task: Decoder(config.dim, decoder_width, config.patch, channels) for task, channels in tasks.items()}
        )

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> prediction (B, C, H, W) of each of ``tasks`` (default: all), and no work for any other."""
        return self.forward_with_routing(images, tasks)[0]

    def forward_with_routing(
        self, images: Tensor, tasks: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], list[Routing]]:
        """As :meth:`forward`, with one routing per MoE block; its groups are ``tasks``, or one where all share a router."""
        features, routings = self.encode(images, tasks)
        return {task: self.decoders[task](x, self.config.grid) for task, x in features.items()}, routings

    def encode(self, images: Tensor, tasks: Sequence[str] | None = None) -> tuple[dict[str, Tensor], list[Routing]]:
        """Tokens (B, T, D) of each task, and the routings. Raises UserError for an unknown task."""
        names = self.tasks if tasks is None else tuple(tasks)
        for name in names:
            if name not in self.tasks:
                raise unknown("task", name, self.tasks)
        x, routings = self.backbone(images, [self.tasks.index(name) for name in names])
        rows = x.split(len(images)) if self.backbone.depends_on_task else [x] * len(names)
        return dict(zip(names, rows, strict=True)), routings

    def decoder_stages(self, tokens: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Tokens of each task -> features after each stage of its decoder; see :meth:`Decoder.features`."""
        return {task: self._decoder(task).features(x, self.config.grid) for task, x in tokens.items()}

    def predict(self, stages: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Stages of each task's decoder -> its prediction (B, C, H, W)."""
        return {task: self._decoder(task).predict(features[-1]) for task, features in stages.items()}

    def _decoder(self, task: str) -> Decoder:
        return cast(Decoder, self.decoders[task])


def initialise(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, each module from its own stream of (seed, name).

    Modules of equal name and shape start equal in every variant of the model. Linear maps and convolutions start U(±1/√fan_in) in
    dense and MoE blocks alike, so that no arm is favoured (the authors start from ImageNet weights instead).
    """
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                module.reset_parameters()
