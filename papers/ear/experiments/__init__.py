"""What is run to settle the claims of EAR, cheapest first: bits and counts, the board model, timings, then training."""

from papers.ear.experiments.counting import boards, counts, false_rate, frozen
from papers.ear.experiments.incremental import cil, dil
from papers.ear.experiments.learning import growth, nas, ood
from papers.ear.experiments.timing import gpu, packed_speed

__all__ = ["boards", "cil", "counts", "dil", "false_rate", "frozen", "gpu", "growth", "nas", "ood", "packed_speed"]
