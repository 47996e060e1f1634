"""Exact counts at full size, from traces on the meta device (B3, B4, B8, H4, H7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

DENSE_EXPERTS = 8 - 1  # that a dense network evaluates besides the chosen one
EXPERT_MACS = 7 * 256 * 256


@experiment(
    claims=["switch_parameters", "switch_parameters_building", "switch_flops_point", "switch_flops_ray",
            "switch_flops_ray_background", "capacity", "flop_ratio", "fps_conflict", "gate_macs", "gate_saving"],
    config=["counts"],
)  # fmt: skip
def costs(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Parameters, MACs and reads of both networks."""
    from papers.switchnerf import counts
    from papers.switchnerf.hmohe import CONFIG_A
    from papers.switchnerf.moe import capacity
    from papers.switchnerf.render import SwitchSampling

    c = cfg.counts
    sampling = SwitchSampling(*c.samples)
    extra = DENSE_EXPERTS * EXPERT_MACS if c.network == "dense" else 0
    samples = sampling.coarse + sampling.fine
    ray = {b: counts.switch_ray_flops(b, sampling) + 2 * samples * extra for b in (False, True)}
    hash_ray = counts.hmohe_ray()
    yield Measurement("switch_parameters", counts.switch_parameters())
    yield Measurement("switch_parameters_building", counts.switch_parameters(counts.BUILDING_IMAGES))
    yield Measurement("switch_flops_point", counts.switch_macs() + extra)
    yield Measurement("switch_flops_ray", ray[False])
    yield Measurement("switch_flops_ray_background", ray[True])
    yield Measurement("capacity", capacity(c.chunk, 8, c.capacity_factor))
    yield Measurement("flop_ratio", ray[False] / (2 * hash_ray.macs))
    needed = ctx.published["fps_1080p"] * 1920 * 1080 * ray[False]
    yield Measurement("fps_conflict", needed / ctx.published["tensor_peak_3090"])
    gate = counts.gate_count(CONFIG_A)
    chosen = counts.switch_gate_macs() if c.gate == "mlp" else gate.macs
    yield Measurement("gate_macs", chosen)
    yield Measurement("gate_saving", counts.switch_gate_macs() / chosen)
    main, first = counts.hmohe_count(CONFIG_A), counts.proposal_count(0)
    rows = [
        {"part": "Switch-NeRF, foreground point", "macs": counts.switch_macs(), "table_reads": 0},
        {"part": "Switch-NeRF, gate", "macs": counts.switch_gate_macs(), "table_reads": 0},
        {"part": "background point", "macs": counts.plain_macs(4), "table_reads": 0},
        {"part": "Mega-NeRF, foreground point", "macs": counts.plain_macs(3), "table_reads": 0},
        {"part": "HMoHE config A, main sample", "macs": main.macs, "table_reads": main.reads},
        {"part": "HMoHE config A, gate", "macs": gate.macs, "table_reads": gate.reads},
        {"part": "proposal sample", "macs": first.macs, "table_reads": first.reads},
        {"part": "HMoHE config A, ray", "macs": hash_ray.macs, "table_reads": hash_ray.reads},
    ]
    yield Table("work", "Work of a forward pass (1 MAC = 2 FLOPs)", rows)
    config_a = [{"part": name, "parameters": value} for name, value in counts.hmohe_parameters().items()]
    yield Table("parameters", "Parameters of config A without appearance embeddings", config_a)


@experiment(claims=["cost_growth", "read_growth", "parameters_linear"], config=["counts"])
def scaling(cfg: Any, ctx: Context) -> Iterator[Result]:
    """What grows with the number of experts, and what does not."""
    from papers.switchnerf import counts
    from papers.switchnerf.hmohe import CONFIG_A

    def per_sample(experts: int) -> counts.FieldCount:
        config = counts.with_experts(CONFIG_A, experts)
        found = counts.hmohe_count(config)
        if cfg.counts.routing == "dense":
            mlp = config.experts[0].levels * 2 * config.expert_hidden + config.expert_hidden * config.outputs
            found += counts.FieldCount(mlp, config.experts[0].reads) * (experts - 1)
        return found

    sizes = (1, 2, 4, 8, 16, 32, 64)
    found = {e: per_sample(e) for e in sizes}
    growth = found[64].macs - found[8].macs - CONFIG_A.gate_hidden * (64 - 8)
    yield Measurement("cost_growth", growth)
    yield Measurement("read_growth", found[64].reads)
    equal = {e: counts.hmohe_parameters(counts.with_experts(CONFIG_A, e))["experts"] for e in sizes}
    per_range = {e: equal[e] for e in (8, 16)}
    yield Measurement("parameters_linear", per_range[16] / per_range[8])
    rows = [
        {
            "experts": e,
            "macs_per_sample": found[e].macs,
            "reads_per_sample": found[e].reads,
            "table_parameters": equal[e],
        }
        for e in sizes
    ]
    title = "Config A with 1 to 64 experts: work per sample stays, parameters grow"
    yield Table("experts", title, rows, Plot("line", "experts", "table_parameters", log_x=True, log_y=True))
