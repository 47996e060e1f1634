"""What is run to settle the claims of Switch-NeRF++, cheapest first.

Torch is imported inside, so that a run from the cache stays instant.
"""

from __future__ import annotations

from papers.switchnerf.experiments.exact import costs, scaling
from papers.switchnerf.experiments.measured import cpu_encode, cpu_rendering, gpu_speed
from papers.switchnerf.experiments.modelled import baseline_model, method_model
from papers.switchnerf.experiments.trained import rendering, surface_field

__all__ = [
    "baseline_model",
    "costs",
    "cpu_encode",
    "cpu_rendering",
    "gpu_speed",
    "method_model",
    "rendering",
    "scaling",
    "surface_field",
]
