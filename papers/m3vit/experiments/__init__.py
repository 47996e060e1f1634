"""What is run to settle the claims of M³ViT, cheapest first: counts, printed tables, the accelerator model, training, the GPU."""

from papers.m3vit.experiments.accelerator import design_space, edge_moe, latency, on_chip_memory, switching
from papers.m3vit.experiments.counting import all_tasks, flops, gpu_memory, recount, traced
from papers.m3vit.experiments.gpu import gpu_launches, gpu_timing
from papers.m3vit.experiments.printed import printed_delta_m, printed_energy
from papers.m3vit.experiments.training import multi_task_training, routing_of_trained_model

__all__ = [
    "all_tasks",
    "design_space",
    "edge_moe",
    "flops",
    "gpu_launches",
    "gpu_memory",
    "gpu_timing",
    "latency",
    "multi_task_training",
    "on_chip_memory",
    "printed_delta_m",
    "printed_energy",
    "recount",
    "routing_of_trained_model",
    "switching",
    "traced",
]
