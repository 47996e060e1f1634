"""From config to the objects of the hardware model."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from papers.m3vit.counts import Encoder
    from papers.m3vit.hardware import Accelerator
    from shared.experiment import Context
    from shared.hardware.device import Device

MIB = 2**20
GIGA = 1e9

# Data types that a weight of so many bits can have, in the order of preference.
_DTYPES = {8: ("int8", "fp8"), 16: ("int16", "bf16", "fp16", "fp16_acc32"), 32: ("fp32",)}  # of peaks


def encoder_of(model: Any) -> Encoder:
    """The encoder that the section ``model`` describes."""
    from dataclasses import replace

    from papers.m3vit.counts import ENCODERS
    from shared.errors import unknown

    if model.size not in ENCODERS:
        raise unknown("model.size", model.size, ENCODERS)
    base = ENCODERS[model.size]
    return replace(
        base,
        num_moe_blocks=model.num_moe_blocks,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_hidden=base.expert_hidden if model.expert_hidden is None else model.expert_hidden,
    )


def device_of(cfg: Any) -> Device:
    """The run's device."""
    from omegaconf import OmegaConf

    return _device(json.dumps(OmegaConf.to_container(cfg.device), sort_keys=True))


@lru_cache(maxsize=4096)
def _device(text: str) -> Device:
    """A sensitivity run asks for the same device many times."""
    from shared.hardware.device import load_device

    return load_device(json.loads(text))


def accelerator_of(cfg: Any) -> Accelerator:
    """The accelerator on ``cfg.device``.

    On an FPGA the paper's multiplier array takes the same share of the DSPs as on its board, at the device's clock. Any other device
    reaches the shares of its peaks that its calibration found, or the peaks where it has none.
    """
    from papers.m3vit.hardware import Accelerator

    device, design = device_of(cfg), cfg.hardware
    power = _power_w(device, design)
    off_chip = "flash" if "dram" not in device.memory and "flash" in device.memory else "dram"  # where experts wait
    bandwidth = device.bandwidth_bytes_per_s(off_chip, "read")
    if device.kind == "fpga" and device.compute.clock is not None:
        share = device.figure("fabric.dsp").value / design.board_dsps
        return Accelerator.from_array(
            macs_per_cycle=design.macs_per_cycle * share,
            attention_macs_per_cycle=design.attention_macs_per_cycle * share,
            clock_hz=device.compute.clock.value,
            bandwidth_bytes_per_s=bandwidth,
            power_w=power,
            weight_bits=design.weight_bits,
            router_drain_cycles=design.router_drain_cycles,
        )
    measured = device.calibration
    rate = _matrix_op_per_s(device, design.weight_bits) / 2.0
    if measured and measured.compute_fraction:
        rate *= measured.compute_fraction.value
    if measured and measured.bandwidth_fraction:
        bandwidth *= measured.bandwidth_fraction.value
    return Accelerator(
        macs_per_s=rate,
        attention_macs_per_s=rate,
        clock_hz=device.compute.clock.value if device.compute.clock else 1.0e9,
        bandwidth_bytes_per_s=bandwidth,
        power_w=power,
        weight_bits=design.weight_bits,
        router_drain_cycles=0.0,  # that cycle belongs to the paper's router pipeline
    )


def _matrix_op_per_s(device: Device, weight_bits: int) -> float:
    """Peak of matrix products with weights of so many bits; a device without such a type computes in a wider one.

    Raises:
        UserError: the device has no rate for such weights or wider ones.
    """
    for bits, dtypes in _DTYPES.items():
        if bits < weight_bits:
            continue
        for dtype in dtypes:
            rates = [
                peak.value for name, peak in device.peak.items() if dtype == name.split("_", 1)[-1] or dtype == name
            ]
            if rates:
                return max(rates)
    raise UserError(
        f"device '{device.id}' cannot compute with weights of {weight_bits} bit, its rates are for "
        f"{', '.join(device.peak) or 'nothing'}; try hardware.weight_bits=8 or another device"
    )


def has_power(device: Device, design: Any) -> bool:
    """Whether the energy of a frame can be told at all."""
    return device.id == design.board or device.power.limit is not None


def _power_w(device: Device, design: Any) -> float:
    """Constant power of E = P·t: the paper's figure on its own board, else the power limit; 1 W where nothing is made of it."""
    if device.id == design.board:
        return float(design.power_w)
    return device.power_w("limit") if has_power(device, design) else 1.0


def on_chip_bytes(device: Device) -> float | None:
    """All on-chip memory that a design can hold data in; None where the file gives no size."""
    sizes = [device.size_bytes(level) for level, memory in device.memory.items() if level != "dram" and memory.size]
    return sum(sizes) if sizes else None


def model_error_rel(cfg: Any, ctx: Context, encoder: Encoder, accelerator: Accelerator) -> float | None:
    """Held-out relative error of the latency model.

    On the paper's board: against the dense ViT's published NYUD-v2 latency, since every constant was inferred from PASCAL-Context
    rows. On another device: what its calibration publishes, if anything.
    """
    from papers.m3vit import counts, hardware

    device = device_of(cfg)
    if device.id != cfg.hardware.board:
        measured = device.calibration
        return measured.held_out_error_rel.value if measured and measured.held_out_error_rel else None
    published = ctx.published["latency_nyud_fpga_dense"]
    ours = hardware.compute_latency(encoder.dense(), counts.dataset("nyud").tokens(), accelerator).total_s
    return abs(float(ours) / published - 1.0)
