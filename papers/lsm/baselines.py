"""What the liquid is compared with: the same network trained by back-propagation through time (SRNN), with a linear or a spiking output,
and a plain recurrent network. The scans keep the loops small: input products of all steps in one, gradients by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import contrastive

EVALUATED = 100  # samples at once
SURROGATE_WIDTH = 0.25  # `lens` of the official scripts: ds/du = 1 / (2 lens) where |u - V_th| < lens


class Scan(torch.autograd.Function):
    """Spikes (T, B, N) of LIF neurons from currents (T, B, N) and recurrent weights (N, N), with the rectangular surrogate.

    What is element-wise is compiled for float32 on a CPU (:mod:`papers.lsm.scan_kernel`), else torch's.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, w_rec: Tensor, decay: float, threshold: float) -> Tensor:
        potentials, spikes = torch.empty_like(current), torch.empty_like(current)
        u, s = torch.zeros_like(current[0]), torch.zeros_like(current[0])
        if _compiled(current):
            from papers.lsm.scan_kernel import step

            product, all_u, all_s = torch.empty_like(u), potentials.numpy(), spikes.numpy()
            array, last_u, last_s = product.numpy(), u.numpy(), s.numpy()
            a, v_th = np.float32(decay), np.float32(threshold)
            for t in range(len(current)):
                torch.addmm(current[t], s, w_rec, out=product)
                step(array, last_u, last_s, a, v_th, all_u[t], all_s[t])
                s, last_u, last_s = spikes[t], all_u[t], all_s[t]
        else:
            for t in range(len(current)):
                u = torch.addmm(current[t], s, w_rec) + decay * u * (1 - s)
                s = (u > threshold).to(u.dtype)
                potentials[t], spikes[t] = u, s
        ctx.save_for_backward(potentials, spikes, w_rec)
        ctx.decay, ctx.threshold = decay, threshold
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        potentials, spikes, w_rec = ctx.saved_tensors
        grad, transposed = gradients[0], w_rec.T.contiguous()
        result, du = torch.empty_like(potentials), torch.zeros_like(potentials[0])
        if _compiled(grad):
            from papers.lsm.scan_kernel import step_back

            product, all_du = torch.empty_like(du), result.numpy()
            array, last, u, s = product.numpy(), du.numpy(), potentials.numpy(), spikes.numpy()
            a, v_th, width = np.float32(ctx.decay), np.float32(ctx.threshold), np.float32(SURROGATE_WIDTH)
            for t in range(len(grad) - 1, -1, -1):
                torch.addmm(grad[t], du, transposed, out=product)
                step_back(array, u[t], s[t], last, a, v_th, width, all_du[t])
                du, last = result[t], all_du[t]
        else:
            slope = ((potentials - ctx.threshold).abs() < SURROGATE_WIDTH).to(grad.dtype) / (2 * SURROGATE_WIDTH)
            kept = ctx.decay * (1 - spikes)
            for t in range(len(grad) - 1, -1, -1):
                ds = torch.addmm(grad[t], du, transposed) - ctx.decay * potentials[t] * du
                du = ds * slope[t] + du * kept[t]
                result[t] = du
        return result, spikes[:-1].flatten(0, 1).T @ result[1:].flatten(0, 1), None, None


