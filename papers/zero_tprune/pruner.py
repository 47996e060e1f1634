"""``prune(model, schedule)``: token pruning of a timm ViT at run time, undone by one call.

The model's own code runs unchanged, with its fused attention: forward hooks read queries and keys off each block's ``attn.qkv`` and
replace the block's output by its surviving rows. No parameter, buffer or state-dict key is added or changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from papers.zero_tprune import importance, selection
from papers.zero_tprune.inside import InsideBlocks
from papers.zero_tprune.plans import ATS, EViT, Layer, Plan, Rule, Schedule, ToMe
from papers.zero_tprune.selection import Tokens
from shared.errors import UserError, unknown

Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")


def prune(model: nn.Module, plan: Plan, *, backend: Backend = "auto") -> Pruner:
    """Prune a timm ViT by ``plan`` from its next call on.

    Calling it again on the same model switches the plan. Works as a context manager, which undoes it at the end.

    Args:
        model: any plain timm ViT (DeiT, AugReg, CLIP, SigLIP, DINOv2; class, distillation, register tokens or none).
        plan: a :class:`~papers.zero_tprune.plans.Schedule`, or one of the baselines ToMe, EViT, ATS.
        backend: ``auto`` uses the Triton kernels on CUDA where they cover the rule, else plain torch; ``triton`` insists.

    Raises:
        UserError: a backbone that cannot lose tokens this way, or a plan that does not fit it.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    pruner = _pruner_of(model) or Pruner(model)
    pruner.backend = backend
    pruner.plan = plan
    return pruner


@dataclass
class Record:
    """What :meth:`Pruner.record` saw, one entry per pruning layer of the last forward pass.

    ``after``: block; ``tokens``: surviving patches as numbers of the original image [B, m]; ``heads_filtered``: share of heads that
    VHF left out, per image, of the I-stage (or of I' where there is none).
    """

    after: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    heads_filtered: list[Tensor] = field(default_factory=list)


