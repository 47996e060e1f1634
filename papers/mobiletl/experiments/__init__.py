"""What is run to settle the claims of MobileTL, cheapest first: counts, the device model, measurements, training."""

from papers.mobiletl.experiments.counting import (
    block,
    calibrated_flops,
    derivative,
    flops,
    memory,
    motivation,
    proxyless,
    saved_tensors,
)
from papers.mobiletl.experiments.halves import half_cifar10, reference_transfer
from papers.mobiletl.experiments.measuring import cpu_time, gpu_measurements, reference_measurements
from papers.mobiletl.experiments.modelling import step_latency
from papers.mobiletl.experiments.training import real_transfer, stand_in, stand_in_idx

__all__ = [
    "block",
    "calibrated_flops",
    "cpu_time",
    "derivative",
    "flops",
    "gpu_measurements",
    "half_cifar10",
    "memory",
    "motivation",
    "proxyless",
    "real_transfer",
    "reference_measurements",
    "reference_transfer",
    "saved_tensors",
    "stand_in",
    "stand_in_idx",
    "step_latency",
]
