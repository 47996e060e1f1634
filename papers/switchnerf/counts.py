"""Exact counts, from models traced on the meta device: parameters, MACs per point and per ray, table reads (B3, B4, B8, H4, H7).

1 MAC = 2 FLOPs. Nothing is computed, so full sizes take milliseconds. Routing moves points around but multiplies nothing: per-point counts
do not depend on which expert a point goes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from papers.switchnerf.hmohe import CONFIG_A, PROPOSALS, HMoHE, HMoHEConfig, Proposal
from papers.switchnerf.render import ProposalSampling, SwitchSampling
from papers.switchnerf.switch import NeRFMLP, SwitchConfig, SwitchNeRF, background
from shared.workload import Workload, trace

POINTS = 1024  # of a trace; per-point figures do not depend on it
CHUNK, BUILDING_IMAGES = 131_072, 1940


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A module without memory."""
    with torch.device("meta"):
        return build().train()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.empty(*shape, device="meta", dtype=dtype)


def trace_field(field: nn.Module, points: int = POINTS, inputs: int = 3, training: bool = False) -> Workload:
    """One pass of a field over ``points`` points; a training trace has the backward pass of its outputs' sum, too."""
    x, direction, image = _meta(points, inputs), _meta(points, 3), _meta(points, dtype=torch.int64)

    def run(*arguments: Any) -> None:
        out = field(*arguments)
        if training:
            (out.density.sum() + out.colour.sum() + out.balance).backward()

    return trace(run, x, direction, image, training=training)


@dataclass(frozen=True)
class FieldCount:
    """Per point: multiply-adds, and table entries that are read."""

    macs: int
    reads: int

    def __add__(self, other: FieldCount) -> FieldCount:
        return FieldCount(self.macs + other.macs, self.reads + other.reads)

    def __mul__(self, samples: int) -> FieldCount:
        return FieldCount(self.macs * samples, self.reads * samples)


def count(workload: Workload, points: int = POINTS, features: int = 2) -> FieldCount:
    """Figures per point of a traced field: MACs, and gathers from hash tables (8 bytes of index and a feature vector each).

    Raises ArithmeticError where they are no whole numbers.
    """
    index = 8  # bytes of an int64 index
    reads = 0
    for op in workload.ops:
        if op.name == "aten.embedding" and not op.module.endswith("appearance"):
            entries, rest = divmod(op.bytes_read, 4 * features + index)
            reads += entries
            if rest:
                raise ArithmeticError(f"{op.bytes_read} bytes are no whole number of table reads")
    if workload.macs % points or reads % points:
        raise ArithmeticError(f"{workload.macs} MACs and {reads} reads are no whole numbers per point")
    return FieldCount(workload.macs // points, reads // points)


def hmohe_count(config: HMoHEConfig) -> FieldCount:
    """HMoHE per main sample."""
    return count(
        trace_field(on_meta(lambda: HMoHE(config)), POINTS * len(config.experts)), POINTS * len(config.experts)
    )


def proposal_count(index: int) -> FieldCount:
    """A proposal net per sample."""
    net = on_meta(lambda: Proposal(PROPOSALS[index]))
    return count(trace(net, _meta(POINTS, 3)))


def gate_count(config: HMoHEConfig) -> FieldCount:
    """The hash gate per sample."""
    field = on_meta(lambda: HMoHE(config))
    assert isinstance(field, HMoHE)
    assert field.gate is not None
    return count(trace(field.gate, _meta(POINTS, 3)))


def hmohe_ray(config: HMoHEConfig = CONFIG_A, sampling: ProposalSampling | None = None) -> FieldCount:
    """HMoHE per ray: proposal rounds and main samples."""
    sampling = sampling or ProposalSampling()
    total = hmohe_count(config) * sampling.samples
    for index, samples in enumerate(sampling.rounds):
        total += proposal_count(index) * samples
    return total


def switch_macs(config: SwitchConfig | None = None) -> int:
    """Switch-NeRF's foreground, MACs per point."""
    config = config or SwitchConfig()
    return count(
        trace_field(on_meta(lambda: SwitchNeRF(config)), POINTS * config.experts), POINTS * config.experts
    ).macs


def plain_macs(inputs: int = 3) -> int:
    """A Mega-NeRF submodule (3 inputs) or the background (4), MACs per point."""
    return count(trace_field(on_meta(lambda: NeRFMLP(inputs)), inputs=inputs)).macs


def switch_gate_macs() -> int:
    """Switch-NeRF's gate, MACs per point."""
    field = on_meta(lambda: SwitchNeRF(SwitchConfig()))
    assert isinstance(field, SwitchNeRF)
    return trace(field.gate, _meta(POINTS, 256)).macs // POINTS


def switch_ray_flops(with_background: bool, sampling: SwitchSampling | None = None) -> int:
    """Switch-NeRF, FLOPs of a forward pass per ray; the background takes half as many samples."""
    sampling = sampling or SwitchSampling()
    samples = sampling.coarse + sampling.fine
    macs = samples * switch_macs()
    return 2 * (macs + (samples // 2 * plain_macs(4) if with_background else 0))


def parameters(module: nn.Module, without: tuple[str, ...] = ()) -> int:
    """Trainable numbers, leaving out modules whose name ends in one of ``without``."""
    return sum(
        p.numel() for name, p in module.named_parameters() if not any(part in name.split(".") for part in without)
    )


def switch_parameters(images: int | None = None) -> int:
    """The foreground without embeddings; with ``images``, foreground, background and an embedding table for each."""
    config = SwitchConfig(images=images or 1)
    foreground = on_meta(lambda: SwitchNeRF(config))
    if images is None:
        return parameters(foreground, ("appearance",))
    return parameters(foreground) + parameters(on_meta(lambda: background(config)))


def hmohe_parameters(config: HMoHEConfig = CONFIG_A) -> dict[str, int]:
    """Config A by part, without appearance embeddings."""
    field = on_meta(lambda: HMoHE(replace(config, appearance=config.appearance)))
    assert isinstance(field, HMoHE)
    proposals = [on_meta(lambda grid=grid: Proposal(grid)) for grid in PROPOSALS]  # type: ignore[misc]
    tables = {"experts": field.encoding.table.numel()}
    if field.gate is not None:
        tables["gate"] = sum(p.numel() for n, p in field.gate.named_parameters() if n.endswith("table"))
    tables["proposals"] = sum(p.numel() for net in proposals for n, p in net.named_parameters() if n.endswith("table"))
    total = parameters(field, ("appearance",)) + sum(parameters(net) for net in proposals)
    return {**tables, "mlps": total - sum(tables.values()), "total": total}


def mega_parameters(submodules: int = 8) -> int:
    """Mega-NeRF's submodules with their backgrounds, without embeddings."""
    one = parameters(on_meta(NeRFMLP), ("appearance",)) + parameters(on_meta(lambda: NeRFMLP(4)), ("appearance",))
    return submodules * one


def with_experts(config: HMoHEConfig, experts: int) -> HMoHEConfig:
    """The config with its ranges repeated or cut to ``experts``."""
    grids = config.experts
    return replace(
        config,
        experts=tuple(
            grids[i * len(grids) // experts] if experts <= len(grids) else grids[i % len(grids)] for i in range(experts)
        ),
    )