class Pruner:
    """The handle that :func:`prune` returns.

    ``plan`` may be set at any time; ``remove()`` gives the model back as it was; ``record()`` collects what survives.
    """

    def __init__(self, model: Any) -> None:
        check_backbone(model)
        self.model: Any = model
        self.depth = len(self.model.blocks)
        self.prefix = int(self.model.num_prefix_tokens)
        self.readers = _readers(model)
        self.backend: Backend = "auto"
        self._plan: Plan = Schedule(())
        self._layers: dict[int, Layer] = {}
        self._rule = Rule()
        self._qkv: Tensor | None = None
        self._record: Record | None = None
        self._ids: Tensor | None = None
        self._inside: InsideBlocks | None = None
        self._handles: list[Any] = []
        for number, block in enumerate(self.model.blocks, start=1):
            self._handles.append(block.attn.qkv.register_forward_hook(_KeepQkv(self, number)))
            self._handles.append(block.register_forward_hook(_Prune(self, number)))

    @property
    def plan(self) -> Plan:
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if not self._handles:
            raise UserError("this pruner was removed from its model: call prune(model, plan) again")
        if not isinstance(plan, Schedule | ToMe | EViT | ATS):
            raise UserError(f"{plan!r} is no plan: give solve(model, flops=0.65), a Schedule, ToMe, EViT or ATS")
        if isinstance(plan, Schedule):
            if plan.layers and plan.layers[-1].after > self.depth:
                raise UserError(
                    f"a pruning layer after block {plan.layers[-1].after}, but the model has {self.depth} blocks"
                )
            if plan.rule.start == "cls" and not self.readers:
                raise UserError("start=cls needs a class token, which this model has not: use start=auto or uniform")
            if plan.rule.method == "cls" and not self.readers:
                raise UserError("method=cls needs a class token, which this model has not")
        inside = None if isinstance(plan, Schedule) else InsideBlocks(plan, self.model, self.prefix, self.readers)
        if self._inside is not None:
            self._inside.remove()
        if inside is not None:
            inside.install()
        self._inside = inside
        self._layers = {layer.after: layer for layer in plan.layers} if isinstance(plan, Schedule) else {}
        self._rule = plan.rule if isinstance(plan, Schedule) else Rule()
        self._plan = plan

    def remove(self) -> None:
        """Give the model back exactly as it was. Safe to call twice."""
        if self._inside is not None:
            self._inside.remove()
            self._inside = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def record(self) -> Iterator[Record]:
        """Collect which patches survive each layer and how many heads VHF filters; costs a second look at the scores."""
        if not isinstance(self._plan, Schedule):
            raise UserError("record() works with a Schedule; for ATS read the counts of Pruner.kept_tokens()")
        self._record = Record()
        try:
            yield self._record
        finally:
            self._record, self._ids = None, None

    def kept_tokens(self) -> list[Tensor]:
        """With ATS: patches that entered each block and left the last one in the last forward pass, per image."""
        return [] if self._inside is None else self._inside.counts

    def tokens_of(self, number: int, x: Tensor, qkv: Tensor) -> Tokens:
        """Queries, keys and values of block ``number`` as its attention used them."""
        attn = self.model.blocks[number - 1].attn
        images, tokens, _ = qkv.shape
        q, k, v = qkv.detach().view(images, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return Tokens(
            attn.q_norm(q).detach(), attn.k_norm(k).detach(), v, x.detach(), attn.scale, self.prefix, self.readers
        )

    def apply(self, number: int, x: Tensor) -> Tensor:
        """The surviving rows of a block's output [B, N, D]."""
        layer, rule = self._layers.get(number), self._rule
        if self._record is not None and number == 1:
            self._ids = torch.arange(x.shape[1] - self.prefix, device=x.device).expand(x.shape[0], -1)
        if layer is None:
            return x
        qkv, self._qkv = self._qkv, None
        left = layer.kept(x.shape[1] - self.prefix)
        if left == x.shape[1] - self.prefix:
            return x
        if rule.method == "truncate" and self._record is None:
            return x[:, : self.prefix + left]
        assert qkv is not None
        tokens = self.tokens_of(number, x, qkv)
        fast = self.backend != "torch" and self._record is None and _fast(tokens, layer, rule, self.backend)
        if fast:
            return _rows_of(x, _triton_select(tokens, layer, rule, left))
        index = selection.select(tokens, layer, rule)
        if self._record is not None:
            self._note(number, layer, tokens, index)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    def _note(self, number: int, layer: Layer, tokens: Tokens, index: Tensor) -> None:
        assert self._record is not None
        assert self._ids is not None
        self._ids = self._ids.gather(1, index[:, self.prefix :] - self.prefix)
        self._record.after.append(number)
        self._record.tokens.append(self._ids.cpu())
        if self._rule.method == "zero_tprune":
            self._record.heads_filtered.append(heads_filtered(tokens, layer, self._rule).cpu())


def heads_filtered(tokens: Tokens, layer: Layer, rule: Rule) -> Tensor:
    """Share of heads [B] outside the bounds of VHF on the unpruned graph of a layer (all of them outside: 1, and EIR uses all)."""
    a = importance.attention(tokens.q, tokens.k, tokens.scale / rule.tau)
    everyone = torch.arange(a.shape[-1], device=a.device).expand(a.shape[0], -1)
    votes = layer.iterations if layer.keep < 1.0 else 1
    s = selection.head_scores(a, everyone, tokens, rule, votes)
    if rule.vhf is None:
        return torch.zeros(s.shape[0])
    patches = s[..., tokens.prefix :] / (s.shape[-1] if rule.vhf_scale == "sum1" else 1)
    variance = patches.var(dim=-1, correction=0)
    return ((variance < rule.vhf[0]) | (variance > rule.vhf[1])).float().mean(dim=-1)


def check_backbone(model: Any) -> None:
    """Raise UserError for a backbone that cannot lose tokens between its blocks."""
    from timm.models.vision_transformer import VisionTransformer

    name = type(model).__name__
    if isinstance(model, str):
        raise UserError(f"'{model}' is a name: give the model, timm.create_model('{model}')")
    if isinstance(getattr(model, "module", None), VisionTransformer):
        raise UserError(f"{name} wraps the model: give what it wraps, its .module")
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{name} is not a plain timm VisionTransformer: windows, pooling, convolutions or rotary positions need tokens in their "
            "places. Take a ViT, DeiT, CLIP, SigLIP, DINOv2 or AugReg model"
        )
    if not isinstance(model.blocks, nn.Sequential) or not len(model.blocks):
        raise UserError(f"{name} has no sequence of blocks to prune between")
    for number, block in enumerate(model.blocks, start=1):
        attention = getattr(block, "attn", None)
        if type(attention).__name__ != "Attention" or not isinstance(getattr(attention, "qkv", None), nn.Module):
            raise UserError(
                f"block {number} of {name} is a {type(block).__name__} without a plain softmax attention (attn.qkv), whose matrix "
                "WPR could read. Take a model with standard blocks"
            )


def _readers(model: Any) -> int:
    from timm.models.deit import VisionTransformerDistilled

    return 2 if isinstance(model, VisionTransformerDistilled) else int(bool(model.has_class_token))


@dataclass(frozen=True)
class _KeepQkv:
    """Hook on ``attn.qkv``: remember its output until the block ends, where this block prunes."""

    pruner: Pruner
    number: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.number in self.pruner._layers:
            self.pruner._qkv = output


