"""What needs a GPU, or ImageNet."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.experiment import Context, Measurement, NotTested, Result, Table, experiment

VALIDATION_IMAGES = 50_000


@experiment(
    claims=["gpu_throughput_gain", "gpu_overhead", "gpu_fp32_ceiling", "gpu_bf16_ceiling"], config=["gpu"], gpu=True
)
def gpu_throughput(cfg: Any, ctx: Context) -> Iterator[Result]:
    """DeiT-S on this GPU: runs ``papers.zero_tprune.gpu`` in a process of its own and reads its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gpu.json"
        command = [sys.executable, "-m", "papers.zero_tprune.gpu", "--out", str(out), "--only", "throughput,stages,check",
                   "--models", "deit_small_patch16_224", "--precisions", "fp32,bf16", "--batches", "128,256",
                   "--budget-s", str(cfg.gpu.budget_s)]  # fmt: skip
        if not cfg.gpu.prunes:
            command.append("--unpruned")
        subprocess.run(command, check=True, cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL)
        data = json.loads(out.read_text())
    gpu = data["environment"]["gpu"]
    cells = {
        (c["precision"], c["batch"], c["budget"], c["mode"]): c["rows"]
        for c in data["throughput"]
        if "small" in c["model"]
    }
    wanted = (
        ("gpu_throughput_gain", ("fp32", 128, "a", "eager"), "speedup"),
        ("gpu_fp32_ceiling", ("fp32", 256, "a", "eager"), "of_ceiling"),
        ("gpu_bf16_ceiling", ("bf16", 256, "a", "graph"), "of_ceiling"),
    )
    for claim, key, field in wanted:
        if key not in cells:
            yield NotTested(claim, f"gpu.budget_s={cfg.gpu.budget_s} ended before this cell: give it more")
            continue
        value, low, high = cells[key]["zero_tprune"][field]
        yield Measurement(claim, value, low, high, note=f"{gpu}, {key[0]}, batch {key[1]}, {key[3]}")
    stage = next((c["rows"] for c in data["stages"] if c["precision"] == "fp32" and c["batch"] == 128), None)
    if stage is None:
        yield NotTested("gpu_overhead", f"gpu.budget_s={cfg.gpu.budget_s} ended before this cell: give it more")
    else:
        yield Measurement(
            "gpu_overhead", 100 * (stage["random"]["images_per_s"] / stage["full"]["images_per_s"] - 1), note=gpu
        )
    yield Table("gpu_check", f"Kernels against plain torch on {gpu}", data["check"])


@experiment(claims=["accuracy_loss"], config=["data", "model", "weights", "pretrained", "flops", "rule", "imagenet"])
def imagenet(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Accuracy of every method at equal FLOPs on ``data.root``: rows like the paper's tables."""
    import torch

    from papers.zero_tprune.budget import solve
    from papers.zero_tprune.counts import flops
    from papers.zero_tprune.experiments.options import rule_of
    from papers.zero_tprune.gpu import plans_for
    from papers.zero_tprune.imagenet import accuracies, create, image_folder, loader
    from papers.zero_tprune.plans import ATS
    from papers.zero_tprune.shape import shape_of
    from shared.errors import UserError

    if cfg.data.root is None:
        yield NotTested(
            "accuracy_loss",
            "needs ImageNet: data.root=FOLDER with val/<class>/*.JPEG, and weights=FILE or pretrained=true",
        )
        return
    if cfg.weights is None and not cfg.pretrained:
        yield NotTested("accuracy_loss", "needs trained weights: weights=FILE, or pretrained=true with a network")
        return
    try:
        folder = image_folder(cfg.data.root)
    except UserError as error:
        yield NotTested("accuracy_loss", str(error))
        return
    model = create(cfg.model, cfg.weights, pretrained=cfg.pretrained)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.imagenet.device == "auto" else cfg.imagenet.device
    shape = shape_of(model, cfg.model)
    plans: dict[str, Any] = plans_for(shape, cfg.flops)
    plans["zero_tprune"] = solve(shape, cfg.flops, rule=rule_of(cfg.rule))
    plans.pop("ceiling")
    batches = loader(folder, model, batch=cfg.imagenet.batch, workers=cfg.imagenet.workers, limit=cfg.imagenet.limit)
    hits = accuracies(model, batches, plans, device)
    base, ours = hits["unpruned"].double(), hits["zero_tprune"].double()
    lost = 100 * (base - ours)
    half = 1.96 * float(lost.std()) / len(lost) ** 0.5
    value, share = float(lost.mean()), ctx.published["flops_a"] / ctx.published["flops_baseline"]
    if (
        not cfg.model.startswith("deit_small_patch16_224")
        or abs(cfg.flops - share) > 0.01
        or len(lost) < VALIDATION_IMAGES
    ):
        reason = (
            f"this run is {cfg.model} at {cfg.flops:g} of its FLOPs on {len(lost)} images: its rows are in the table"
        )
        yield NotTested(
            "accuracy_loss", f"the claim is about DeiT-S at 2.97 GFLOPs on ImageNet's validation images; {reason}"
        )
    else:
        yield Measurement("accuracy_loss", value, value - half, value + half, note="interval over images")
    rows = [
        {"method": name, "top1_percent": 100 * float(found.double().mean()),
         "blocks_gflops": None if isinstance(plans[name], ATS) else flops(shape, plans[name]).total("blocks") / 1e9}
        for name, found in hits.items()
    ]  # fmt: skip
    yield Table("imagenet", f"{cfg.model} on {len(lost)} images of {folder.name}", rows)
