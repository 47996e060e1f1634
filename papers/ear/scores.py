"""Zero-shot scores of adaptors: spectral ones (heading 3.3) and the usual proxies, each larger for a better candidate as published.

The paper says only "spectral analysis"; the score that we take is the condition number of the neural tangent kernel,
S = -log(lambda_max / lambda_min). Proxies follow their publications; signs are theirs (jacob_cov and zico as printed).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from papers.ear.hdc import grid_pool
from papers.ear.learner import AdaptorNet, Features, rebundle, take, warm_statistics
from shared.errors import unknown

EIGEN_FLOOR = 1e-12
JACOB_K = 1e-5

SPECTRAL = ("ntk_cond", "ntk_trace", "gram_rank", "gram_min", "gram_slope", "alignment")
GRADIENT = ("grad_norm", "snip", "synflow", "jacob_cov", "zico")
SCORES = (*SPECTRAL, *GRADIENT, "params", "macs")


def ntk(net: AdaptorNet, taps: Features, *, seed: int = 0) -> Tensor:
    """J J^T (m, m) of f_i = <l2norm(h(x_i)), v> with v ~ N(0, I) fixed, J over all adaptor parameters, in evaluation mode."""
    v = torch.randn(net.classifier.shape[1], generator=torch.Generator().manual_seed(seed))
    parameters = {name: p.detach() for name, p in net.adaptor.named_parameters()}
    others = dict(net.adaptor.named_buffers())
    net.eval()

    def output(parameters: dict[str, Tensor], sample: tuple[Tensor, ...]) -> Tensor:
        adapted = functional_call(net.adaptor, (parameters, others), ([t.unsqueeze(0) for t in sample],))
        grid = net.hd.settings.grid
        u = [None if t is None else F.normalize(grid_pool(t, grid), dim=1) for t in adapted]
        return (F.normalize(net.hd.project(u), dim=1) @ v).squeeze()

    rows = vmap(grad(output), in_dims=(None, 0))(parameters, tuple(taps))
    jacobian = torch.cat([r.flatten(1) for r in rows.values()], 1)
    return jacobian @ jacobian.T


def log_condition(kernel: Tensor) -> float:
    """log(lambda_max / lambda_min) of a symmetric matrix, eigenvalues clamped from below."""
    values = torch.linalg.eigvalsh(kernel.double()).clamp_min(EIGEN_FLOOR)
    return float(torch.log(values[-1] / values[0]))


def centred_spectrum(h: Tensor) -> Tensor:
    """Eigenvalues of the centred Gram matrix of unit-length h (n, D), largest first, without the zero that centring makes."""
    centred = (h - h.mean(0)).double()
    small = centred @ centred.T if len(h) <= h.shape[1] else centred.T @ centred
    return torch.linalg.eigvalsh(small).flip(0)[:-1].clamp_min(EIGEN_FLOOR)


def entropy_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised spectrum: the effective number of dimensions."""
    p = spectrum / spectrum.sum()
    return float(torch.exp(-(p * torch.log(p)).sum()))


def power_law_slope(spectrum: Tensor) -> float:
    """Slope of log eigenvalue over log rank, by least squares (negative: decaying)."""
    x = torch.log(torch.arange(1, len(spectrum) + 1, dtype=torch.float64))
    y = torch.log(spectrum)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def kernel_alignment(h: Tensor, labels: Tensor) -> float:
    """Cosine between the centred Gram matrix of h and that of the labels."""
    same = (labels[:, None] == labels[None]).double()
    gram = (h @ h.T).double()

    def centre(k: Tensor) -> Tensor:
        return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()

    a, b = centre(gram), centre(same)
    return float((a * b).sum() / (a.norm() * b.norm()))


def jacob_cov(jacobian: Tensor) -> float:
    """-sum(log(lambda + k) + 1 / (lambda + k)) over the eigenvalues of the rows' correlation (NASWOT, first version)."""
    values = torch.linalg.eigvalsh(torch.corrcoef(jacobian.double()))
    return float(-(torch.log(values.clamp_min(0) + JACOB_K) + 1 / (values.clamp_min(0) + JACOB_K)).sum())


