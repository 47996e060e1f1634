"""Training at reduced scale on SynthRoom (C8 to C10, C13), and what the routing of the trained model does to a cache (C4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers.m3vit.experiments.setup import accelerator_of, encoder_of
from shared.experiment import Artifact, Context, Picture, Plot, Result, Table, experiment, seed_measurement

_ARM_OF_ROUTER = {"none": "dense", "single": "single", "multi": "multi", "task_cond": "task_cond"}
_TITLES = {
    "dense": "dense (M-ViT)",
    "single": "one router",
    "task_cond": "task-conditioned router",
    "multi": "router per task (M³ViT)",
}
_TRACE_IMAGES = 16
_SHOW_IMAGES = 4


def _job(cfg: Any, arm: str, tasks: Sequence[str], seed: int, first_seed: int) -> dict[str, Any]:
    from omegaconf import OmegaConf

    micro: dict[str, Any] = OmegaConf.to_container(cfg.micro)  # type: ignore[assignment]
    train: dict[str, Any] = OmegaConf.to_container(cfg.train)  # type: ignore[assignment]
    data: dict[str, Any] = OmegaConf.to_container(cfg.data)  # type: ignore[assignment]
    five_tasks = list(tasks) == micro["tasks"]
    return {
        "arm": arm,
        "tasks": list(tasks),
        "seed": seed,
        "model": {key: value for key, value in micro.items() if key not in ("router", "tasks", "few_tasks")},
        "train": train,
        "data": {key: value for key, value in data.items() if key != "root"},
        "trace_images": min(_TRACE_IMAGES, data["num_val"]) if five_tasks and arm == "multi" else 0,
        "show_images": min(_SHOW_IMAGES, data["num_val"])
        if five_tasks and arm == "multi" and seed == first_seed
        else 0,
    }


@experiment(
    claims=["moe_beats_dense", "task_routers_beat_single", "moe_beats_dense_two_tasks", "gain_grows_with_tasks"],
    config=["micro", "train", "data"],
)
def multi_task_training(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Δ_m of each arm over the dense M-ViT of the same seed: same batches, same initial weights where shapes coincide."""
    from papers.m3vit.jobs import CHECKPOINT_FILE, train_job

    arm = _ARM_OF_ROUTER[cfg.micro.router]
    many, few = list(cfg.micro.tasks), list(cfg.micro.few_tasks)
    # Long jobs first, so that no core waits for the last one.
    plan = [("dense", many), (arm, many), ("single", many), ("task_cond", many), ("dense", few), (arm, few)]
    plan = [entry for index, entry in enumerate(plan) if entry not in plan[:index]]
    jobs = [_job(cfg, name, tasks, seed, ctx.seeds[0]) for name, tasks in plan for seed in ctx.seeds]
    results: dict[tuple[str, int, int], Mapping[str, Any]] = {}  # (arm, number of tasks, seed)
    settled: set[str] = set()
    artifacts = []
    for job, result, workdir in ctx.map("training on SynthRoom", train_job, jobs):
        results[job["arm"], len(job["tasks"]), job["seed"]] = result
        if job["seed"] == ctx.seeds[0] and job["tasks"] == many:
            artifacts.append(Artifact(f"{job['arm']}.pt", workdir / CHECKPOINT_FILE))
        for claim, values in _values(results, arm, len(many), len(few), ctx.seeds).items():
            if claim not in settled:
                settled.add(claim)
                yield seed_measurement(claim, values, "Δm over the dense model of the same seed")
    yield _metrics_table(results, ctx.seeds)
    yield _gain_table(results, len(many), len(few), ctx.seeds)
    yield _curves(results, len(many), ctx.seeds)
    yield _usage(results, len(many), ctx.seeds)
    yield from sorted(artifacts, key=lambda artifact: artifact.name)


def _gain(results: Mapping[Any, Any], arm: str, num_tasks: int, seed: int) -> float:
    from papers.m3vit.metrics import delta_m

    return delta_m(results[arm, num_tasks, seed]["metrics"], results["dense", num_tasks, seed]["metrics"])


def _values(results: Mapping[Any, Any], arm: str, many: int, few: int, seeds: Sequence[int]) -> dict[str, list[float]]:
    """The claims whose networks have all been trained, one value per seed."""

    def done(name: str, num_tasks: int) -> bool:
        return all((name, num_tasks, seed) in results for seed in seeds)

    values: dict[str, list[float]] = {}
    large = done("dense", many) and done(arm, many)
    small = done("dense", few) and done(arm, few)
    if large:
        values["moe_beats_dense"] = [_gain(results, arm, many, seed) for seed in seeds]
    if large and done("single", many):
        values["task_routers_beat_single"] = [
            _gain(results, arm, many, seed) - _gain(results, "single", many, seed) for seed in seeds
        ]
    if small:
        values["moe_beats_dense_two_tasks"] = [_gain(results, arm, few, seed) for seed in seeds]
    if large and small:
        values["gain_grows_with_tasks"] = [
            _gain(results, arm, many, seed) - _gain(results, arm, few, seed) for seed in seeds
        ]
    return values


