"""What is timed on a CPU: rendering calls of both full-size networks, and encode calls of both forms."""

from __future__ import annotations

from collections.abc import Callable

import torch

from papers.switchnerf import city as scene
from papers.switchnerf.hashgrid import HashEncoding
from papers.switchnerf.hmohe import CONFIG_A, CONFIG_S, PROPOSALS, HMoHE, Proposal
from papers.switchnerf.rays import Ellipsoid, Rays
from papers.switchnerf.render import HMoHERenderer, ProposalSampling, SwitchRenderer
from papers.switchnerf.switch import SwitchConfig, SwitchNeRF

Calls = dict[str, Callable[[], object]]


def _rays(count: int) -> Rays:
    """Neighbouring rays of one camera over the small city."""
    (view,) = scene.cameras(scene.build_city(0), 1, 0, 512)
    return scene.ALTITUDE.bound(view.rays(0.0, 10.0)).map(lambda t: t[100_000 : 100_000 + count])


def cpu_renderers(switch_rays: int, hmohe_rays: int) -> Calls:
    """Rendering calls ``switch`` (foreground only) and ``hmohe`` (config A), random weights, float32."""
    torch.manual_seed(0)
    region = Ellipsoid(torch.tensor([0.5, 0.5, 0.2]), torch.full((3,), 2.0))
    switch = SwitchRenderer(SwitchNeRF(SwitchConfig()), None, region).eval()
    nets = [Proposal(grid) for grid in PROPOSALS]
    centre, half = torch.tensor([0.5, 0.5, 0.07]), torch.tensor([0.5, 0.5, 0.1])
    ours = HMoHERenderer(HMoHE(CONFIG_A), nets, centre, half, ProposalSampling(spacing="linear")).eval()
    few, many = _rays(switch_rays), _rays(hmohe_rays)
    return {"switch": lambda: switch(few), "hmohe": lambda: ours(many)}


def encode_calls(points: int, threads: int = 2) -> tuple[Calls, Callable[[], None]]:
    """Encode calls ``numba`` and ``reference``, forward and backward, config S's grids in equal segments; and what restores the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(points, 3, generator=generator)
    offsets = torch.linspace(0, points, len(CONFIG_S.experts) + 1).long()

    def call(encoding: HashEncoding, grad: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            encoding.table.grad = None
            encoding(x, offsets).backward(grad)

        return run

    calls: Calls = {}
    for backend in ("numba", "reference"):
        encoding = HashEncoding(CONFIG_S.experts, backend)
        calls[backend] = call(encoding, torch.randn(points, encoding.width, generator=generator))
    return calls, lambda: torch.set_num_threads(before)
