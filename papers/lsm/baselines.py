"""What the liquid is compared with: the same network trained by back-propagation through time (SRNN), with a linear or a spiking output,
and a plain recurrent network. The scan keeps the loop small: input products of all steps in one, gradients by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import contrastive

SURROGATE_WIDTH = 0.25  # `lens` of the official scripts: ds/du = 1 / (2 lens) where |u - V_th| < lens


class Scan(torch.autograd.Function):
    """Spikes (T, B, N) of LIF neurons from currents (T, B, N) and recurrent weights (N, N), with the rectangular surrogate."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, w_rec: Tensor, decay: float, threshold: float) -> Tensor:
        steps, batch, neurons = current.shape
        potentials, spikes = torch.empty_like(current), torch.empty_like(current)
        u, s = current.new_zeros(batch, neurons), current.new_zeros(batch, neurons)
        for t in range(steps):
            u = torch.addmm(current[t], s, w_rec) + decay * u * (1 - s)
            s = (u > threshold).to(u.dtype)
            potentials[t], spikes[t] = u, s
        ctx.save_for_backward(potentials, spikes, w_rec)
        ctx.decay, ctx.threshold = decay, threshold
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        potentials, spikes, w_rec = ctx.saved_tensors
        grad = gradients[0]
        slope = ((potentials - ctx.threshold).abs() < SURROGATE_WIDTH).to(grad.dtype) / (2 * SURROGATE_WIDTH)
        kept = ctx.decay * (1 - spikes)
        result = torch.empty_like(potentials)
        du = torch.zeros_like(grad[0])
        for t in range(len(grad) - 1, -1, -1):
            ds = torch.addmm(grad[t], du, w_rec.T) - ctx.decay * potentials[t] * du
            du = ds * slope[t] + du * kept[t]
            result[t] = du
        grad_w = spikes[:-1].flatten(0, 1).T @ result[1:].flatten(0, 1)
        return result, grad_w, None, None


class SRNN(nn.Module):
    """The liquid's equation with trained W_in and W_rec, started from the same random statistics times ``const``."""

    def __init__(self, inputs: int, neurons: int, *, decay: float, v_th: float, const: float, seed: int) -> None:
        super().__init__()
        w = gaussian(inputs, neurons, seed)
        self.w_in, self.w_rec = nn.Parameter(const * w.input), nn.Parameter(const * w.recurrent)
        self.decay, self.v_th = decay, v_th

    def spikes(self, x: Tensor) -> Tensor:
        """(T, B, N) from spike trains (B, T, n_in)."""
        return Scan.apply(x.transpose(0, 1).float() @ self.w_in, self.w_rec, self.decay, self.v_th)

    def forward(self, x: Tensor) -> Tensor:
        """Mean spikes per step (B, N)."""
        return self.spikes(x).mean(0)


class LinearOutput(nn.Module):
    """SRNN-ANN: a linear layer on the mean spikes."""

    def __init__(self, body: SRNN, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(body.w_in.shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * 10.0)  # spike rates are of the order of 0.1


class SpikingOutput(nn.Module):
    """SRNN-SNN: LIF output units driven by the hidden spikes; the score is their spike count over T."""

    def __init__(self, body: SRNN, classes: int, *, decay: float) -> None:
        super().__init__()
        neurons = body.w_in.shape[1]
        self.body, self.decay = body, decay
        self.weight = nn.Parameter(torch.empty(neurons, classes).uniform_(-1, 1) / neurons**0.5)

    def forward(self, x: Tensor) -> Tensor:
        silent = self.weight.new_zeros(self.weight.shape[1], self.weight.shape[1])
        return Scan.apply(self.body.spikes(x) @ self.weight, silent, self.decay, self.body.v_th).mean(0)


class PlainRNN(nn.Module):
    """Elman network, last state to a linear layer; ``steps`` limits what it reads."""

    def __init__(self, inputs: int, neurons: int, classes: int, steps: int | None = None) -> None:
        super().__init__()
        self.rnn, self.head, self.steps = nn.RNN(inputs, neurons, batch_first=True), nn.Linear(neurons, classes), steps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, : self.steps].float())[0][:, -1])


def train_classifier(
    model: nn.Module, parts: tuple[tuple[Tensor, Tensor], ...], *, epochs: int, batch: int, lr: float, seed: int,
    mse: bool = False, progress: Callable[[int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Adam on the training part; the epoch with the best validation accuracy is scored on the test part, the best test epoch beside it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    (x, y), val, test = parts
    best = {"val": -1.0, "test": 0.0, "test_selected": 0.0}
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad(set_to_none=True)
            scores = model(x[chosen])
            target = F.one_hot(y[chosen], scores.shape[1]).float()
            loss = F.mse_loss(scores, target) if mse else F.cross_entropy(scores, y[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            scored = [float((model(a).argmax(1) == b).double().mean()) for a, b in (val, test)]
        if scored[0] >= best["val"]:
            best = {**best, "val": scored[0], "test": scored[1]}
        best["test_selected"] = max(best["test_selected"], scored[1])
        if progress is not None:
            progress(epoch + 1)
    return best


class SpikingCLIP(nn.Module):
    """SRNN-CLIP: two trained spiking encoders with a linear head each."""

    def __init__(self, audio: SRNN, image: SRNN, dim: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleList([audio, image])
        self.heads = nn.ModuleList([nn.Linear(b.w_in.shape[1], dim) for b in (audio, image)])

    def embed(self, index: int, x: Tensor) -> Tensor:
        return F.gelu(self.heads[index](self.bodies[index](x) * 10.0))


def train_clip(
    model: SpikingCLIP, audio: Tensor, image: Tensor, labels: Tensor, *, epochs: int, batch: int, lr: float, tau: float, seed: int,
    each_epoch: Callable[[int], None],
) -> None:  # fmt: skip
    """Contrastive training of everything on paired spike trains (B, T, n), the loss that the liquid's heads get."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            optimizer.zero_grad(set_to_none=True)
            a, v = model.embed(0, audio[chosen]), model.embed(1, image[chosen])
            contrastive(a, v, labels[chosen], tau=tau).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        each_epoch(epoch)
