"""What is run to settle the claims, cheapest first: counts, the energy model, timings, then what is learnt."""

from papers.lsm.experiments.counting import counts, device_weights, printed
from papers.lsm.experiments.energy import energy
from papers.lsm.experiments.learning import comparison, device_map, supervised
from papers.lsm.experiments.pairing import letters, zeroshot
from papers.lsm.experiments.timing import cpu_speed, gpu_speed

__all__ = [
    "comparison", "counts", "cpu_speed", "device_map", "device_weights", "energy", "gpu_speed", "letters", "printed", "supervised",
    "zeroshot",
]  # fmt: skip
