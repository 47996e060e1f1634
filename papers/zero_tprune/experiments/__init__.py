"""What is run to settle the claims of Zero-TPrune; torch is imported inside, so that a run from the cache stays instant."""

from __future__ import annotations

from papers.zero_tprune.experiments.exact import counts, graph, switching, tables, target
from papers.zero_tprune.experiments.modelled import device_model, device_tables
from papers.zero_tprune.experiments.real import gpu_throughput, imagenet
from papers.zero_tprune.experiments.reference import references
from papers.zero_tprune.experiments.trained import equal_latency, standin

__all__ = [
    "counts",
    "device_model",
    "device_tables",
    "equal_latency",
    "gpu_throughput",
    "graph",
    "imagenet",
    "references",
    "standin",
    "switching",
    "tables",
    "target",
]
