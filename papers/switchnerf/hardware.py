"""Time, memory and energy of both networks on a device: a roofline per traced operation, and a model of gathers from hash tables.

Switch-NeRF is bound by products and by unfused traffic between them: every operation of the trace is costed by the shared roofline.
HMoHE adds table reads. A read moves one sector. Level-major order keeps one level of one expert hot: if that level fits the share of the
L2 that a kernel gets, reads come from the L2 and each table crosses DRAM once per pass; otherwise (or in point order) every read goes to
DRAM. Training adds a read-modify-write per read in the backward pass, and Adam's dense pass over all tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from papers.switchnerf.counts import hmohe_parameters, on_meta, proposal_count, trace_field
from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import PROPOSALS, HMoHE, HMoHEConfig, Proposal
from papers.switchnerf.render import ProposalSampling, SwitchSampling
from papers.switchnerf.switch import NeRFMLP, SwitchConfig, SwitchNeRF
from shared.hardware import Achieved, Device, WorkloadArrays, cost
from shared.workload import Workload, trace

Row: TypeAlias = dict[str, Any]
Order: TypeAlias = Literal["point", "level"]
SECTOR_BYTES = 32  # smallest transfer of an NVIDIA cache
ADAM_BYTES = 28  # per parameter: gradient, weight and two moments read, three written, float32
CHUNK_POINTS = 131_072


@dataclass(frozen=True)
class Assumed:
    """What a device reaches of its peaks where it publishes no calibration, and how gathers use the L2."""

    compute: float
    bandwidth: float
    overhead_s: float
    l2_share: float = 0.5  # of the L2 that one level's table may fill and still stay
    table_bytes: int = 2  # of a table entry's feature: half precision

    def complete(self, device: Device) -> Achieved:
        """The device's own calibration, completed by these."""
        known = device.calibration
        return Achieved(
            None if known.compute_fraction else self.compute,
            None if known.bandwidth_fraction else self.bandwidth,
            None if known.overhead else self.overhead_s,
        )

    def bandwidth_of(self, device: Device) -> float:
        """Achieved share of the memory bandwidth."""
        figure = device.calibration.bandwidth_fraction
        return figure.value if figure else self.bandwidth


def low_precision(field: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The field in ``dtype`` with its gate in float32, as it runs under autocast."""
    field = field.to(dtype)
    for name in ("gate",):
        if hasattr(field, name) and getattr(field, name) is not None:
            getattr(field, name).float()
    return field


@cache
def _traced(kind: str, dtype: torch.dtype, points: int, training: bool) -> Workload:
    """Trace of Switch-NeRF's foreground, its background, or a Mega-NeRF submodule."""
    builders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "switch": (lambda: SwitchNeRF(SwitchConfig()), 3),
        "background": (lambda: NeRFMLP(4), 4),
        "mega": (lambda: NeRFMLP(3), 3),
    }
    build, inputs = builders[kind]
    field = low_precision(on_meta(build), dtype).train(training)
    if kind == "switch" and not training:
        field.train()  # static shapes; without a limit the same products are done, sorted by expert
    x = torch.empty(points, inputs, device="meta", dtype=dtype)
    direction = torch.empty(points, 3, device="meta")
    image = torch.empty(points, device="meta", dtype=torch.int64)

    def run(*arguments: Any) -> None:
        out = field(*arguments)
        if training:
            (out.density.sum() + out.colour.sum() + out.balance).backward()

    return trace(run, x, direction, image, training=training)


def _seconds(arrays: WorkloadArrays, device: Device, assumed: Assumed) -> float:
    return cost(arrays, device, achieved=assumed.complete(device), energy="none").latency_s


@dataclass(frozen=True)
class MLPCost:
    """A network of products: seconds and saved bytes per point, and FLOPs per point of the forward pass."""

    seconds: float
    saved_bytes: float
    flops: float


