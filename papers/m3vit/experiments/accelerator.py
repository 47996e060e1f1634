"""The accelerator (C3, C4, C5, C6, C11): on-chip memory, latency and energy of the three designs, task switching, design space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from papers.m3vit.experiments.setup import GIGA, MIB, accelerator_of, encoder_of, has_power, model_error_rel
from shared.experiment import Context, Measurement, NotTested, Plot, Result, Table, experiment


@experiment(
    claims=[
        "memory_reduction",
        "memory_reordered",
        "memory_resident",
        "memory_against_chip",
        "queue_memory",
        "memory_growth_with_experts",
        "queue_growth_per_expert",
    ],
    config=["model", "hardware", "device"],
)
def on_chip_memory(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Tab. 4, column "Memory": named buffers, 16-bit words, MiB of 2^20."""
    from papers.m3vit import counts, hardware
    from papers.m3vit.experiments.setup import device_of, on_chip_bytes

    encoder, tokens, bits = encoder_of(cfg.model), cfg.hardware.memory_tokens, cfg.hardware.weight_bits
    design = "reordered" if cfg.hardware.reordering else "resident"

    def mib(shape: Any, kind: str) -> float:
        return float(hardware.memory_bytes(shape, tokens, kind, bits)) / MIB

    ours, resident = mib(encoder, design), mib(encoder, "resident")
    yield Measurement("memory_reduction", resident / ours)
    yield Measurement("memory_reordered", ours)
    yield Measurement("memory_resident", resident)
    device = device_of(cfg)
    chip = on_chip_bytes(device)
    if chip is None:
        yield NotTested("memory_against_chip", f"the file of {device.id} gives no size of its on-chip memory")
    else:
        yield Measurement("memory_against_chip", ours * MIB / chip)
    queues = float(hardware.queue_words(encoder, tokens)) * bits / 8.0 if encoder.num_moe_blocks else 0.0
    yield Measurement("queue_memory", queues / MIB)
    many = replace(encoder, num_experts=4 * encoder.num_experts)
    yield Measurement("memory_growth_with_experts", 100.0 * (mib(many, design) / ours - 1.0))
    one_more = replace(encoder, num_experts=encoder.num_experts + 1)
    words = sum(
        sign
        * (
            float(counts.sum_counts(hardware.memory_words(shape, tokens, "reordered")))
            + float(hardware.queue_words(shape, tokens))
        )
        for sign, shape in ((1, one_more), (-1, encoder))
    )
    yield Measurement("queue_growth_per_expert", words * bits / 8.0 / 1e3)

    rows = []
    for num_experts in (4, 8, 16, 32, 64, 128):
        shape = replace(encoder, num_experts=num_experts, top_k=min(encoder.top_k, num_experts))
        extra = float(hardware.queue_words(shape, tokens)) * bits / 8.0 / MIB
        rows += [
            {"experts": num_experts, "design": "all experts resident", "MiB": mib(shape, "resident")},
            {"experts": num_experts, "design": "expert by expert", "MiB": mib(shape, "reordered")},
            {
                "experts": num_experts,
                "design": "expert by expert, queues counted",
                "MiB": mib(shape, "reordered") + extra,
            },
        ]
    yield Table(
        "memory_by_experts",
        "On-chip memory against the number of experts",
        rows,
        Plot("line", x="experts", y="MiB", series="design", log_x=True, log_y=True, ylabel="MiB on chip"),
    )
    yield Table(
        "memory_buffers",
        "On-chip buffers",
        [
            {"design": kind, "buffer": name.replace("_", " "), "MiB": float(count) * bits / 8.0 / MIB}
            for kind in ("reordered", "resident")
            for name, count in hardware.memory_words(encoder, tokens, kind).items()
        ],
        Plot("stacked", x="design", y="MiB", series="buffer", ylabel="MiB on chip"),
    )


