"""Time and peak memory of real code on the real host, as ratios inside one run.

Machines are shared and noisy, so nothing here is judged as a bare time: the functions to compare run in alternation, and the ratio of
each round is what is reported. Importable without hydra and wandb.
"""

from shared.measure.memory import peak_allocated_bytes
from shared.measure.timing import Ratio, Timing, Timings, measure

__all__ = ["Ratio", "Timing", "Timings", "measure", "peak_allocated_bytes"]