def _arms(results: Mapping[Any, Any], num_tasks: int) -> list[str]:
    present = {arm for arm, tasks, _ in results if tasks == num_tasks}
    return [arm for arm in _TITLES if arm in present]


def _metrics_table(results: Mapping[Any, Any], seeds: Sequence[int]) -> Table:
    from shared.experiment import mean_interval

    rows = []
    for num_tasks in sorted({tasks for _, tasks, _ in results}, reverse=True):
        for arm in _arms(results, num_tasks):
            by_task: dict[str, list[float]] = defaultdict(list)
            for seed in seeds:
                for task, value in results[arm, num_tasks, seed]["metrics"].items():
                    by_task[task].append(value)
            for task, values in by_task.items():
                mean, low, high = mean_interval(values)
                rows.append(
                    {
                        "tasks": num_tasks,
                        "model": _TITLES[arm],
                        "task": task,
                        "mean": mean,
                        "ci_low": low,
                        "ci_high": high,
                        "seeds": len(values),
                        "parameters": results[arm, num_tasks, seeds[0]]["parameters"],
                    }
                )
    return Table(
        "task_metrics",
        "Metrics on unseen SynthRoom scenes",
        rows,
        note="semseg, parts: mIoU in percent; sal: best mIoU; normals: mean error in degrees, depth: RMSE in metres (lower is better); "
        "edge: best F in percent.",
    )


def _gain_table(results: Mapping[Any, Any], many: int, few: int, seeds: Sequence[int]) -> Table:
    from shared.experiment import mean_interval

    rows = []
    for num_tasks in (many, few):
        for arm in _arms(results, num_tasks):
            if arm == "dense":
                continue
            mean, low, high = mean_interval([_gain(results, arm, num_tasks, seed) for seed in seeds])
            rows.append(
                {"model": _TITLES[arm], "tasks": f"{num_tasks} tasks", "Δm %": mean, "ci_low": low, "ci_high": high}
            )
    return Table(
        "gain_over_dense",
        "Mean gain over the dense model of the same seed",
        rows,
        Plot("bar", x="model", y="Δm %", series="tasks", error=("ci_low", "ci_high"), hline=0.0),
        note=f"Mean and 95 % interval over {len(seeds)} seeds.",
    )


def _curves(results: Mapping[Any, Any], many: int, seeds: Sequence[int]) -> Table:
    rows = []
    for arm in _arms(results, many):
        curves = [results[arm, many, seed]["losses"] for seed in seeds]
        for index, (step, _) in enumerate(curves[0]):
            rows.append(
                {"step": step, "model": _TITLES[arm], "loss": sum(curve[index][1] for curve in curves) / len(curves)}
            )
    return Table("loss_curves", "Training loss", rows, Plot("line", x="step", y="loss", series="model"))


def _usage(results: Mapping[Any, Any], many: int, seeds: Sequence[int]) -> Table:
    """Is the gate balanced, and how flat is it? The paper does not renormalise, so a flat router halves the signal."""
    rows = []
    for arm in _arms(results, many):
        if arm == "dense":
            continue
        layers = list(zip(*(results[arm, many, seed]["routing"]["usage"] for seed in seeds), strict=True))
        sums = list(zip(*(results[arm, many, seed]["routing"]["gate_sum"] for seed in seeds), strict=True))
        for layer, (usage, gate_sum) in enumerate(zip(layers, sums, strict=True)):
            shares = [share for seed_usage in usage for task in seed_usage for share in task]
            gates = [value for seed_sums in gate_sum for value in seed_sums]
            experts = len(usage[0][0])
            rows.append(
                {
                    "model": _TITLES[arm],
                    "MoE layer": layer + 1,
                    "busiest expert over mean": max(shares) * experts,
                    "idlest expert over mean": min(shares) * experts,
                    "sum of the kept gates": sum(gates) / len(gates),
                }
            )
    return Table("expert_usage", "Expert usage of the trained models, all tasks and seeds", rows)