@experiment(
    claims=[
        "reordering_speedup_pascal",
        "reordering_speedup_nyud",
        "cache_extra_time_pascal",
        "cache_extra_time_nyud",
        "reordering_speedup_paper_base",
        "latency_reordered_pascal",
        "latency_reordered_nyud",
        "reordering_overhead_pascal",
        "reordering_overhead_nyud",
        "reordering_overhead_small",
        "decoder_latency",
        "reordering_speedup_with_decoder",
        "stall_threshold",
        "critical_bandwidth",
        "gpu_energy_ratio_pascal",
        "gpu_energy_ratio_nyud",
    ],
    config=["model", "hardware", "device"],
)
def latency(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Tab. 4: latency and energy of one task, batch 1, encoder only."""
    from papers.m3vit import counts, hardware
    from papers.m3vit.experiments.setup import device_of

    encoder, accelerator = encoder_of(cfg.model), accelerator_of(cfg)
    error = model_error_rel(cfg, ctx, encoder, accelerator)
    device, published = device_of(cfg), ctx.published
    totals: dict[str, dict[str, float]] = {}
    for name in ("pascal", "nyud"):
        tokens = counts.dataset(name).tokens()
        cached = hardware.frame_latency(encoder, tokens, accelerator, design="cached")
        reordered = hardware.frame_latency(
            encoder,
            tokens,
            accelerator,
            design="reordered",
            overlap=cfg.hardware.double_buffering,
            first_load_exposed=cfg.hardware.first_load_exposed,
        )
        ours = reordered if cfg.hardware.reordering else cached
        dense = hardware.compute_latency(encoder.dense(), tokens, accelerator)
        totals[name] = {
            "ours": float(ours.total_s),
            "cached": float(cached.total_s),
            "dense": float(dense.total_s),
            "loads": float(cached.exposed_load_s),
        }
        t = totals[name]
        yield Measurement(f"reordering_speedup_{name}", t["cached"] / t["ours"], model_error_rel=error)
        yield Measurement(f"cache_extra_time_{name}", 1e3 * t["loads"], model_error_rel=error)
        yield Measurement(f"latency_reordered_{name}", 1e3 * t["ours"], model_error_rel=error)
        yield Measurement(f"reordering_overhead_{name}", 1e3 * (t["ours"] - t["dense"]), model_error_rel=error)
        if has_power(device, cfg.hardware):
            gpu_j = published[f"latency_{name}_gpu_moe"] * published["gpu_power"]
            ours_j = float(hardware.energy_j(t["ours"], accelerator.power_w))
            yield Measurement(f"gpu_energy_ratio_{name}", gpu_j / ours_j, model_error_rel=error)
        else:
            yield NotTested(f"gpu_energy_ratio_{name}", f"the file of {device.id} gives no power under load")

    pascal, base = totals["pascal"], published["latency_pascal_fpga_reordered"]
    loads = pascal["loads"] if cfg.hardware.reordering else 0.0
    yield Measurement("reordering_speedup_paper_base", (base + loads) / base, model_error_rel=error)
    yield Measurement(
        "reordering_overhead_small", 100.0 * (pascal["ours"] / pascal["dense"] - 1.0), model_error_rel=error
    )
    decoder = float(
        hardware.decoder_latency_s(counts.mean_decoder_macs(encoder, counts.dataset("pascal")), accelerator)
    )
    yield Measurement("decoder_latency", 1e3 * decoder, model_error_rel=error)
    yield Measurement(
        "reordering_speedup_with_decoder",
        (pascal["cached"] + decoder) / (pascal["ours"] + decoder),
        model_error_rel=error,
    )
    yield Measurement(
        "stall_threshold", float(hardware.stall_threshold_tokens(encoder, accelerator)), model_error_rel=error
    )
    critical = hardware.critical_bandwidth_bytes_per_s(encoder, counts.dataset("pascal").tokens(), accelerator)
    yield Measurement("critical_bandwidth", float(critical) / GIGA, model_error_rel=error)
    yield from _latency_tables(cfg, encoder, accelerator, decoder)


def _latency_tables(cfg: Any, encoder: Any, accelerator: Any, decoder_s: float) -> Iterator[Result]:
    """The breakdown behind the ratios."""
    from dataclasses import asdict

    from papers.m3vit import counts, hardware

    tokens = counts.dataset("pascal").tokens()
    designs = {
        "dense ViT": hardware.compute_latency(encoder.dense(), tokens, accelerator),
        "MoE, expert by expert": hardware.frame_latency(encoder, tokens, accelerator, design="reordered"),
        "MoE, token by token, cached": hardware.frame_latency(encoder, tokens, accelerator, design="cached"),
    }
    parts = {
        name: {**{part.removesuffix("_s").replace("_", " "): float(value) for part, value in asdict(design).items()}}
        for name, design in designs.items()
    }
    rows = [
        {"design": name, "part": part, "ms": 1e3 * seconds, "mJ": 1e3 * seconds * float(accelerator.power_w)}
        for name, entries in parts.items()
        for part, seconds in entries.items()
    ]
    yield Table(
        "latency_breakdown",
        "Latency of one PASCAL-Context frame by part",
        rows,
        Plot("stacked", x="design", y="ms", series="part", ylabel="ms"),
        note=f"Encoder only, as in Tab. 4; one decoder would add {1e3 * decoder_s:.0f} ms to each.",
    )
    yield Table(
        "energy_breakdown",
        "Energy of one PASCAL-Context frame by part",
        rows,
        Plot("stacked", x="design", y="mJ", series="part", ylabel="mJ"),
        note=f"Constant power of {float(accelerator.power_w):g} W, as the paper has it: energy ratios are latency ratios.",
    )


@experiment(
    claims=["switching_overhead", "latency_spread_over_routings"],
    config=["model", "hardware", "device", "routing"],
)
def switching(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Sec. 3.2: with double buffering the latency knows neither task nor routing. Queues of simulated routings."""
    import numpy as np

    from papers.m3vit import cache, counts, hardware

    encoder, accelerator = encoder_of(cfg.model), accelerator_of(cfg)
    error = model_error_rel(cfg, ctx, encoder, accelerator)
    tokens = counts.dataset("pascal").tokens()
    balanced = hardware.frame_latency(
        encoder, tokens, accelerator, design="reordered", overlap=cfg.hardware.double_buffering
    )
    yield Measurement(
        "switching_overhead", 100.0 * float(balanced.exposed_load_s / balanced.total_s), model_error_rel=error
    )
    rng = np.random.default_rng(ctx.seed)
    frames: list[Any] = []
    rows = []
    for skew in (0.0, cfg.routing.skew, 3.0 * cfg.routing.skew):
        trace = cache.random_routing(
            rng,
            layers=encoder.num_moe_blocks,
            images=cfg.routing.images,
            tokens=tokens,
            num_experts=int(encoder.num_experts),
            top_k=int(encoder.top_k),
            skew=skew,
        )
        queues = np.moveaxis(cache.queue_lengths(trace, int(encoder.num_experts)), 0, 1)
        if cfg.hardware.reordering:
            simulated = hardware.frame_latency(encoder, tokens, accelerator, design="reordered", queues=queues)
        else:
            misses = cache.previous_token_misses(trace, int(encoder.num_experts)).sum(0).astype(float)
            simulated = hardware.frame_latency(encoder, tokens, accelerator, design="cached", misses=misses)
        total = np.broadcast_to(simulated.total_s, (cfg.routing.images,))
        if skew <= cfg.routing.skew:
            frames.append(total)
        rows.append(
            {
                "skew of expert popularity": skew,
                "shortest queue": int(queues.min()),
                "share of stalling queues": cache.stall_probability(
                    queues, float(hardware.stall_threshold_tokens(encoder, accelerator))
                ),
                "slowest frame ms": 1e3 * float(total.max()),
                "spread %": 100.0 * float(total.max() / total.min() - 1.0),
            }
        )
    every = np.concatenate(frames)
    yield Measurement(
        "latency_spread_over_routings", 100.0 * float(every.max() / every.min() - 1.0), model_error_rel=error
    )
    yield Table(
        "routing_imbalance",
        "Latency under random routing, by how unequal the experts' popularity is",
        rows,
        note="A queue shorter than the stall threshold lets the next load show; only strong imbalance makes such queues.",
    )
    yield Table(
        "several_tasks",
        "Encoder latency and expert traffic when several tasks of one frame are wanted",
        [
            {
                "tasks": tasks,
                "schedule": title,
                "ms": 1e3 * float(cost.latency_s),
                "MB of experts": float(cost.traffic_bytes) / 1e6,
            }
            for tasks in (1, 2, 3, 4, 5)
            for title, share, merge in (
                ("one task after the other", False, False),
                ("shared prefix", True, False),
                ("shared prefix, merged queues", True, True),
            )
            for cost in [
                hardware.multi_task(encoder, tokens, accelerator, tasks=tasks, share_prefix=share, merge_queues=merge)
            ]
        ],
        Plot("line", x="tasks", y="MB of experts", series="schedule", ylabel="MB of experts a frame"),
        note="Merged queues load each expert once for all tasks: the traffic does not grow with their number.",
    )


@experiment(claims=["edge_moe_model_gap", "edge_moe_reordering_saving"], config=["edge_moe", "routing"])
def edge_moe(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The same mechanism against the measured follow-up design."""
    import numpy as np

    from papers.m3vit import cache
    from papers.m3vit import edge_moe as board

    units = board.Units(**cfg.edge_moe)
    rng = np.random.default_rng(ctx.seed)
    shape = board.ENCODER
    trace = cache.random_routing(
        rng,
        layers=shape.num_moe_blocks,
        images=cfg.routing.images,
        tokens=board.TOKENS,
        num_experts=int(shape.num_experts),
        top_k=int(shape.top_k),
    )
    queues = np.moveaxis(cache.queue_lengths(trace, int(shape.num_experts)), 0, 1)
    frames = [board.latency(units, frame) for frame in queues]
    modelled = float(np.mean([frame.total_s for frame in frames]))
    published = ctx.published
    yield Measurement("edge_moe_model_gap", published["edge_moe_latency"] / modelled)
    naive = published["edge_moe_naive_latency"]
    saved = naive - naive / published["edge_moe_reordering_speedup"]
    yield Measurement("edge_moe_reordering_saving", 100.0 * frames[0].token_order_load_s / saved)


@experiment(claims=[], config=["model", "hardware", "device", "explorer"])
def design_space(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Where loading stops hiding, over experts, widths, bandwidth and multipliers: every point of a grid in one call."""
    import numpy as np

    from papers.m3vit import counts, explorer

    encoder, accelerator = encoder_of(cfg.model), accelerator_of(cfg)
    axes = {name: list(values) for name, values in cfg.explorer.items()}
    axes |= {
        "dim": [int(encoder.dim)],
        "tokens": [counts.dataset("pascal").tokens()],
        "power_w": [float(accelerator.power_w)],
        "router_drain_cycles": [cfg.hardware.router_drain_cycles],
        "attention_macs_per_cycle": [cfg.hardware.attention_macs_per_cycle],
    }
    points = explorer.grid(**axes)
    possible = points["top_k"] <= points["num_experts"]
    points = {name: values[possible] for name, values in points.items()}
    # The attention unit scales with the multiplier array, as on the paper's board.
    points["attention_macs_per_cycle"] = points["macs_per_cycle"]
    cost = explorer.evaluate(points)
    front = _pareto(cost["latency_s"], cost["memory_bytes"], points["top_k"] * points["expert_hidden"])
    rows = [
        {
            **{name: points[name][index].item() for name in cfg.explorer},
            "latency ms": 1e3 * float(cost["latency_s"][index]),
            "MiB on chip": float(cost["memory_bytes"][index]) / MIB,
            "loads hidden": bool(cost["loads_hidden"][index]),
            "gain over a cache": float(cost["reordering_speedup"][index]),
        }
        for index in front[:40]
    ]
    yield Table(
        "design_front",
        f"Designs that no other of {len(cost['latency_s']):,} beats in latency, memory and expert width at once",
        rows,
    )
    bandwidths = np.asarray(axes["bandwidth_bytes_per_s"])
    rows = []
    for bits in axes["weight_bits"]:
        one = {name: np.asarray(values[:1]) for name, values in axes.items()}
        one |= {
            "num_experts": np.asarray([int(encoder.num_experts)]),
            "top_k": np.asarray([int(encoder.top_k)]),
            "expert_hidden": np.asarray([int(encoder.expert_hidden)]),
            "weight_bits": np.asarray([bits]),
            "bandwidth_bytes_per_s": bandwidths,
            "macs_per_cycle": np.asarray([cfg.hardware.macs_per_cycle]),
            "attention_macs_per_cycle": np.asarray([cfg.hardware.attention_macs_per_cycle]),
            "clock_hz": np.asarray([float(accelerator.clock_hz)]),
        }
        result = explorer.evaluate(one)
        rows += [
            {"GB/s": float(bandwidth) / GIGA, "weights": f"{bits} bit", "ms": 1e3 * float(seconds)}
            for bandwidth, seconds in zip(bandwidths, result["latency_s"], strict=True)
        ]
    yield Table(
        "bandwidth_sweep",
        "Latency of the reordered design against DRAM bandwidth",
        rows,
        Plot("line", x="GB/s", y="ms", series="weights", log_x=True, xlabel="DRAM GB/s", ylabel="ms a frame"),
    )


def _pareto(latency_s: Any, memory_bytes: Any, width: Any) -> list[int]:
    """Indices of the points that none beats in all of latency (low), memory (low) and width (high), fastest first."""
    import numpy as np

    order = np.lexsort((-width, memory_bytes, latency_s))
    kept: list[int] = []
    for index in order.tolist():
        earlier = np.asarray(kept, dtype=int)
        beaten = (memory_bytes[earlier] <= memory_bytes[index]) & (width[earlier] >= width[index])
        if not beaten.any():
            kept.append(index)
    return kept
