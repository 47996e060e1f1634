"""Expert parallelism over gloo: the same output as on one rank, and exactly rho of the vanilla layer's bytes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from papers.moepp.layer import MoE, MoEPlusPlus
from papers.moepp.parallel import ExpertParallel
from papers.moepp.routing import Experts
from papers.moepp.synthetic import exact_routing
from shared.errors import UserError

RANKS, TOKENS, EXPERTS, TAU = 2, 240, Experts(8, 2, 1, 1), 0.75


def build(vanilla: bool = False) -> MoEPlusPlus:
    torch.manual_seed(0)
    layer = MoE(16, 24, 8) if vanilla else MoEPlusPlus(16, 24, 8, tau=TAU)
    with torch.no_grad():
        layer.router.weight.mul_(20)
    return layer.double()


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(TOKENS, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, vanilla in (("plus", False), ("vanilla", True)):
        for overlap in (True, False):
            layer = ExpertParallel(build(vanilla), overlap=overlap)
            x = inputs(rank).requires_grad_()
            out = layer(x)
            out.y.square().sum().backward()
            found[f"{name} {overlap}"] = [out.y.detach(), x.grad, layer.w_in.grad, layer.layer.router.weight.grad]
        experts = Experts(8) if vanilla else EXPERTS
        ids = exact_routing(TOKENS, 2, experts, TAU, seed=rank)
        layer.compute(inputs(rank), ids, torch.rand(TOKENS, 2, dtype=torch.float64))
        traffic = layer.traffic
        assert traffic is not None
        found[f"{name} traffic"] = (
            traffic.rows_to_others,
            traffic.rows_kept,
            traffic.rows_received,
            traffic.sent_bytes,
        )
    nothing = torch.full((TOKENS, 2), 10)  # copies only
    copied = ExpertParallel(build()).compute(inputs(rank), nothing, torch.full((TOKENS, 2), 0.5, dtype=torch.float64))
    found["copied"] = copied
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["plus", "vanilla"])
@pytest.mark.parametrize("overlap", [True, False])
def test_ranks_agree_with_one_process(found: list[dict[str, Any]], name: str, overlap: bool) -> None:
    """Outputs and input gradients of each rank; expert gradients summed over all tokens; router gradients of each rank's own tokens."""
    layer = build(name == "vanilla")
    x = torch.cat([inputs(rank) for rank in range(RANKS)]).requires_grad_()
    out = layer(x)
    out.y.square().sum().backward()
    assert x.grad is not None
    assert layer.w_in.grad is not None
    torch.testing.assert_close(torch.cat([f[f"{name} {overlap}"][0] for f in found]), out.y)
    torch.testing.assert_close(torch.cat([f[f"{name} {overlap}"][1] for f in found]), x.grad)
    torch.testing.assert_close(torch.cat([f[f"{name} {overlap}"][2] for f in found]), layer.w_in.grad)
    torch.testing.assert_close(sum(f[f"{name} {overlap}"][3] for f in found), layer.router.weight.grad)


def test_traffic_is_exactly_rho(found: list[dict[str, Any]]) -> None:
    """480 assignments a rank: vanilla sends half of them (4 of 8 experts are elsewhere), MoE++ 0.6 of that; no other row moves."""
    rho = EXPERTS.ffn_share(TAU)
    assert rho == pytest.approx(0.6)
    for f in found:
        to_others, kept, received, sent = f["vanilla traffic"]
        assert (to_others, kept, received, sent) == (240, 240, 480, 240 * 16 * 8)
        to_others, kept, received, sent = f["plus traffic"]
        assert (to_others, kept, received) == (144, 144, 288)
        assert sent == pytest.approx(rho * f["vanilla traffic"][3])
    assert sum(f["plus traffic"][2] for f in found) == rho * 2 * TOKENS * RANKS  # rows received in all: rho·K·T·P


def test_zero_computation_rows_stay_at_home(found: list[dict[str, Any]]) -> None:
    for rank, f in enumerate(found):
        torch.testing.assert_close(f["copied"], inputs(rank))


def test_one_rank_is_the_local_layer_bit_for_bit(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = ExpertParallel(build())
        assert torch.equal(parallel(inputs(0)).y, build()(inputs(0)).y)
        assert parallel.traffic is not None
        assert parallel.traffic.sent_bytes == 0
        with pytest.raises(UserError, match="dropless"):
            ExpertParallel(MoEPlusPlus(16, 24, 8, capacity_factor=1.1))
    finally:
        dist.destroy_process_group()
