"""Counts (C1, C2, C7): FLOPs of one task and of all tasks, the baselines recounted, the torch model traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.m3vit.experiments.setup import GIGA, MIB, encoder_of
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

_PRINTED_ROWS = {"mtl": "MTL-B", "mtan": "MTAN", "cross_stitch": "Cross-Stitch", "nddr": "NDDR-CNN"}


def _reduction(ours: float, theirs: float) -> float:
    """Percent saved."""
    return 100.0 * (1.0 - ours / theirs)


@experiment(
    claims=[
        "flops_reduction_pascal",
        "flops_reduction_pascal_nddr",
        "flops_reduction_nyud_intro",
        "flops_reduction_nyud",
        "flops_moe_pascal",
        "flops_dense_pascal",
        "flops_moe_nyud",
        "moe_keeps_flops",
        "decoder_share",
    ],
    config=["model"],
)
def flops(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The FLOPs column of Tab. 1 and 2: encoder plus one decoder, 1 MAC counted as 1."""
    from papers.m3vit import counts

    printed = ctx.published
    for claim, data, baseline in (
        ("flops_reduction_pascal", "pascal", "cross_stitch"),
        ("flops_reduction_pascal_nddr", "pascal", "nddr"),
        ("flops_reduction_nyud_intro", "nyud", "nddr"),
        ("flops_reduction_nyud", "nyud", "cross_stitch"),
    ):
        value = _reduction(printed[f"flops_{data}_m3vit"], printed[f"flops_{data}_{baseline}"])
        yield Measurement(claim, value, note="from the printed table")

    encoder = encoder_of(cfg.model)
    pascal, nyud = counts.dataset("pascal"), counts.dataset("nyud")
    moe = counts.single_task_macs(encoder, pascal)
    dense = counts.single_task_macs(encoder.dense(), pascal)
    yield Measurement("flops_moe_pascal", moe / GIGA)
    yield Measurement("flops_dense_pascal", dense / GIGA)
    yield Measurement("flops_moe_nyud", counts.single_task_macs(encoder, nyud) / GIGA)
    yield Measurement("moe_keeps_flops", moe / dense)
    yield Measurement("decoder_share", 100.0 * counts.mean_decoder_macs(encoder, pascal) / moe)

    rows = []
    for kind, shape in (("dense M-ViT", encoder.dense()), ("M³ViT", encoder)):
        for part, macs in counts.encoder_macs(shape, pascal.tokens()).items():
            rows.append({"model": kind, "part": part.replace("_", " "), "GMAC": float(macs) / GIGA})
        rows.append({"model": kind, "part": "decoder", "GMAC": counts.mean_decoder_macs(shape, pascal) / GIGA})
    yield Table(
        "flops_by_part",
        "Where the multiply-adds of one PASCAL-Context task go",
        rows,
        Plot("stacked", x="model", y="GMAC", series="part", ylabel="GMAC of one task"),
        note="The FPGA latency and energy of Tab. 4 leave the decoder out.",
    )


