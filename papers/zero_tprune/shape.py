"""What the counts need to know about a model: read off any timm ViT, or given for the paper's DeiTs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Shape:
    """A plain ViT in numbers. Multiply-accumulates (MAC) are per image.

    Attributes:
        depth, heads, head_dim: of the encoder; ``heads · head_dim`` is the width of attention.
        dim: width of a token.
        patches, prefix: patch tokens; class, distillation and register tokens.
        readers: leading tokens that the head reads (class and distillation token): what the class-weighted start favours.
        block_linear: MAC per token of all linear layers of one block.
        hidden: widths that a token takes inside the MLP (its activations are read and written).
        block_norm: elements per token that the LayerNorms of one block normalise.
        embed: MAC of the patch embedding.
        final_norm: elements per token normalised after the last block; ``pooled_norm``: elements normalised after pooling.
        head: MAC of the classifier. ``pool_token``, ``pool_fixed``: MAC of an attention pool per token, and once.
    """

    name: str
    depth: int
    dim: int
    heads: int
    head_dim: int
    patches: int
    prefix: int
    readers: int
    block_linear: int
    hidden: int
    block_norm: int
    embed: int
    final_norm: int
    pooled_norm: int
    head: int
    pool_token: int = 0
    pool_fixed: int = 0

    @property
    def attention_dim(self) -> int:
        """Width of queries, keys and values over all heads."""
        return self.heads * self.head_dim

    @property
    def parameters_block(self) -> int:
        """Weights of the linear layers of one block."""
        return self.block_linear


def plain(name: str, depth: int, dim: int, heads: int, *, ratio: int = 4, side: int = 14, patch: int = 16, classes: int = 1000,
          prefix: int = 1, channels: int = 3) -> Shape:  # fmt: skip
    """A ViT of the original form: one class token, LayerNorms before attention and MLP and at the end."""
    return Shape(
        name, depth, dim, heads, dim // heads, side * side, prefix, min(prefix, 1),
        block_linear=4 * dim * dim + 2 * ratio * dim * dim, hidden=ratio * dim, block_norm=2 * dim,
        embed=side * side * channels * patch * patch * dim, final_norm=dim, pooled_norm=0, head=dim * classes,
    )  # fmt: skip


DEIT_T = plain("deit_tiny_patch16_224", 12, 192, 3)
DEIT_S = plain("deit_small_patch16_224", 12, 384, 6)
DEIT_B = plain("deit_base_patch16_224", 12, 768, 12)


def shape_of(model: Any, name: str = "") -> Shape:
    """The shape of a timm ViT.

    Raises:
        UserError: not a plain ViT (see :func:`papers.zero_tprune.pruner.check_backbone`).
    """
    from timm.models.deit import VisionTransformerDistilled
    from torch import nn

    from papers.zero_tprune.pruner import check_backbone

    check_backbone(model)
    block, attention = model.blocks[0], model.blocks[0].attn
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    embed = model.patch_embed.proj
    kernel = embed.kernel_size
    distilled = isinstance(model, VisionTransformerDistilled)
    pool = getattr(model, "attn_pool", None)
    pool_token, pool_fixed = _pool(pool, int(model.embed_dim)) if pool is not None else (0, 0)
    return Shape(
        name or getattr(model, "default_cfg", {}).get("architecture", type(model).__name__),
        depth=len(model.blocks),
        dim=int(model.embed_dim),
        heads=int(attention.num_heads),
        head_dim=int(attention.qkv.out_features) // 3 // int(attention.num_heads),
        patches=int(model.patch_embed.num_patches),
        prefix=int(model.num_prefix_tokens),
        readers=2 if distilled else int(model.has_class_token),
        block_linear=sum(layer.in_features * layer.out_features for layer in linears),
        hidden=sum(
            layer.out_features for layer in linears if layer is not attention.qkv and layer is not attention.proj
        )
        - int(model.embed_dim),
        block_norm=sum(_norm_elements(module, attention) for module in block.modules()),
        embed=int(model.patch_embed.num_patches) * embed.in_channels * kernel[0] * kernel[1] * embed.out_channels,
        final_norm=_elements(model.norm),
        pooled_norm=_elements(model.fc_norm),
        head=sum(_macs(layer) for layer in (model.head, getattr(model, "head_dist", None))),
        pool_token=pool_token,
        pool_fixed=pool_fixed,
    )


def _norm_elements(module: nn.Module, attention: Any) -> int:
    """Elements per token; the norms of queries and keys run once per head."""
    per_head = module is getattr(attention, "q_norm", None) or module is getattr(attention, "k_norm", None)
    return _elements(module) * (int(attention.num_heads) if per_head else 1)


def _elements(module: nn.Module | None) -> int:
    from torch import nn

    if module is None or isinstance(module, nn.Identity):
        return 0
    shape = getattr(module, "normalized_shape", None)
    return int(shape[0]) if shape else 0


def _macs(module: nn.Module | None) -> int:
    from torch import nn

    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _pool(pool: Any, dim: int) -> tuple[int, int]:
    """MAC of an attention pool: keys and values of every token and the two products with one latent query; the rest once."""
    from torch import nn

    if not hasattr(pool, "kv"):
        raise UserError(
            f"the pooling layer {type(pool).__name__} has no count: use a model with token, average or attention pooling"
        )
    linears = [module for module in pool.modules() if isinstance(module, nn.Linear)]
    kv = _macs(pool.kv)
    return kv + 2 * dim, sum(map(_macs, linears)) - kv
