"""What a user of other tools would run: snnTorch's recurrent leaky layer, written out from its documentation, and a plain torch loop.

snnTorch's zero reset differs from the liquid's: a step after a spike loses its whole update, the new input included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from papers.lsm.encoder import Liquid
from papers.lsm.gpu import step_loop
from shared.measure import measure


class RecurrentLeaky(nn.Module):
    """``fc`` and ``RLeaky(all_to_all=True, reset_mechanism="zero")``: U' = bU + I + V(S) less R times the same, with R from the last U."""

    def __init__(self, liquid: Liquid) -> None:
        super().__init__()
        w = liquid.weights
        self.fc = nn.Linear(w.num_inputs, w.num_neurons, bias=False)
        self.recurrent = nn.Linear(w.num_neurons, w.num_neurons, bias=False)
        self.fc.weight.data.copy_(w.input.T)
        self.recurrent.weight.data.copy_(w.recurrent.T)
        self.beta, self.threshold = liquid.decay, torch.tensor(liquid.threshold).float()

    def step(self, current: Tensor, spikes: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and potential after one step."""
        reset = ((potential - self.threshold) > 0).float()
        updated = self.beta * potential + current + self.recurrent(spikes)
        potential = updated - reset * updated
        return ((potential - self.threshold) > 0).float(), potential

    def forward(self, x: Tensor) -> Tensor:
        """Counts (B, N) of spike trains (B, T, n_in) by the loop that its tutorials show."""
        spikes = potential = torch.zeros(x.shape[0], self.fc.out_features)
        record = []
        for t in range(x.shape[1]):
            spikes, potential = self.step(self.fc(x[:, t]), spikes, potential)
            record.append(spikes)
        return torch.stack(record).sum(0)


def measure_cpu(liquid: Liquid, spikes: Tensor, *, backend: str, threads: int, rounds: int = 15) -> dict[str, Any]:
    """Times of one encode by ``backend`` and by both loops on ``threads`` threads, alternating; counts that differ from the plain loop's.

    The loops get their input as float32 before the clock starts; ours takes the spikes as they are.
    """
    peer, w = RecurrentLeaky(liquid), liquid.weights
    floats = spikes.float()
    decay, threshold = torch.tensor(liquid.decay).float().item(), torch.tensor(liquid.threshold).float().item()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            functions = {
                "ours": lambda: liquid.encode(spikes, backend=backend),
                "torch loop": lambda: step_loop(floats, w.input, w.recurrent, decay, threshold),
                "snnTorch update": lambda: peer(floats),
            }
            counts = {name: function().to(torch.int16) for name, function in functions.items()}
            timings = measure(functions, rounds=rounds, min_round_s=0.05)
    finally:
        torch.set_num_threads(before)
    result: dict[str, Any] = {"device": timings.device, "seconds": {n: t.median_s for n, t in timings.by_name.items()}}
    for name in ("torch loop", "snnTorch update"):
        ratio = timings.ratio(name, "ours")
        result[name] = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
        result[f"{name}: counts that differ"] = int((counts[name] != counts["ours"]).sum())
    return result
