"""One trained language model per worker process, and what is looked at afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from papers.moepp import corpus
from papers.moepp.bytes_of_text import CLASSES, classify
from papers.moepp.lm import LanguageModel, Options, loss
from papers.moepp.routing import Experts
from shared.training import fit

DATA_SEED = 1234  # plus the run's seed: the batches, the same for every arm
VALIDATION_SEED = 99


def options_of(arm: Mapping[str, Any], model: Mapping[str, Any]) -> Options:
    """The model of one arm: sizes from ``model``, what an arm changes from ``arm``."""
    merged = {**model, **arm}
    counts = [int(merged.pop(name)) for name in ("n_ffn", "n_constant", "n_copy", "n_zero")]
    return Options(Experts(*counts), **merged)


def cosine(steps: int, warmup: int, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate: linear from 1/warmup to 1, then a half cosine down to ``floor``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(steps - warmup, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def train_job(
    *,
    arm: Mapping[str, Any],
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    root: str | None,
    show: int,
    workdir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Train one arm and evaluate it on fixed windows of unseen files.

    arm: what differs from ``model`` (counts of experts, k, tau, pathway, …); ``show``: bytes of an unseen file to route one by one.
    Returns bits per byte, FFN experts per token, FFN FLOPs per token, FFN experts by class of byte,
    statistics of the two largest routing probabilities, the corpus digest, and losses.
    """
    text = corpus.load(root)
    torch.manual_seed(seed)
    net = LanguageModel(options_of(arm, model))
    matrices = [p for p in net.parameters() if p.dim() >= 2]
    rest = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": train["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    steps, warmup = train["steps"], max(1, train["steps"] // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, warmup, 0.1))

    def batch_loss(step: int) -> Tensor:
        batch_seed = (DATA_SEED + seed) * 1_000_003 + step
        inputs, targets = corpus.windows(text.train, train["batch"], train["sequence"], batch_seed)
        return loss(net, inputs, targets, train["beta"])

    result = fit(
        net, optimizer, schedule, batch_loss, steps=steps, seed=seed, workdir=workdir, progress=progress, clip_norm=1.0
    )
    torch.save({"options": {"arm": dict(arm), "model": dict(model)}, "state": net.state_dict()}, workdir / "model.pt")
    found = evaluate(net, text, train["validation_windows"], train["sequence"])
    d, h, layers = net.options.d_model, net.options.d_expert, net.options.layers
    found |= {
        "ffn_flops_per_token": 6.0 * d * h * layers * found["ffn_per_token"],
        "parameters": sum(p.numel() for p in net.parameters()),
        "losses": list(result.losses[:: max(1, steps // 100)]),
        "losses_every": max(1, steps // 100),
        "corpus": text.digest,
        "corpus_bytes": len(text.train),
    }
    if show:
        shown = bytes(text.validation[:show]).decode("ascii", "replace").replace("\ufffd", "?")
        found["shown"] = {"text": shown, "ffn": ffn_of_text(net, shown, train["sequence"])}
    return found


@torch.no_grad()
def evaluate(net: LanguageModel, text: corpus.Corpus, count: int, length: int) -> dict[str, Any]:
    """Metrics over ``count`` fixed windows of the validation text."""
    net.eval()
    inputs, targets = corpus.windows(text.validation, count, length, VALIDATION_SEED)
    nats, ffn, top, kinds = [], [], [], []
    for x, y in zip(inputs.split(32), targets.split(32), strict=True):
        out = net(x)
        nats.append(F.cross_entropy(out.logits.flatten(0, 1), y.flatten(), reduction="none"))
        ffn.append((out.ids < net.options.experts.ffn).sum(-1).float().flatten(1))  # [layers, tokens]
        top.append(torch.softmax(out.routing, -1).topk(min(2, out.routing.shape[-1]), -1).values.flatten(1, 2))
        kinds.append(torch.from_numpy(classify(x.flatten().to(torch.uint8).numpy())))
    counts, probabilities, kind = torch.cat(ffn, 1), torch.cat(top, 1), torch.cat(kinds)
    mean = counts.double().mean(0)
    shuffled = kind[torch.randperm(len(kind), generator=torch.Generator().manual_seed(VALIDATION_SEED))]
    later = probabilities[1:] if len(probabilities) > 1 else probabilities  # the first layer has no residual
    return {
        "bits_per_byte": float(torch.cat(nats).double().mean()) / math.log(2),
        "ffn_per_token": float(counts.double().mean()),
        "ffn_by_layer": counts.double().mean(1).tolist(),
        "ffn_by_class": {
            name: float(counts[:, kind == index].double().mean())
            for index, name in enumerate(CLASSES)
            if int((kind == index).sum()) > 0
        },
        "spread": _spread(mean, kind),
        "spread_shuffled": _spread(mean, shuffled),
        "bytes_by_class": {name: int((kind == index).sum()) for index, name in enumerate(CLASSES)},
        "top1_mean": float(later[..., 0].double().mean()),
        "top1_variance": float(later[..., 0].double().var(1).mean()),
        "top2_variance": float(later[..., -1].double().var(1).mean()),
    }


def _spread(counts: Tensor, kind: Tensor) -> float:
    """Largest minus smallest mean over classes with at least 0.5 % of the bytes."""
    classes = [kind == index for index in range(len(CLASSES))]
    means = [float(counts[mask].mean()) for mask in classes if int(mask.sum()) >= max(1, len(kind) // 200)]
    return max(means) - min(means)


@torch.no_grad()
def ffn_of_text(net: LanguageModel, text: str, window: int) -> list[float]:
    """Mean number of FFN experts over layers for every byte of an ASCII ``text``, in overlapping windows as long as in training."""
    net.eval()
    tokens = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()
    half = max(1, window // 2)
    values: list[float] = []
    for start in range(0, len(tokens), half):
        first = max(0, start - half)  # context that is already counted
        ids = net(tokens[None, first : start + half]).ids[:, 0, start - first :]
        values += (ids < net.options.experts.ffn).sum(-1).float().mean(0).tolist()
    return values