def synflow(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """SynFlow with |weights|, batch normalisation switched off, an input of ones, in float64: sum of theta * dR/dtheta.

    ``module`` maps ``inputs`` (whose values are not used) to a tensor or a list of tensors; R is the sum of all of it.
    """
    twin = _without_norm(copy.deepcopy(module)).double()
    with torch.no_grad():
        for p in twin.parameters():
            p.abs_()
    out = (
        twin([torch.ones_like(t[:1], dtype=torch.float64) for t in inputs])
        if len(inputs) > 1
        else twin(torch.ones_like(inputs[0][:1], dtype=torch.float64))
    )
    total = sum(t.sum() for t in ([out] if isinstance(out, Tensor) else out) if t is not None)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    if not parameters:
        return torch.zeros((), dtype=torch.float64)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return sum(
        ((p * g).sum() for p, g in zip(parameters, grads, strict=True) if g is not None), torch.zeros(())
    ).detach()


def _without_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())
        else:
            _without_norm(child)
    return module


def zico(batch_grads: Sequence[Sequence[Tensor]]) -> float:
    """Sum over layers of log(sum over weights of mean|g| / std g) across at least two batches; weights with no spread are skipped."""
    total = 0.0
    for layer in zip(*batch_grads, strict=True):
        g = torch.stack([x.detach().flatten().double() for x in layer])
        spread = g.std(0, unbiased=False)
        live = spread > 0
        if live.any():
            total += float(torch.log((g.abs().mean(0)[live] / spread[live]).sum()))
    return total


def _weight_grads(net: AdaptorNet, taps: Features, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Convolution weights and their gradients of the cross-entropy, batch statistics of this batch."""
    weights = [m.weight for m in net.adaptor.modules() if isinstance(m, nn.Conv2d)]
    if not weights:
        return [], []
    net.train()
    loss = F.cross_entropy(net(taps), labels)
    grads = [g.detach() for g in torch.autograd.grad(loss, weights)]
    net.eval()
    return [w.detach() for w in weights], grads


def score(net: AdaptorNet, name: str, taps: Features, labels: Tensor, *, samples: int = 16, seed: int = 0) -> float:
    """One zero-shot score of an untrained candidate whose batch statistics exist (:func:`prepare`).

    Args:
        net: the candidate.
        name: one of :data:`SCORES`.
        taps, labels: the proxy batch (256 images of the new domain).
        samples: m images for the tangent kernel.
    """
    if name == "params":
        return float(net.adaptor.architecture.params(net.adaptor_channels))
    if name == "macs":
        return float(net.adaptor.architecture.macs(net.adaptor_channels, [t.shape[2] * t.shape[3] for t in taps]))
    if name in ("ntk_cond", "ntk_trace"):
        kernel = ntk(net, take(taps, slice(0, samples)), seed=seed)
        return -log_condition(kernel) if name == "ntk_cond" else float(torch.log(kernel.trace().clamp_min(EIGEN_FLOOR)))
    if name in ("gram_rank", "gram_min", "gram_slope", "alignment"):
        h = net.embed_all(taps)
        if name == "alignment":
            return kernel_alignment(h, labels)
        spectrum = centred_spectrum(h)
        return {"gram_rank": entropy_rank, "gram_min": lambda s: float(s[-1]), "gram_slope": power_law_slope}[name](
            spectrum
        )
    if name == "synflow":
        return float(torch.log(synflow(net.adaptor, taps).clamp_min(EIGEN_FLOOR)))
    if name == "jacob_cov":
        inputs = [t[:64].clone().requires_grad_(True) for t in taps]
        used = [t for t, op in zip(inputs, net.adaptor.architecture.ops, strict=True) if op.kind != "skip"]
        grads = torch.autograd.grad(net(inputs).sum(), used)
        return jacob_cov(torch.cat([g.flatten(1) for g in grads], 1))
    if name in ("grad_norm", "snip"):
        weights, grads = _weight_grads(net, taps, labels)
        if name == "grad_norm":
            return float(sum(g.norm() for g in grads))
        return float(sum((w * g).abs().sum() for w, g in zip(weights, grads, strict=True)))
    if name == "zico":
        parts = [slice(i, i + 64) for i in range(0, len(labels) - 63, 64)]
        return zico([_weight_grads(net, take(taps, part), labels[part])[1] for part in parts])
    raise unknown("score", name, SCORES)


def prepare(net: AdaptorNet, taps: Features, labels: Tensor) -> AdaptorNet:
    """Batch statistics by forward passes and C by bundling: what the scores need of an untrained candidate."""
    warm_statistics(net, taps)
    rebundle(net, taps, labels)
    return net