def _compiled(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and find_spec("numba") is not None


class ElmanScan(torch.autograd.Function):
    """Last state (B, N) of h = tanh(x[t] + h W^T) from input products (T, B, N); one product gives the gradient of W."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, weight: Tensor) -> Tensor:
        states = torch.empty_like(products)
        h, transposed = torch.zeros_like(products[0]), weight.T.contiguous()
        for t in range(len(products)):
            h = torch.addmm(products[t], h, transposed, out=states[t]).tanh_()
        ctx.save_for_backward(states, weight)
        return states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        states, weight = ctx.saved_tensors
        result = 1 - states.square()
        d = gradients[0]
        for t in range(len(states) - 1, -1, -1):
            d = result[t].mul_(d) @ weight
        return result, result[1:].flatten(0, 1).T @ states[:-1].flatten(0, 1)


def _by_step(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, B, n) from (B, T, n), turned while it is still bytes: one product serves all steps."""
    return x.transpose(0, 1).contiguous().to(dtype)


class SRNN(nn.Module):
    """The liquid's equation with trained W_in and W_rec, started from the same random statistics times ``const``."""

    def __init__(self, inputs: int, neurons: int, *, decay: float, v_th: float, const: float, seed: int) -> None:
        super().__init__()
        w = gaussian(inputs, neurons, seed)
        self.w_in, self.w_rec = nn.Parameter(const * w.input), nn.Parameter(const * w.recurrent)
        self.decay, self.v_th = decay, v_th

    def spikes(self, x: Tensor) -> Tensor:
        """(T, B, N) from spike trains (B, T, n_in)."""
        return Scan.apply(_by_step(x, self.w_in.dtype) @ self.w_in, self.w_rec, self.decay, self.v_th)

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
        w_in, w_rec, *biases = self.rnn.parameters()
        products = F.linear(_by_step(x[:, : self.steps], w_in.dtype), w_in, biases[0] + biases[1])
        return self.head(ElmanScan.apply(products, w_rec))


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    # In blocks: states of all steps of a whole set are hundreds of megabytes.
    right = [(model(a).argmax(1) == b) for a, b in zip(x.split(EVALUATED), y.split(EVALUATED), strict=True)]
    return float(torch.cat(right).double().mean())


class Training:
    """Adam on ``loss(chosen)`` of batches of ``number`` items. ``best`` holds ``test()`` of the last epoch with the best ``validate()``."""

    def __init__(
        self, model: nn.Module, number: int, loss: Callable[[Tensor], Tensor], validate: Callable[[], float],
        test: Callable[[], dict[str, float]], *, batch: int, lr: float, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.number, self.loss, self.validate, self.test = model, number, loss, validate, test
        self.batch, self.lr = batch, lr
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.best: dict[str, float] = {"val": -1.0}
        self.epochs = 0

    def run(self, epochs: int, progress: Callable[[], None] = lambda: None) -> None:
        """Train on for so many epochs."""
        for _ in range(epochs):
            self.model.train()
            for chosen in torch.randperm(self.number, generator=self.generator).split(self.batch):
                self.optimizer.zero_grad(set_to_none=True)
                self.loss(chosen).backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
            self.epochs += 1
            self.model.eval()
            with torch.no_grad():
                if (score := self.validate()) >= self.best["val"]:
                    self.best = {"val": score, **self.test(), "epoch": self.epochs, "lr": self.lr}
            progress()


def tune(
    make: Callable[[float], Training], rates: Sequence[float], trial: int, epochs: int, progress: Callable[[], None]
) -> dict[str, float]:
    """Every learning rate for ``trial`` epochs, the best on validation for all ``epochs``: its best epoch."""
    tried = [make(rate) for rate in rates]
    for one in tried:
        one.run(min(trial, epochs), progress)
    best = max(tried, key=lambda one: one.best["val"])
    best.run(max(0, epochs - trial), progress)
    return best.best


def epochs_run(rates: Sequence[float], trial: int, epochs: int) -> int:
    """How many epochs :func:`tune` runs."""
    return len(rates) * min(trial, epochs) + max(0, epochs - trial)


def classifier(
    model: nn.Module, parts: tuple[tuple[Tensor, Tensor], ...], *, batch: int, lr: float, seed: int, mse: bool = False
) -> Training:
    """Training of a classifier on the training part of three, by cross-entropy or squared error."""
    (x, y), val, test = parts

    def loss(chosen: Tensor) -> Tensor:
        scores = model(x[chosen])
        if mse:
            return F.mse_loss(scores, F.one_hot(y[chosen], scores.shape[1]).float())
        return F.cross_entropy(scores, y[chosen])

    return Training(
        model, len(x), loss, lambda: _accuracy(model, *val), lambda: {"test": _accuracy(model, *test)},
        batch=batch, lr=lr, seed=seed,
    )  # fmt: skip


class SpikingCLIP(nn.Module):
    """SRNN-CLIP: two trained spiking encoders with a linear head each."""

    def __init__(self, audio: SRNN, image: SRNN, dim: int) -> None:
        super().__init__()
        self.bodies = nn.ModuleList([audio, image])
        self.heads = nn.ModuleList([nn.Linear(b.w_in.shape[1], dim) for b in (audio, image)])

    def embed(self, index: int, x: Tensor) -> Tensor:
        rates = torch.cat([self.bodies[index](part) for part in x.split(EVALUATED)])
        return F.gelu(self.heads[index](rates * 10.0))


def clip(
    model: SpikingCLIP, train: Sequence[Tensor], labels: Tensor, validate: Callable[[], float], test: Callable[[], dict[str, float]], *,
    batch: int, lr: float, tau: float, seed: int,
) -> Training:  # fmt: skip
    """Contrastive training of everything on paired spike trains (B, T, n) of audio and image: the loss of the liquid's heads."""

    def loss(chosen: Tensor) -> Tensor:
        a, v = (model.embed(i, side[chosen]) for i, side in enumerate(train))
        return contrastive(a, v, labels[chosen], tau=tau)

    return Training(model, len(labels), loss, validate, test, batch=batch, lr=lr, seed=seed)
