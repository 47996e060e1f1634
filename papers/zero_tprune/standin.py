"""The stand-in experiment: train a small DeiT on ClutterDigits, prune it in all ways at the same FLOPs, compare accuracies.

Two jobs per seed (:func:`train_seed`, :func:`evaluate_seed`); everything is paired on the same test images. VHF is off by default here:
the paper's bounds cost a model of this size up to nine points, which is reported, not hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from papers.zero_tprune import digits
from papers.zero_tprune.plans import Plan, Rule, Schedule
from papers.zero_tprune.pruner import Pruner, prune
from papers.zero_tprune.search import ats_for_share, best_plan, correct, draw_schedule, draw_tome, draws
from papers.zero_tprune.shape import shape_of
from papers.zero_tprune.solve import solve_tome
from shared.training import fit

TEST_SEED = 10_000  # of the test canvases, the same for all runs
CALIBRATION_SEED = 20_000
RANDOM_MASKS = 3
PLAIN = Rule(vhf=None)
CHECKPOINT = "model.pt"


def build(seed: int) -> Any:
    """The model: patch 5, 64 tokens and a class token, width 48, 6 blocks, 3 heads."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=digits.SIZE,
        patch_size=5,
        in_chans=1,
        num_classes=10,
        embed_dim=48,
        depth=6,
        num_heads=3,
        mlp_ratio=2.0,
    )


def train(model: nn.Module, source: digits.Digits, *, steps: int, batch: int, lr: float, seed: int, workdir: Path | None,
          progress: Callable[[int, int], None] | None) -> float:  # fmt: skip
    """AdamW, 5 % warm-up, cosine to zero; fresh canvases at every step. Returns the mean loss of the last tenth of the steps."""
    import math

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        images, labels = source.canvases(batch, generator)
        return nn.functional.cross_entropy(model(images), labels)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    result = fit(
        model, optimizer, schedule, loss, steps=steps, seed=seed, workdir=workdir, progress=progress, clip_norm=1.0
    )
    last = result.losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def rules(scorer: str) -> dict[str, Rule]:
    """The variants of Zero-TPrune that share one schedule. ``scorer=random`` is the control: it ranks by chance under every name."""
    table = {
        "wpr": Rule(vhf=None, order="i", heads="mean"),
        "wpr+eir": Rule(vhf=None, order="i"),
        "full": PLAIN,
        "full uniform start": Rule(vhf=None, start="uniform"),
        "full vhf 0.01-0.7": Rule(),
        "full vhf 0-3": Rule(vhf=(0.0, 3.0)),
        "full mean of heads": Rule(vhf=None, heads="mean"),
        "full key_mean": Rule(vhf=None, feature="key_mean"),
        "full no renormalisation": Rule(vhf=None, renormalise=False),
    }
    if scorer == "random":
        return {name: Rule(method="random", seed=900 + i) for i, name in enumerate(table)}
    return table


def train_seed(
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    source: str,
    root: str | None,
    workdir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Train one model; ``model.pt`` in ``workdir`` keeps it."""
    model = build(seed)
    training = digits.load(source, root, train=True)
    loss = train(model, training, steps=steps, batch=batch, lr=lr, seed=seed, workdir=workdir, progress=progress)
    torch.save(model.state_dict(), workdir / CHECKPOINT)
    return {"loss": loss}


def load_model(seed: int, checkpoint: str | Path) -> Any:
    """A trained model in evaluation mode."""
    model = build(seed)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def evaluate_seed(
    *, seed: int, checkpoint: str, test_images: int, calibration_images: int, draws_per_method: int, shares: list[float], source: str,
    root: str | None, scorer: str, workdir: Path, progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """Every method at every share of the FLOPs, on one trained model.

    Returns:
        ``base`` accuracy in percent, and by share (as text) ``accuracy`` by method, ``plans``, ATS's FLOPs share, heads that the paper's
        VHF bounds would filter.
    """
    model = load_model(seed, checkpoint)
    test = digits.load(source, root, train=False).canvases(test_images, torch.Generator().manual_seed(TEST_SEED))
    training = digits.load(source, root, train=True)
    chosen = training.canvases(calibration_images, torch.Generator().manual_seed(CALIBRATION_SEED + seed))
    result: dict[str, Any] = {"base": _percent(correct(model, *test)), "shares": {}}
    with prune(model, Schedule(())) as pruner:
        for number, share in enumerate(shares):
            result["shares"][f"{share:g}"] = _one_share(pruner, share, draws_per_method, seed, test, chosen, scorer)
            progress(number + 1, len(shares))
    return result


def _one_share(
    pruner: Pruner, share: float, number: int, seed: int, test: Any, chosen: Any, scorer: str
) -> dict[str, Any]:
    shape, generator = shape_of(pruner.model), torch.Generator().manual_seed(seed)
    table = rules(scorer)
    schedule = best_plan(
        pruner, draws(lambda g: draw_schedule(shape, share, g, table["full"]), number, generator), *chosen
    )
    searched = best_plan(pruner, draws(lambda g: draw_tome(shape, share, g), number, generator), *chosen)
    ats, ats_share = ats_for_share(pruner, shape, chosen[0], share)
    accuracy: dict[str, float] = {}

    def evaluate(plan: Plan) -> float:
        pruner.plan = plan
        return _percent(correct(pruner.model, *test))

    masks = [evaluate(schedule.with_rule(method="random", seed=m)) for m in range(RANDOM_MASKS)]
    accuracy["random"] = sum(masks) / len(masks)
    accuracy["class row"] = evaluate(schedule.with_rule(method="cls"))
    for name, rule in table.items():
        accuracy[name] = evaluate(Schedule(schedule.layers, rule))
    constant = solve_tome(shape, share)
    accuracy["tome constant"], accuracy["tome searched"] = evaluate(constant), evaluate(searched)
    accuracy["ats"] = evaluate(ats)
    pruner.plan = Schedule(schedule.layers, Rule())
    with pruner.record() as record, torch.inference_mode():
        pruner.model(chosen[0][:64])
    filtered = [float(share.mean()) for share in record.heads_filtered]
    layers = [[y.after, y.keep, y.drop, y.iterations] for y in schedule.layers]
    plans = {"schedule": layers, "tome constant": list(constant.merge), "tome searched": list(searched.merge)}
    return {
        "accuracy": accuracy,
        "plans": plans,
        "ats_share": ats_share,
        "heads_filtered": sum(filtered) / max(1, len(filtered)),
    }


def _percent(hits: torch.Tensor) -> float:
    return 100.0 * float(hits.float().mean())