def mlp_cost(kind: str, device: Device, dtype: str, assumed: Assumed, training: bool) -> MLPCost:
    """Cost per point of ``switch``, ``background`` or ``mega``, in chunks of 131,072 points."""
    workload = _traced(kind, getattr(torch, dtype), CHUNK_POINTS, training)
    seconds = _seconds(WorkloadArrays.from_workload(workload), device, assumed)
    forward = sum(op.flops * op.count for op in workload.ops if op.phase == "forward")
    return MLPCost(seconds / CHUNK_POINTS, workload.saved_bytes / CHUNK_POINTS, forward / CHUNK_POINTS)


@dataclass(frozen=True)
class RayCost:
    """Seconds and FLOPs per ray, and where the seconds go."""

    seconds: float
    flops: float
    parts_s: dict[str, float]
    saved_bytes: float = 0.0

    @property
    def rays_per_s(self) -> float:
        """Throughput."""
        return 1.0 / self.seconds


def switch_ray(
    device: Device, dtype: str, assumed: Assumed, *, training: bool, with_background: bool, kind: str = "switch",
    sampling: SwitchSampling | None = None,
) -> RayCost:  # fmt: skip
    """Switch-NeRF (or ``kind="mega"``) per ray; the background takes half as many samples."""
    sampling = sampling or SwitchSampling()
    samples = sampling.coarse + sampling.fine
    front = mlp_cost(kind, device, dtype, assumed, training)
    parts = {"foreground": samples * front.seconds}
    flops, saved = samples * front.flops, samples * front.saved_bytes
    if with_background:
        back = mlp_cost("background", device, dtype, assumed, training)
        parts["background"] = samples / 2 * back.seconds
        flops, saved = flops + samples / 2 * back.flops, saved + samples / 2 * back.saved_bytes
    return RayCost(sum(parts.values()), flops, parts, saved)


@cache
def _hash_rows(
    config: HMoHEConfig, dtype: torch.dtype, rays: int, samples: int, rounds: tuple[int, ...], training: bool
) -> tuple[Row, ...]:
    """Operations of HMoHE beside its table reads: gate, experts, head, routing, proposals."""
    field = on_meta(lambda: HMoHE(config)).train()
    rows: list[Row] = list(_without_tables(trace_field(field, rays * samples, training=training), dtype))
    for grid, count in zip(PROPOSALS, rounds, strict=True):
        net = on_meta(lambda grid=grid: Proposal(grid))  # type: ignore[misc]

        def run(x: Any, net: nn.Module = net) -> None:
            out = net(x)
            if training:
                out.sum().backward()

        rows += _without_tables(trace(run, torch.empty(rays * count, 3, device="meta"), training=training), dtype)
    return tuple(rows)


def _without_tables(workload: Workload, dtype: torch.dtype) -> Iterable[Row]:
    """The rows of a float32 trace as they run in ``dtype`` (half the bytes), without hash encodings; the gate stays in float32."""
    name, scale = str(dtype).removeprefix("torch."), dtype.itemsize / 4
    for op in workload.ops:
        path = op.module.split(".")
        if "encoding" in path:
            continue
        exact = "gate" in path
        yield {
            "name": op.name, "dtype": "float32" if exact else name, "flops": op.flops, "vector_ops": op.vector_ops, "count": op.count,
            "bytes_read": op.bytes_read * (1 if exact else scale), "bytes_written": op.bytes_written * (1 if exact else scale),
        }  # fmt: skip


@dataclass(frozen=True)
class Gather:
    """Table reads of one grid (or of all experts' grids) in one pass over a batch."""

    reads: float
    level_bytes: float  # the largest level of one expert: what must stay in the L2
    total_bytes: float  # all tables


