"""What is run to settle the claims of MoE++, cheapest first: counts and arithmetic, the device model, training, timings on a GPU."""

from papers.moepp.experiments.counting import counts, printed_tables, routing_facts
from papers.moepp.experiments.measured import gpu_parallel, gpu_peers, gpu_speed
from papers.moepp.experiments.modelled import device_model, expert_parallel
from papers.moepp.experiments.training import language_models

__all__ = [
    "counts",
    "device_model",
    "expert_parallel",
    "gpu_parallel",
    "gpu_peers",
    "gpu_speed",
    "language_models",
    "printed_tables",
    "routing_facts",
]