@experiment(
    claims=["real_routing_misses"],
    config=["micro", "train", "data", "routing", "model", "hardware", "device"],
)
def routing_of_trained_model(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Real routing traces through expert caches: what the 9.23 times would be with a trained router."""
    import numpy as np

    from papers.m3vit import cache, counts, hardware
    from papers.m3vit.jobs import PREDICTIONS_FILE, train_job

    jobs = [_job(cfg, "multi", list(cfg.micro.tasks), seed, ctx.seeds[0]) for seed in ctx.seeds]
    num_experts, side = cfg.micro.num_experts, cfg.data.image // cfg.micro.patch
    traces: dict[int, dict[str, Any]] = {}
    shown = None
    for job, result, workdir in ctx.map("training on SynthRoom", train_job, jobs):
        traces[job["seed"]] = {task: np.asarray(trace) for task, trace in result["trace"].items()}
        if job["show_images"]:
            shown = workdir / PREDICTIONS_FILE
    if cfg.routing.source == "random":
        for seed in ctx.seeds:
            rng = np.random.default_rng(seed)
            for task, trace in traces[seed].items():
                layers, images, tokens, top_k = trace.shape
                traces[seed][task] = cache.random_routing(
                    rng, layers=layers, images=images, tokens=tokens, num_experts=num_experts, top_k=top_k
                )

    ratios = [float(np.mean([cache.miss_ratio(t, num_experts) for t in traces[seed].values()])) for seed in ctx.seeds]
    yield seed_measurement(
        "real_routing_misses", [100.0 * (1.0 - ratio) for ratio in ratios], "percent of the random expectation saved"
    )

    encoder, accelerator = encoder_of(cfg.model), accelerator_of(cfg)
    tokens = counts.dataset("pascal").tokens()
    random_misses = float(hardware.expected_misses(encoder, tokens))
    everything = np.concatenate([trace for seed in ctx.seeds for trace in traces[seed].values()], axis=1)
    micro_random = float(
        hardware.expected_misses(counts.Encoder(num_experts=num_experts, top_k=cfg.micro.top_k), everything.shape[2])
    )
    rows = []
    for order in cfg.routing.orders:
        ordered = cache.reorder_tokens(everything, num_experts, order, (side, side))
        curve = cache.lru_miss_curve(ordered, num_experts).mean((0, 1))
        for held in (cfg.micro.top_k, 2 * cfg.micro.top_k):
            ratio = float(curve[held - cfg.micro.top_k]) / micro_random
            rows.append(
                {
                    "token order": order,
                    "cache": f"{held} experts",
                    "misses over random": ratio,
                    "reordering would gain": cache.scaled_advantage(ratio, encoder, tokens, accelerator),
                }
            )
    yield Table(
        "cache_study",
        "Expert caches on the routing of the trained model",
        rows,
        Plot(
            "bar",
            x="token order",
            y="reordering would gain",
            series="cache",
            hline=1.0,
            ylabel="times, at the paper's size",
        ),
        note=f"The paper's baseline is a cache of K experts in raster order under random routing ({random_misses:.0f} misses a layer). "
        "Carrying the miss ratio of the micro model over to the paper's size is an assumption.",
    )
    yield _stalls(traces, num_experts, encoder, tokens, accelerator)
    if shown is not None and shown.exists():
        from papers.m3vit.pictures import prediction_sheet

        yield Picture(
            "predictions",
            "SynthRoom scenes, their labels, and what the multi-gate model predicts",
            prediction_sheet(shown, list(cfg.micro.tasks)),
            note="Unseen scenes, the first seed.",
        )


def _stalls(
    traces: Mapping[int, Mapping[str, Any]], num_experts: int, encoder: Any, tokens: int, accelerator: Any
) -> Table:
    """Queue lengths of the trained router, scaled to the paper's size, against the stall threshold."""
    import numpy as np

    from papers.m3vit import cache, hardware

    scale = float(hardware.mean_queue(encoder, tokens))
    threshold = float(hardware.stall_threshold_tokens(encoder, accelerator))
    rows = []
    tasks = list(next(iter(traces.values())))
    for task in tasks:
        queues = np.concatenate(
            [cache.queue_lengths(by_task[task], num_experts) for by_task in traces.values()], axis=1
        )
        relative = queues / queues.mean(-1, keepdims=True)
        rows.append(
            {
                "task": task,
                "longest over mean queue": float(relative.max(-1).mean()),
                "empty queues %": 100.0 * float((queues == 0).mean()),
                "stalling queues %": 100.0
                * cache.stall_probability(np.where(queues > 0, relative * scale, 0.0), threshold),
            }
        )
    merged = [cache.merge_queues(by_task, num_experts) for by_task in traces.values()]
    together = np.concatenate(merged, axis=1)
    relative = together / together.mean(-1, keepdims=True)
    rows.append(
        {
            "task": "all tasks merged",
            "longest over mean queue": float(relative.max(-1).mean()),
            "empty queues %": 100.0 * float((together == 0).mean()),
            "stalling queues %": 100.0
            * cache.stall_probability(np.where(together > 0, relative * scale * len(tasks), 0.0), threshold),
        }
    )
    return Table(
        "stalls",
        "Queues of the trained router at the paper's size",
        rows,
        note=f"A queue stalls the double buffer below {threshold:.0f} tokens; the mean queue would hold {scale:.0f}.",
    )