def gather_s(gather: Gather, device: Device, assumed: Assumed, order: Order) -> tuple[float, bool]:
    """Seconds of the reads, and whether they come from the L2.

    Raises UserError for level order where the device has no L2 bandwidth: a rate that nobody published is not assumed.
    """
    dram = device.bandwidth_bytes_per_s() * assumed.bandwidth_of(device)
    if order == "point" or gather.level_bytes > assumed.l2_share * device.size_bytes("l2"):
        return gather.reads * SECTOR_BYTES / dram, False
    l2 = device.bandwidth_bytes_per_s("l2")
    return max(gather.reads * SECTOR_BYTES / l2, gather.total_bytes / dram), True


def _gathers(config: HMoHEConfig, rays: int, sampling: ProposalSampling, table_bytes: int) -> dict[str, Gather]:
    def of(grids: tuple[GridSpec, ...], points: float) -> Gather:
        largest = max(level.entries for grid in grids for level in grid.level_table())
        size = grids[0].features * table_bytes
        return Gather(points * grids[0].reads, largest * size, sum(grid.entries for grid in grids) * size)

    main = rays * sampling.samples
    parts = {"experts": of(config.experts, main)}
    if len(config.experts) > 1:
        parts["gate"] = of((config.gate,), main)
    for index, (grid, count) in enumerate(zip(PROPOSALS, sampling.rounds, strict=True)):
        parts[f"proposal {index + 1}"] = of((grid,), rays * count)
    return parts


def hmohe_ray(
    config: HMoHEConfig, device: Device, dtype: str, assumed: Assumed, *, training: bool, rays: int, order: Order,
    sampling: ProposalSampling | None = None,
) -> RayCost:  # fmt: skip
    """HMoHE per ray in batches of ``rays``."""
    sampling = sampling or ProposalSampling()
    small = replace(
        config, experts=tuple(replace(grid, log2_size=4) for grid in config.experts)
    )  # tables change no product
    rows = _hash_rows(small, getattr(torch, dtype), rays, sampling.samples, sampling.rounds, training)
    products = _seconds(WorkloadArrays.from_rows(rows), device, assumed)
    parts = {"products and traffic": products / rays}
    for name, gather in _gathers(config, rays, sampling, assumed.table_bytes).items():
        seconds, _ = gather_s(gather, device, assumed, order)
        if training:  # atomic additions into float32 gradients: a read and a write per entry
            width = 4 // assumed.table_bytes
            back = Gather(2 * gather.reads, width * gather.level_bytes, 2 * width * gather.total_bytes)
            seconds += gather_s(back, device, assumed, order)[0]
        parts[f"tables: {name}"] = seconds / rays
    if training:
        bandwidth = device.bandwidth_bytes_per_s() * assumed.bandwidth_of(device)
        parts["Adam"] = hmohe_parameters(config)["total"] * ADAM_BYTES / bandwidth / rays
    flops = sum(row["flops"] * row["count"] for row in rows) / rays
    return RayCost(sum(parts.values()), flops, parts)


def peak_ratio(device: Device, dtype: str, flops_switch: float, reads: float) -> float:
    """Rendering speed-up of the bare roofline: products at the full peak against all reads missing, at the full bandwidth."""
    return (flops_switch / device.op_per_s(dtype)) / (reads * SECTOR_BYTES / device.bandwidth_bytes_per_s())


def hmohe_memory_bytes(config: HMoHEConfig, training: bool) -> dict[str, float]:
    """Weights in half precision; training adds float32 masters, gradients and Adam's moments."""
    total = hmohe_parameters(config)["total"]
    parts = {"half-precision weights": 2.0 * total}
    if training:
        parts |= {"float32 master": 4.0 * total, "Adam moments": 8.0 * total, "float32 gradient": 4.0 * total}
    return parts


def energy_j(device: Device, seconds: float) -> float:
    """Upper bound: the board's power limit for all of the time."""
    return device.power_w("limit") * seconds


def proposal_reads(sampling: ProposalSampling) -> int:
    """Table reads of the proposal rounds per ray."""
    return sum(proposal_count(i).reads * count for i, count in enumerate(sampling.rounds))
