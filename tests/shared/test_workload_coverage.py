"""What the papers' code needs has rules: time loops, hash grids, and operators of all families in both passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.workload import trace


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_loops_over_time_count_every_step() -> None:
    """A leaky integrate-and-fire neuron: decay, add, compare, reset."""

    def spikes(current: torch.Tensor) -> torch.Tensor:
        v = torch.zeros_like(current[0])
        out = []
        for step in current:
            v = 0.9 * v + step
            fired = (v > 1).float()
            v = v * (1 - fired)
            out.append(fired)
        return torch.stack(out)

    steps, n = 7, 30
    work = trace(spikes, meta(steps, n))
    assert work.by_op()["aten.gt"].num_ops == steps
    # 0.9·v, + step, v > 1, 1 - fired, v·(1 - fired); the cast and the stack are copies
    assert work.by_kind()["vector"].vector_ops == steps * 5 * n
    assert work.by_kind()["copy"].bytes_written == 4 * n + steps * 4 * n + 4 * steps * n


def test_a_hash_grid_encoder() -> None:
    """Eight corners a point and level, hashed by xor of products, looked up and blended."""
    points, levels, size, features = 50, 4, 1 << 14, 2

    def encode(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        out = []
        for level in range(levels):
            scaled = x * 16 * 1.5**level
            cell = scaled.floor()
            offset = (scaled - cell)[:, None]
            corners = torch.stack(torch.meshgrid(*[torch.arange(2, device=x.device)] * 3, indexing="ij"), -1).view(8, 3)
            at = cell.long()[:, None] + corners
            index = ((at[..., 0] * 1) ^ (at[..., 1] * 2_654_435_761) ^ (at[..., 2] * 805_459_861)) % size
            weight = torch.where(corners.bool(), offset, 1 - offset).prod(-1, keepdim=True)
            out.append((table[level][index] * weight).sum(1))
        return torch.cat(out, -1)

    for device in ("cpu", "meta"):
        work = trace(encode, torch.rand(points, 3, device=device), torch.randn(levels, size, features, device=device))
        looked_up = work.by_kind()["gather"]
        corners = levels * points * 8
        assert looked_up.bytes_read == corners * (4 * features + 8)  # the features and the index of each corner
        assert looked_up.bytes_written == corners * 4 * features
        assert work.by_op()["aten.bitwise_xor"].vector_ops == 2 * corners
        assert work.macs == 0


EVERYTHING = {
    "conv_transpose": lambda x: F.conv_transpose2d(x, x.new_ones(4, 3, 2, 2), stride=2),
    "conv1d": lambda x: F.conv1d(x[..., 0], x.new_ones(5, 4, 3)),
    "conv3d": lambda x: F.conv3d(x[:, :, None], x.new_ones(5, 4, 1, 3, 3)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "normalize": F.normalize,
    "pools": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2) + F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
    "unfold_fold": lambda x: F.fold(F.unfold(x, 3), (8, 8), 3),
    "pads": lambda x: F.pad(F.pad(x, (1, 1, 1, 1), mode="reflect"), (1, 1, 1, 1), mode="replicate"),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "activations": lambda x: sum(f(x) for f in (F.mish, F.elu, F.selu, F.softplus, F.leaky_relu, F.hardswish, F.logsigmoid, F.tanhshrink)),
    "glu": lambda x: F.glu(x, 1),
    "losses": lambda x: F.mse_loss(x, x * 2) + F.smooth_l1_loss(x, x * 2) + F.huber_loss(x, x * 2) + F.l1_loss(x, x * 2),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float()) + F.binary_cross_entropy(x.sigmoid(), (x > 0).float()),
    "divergence": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "cross_entropy": lambda x: F.cross_entropy(x, x.argmax(1), label_smoothing=0.1),
    "sort": lambda x: x.sort(1).values + x.topk(4, 1).values + x.gather(1, x.argsort(1)),
    "scans": lambda x: x.cumsum(1) + x.cumprod(1) + x.cummax(1).values + x.logcumsumexp(1),
    "scatters": lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x).index_add(0, x.new_zeros(2, dtype=torch.long), x),
    "reduce": lambda x: x.scatter_reduce(1, x.argsort(1), x, "mean") + x.logsumexp(1, True) + x.std(1, keepdim=True) + x.norm(),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "dropout": lambda x: F.dropout2d(F.dropout(x, 0.3), 0.3),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * 2),
    "surrogate": lambda x: x + (x.round() - x).detach(),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3) + torch.addcmul(x, x, x) + torch.where(x > 0, x, 0.0),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0).roll(1, 1)),
    "recurrent": lambda x: nn.GRU(8, 4, device=x.device)(x.flatten(0, 1))[0],
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_operators_of_the_papers_have_rules_in_both_passes(name: str, device: str) -> None:
    x = torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    function = EVERYTHING[name]
    forward = trace(function, x)
    assert forward.ops
    work = trace(lambda: function(x).sum().backward(), training=True)
    assert work.by_phase()["backward"].bytes > 0
