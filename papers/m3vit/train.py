"""Training runs on SynthRoom at reduced scale: one function per run, for worker processes.

An arm is one model of the comparison: ``dense`` (M-ViT, shared encoder), ``single``, ``task_cond``, ``multi`` (the routers of Tab. 3), or
``stl`` (one dense network per task, the baseline of Δ_m). Arms of equal seed see the same batches and start from the same weights
wherever names and shapes coincide, so that their difference can be taken pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from papers.m3vit import synthroom
from papers.m3vit.dataset import TRAIN_START, VAL_START, Batches, Scenes, scenes
from papers.m3vit.losses import LOSS_WEIGHTS, total_loss
from papers.m3vit.metrics import metric_for
from papers.m3vit.model import SYNTHROOM_TASKS, MultiTaskModel, ViTConfig, initialise
from papers.m3vit.moe import MoE, Router, Routing, balance_loss
from papers.m3vit.options import DataOptions, ModelOptions, TrainOptions, parse
from papers.m3vit.tam import TAM
from shared.errors import unknown
from shared.training import FitResult, fit, warmup_poly

ARMS = {"dense": "none", "single": "single", "task_cond": "task_cond", "multi": "multi", "stl": "none"}  # arm -> router
MODEL_FILE = "model.pt"

Progress = Callable[[int, int], None]


def train_run(
    *,
    arm: str,
    tasks: Sequence[str],
    seed: int,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    data: Mapping[str, Any],
    workdir: Path,
    progress: Progress | None = None,
    threads: int | None = None,
    save: bool = False,
) -> dict[str, Any]:
    """Train one arm on SynthRoom and evaluate it on scenes that it has not seen.

    Args:
        arm: one of :data:`ARMS`.
        tasks: names out of :data:`SYNTHROOM_TASKS`.
        seed: of weights, batches and router noise.
        model, train, data: fields of :class:`ModelOptions`, :class:`TrainOptions`, :class:`DataOptions`.
        workdir: for checkpoints; a killed run goes on from there.
        progress: called with (steps done, steps in all).
        threads: torch threads; unchanged if None. Results repeat bit for bit with the same number.
        save: leave the trained weights in ``workdir/model.pt``, for :func:`load_model` (not for ``stl``).

    Returns:
        ``metrics`` (task -> value: percent, degrees or metres), ``losses`` (list of [step, mean loss since the entry before]),
        ``routing`` (see :func:`routing_statistics`), ``parameters``, ``seconds`` (of training steps), ``notes``.

    Raises:
        UserError: unknown arm, task or option, or a loss that is not finite.
    """
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    for task in tasks:
        if task not in SYNTHROOM_TASKS:
            raise unknown("task", task, SYNTHROOM_TASKS)
    if threads is not None:
        torch.set_num_threads(threads)
    shape, options = parse(ModelOptions, "model", dict(model)), parse(TrainOptions, "train", dict(train))
    source = parse(DataOptions, "data", dict(data))
    train_data, val_data = load_data(source)
    batches = Batches(train_data, options.batch, seed, options.augment)
    task_sets = [[task] for task in tasks] if arm == "stl" else [list(tasks)]
    report = _Progress(progress, options.pretrain_steps + options.steps * len(task_sets))
    notes = [note for note in (train_data.note, val_data.note) if note]
    metrics: dict[str, float] = {}
    fits: list[FitResult] = []
    parameters = 0
    encoder: dict[str, Tensor] | None = None
    for task_set in task_sets:
        net = build(ARMS[arm], task_set, shape, source.image, seed)
        parameters += sum(parameter.numel() for parameter in net.parameters())
        if options.pretrain_steps and encoder is None:
            pretrained = _pretrain(net, batches, options, seed, Path(workdir) / "pretrain", report)
            encoder = net.backbone.state_dict()
            notes += pretrained.notes
        elif encoder is not None:
            net.backbone.load_state_dict(encoder)
        fits.append(_train(net, batches, options, seed, Path(workdir) / "-".join(task_set), report))
        metrics.update(evaluate(net, Batches(val_data, min(50, source.num_val), seed)))
    if save and arm != "stl":
        saved = {"router": ARMS[arm], "tasks": list(tasks), "model": shape.model_dump(), "image": source.image}
        torch.save({**saved, "weights": net.state_dict()}, Path(workdir) / MODEL_FILE)
    return {
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        "losses": _subsample(np.sum([result.losses for result in fits], axis=0)),
        "routing": routing_statistics(net, Batches(val_data, min(50, source.num_val), seed)) if arm != "stl" else {},
        "parameters": parameters,
        "seconds": sum(result.seconds for result in fits),
        "notes": notes + [note for result in fits for note in result.notes],
    }


def build(router: str, tasks: Sequence[str], shape: ModelOptions, image: int, seed: int) -> MultiTaskModel:
    """The micro model with its initial weights."""
    config = ViTConfig(
        (image, image),
        shape.patch,
        shape.dim,
        shape.depth,
        shape.heads,
        router,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        noise=shape.noise,
    )
    net = MultiTaskModel(config, {task: SYNTHROOM_TASKS[task] for task in tasks}, shape.decoder_width)
    initialise(net, seed)
    if shape.scale_experts:
        with torch.no_grad():
            for layer in _moe_layers(net):
                layer.experts.weight2.mul_(shape.num_experts / shape.top_k)
                layer.experts.bias2.mul_(shape.num_experts / shape.top_k)
    return net


def load_model(path: Path) -> MultiTaskModel:
    """The model that :func:`train_run` saved, in evaluation mode."""
    saved = torch.load(path, weights_only=True)
    net = build(saved["router"], saved["tasks"], ModelOptions(**saved["model"]), saved["image"], seed=0)
    net.load_state_dict(saved["weights"])
    return net.eval()


@torch.no_grad()
def routing_trace(model: MultiTaskModel, images: Tensor, task: str) -> NDArray[np.int64]:
    """Experts that ``task`` chooses for images (B, 3, H, W): (MoE layers, B, T, K), best first, class token first."""
    was_training = model.training
    model.eval()
    _, routings = model.encode(images, [task])
    model.train(was_training)
    return np.stack([routing.experts.view(len(images), -1, routing.experts.shape[-1]).numpy() for routing in routings])


@torch.no_grad()
def evaluate(model: MultiTaskModel, batches: Batches) -> dict[str, float]:
    """Metric of each task of the model over all scenes of ``batches``."""
    model.eval()
    meters = {task: metric_for(task, SYNTHROOM_TASKS[task]) for task in model.tasks}
    for images, targets in batches:
        for task, prediction in model(images).items():
            meters[task].update(prediction, targets[task])
    return {task: meter.compute() for task, meter in meters.items()}


@torch.no_grad()
def routing_statistics(model: MultiTaskModel, batches: Batches) -> dict[str, Any]:
    """How the experts are used on the scenes of ``batches``; lists run over MoE layers, then tasks (one entry if tasks share a router).

    ``usage``: share of the token-expert pairs of each expert. ``gate_sum``: mean over tokens of the sum of the K gates.
    """
    model.eval()
    usage: list[Tensor] = []
    gate_sum: list[Tensor] = []
    num_batches = 0
    for images, _ in batches:
        _, routings = model.encode(images)
        num_batches += 1
        for layer, routing in enumerate(routings):
            counts = routing.counts()
            if len(usage) <= layer:
                usage.append(torch.zeros_like(counts))
                gate_sum.append(torch.zeros(len(counts)))
            usage[layer] += counts / counts.sum(1, keepdim=True)
            gate_sum[layer] += routing.gates.sum(-1).mean(1)
    return {
        "usage": [(layer / num_batches).tolist() for layer in usage],
        "gate_sum": [(layer / num_batches).tolist() for layer in gate_sum],
    }


class _Progress:
    """Counts the steps of several trainings as one."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.before = progress, total, 0

    def part(self, steps: int) -> Progress:
        """Progress of the next ``steps`` steps."""
        start, self.before = self.before, self.before + steps

        def report(done: int, _: int) -> None:
            if self.progress is not None:
                self.progress(start + done, self.total)

        return report