@experiment(
    claims=[
        "recount_reduction_pascal_cross_stitch",
        "recount_reduction_pascal_nddr",
        "recount_more_than_mtl_pascal",
        "recount_reduction_nyud_cross_stitch",
        "recount_reduction_nyud_nddr",
        "recount_pascal_factor",
    ],
    config=["model", "accounting"],
)
def recount(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Every baseline counted at the same input and unit, from its layer shapes."""
    from papers.m3vit import baselines, counts

    encoder = encoder_of(cfg.model)
    every_task = cfg.accounting.tasks == "all"
    unfused = baselines.NDDR_STAGES[:-1]

    def ours(data: Any) -> float:
        return counts.all_tasks_macs(encoder, data) if every_task else counts.single_task_macs(encoder, data)

    def theirs(method: str, data: Any, **options: Any) -> float:
        return baselines.baseline_macs(method, data, all_tasks=every_task, **options)

    pascal, nyud = counts.dataset("pascal"), counts.dataset("nyud")
    stages = baselines.NDDR_STAGES if cfg.accounting.nddr_fuse_last_stage else unfused
    cross_stitch = theirs("cross_stitch", pascal)
    yield Measurement("recount_reduction_pascal_cross_stitch", _reduction(ours(pascal), cross_stitch))
    yield Measurement(
        "recount_reduction_pascal_nddr", _reduction(ours(pascal), theirs("nddr", pascal, nddr_stages=stages))
    )
    yield Measurement("recount_more_than_mtl_pascal", -_reduction(ours(pascal), theirs("mtl", pascal)))
    yield Measurement("recount_reduction_nyud_cross_stitch", _reduction(ours(nyud), theirs("cross_stitch", nyud)))
    yield Measurement(
        "recount_reduction_nyud_nddr",
        _reduction(ours(nyud), theirs("nddr", nyud, nddr_stages=unfused)),
        note="without fusion after the last stage, which alone gives the printed 340 G",
    )
    one_task = baselines.baseline_macs("cross_stitch", pascal)
    yield Measurement("recount_pascal_factor", ctx.published["flops_pascal_cross_stitch"] * GIGA / one_task)

    rows = []
    for data_name, data in (("pascal", pascal), ("nyud", nyud)):
        for method, title in _PRINTED_ROWS.items():
            options = {"nddr_stages": unfused} if (method, data_name) == ("nddr", "nyud") else {}
            counted = baselines.baseline_macs(method, data, **options)
            rows.append(_recount_row(data.name, title, counted, ctx.published[f"flops_{data_name}_{method}"]))
        for title, shape, key in (("M-ViT", encoder.dense(), "mvit"), ("M³ViT", encoder, "m3vit")):
            counted = counts.single_task_macs(shape, data)
            rows.append(_recount_row(data.name, title, counted, ctx.published[f"flops_{data_name}_{key}"]))
    yield Table(
        "recount",
        "One task, printed against counted",
        rows,
        Plot("bar", x="model", y="printed over counted", series="dataset", hline=1.0),
        note="On PASCAL-Context the ResNet rows are 2.5 times what their layers give; everything else agrees.",
    )


def _recount_row(data: str, model: str, counted: float, printed: float) -> dict[str, Any]:
    return {
        "model": model,
        "dataset": data,
        "counted GMAC": counted / GIGA,
        "printed G": printed,
        "printed over counted": printed * GIGA / counted,
    }


@experiment(
    claims=["all_tasks_cost", "all_tasks_cost_shared_prefix", "all_tasks_against_cross_stitch"], config=["model"]
)
def all_tasks(cfg: Any, ctx: Context) -> Iterator[Result]:
    """What it costs when every task of the image is wanted."""
    from papers.m3vit import baselines, counts

    encoder, pascal = encoder_of(cfg.model), counts.dataset("pascal")
    dense = counts.all_tasks_macs(encoder.dense(), pascal)
    multi = counts.all_tasks_macs(encoder, pascal)
    shared = counts.all_tasks_macs(encoder, pascal, share_prefix=True)
    cross_stitch = baselines.baseline_macs("cross_stitch", pascal, all_tasks=True)
    yield Measurement("all_tasks_cost", 100.0 * (multi / dense - 1.0))
    yield Measurement("all_tasks_cost_shared_prefix", 100.0 * (shared / dense - 1.0))
    yield Measurement("all_tasks_against_cross_stitch", 100.0 * (multi / cross_stitch - 1.0))


@experiment(claims=["gpu_memory_dense", "gpu_memory_moe"], config=["model"])
def gpu_memory(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The GPU rows of the memory column: all parameters at two bytes."""
    from papers.m3vit import counts

    encoder, tokens = encoder_of(cfg.model), counts.dataset("nyud").tokens()
    yield Measurement("gpu_memory_dense", 2.0 * counts.encoder_parameters(encoder.dense(), tokens) / MIB)
    yield Measurement("gpu_memory_moe", 2.0 * counts.encoder_parameters(encoder, tokens) / MIB)


@experiment(claims=["traced_macs", "traced_parameters"], config=["model"])
def traced(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The torch model itself, traced operation by operation at full size on meta tensors, against the closed forms."""
    import torch

    from papers.m3vit import counts
    from papers.m3vit.model import MultiTaskModel, preset
    from shared.workload import trace

    encoder, pascal = encoder_of(cfg.model), counts.dataset("pascal")
    image = (pascal.height, pascal.width)
    router = "multi" if encoder.num_moe_blocks else "none"
    config = preset(
        cfg.model.size,
        image,
        router=router,
        heads=cfg.model.heads,
        num_experts=cfg.model.num_experts,
        top_k=cfg.model.top_k,
        expert_hidden=int(encoder.expert_hidden),
    )
    with torch.device("meta"), torch.no_grad():
        model = MultiTaskModel(config, {"semseg": pascal.task_channels["semseg"]}).eval()
        workload = trace(model, torch.empty(1, 3, *image))
    tokens = pascal.tokens()
    expected_macs = counts.sum_counts(counts.encoder_macs(encoder, tokens)) + counts.decoder_macs(
        encoder.dim, pascal.patches(), pascal.task_channels["semseg"]
    )
    expected_parameters = counts.encoder_parameters(encoder, tokens) + counts.decoder_parameters(
        encoder.dim, pascal.task_channels["semseg"]
    )
    yield Measurement("traced_macs", float(workload.macs - expected_macs))
    yield Measurement("traced_parameters", float(workload.num_parameters - expected_parameters))
    rows = [
        {
            "kind": kind,
            "GMAC": total.macs / GIGA,
            "vector G operations": total.vector_ops / GIGA,
            "GB moved": total.bytes / GIGA,
        }
        for kind, total in workload.by_kind().items()
    ]
    yield Table(
        "traced_workload",
        "The traced workload of one PASCAL-Context task by kind of operation",
        rows,
        note="fp32, one operation at a time; attention is one fused operation",
    )
