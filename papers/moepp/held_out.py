"""The layer of routed experts among the models that no calibration has seen (:mod:`shared.calibrate.models`).

The vanilla layer at the width of the 0.6B model, by grouped products: every assignment is computed, whatever the router says, so what is
traced is what runs. In MoE++ the routing decides how many rows the products have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.moepp import MoE, paths
from shared.calibrate.models import Built, HeldOut

TOKENS = 64  # of a sequence


class Grouped(nn.Module):
    """Route, then :func:`papers.moepp.paths.grouped`: what ``MoE(path="grouped")`` runs on a GPU that has no Triton, without autocast,
    which has no meta device."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        layer = self.layer
        gates, ids = F.linear(x.float(), layer.router.weight.float()).softmax(-1).topk(layer.k, -1)
        return paths.grouped(x, ids, gates, layer.w_in, layer.w_out)


def _build(batch: int, dtype: torch.dtype, device: str) -> Built:
    with torch.device(device):
        layer = MoE(768, 2048, 8, path="grouped").to(dtype).eval()
        return Grouped(layer), (torch.randn(TOKENS * batch, 768, dtype=dtype),)


def held_out_models() -> list[HeldOut]:
    """In bfloat16 alone: torch groups products of no other precision on a GPU."""
    return [HeldOut("moepp_layer_768", _build, dtypes=("bf16",))]