def load_data(source: DataOptions) -> tuple[Scenes, Scenes]:
    """Training and validation scenes, from the cache folder where there is one."""
    image = (source.image, source.image)
    loaded = []
    for name, start, count in (("train", TRAIN_START, source.num_train), ("val", VAL_START, source.num_val)):
        file = f"{name}-{count}-{source.image}-{source.panels[0]}-{source.panels[1]}.npz"
        cache = None if source.cache is None else Path(source.cache) / file
        loaded.append(scenes(range(start, start + count), image, source.panels, cache))
    return loaded[0], loaded[1]


def _moe_layers(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    options: TrainOptions,
    seed: int,
    workdir: Path,
    report: _Progress,
) -> FitResult:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=options.weight_decay, fused=fused)
    factor = warmup_poly(steps, min(options.warmup_steps, steps // 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return fit(
        model,
        optimizer,
        schedule,
        loss,
        steps=steps,
        seed=seed,
        workdir=workdir,
        progress=report.part(steps),
        clip_norm=options.clip_norm,
    )


def _balance(routings: Sequence[Routing], weight: float) -> Tensor:
    return weight * torch.stack([balance_loss(routing) for routing in routings]).sum()


def _train(
    net: MultiTaskModel, batches: Batches, options: TrainOptions, seed: int, workdir: Path, report: _Progress
) -> FitResult:
    """Sec. 3.1, Supp. A.2: the weighted losses of all tasks together, and the balance loss of every router."""
    weights = {**LOSS_WEIGHTS, **options.loss_weights}
    for task in options.loss_weights:
        if task not in LOSS_WEIGHTS:
            raise unknown("task in train.loss_weights", task, LOSS_WEIGHTS)
    tam: TAM | None = None
    if options.distillation:
        channels = {task: SYNTHROOM_TASKS[task] for task in net.tasks}
        tam = TAM(channels, net.decoder_width, options.distillation, net.config.patch.bit_length() - 1)
        initialise(tam, seed)

    def loss(step: int) -> Tensor:
        images, targets = batches(step)
        if tam is None:
            predictions, routings = net.forward_with_routing(images)
            total = total_loss(predictions, targets, weights)
        else:
            tokens, routings = net.encode(images)
            stages = net.decoder_stages(tokens)
            total = total_loss(net.predict(stages), targets, weights)
            for distilled in tam(stages, net.config.image):
                total = total + total_loss(distilled, targets, weights)
        return total + _balance(routings, options.balance_weight) if routings else total

    modules = nn.ModuleList([net] if tam is None else [net, tam])
    return _fit(modules, loss, options.steps, options, seed, workdir, report)


def _pretrain(
    net: MultiTaskModel, batches: Batches, options: TrainOptions, seed: int, workdir: Path, report: _Progress
) -> FitResult:
    """Stands for ImageNet: the encoder learns from its class token which kinds of object are visible, before tasks exist.

    As in the authors' code, the routers of all tasks then start from the pre-trained one.
    """
    head = nn.Linear(net.config.dim, 3)
    initialise(head, seed)

    def loss(step: int) -> Tensor:
        images, targets = batches(step)
        kinds = torch.tensor([synthroom.SPHERE, synthroom.BOX, synthroom.CYLINDER])
        visible = (targets["semseg"].flatten(1, 2)[..., None] == kinds).any(1).float()
        tokens, routings = net.backbone(images, None)
        total = F.binary_cross_entropy_with_logits(head(tokens[:, 0]), visible)
        return total + _balance(routings, options.balance_weight) if routings else total

    modules = nn.ModuleDict({"backbone": net.backbone, "head": head})
    result = _fit(modules, loss, options.pretrain_steps, options, seed, workdir, report)
    for layer in _moe_layers(net):
        if isinstance(layer.router, Router):
            layer.router.share_first()
    return result


def _subsample(losses: NDArray[np.float64], points: int = 50) -> list[list[float]]:
    """At most ``points`` entries [steps done, mean loss since the entry before]."""
    ends = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).round().astype(int))
    return [[int(end), float(losses[start:end].mean())] for start, end in pairwise(ends)]
