"""The two networks: equivalences between routed and plain fields, and what rendering makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import CONFIG_S, HMoHE, HMoHEConfig, Proposal, homogeneous
from papers.switchnerf.rays import Ellipsoid, Rays
from papers.switchnerf.render import (
    HMoHERenderer,
    ProposalSampling,
    SwitchRenderer,
    SwitchSampling,
    anneal_exponent,
)
from papers.switchnerf.switch import FieldOutput, NeRFMLP, SwitchConfig, SwitchNeRF, background

SMALL = SwitchConfig(4, 16, 4, 1, 4, 2, 8, 0, chunk=64, density_noise=0.0)


def _points(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, generator=g), F.normalize(torch.randn(n, 3, generator=g), dim=-1)


def _lively(field: torch.nn.Module) -> torch.nn.Module:
    """Tables start near zero; larger entries make differences visible."""
    with torch.no_grad():
        for name, p in field.named_parameters():
            if name.endswith("table"):
                p.normal_()
    return field


def test_one_expert_is_the_plain_hash_field_bit_for_bit() -> None:
    config = homogeneous(CONFIG_S, 8, 64, experts=1)
    field = _lively(HMoHE(config))
    x, d = _points()
    out = field(x, d)
    h = field.encoding(x)  # type: ignore[operator]
    first, second = field.experts.layers  # type: ignore[union-attr, misc]
    y = F.linear(torch.relu(F.linear(h, first.weight[0].t())), second.weight[0].t())
    assert torch.equal(out.density, F.softplus(y[:, 0] - 1))
    assert torch.equal(field(x, d).density, field.eval()(x, d).density)
    assert out.balance.item() == 0.0


def test_equal_ranges_make_a_homogeneous_field_bit_for_bit() -> None:
    same = replace(CONFIG_S, experts=(GridSpec(4, 16, 256, 12),) * 4)
    fields = []
    for config in (same, homogeneous(CONFIG_S, 16, 256)):
        torch.manual_seed(1)
        fields.append(HMoHE(config))
    x, d = _points()
    assert torch.equal(fields[0](x, d).colour, fields[1](x, d).colour)


def test_evaluation_equals_every_expert_on_every_point_and_a_mask() -> None:
    field = _lively(HMoHE(CONFIG_S)).eval()
    x, d = _points()
    got = field(x, d)
    p = field.probabilities(x)  # type: ignore[operator]
    value, chosen = p.max(-1)
    assert len(chosen.unique()) > 1
    want = torch.zeros(len(x), 16)
    for e in range(4):
        offsets = torch.zeros(5, dtype=torch.int64)
        offsets[e + 1 :] = len(x)
        h = field.encoding(x, offsets)  # type: ignore[operator]
        first, second = field.experts.layers  # type: ignore[union-attr, misc]
        y = torch.relu(h @ first.weight[e]) @ second.weight[e]
        want = torch.where((chosen == e)[:, None], value[:, None] * y, want)
    torch.testing.assert_close(got.density, F.softplus(want[:, 0] - 1), rtol=1e-4, atol=1e-6)
    assert torch.equal(got.expert, chosen)
    assert got.kept.all()


def test_permuting_the_experts_changes_nothing() -> None:
    torch.manual_seed(0)
    field = _lively(HMoHE(homogeneous(CONFIG_S, 16, 128))).eval()
    assert isinstance(field, HMoHE)
    order = [2, 0, 3, 1]
    other = HMoHE(field.config).eval()
    state = field.state_dict()
    entries = field.encoding.layout.entries // 4
    state["encoding.table"] = torch.cat([state["encoding.table"][e * entries : (e + 1) * entries] for e in order])
    for name in ("experts.layers.0.weight", "experts.layers.1.weight", "gate.mlp.2.weight"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    x, d = _points()
    a, b = field(x, d), other(x, d)
    assert len(a.expert.unique()) > 1
    torch.testing.assert_close(a.colour, b.colour, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.density, b.density, rtol=1e-4, atol=1e-6)


def test_a_fixed_partition_trains_only_its_own_expert() -> None:
    field = HMoHE(CONFIG_S)
    x, d = _points()
    field(x, d, expert=torch.full((len(x),), 2)).colour.sum().backward()
    for e in range(4):
        weight: Any = field.experts.layers[0].weight
        used = weight.grad[e].abs().sum() > 0
        assert bool(used) == (e == 2)


def test_switch_nerf_routes_by_chunk_with_a_capacity_each() -> None:
    field = SwitchNeRF(SMALL)
    x, d = _points(150)  # chunks of 64, 64 and 22: capacities 16, 16 and 5
    out = field(x, d)
    for start, size, slots in ((0, 64, 16), (64, 64, 16), (128, 22, 6)):
        part = slice(start, start + size)
        for e in range(4):
            assert int((out.expert[part] == e)[out.kept[part]].sum()) <= slots
    assert field.eval()(x, d).kept.all()


def test_a_chunk_of_switch_nerf_compiles_into_one_graph() -> None:
    torch.manual_seed(0)
    net = SwitchNeRF(SwitchConfig(4, 16, 4, 1, chunk=128, images=5, density_noise=0.0)).train()
    x, d = torch.randn(256, 3), F.normalize(torch.randn(256, 3), dim=-1)
    image = torch.arange(256) % 5

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = net(x, d, image)
        loss = out.colour.square().sum() + out.density.sum() + out.balance
        return out.colour.detach(), list(torch.autograd.grad(loss, list(net.parameters())))

    want, gradients = run()
    counter = CompileCounterWithBackend("aot_eager")
    net.points = torch.compile(net.points, dynamic=False, fullgraph=True, backend=counter)  # type: ignore[method-assign]
    got, ours = run()
    assert counter.frame_count == 1  # both chunks run the same graph
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gate_of_switch_nerf_learns_from_the_image_alone() -> None:
    field = SwitchNeRF(SMALL)
    x, d = _points(64)
    field(x, d).colour.sum().backward()
    assert field.gate[0].weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_missing_image_numbers_are_refused() -> None:
    x, d = _points(8)
    with pytest.raises(ValueError, match="image of every point"):
        SwitchNeRF(replace(SMALL, appearance=4))(x, d)
    with pytest.raises(ValueError, match="image of every point"):
        HMoHE(replace(CONFIG_S, appearance=4))(x, d)


class _Slab(torch.nn.Module):
    """A field of constant density and colour inside z < 0, empty above."""

    def forward(self, x: torch.Tensor, direction: torch.Tensor, image: torch.Tensor) -> object:
        from papers.switchnerf.switch import FieldOutput

        inside = (x[:, 2] < 0).float()
        return FieldOutput(1000.0 * inside, torch.full_like(x, 0.25), x.new_zeros(()))


def _down(n: int = 3) -> Rays:
    o = torch.tensor([[0.1, 0.2, 0.5]]).expand(n, 3)
    d = torch.tensor([[0.0, 0.0, -1.0]]).expand(n, 3)
    return Rays(o, d, torch.zeros(n), torch.ones(n), torch.zeros(n, dtype=torch.int64))


def test_switch_renderer_finds_a_surface() -> None:
    region = Ellipsoid(torch.zeros(3), torch.ones(3))
    renderer = SwitchRenderer(_Slab(), None, region, SwitchSampling(32, 64)).eval()  # type: ignore[arg-type]
    out = renderer(_down())
    torch.testing.assert_close(out.colour, torch.full((3, 3), 0.25), atol=1e-4, rtol=0)
    assert out.depth[0].item() == pytest.approx(0.5, abs=0.02)
    assert out.weights.shape == (3, 96)


def test_background_fills_what_the_foreground_leaves() -> None:
    config = replace(SMALL, images=2)
    region = Ellipsoid(torch.tensor([0.0, 0.0, 10.0]), torch.full((3,), 0.1))  # rays miss it: everything is background
    renderer = SwitchRenderer(SwitchNeRF(config), NeRFMLP(4, 16, 2, 1, 2, 2, 0), region, SwitchSampling(8, 16)).eval()
    renderer.behind.head.colour.weight.data.zero_()  # type: ignore[union-attr]
    renderer.behind.head.colour.bias.data.fill_(0.0)  # type: ignore[union-attr]
    rays = _down()
    far = Rays(rays.origin, rays.direction, rays.near, torch.full((3,), 1e5), rays.image)
    torch.testing.assert_close(renderer(far).colour, torch.full((3, 3), 0.5), atol=1e-4, rtol=0)


def test_hmohe_renderer_finds_a_surface_and_gathers_samples() -> None:
    class Field(HMoHE):
        def forward(self, x: Any, direction: Any, image: Any = None, expert: Any = None) -> Any:
            inside = (x[:, 2] < 0.5).float()
            from papers.switchnerf.switch import FieldOutput

            zero = torch.zeros(len(x), dtype=torch.int64)
            return FieldOutput(1000.0 * inside, torch.full_like(x, 0.25), x.new_zeros(()), zero, zero == 0)

    class Density(Proposal):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1000.0 * (x[:, 2] < 0.5)

    sampling = ProposalSampling((64, 32), 16, spacing="linear", padding=1e-4)
    nets = [Density(GridSpec(1, 4, 4, 8)) for _ in range(2)]
    renderer = HMoHERenderer(Field(CONFIG_S), nets, torch.zeros(3), torch.ones(3), sampling).eval()
    out = renderer(_down())
    torch.testing.assert_close(out.colour, torch.full((3, 3), 0.25), atol=1e-5, rtol=0)
    assert out.depth[0].item() == pytest.approx(0.5, abs=0.01)  # one main interval is finer than 1/64
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(3), atol=1e-5, rtol=0)


def test_training_rendering_gives_all_losses_and_gradients() -> None:
    torch.manual_seed(0)
    config: HMoHEConfig = CONFIG_S
    nets = [Proposal(GridSpec(2, 4, 16, 8)), Proposal(GridSpec(2, 4, 32, 8))]
    renderer = HMoHERenderer(HMoHE(config), nets, torch.zeros(3), torch.ones(3), ProposalSampling((16, 8), 8)).train()
    out = renderer(_down(5), step=10)
    assert set(out.losses) == {"balance", "distortion", "interlevel"}
    (out.colour.sum() + sum(out.losses.values())).backward()
    assert all(p.grad is not None for p in renderer.parameters())
    assert set(renderer(_down(5), step=10, update_proposals=False).losses) == {"balance", "distortion"}
    assert 0.0 <= out.dropped_weight() <= 1.0


def test_annealing_starts_uniform_and_ends_at_one() -> None:
    sampling = ProposalSampling()
    assert anneal_exponent(0, sampling) == 0.0
    assert anneal_exponent(100, sampling) == pytest.approx(10 * 0.1 / (9 * 0.1 + 1))
    assert anneal_exponent(5000, sampling) == 1.0


def test_background_network_shares_the_embedding_size() -> None:
    assert background(SwitchConfig(images=7)).head.appearance.num_embeddings == 7  # type: ignore[union-attr]


def test_density_counts_in_the_samplers_unit() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor, *_: Any) -> Any:
            if not _:  # as a proposal
                return torch.full((len(x),), 3.0)
            none = torch.zeros(len(x), dtype=torch.int64)
            return FieldOutput(torch.full((len(x),), 3.0), torch.ones(len(x), 3), torch.zeros(()), none, none == 0)

    sampling = ProposalSampling((4,), 4, "linear", unit=0.25)
    field: Any = Constant()
    renderer = HMoHERenderer(field, [field], torch.zeros(3), torch.ones(3), sampling).eval()
    one = torch.ones(1)
    rays = Rays(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]), 0 * one, one, one.long())
    weights = renderer(rays).weights
    scaled = ProposalSampling((4,), 4, "linear", unit=1.0)
    longer = Rays(
        rays.origin, rays.direction, 4 * rays.near, 4 * rays.far, rays.image
    )  # four times the length: the same
    same = HMoHERenderer(field, [field], torch.zeros(3), torch.ones(3), scaled).eval()(longer).weights
    torch.testing.assert_close(weights, same)
