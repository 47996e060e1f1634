"""A liquid among the models that no calibration has seen (:mod:`shared.calibrate.models`): its equation in plain torch.

Written out here, as the encoder's back ends are compiled, or work in place, and may change; what was timed must be what is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.calibrate.models import Built, HeldOut

INPUTS, NEURONS, STEPS = 64, 200, 50
DECAY, THRESHOLD = 0.9, 100.0  # V_th / const of the digits


class Encoder(nn.Module):
    """u[t] = a u[t-1] (1 - s[t-1]) + x[t] W_in + s[t-1] W_rec, s[t] = [u[t] > V_th], as in :mod:`papers.lsm.encoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(INPUTS, NEURONS))
        self.recurrent = nn.Parameter(torch.randn(NEURONS, NEURONS))

    def forward(self, spikes: Tensor) -> Tensor:
        """(B, T, n_in) of zeros and ones -> spike counts (B, N)."""
        batch, steps, _ = spikes.shape
        u = torch.zeros(batch, NEURONS, device=spikes.device)
        s, counts = torch.zeros_like(u), torch.zeros_like(u)
        for t in range(steps):
            u = u * DECAY * (1.0 - s) + (spikes[:, t].float() @ self.input + s @ self.recurrent)
            s = (u > THRESHOLD).float()
            counts += s
        return counts.to(torch.int16)


def _build(batch: int, dtype: torch.dtype, device: str) -> Built:
    with torch.device(device):
        shape = (batch, STEPS, INPUTS)
        spikes = (
            torch.zeros(shape, dtype=torch.uint8) if device == "meta" else (torch.rand(shape) < 0.1).to(torch.uint8)
        )
        return Encoder().eval(), (spikes,)


def held_out_models() -> list[HeldOut]:
    """Potentials are kept in single precision."""
    return [HeldOut("liquid_200", _build, cpu_batches=(1, 64), gpu_batches=(16, 64, 256), dtypes=("fp32",))]
