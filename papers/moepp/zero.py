"""Zero-computation experts (Sec. 3.2): zero, copy and constant, one by one and as one dense mix.

A constant expert gives a1·x + a2·v with (a1, a2) = softmax(W_c·x) (Eq. 5), so a1 = sigmoid((W_c[0] - W_c[1])·x).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from papers.moepp.routing import Experts


class ConstantExperts(nn.Module):
    """The parameters of J constant experts: ``weight`` W_c [J, 2, d] and ``vector`` v [J, d]; 3·d each."""

    def __init__(self, count: int, d_model: int, *, weight_std: float = 0.02, vector_std: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, 2, d_model) * weight_std)
        self.vector = nn.Parameter(torch.randn(count, d_model) * vector_std)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Output of constant expert ``index`` for x [T, d]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mix = torch.softmax(x.to(dtype) @ self.weight[index].to(dtype).t(), -1)
        return (mix[:, :1] * x + mix[:, 1:] * self.vector[index].to(dtype)).to(x.dtype)


def dense_mix(
    x: Tensor, ids: Tensor, gates: Tensor, experts: Experts, weight: Tensor | None = None, vector: Tensor | None = None
) -> Tensor:
    """All zero-computation experts at once: y = s·x + u·V, without dispatch; equal to running them one by one.

    x: [T, d]; ids, gates: [T, K]; an id of N belongs to no expert; weight, vector: those of :class:`ConstantExperts`. s gathers the
    gates of copies and a1 of constants, u those of the constant vectors.
    """
    dtype = torch.promote_types(x.dtype, gates.dtype)
    value = x.to(dtype)
    weights = torch.zeros(x.shape[0], experts.total + 1, dtype=dtype, device=x.device).scatter_add(
        1, ids, gates.to(dtype)
    )
    first_copy = experts.ffn + experts.constant
    on_x = weights[:, first_copy : first_copy + experts.copy].sum(1)
    if weight is None or vector is None:
        return (on_x[:, None] * value).to(x.dtype)
    a1 = torch.sigmoid(value @ (weight[:, 0].to(dtype) - weight[:, 1].to(dtype)).t())
    picked = weights[:, experts.ffn : first_copy]
    on_x = on_x + (picked * a1).sum(1)
    mixed = torch.addcmul((picked * (1 - a1)) @ vector.to(dtype), on_x[:, None], value)
    return mixed.to(x.dtype)