@dataclass(frozen=True)
class _Prune:
    """Hook on a block: hand on the rows that survive."""

    pruner: Pruner
    number: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.pruner.apply(self.number, output)


def _pruner_of(model: Any) -> Pruner | None:
    """The pruner whose hooks a model carries; a deep copy of a pruned model carries a copy."""
    for block in list(getattr(model, "blocks", ()))[:1]:
        for hook in block._forward_hooks.values():
            if isinstance(hook, _Prune):
                return hook.pruner
    return None


def _rows_of(x: Tensor, flat: Tensor) -> Tensor:
    images, left = flat.shape
    return x.reshape(-1, x.shape[-1]).index_select(0, flat.view(-1)).view(images, left, x.shape[-1])


def _fast(tokens: Tokens, layer: Layer, rule: Rule, backend: str) -> bool:
    """Whether the Triton kernels take this layer; a UserError where they were asked for and cannot."""
    problem = _obstacle(tokens, rule)
    if problem and backend == "triton":
        raise UserError(f"backend=triton: {problem}; use backend=auto")
    return not problem


def _obstacle(tokens: Tokens, rule: Rule) -> str:
    if not tokens.x.is_cuda:
        return "the tensors are not on a CUDA device"
    try:
        from papers.zero_tprune import kernels
    except ImportError:
        return "triton is not installed"
    if rule.method == "truncate":
        return "method=truncate needs no kernel"
    if not kernels.head_width(tokens.q.shape[-1]):
        return f"heads of width {tokens.q.shape[-1]} are not a power of two from 16 to 128"
    if rule.method == "cls" and not (tokens.x.shape[1] <= kernels.SHORT and kernels.fits(tokens.q, tokens.x.shape[1])):
        return "the class token's attention has a kernel up to 256 tokens"
    if rule.method in ("random", "cls"):
        return ""
    if rule.order not in ("isi", "i") or not rule.renormalise or rule.metric != "cos":
        return "the kernels cover order isi and i, cosine similarity, renormalised rows"
    if rule.partition not in ("seq_u", "seq_i") or rule.feature not in ("key_concat", "key_mean"):
        return "the kernels cover partitions seq_u and seq_i on keys"
    return ""


def _triton_select(tokens: Tokens, layer: Layer, rule: Rule, left: int) -> Tensor:
    """Rows of the flattened batch [B, P + left] that survive: I' → S → I in at most four kernels."""
    from papers.zero_tprune import kernels

    q, k, prefix, n = tokens.q, tokens.k, tokens.prefix, tokens.x.shape[1]
    scale, readers = tokens.scale / rule.tau, selection.start_readers(rule, tokens.readers)
    rms, drop = rule.heads == "rms", layer.dropped(tokens.patches) if rule.order == "isi" else 0
    index: Tensor | None = None
    flat: Tensor | None = None
    if rule.method != "zero_tprune":  # baselines get the same kernels
        if rule.method == "random":
            s = torch.nn.functional.pad(selection.random_scores(tokens, layer, rule), (prefix, 0))[:, None]
        else:
            s = kernels.class_attention(q, k, tokens.scale)
        return kernels.select_top(s, None, prefix + left, n, prefix, None, rms=False)[1]
    if drop and (n > kernels.SHORT or not kernels.fits(k, n)):  # the match needs more room than one program has
        s = kernels.votes(q, k, None, scale, readers, 1)
        mask = importance.head_mask(s, prefix, _bounds(rule, n))
        order = importance.over_heads(s, mask, rule.heads)[:, prefix:]
        index = selection.after_s(tokens, layer, rule, None, order, drop)
        flat = index + torch.arange(index.shape[0], device=index.device)[:, None] * n
        index = index.int()
    elif drop:
        s = kernels.votes(q, k, None, scale, readers, 1)
        feature = k if rule.feature == "key_concat" else k.mean(dim=1, keepdim=True)
        index, flat = kernels.select_unique(
            s, feature, drop, prefix, _bounds(rule, n), rms, unimportant=rule.partition == "seq_u"
        )
    if prefix + left < n - drop:
        s = kernels.votes(q, k, index, scale, readers, layer.iterations)
        _, flat = kernels.select_top(s, index, prefix + left, n, prefix, _bounds(rule, n - drop), rms)
    assert flat is not None
    return flat


def _bounds(rule: Rule, tokens: int) -> tuple[float, float] | None:
    """VHF's bounds for scores of mean 1."""
    if rule.vhf is None or rule.vhf_scale == "mean1":
        return rule.vhf
    return rule.vhf[0] * tokens**2, rule.vhf[1] * tokens**2
