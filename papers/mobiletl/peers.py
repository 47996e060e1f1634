"""Other ways to train the last k blocks in less memory, on the same frozen part: checkpoints per block, and a compiler's recomputation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from papers.mobiletl.anatomy import anatomy
from papers.mobiletl.convert import adapt


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False, preserve_rng_state=False)
        return out


def checkpointed(model: nn.Module, blocks: int) -> nn.Module:
    """Plain fine-tuning of the last ``blocks`` blocks that keeps each block's input and computes the rest again.

    The gradients are exact; the second forward pass also updates the norms' running statistics a second time, as
    ``torch.utils.checkpoint`` does with any batch norm.
    """
    tuned = adapt(model, "ft_blocks", blocks)
    for path in anatomy(tuned).top(blocks):
        tuned.set_submodule(path, _Checkpointed(tuned.get_submodule(path)))
    return tuned


def compiled(model: nn.Module, blocks: int) -> nn.Module:
    """Plain fine-tuning compiled by ``torch.compile``, whose min-cut partitioner recomputes cheap maps instead of keeping them."""
    tuned = adapt(model, "ft_blocks", blocks)
    tuned.compile(dynamic=False)
    return tuned
