"""Launches captured once: a model whose forward and backward passes replay as CUDA graphs inside an ordinary training loop."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def graphed(model: Model, images: Tensor) -> Model:
    """Capture a converted model, on an NVIDIA GPU and in training mode, for batches of the shape of ``images``; returns it.

    At small batches a GPU waits for launches; replaying two graphs instead of launching hundreds of kernels takes them away. The loop,
    the loss and the optimizer stay as they are; use ``drop_last=True``, since other shapes do not fit. In evaluation mode the model
    runs as before. What a step keeps stays allocated between steps. Works for :func:`papers.mobiletl.mobiletl` and for its rivals.

    Raises:
        UserError: the model is not on a GPU or not in training mode.
    """
    if not images.is_cuda or not model.training:
        raise UserError("graphed needs a model in training mode and images on an NVIDIA GPU: call model.cuda().train()")
    before = [buffer.clone() for buffer in model.buffers()]
    torch.cuda.make_graphed_callables(model, (images,))
    for buffer, value in zip(model.buffers(), before, strict=True):  # the warm-up moved the running statistics
        buffer.copy_(value)
    model.zero_grad(set_to_none=True)
    return model
