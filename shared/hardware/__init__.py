"""Devices as data, and what a workload costs on them: roofline, energy, on-chip memory, overlap, collectives, sensitivity."""

from shared.hardware.arrays import WorkloadArrays
from shared.hardware.batch import IDEAL, Achieved, ConstantPower, DeviceBatch
from shared.hardware.buffers import Buffer, Buffers
from shared.hardware.checks import CapacityError, PhysicsError
from shared.hardware.collectives import AlphaBeta
from shared.hardware.device import Device, list_devices, load_device
from shared.hardware.figure import Figure
from shared.hardware.overlap import Hop, double_buffered_latency, streamed_latency, transfer_s
from shared.hardware.roofline import BatchCost, Cost, cost, cost_batch
from shared.hardware.sensitivity import Sensitivity, Spread, Uncertain, latin_hypercube, one_at_a_time

__all__ = [
    "IDEAL",
    "Achieved",
    "AlphaBeta",
    "BatchCost",
    "Buffer",
    "Buffers",
    "CapacityError",
    "ConstantPower",
    "Cost",
    "Device",
    "DeviceBatch",
    "Figure",
    "Hop",
    "PhysicsError",
    "Sensitivity",
    "Spread",
    "Uncertain",
    "WorkloadArrays",
    "cost",
    "cost_batch",
    "double_buffered_latency",
    "latin_hypercube",
    "list_devices",
    "load_device",
    "one_at_a_time",
    "streamed_latency",
    "transfer_s",
]
