"""What every GPU measurement of this package stands on: sizes, renderers, rays, forms of a call (eager, compiled, captured), speed-ups."""

from __future__ import annotations

import json
import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from papers.switchnerf import city as scene
from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import CONFIG_A, PROPOSALS, HMoHE, HMoHEConfig, Proposal
from papers.switchnerf.rays import Ellipsoid, Rays
from papers.switchnerf.render import HMoHERenderer, ProposalSampling, SwitchRenderer, SwitchSampling
from papers.switchnerf.switch import SwitchConfig, SwitchNeRF, background
from shared.measure import Ratio, Timings, measure

DISTRICTS, LOTS = 16, 12  # of the large city
Call = Callable[[], object]
TINY = replace(
    CONFIG_A,
    experts=tuple(replace(grid, levels=4, n_max=64, log2_size=9) for grid in CONFIG_A.experts[:4]),
    gate=GridSpec(2, 4, 8, 8),
)


@dataclass(frozen=True)
class Training:
    """The training run on a large city: seconds of training per arm, arms, districts along a side."""

    budget_s: float = 60.0
    arms: tuple[str, ...] = ("hmohe",)
    districts: int = DISTRICTS


class Bench:
    """One run: device, sizes, results so far."""

    def __init__(self, out: Path, smoke: bool, training: Training | None = None, claims_only: bool = False) -> None:
        self.out, self.smoke, self.device = out, smoke, "cpu" if smoke else "cuda"
        self.training, self.claims_only = training or Training(), claims_only
        self.results: dict[str, Any] = {"environment": environment(self.device)}
        self.config = TINY if smoke else CONFIG_A
        self.city = self.large_city(DISTRICTS)

    def large_city(self, districts: int) -> scene.City:
        """A city of ``districts`` x ``districts``, twelve by twelve lots each."""
        return scene.build_city(0, 2 if self.smoke else districts, 6 if self.smoke else LOTS)

    def save(self) -> None:
        """Write what there is."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def measure(self, functions: Mapping[str, Call], rounds: int = 10, warmup: int = 3) -> Timings:
        """Alternating timings, devices synchronised by events."""
        if self.smoke:
            return measure(functions, rounds=6, min_round_s=0.0, warmup=1)
        return measure(functions, device=self.device, rounds=rounds, min_round_s=0.02, warmup=warmup)

    def ready(self, section: str, forms: Mapping[str, Callable[[], Call]]) -> dict[str, Call]:
        """Build and run every form once, which compiles it. One that fails is printed, listed under ``failed`` and left out."""
        calls: dict[str, Call] = {}
        for name, build in forms.items():
            with self.listing(f"{section}: {name}"):
                call = build()
                call()
                calls[name] = call
        return calls

    def with_captured(
        self, section: str, calls: dict[str, Call], captured: Mapping[str, Call], rounds: int
    ) -> tuple[Timings, dict[str, Call]]:
        """Timings of ``calls``, measured again together with the CUDA graphs of ``captured``; without them where that fails."""
        timings, both = self.measure(calls, rounds=rounds, warmup=1), dict(calls)
        for name, call in captured.items():
            with self.listing(f"{section}: {name}"):
                both[name] = self.captured(call)
        if len(both) > len(calls):
            with self.listing(f"{section}: with CUDA graphs"):
                return self.measure(both, rounds=rounds, warmup=1), both
        return timings, calls

    @contextmanager
    def listing(self, what: str) -> Iterator[None]:
        """An error inside is printed and listed under ``failed``, and does not go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.results.setdefault("failed", {})[what] = type(error).__name__

    def captured(self, call: Call) -> Call:
        """The same call as one CUDA graph: nothing waits for Python. All its shapes must be static; without CUDA the call itself."""
        if self.smoke:
            return call
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        # Autograd adds gradients up on the stream that first saw a parameter: the one that everything here runs on, see gpu_settings.
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                call()
        except Exception:  # the random generator still believes in the capture
            fresh = torch.Generator(self.device).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)
            raise
        return graph.replay

    def rays(self, count: int, seed: int = 0, far: float | None = None) -> Rays:
        """Camera rays in image order from random views of the city; ``far`` replaces the altitude planes."""
        views = scene.cameras(self.city, 64, seed, 512)
        per_view = -(-count // len(views))
        parts = []
        for number, view in enumerate(views):
            start = (number * 7919) % (512 * 512 - per_view)
            ray = view.rays(0.0, 1e5, number).map(lambda t, s=start: t[s : s + per_view])  # type: ignore[misc]
            parts.append(ray if far is not None else scene.ALTITUDE.bound(ray))
        joined = Rays(*(torch.cat([getattr(p, f) for p in parts])[:count] for f in Rays.__dataclass_fields__))
        return joined.map(lambda t: t.to(self.device))

    def autocast(self) -> torch.autocast:
        """bf16 products on the GPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=not self.smoke)

    def hmohe(
        self,
        config: HMoHEConfig | None = None,
        backend: str = "auto",
        sampling: ProposalSampling | None = None,
        proposals: Sequence[GridSpec] = PROPOSALS,
        half_height: float = 0.1,
    ) -> HMoHERenderer:
        """Config A with its proposals around the city; ``half_height`` of the box that is not contracted."""
        torch.manual_seed(0)
        middle = half = self.city.extent / 2
        if sampling is None:
            sampling = ProposalSampling((16, 8), 8, "linear") if self.smoke else ProposalSampling(spacing="linear")
        grids = [replace(grid, log2_size=8) for grid in proposals] if self.smoke else proposals
        with torch.device(self.device):
            nets = [Proposal(grid, backend=backend) for grid in grids]  # type: ignore[arg-type]
            field = HMoHE(replace(config or self.config, images=512), backend)  # type: ignore[arg-type]
        centre, size = torch.tensor([middle, middle, 0.07]), torch.tensor([half, half, half_height])
        return HMoHERenderer(field, nets, centre, size, sampling).to(self.device)

    def switch(
        self,
        with_background: bool = False,
        compiled: bool = False,
        sampling: SwitchSampling | None = None,
    ) -> SwitchRenderer:
        """Switch-NeRF as released, with or without its background; ``compiled``: a whole chunk of points as one graph of static shapes."""
        torch.manual_seed(0)
        small = SwitchConfig(4, 16, 4, 1, chunk=4096, images=512)
        config = small if self.smoke else SwitchConfig(images=512)
        middle = self.city.extent / 2
        region = Ellipsoid(torch.tensor([middle, middle, 0.2]), torch.tensor([1.6 * middle, 1.6 * middle, 0.8]))
        if sampling is None:
            sampling = SwitchSampling(16, 32) if self.smoke else SwitchSampling()
        with torch.device(self.device):
            network, behind = SwitchNeRF(config), background(config) if with_background else None
        if compiled and not self.smoke:
            network.points = torch.compile(network.points, dynamic=False)  # type: ignore[method-assign]
            if behind is not None:
                behind.compile()
        return SwitchRenderer(network, behind, region, sampling).to(self.device)


@contextmanager
def gpu_settings() -> Iterator[None]:
    """What all timings run under: TF32 for float32 products and, on a GPU, a stream of their own, which CUDA graphs need.

    TF32 is the default of PyTorch 1.10, on which Switch-NeRF's public code runs; both networks have it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def environment(device: str) -> dict[str, Any]:
    """Machine, commit and versions behind the numbers."""
    from shared.runner.environment import environment as whole

    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    code = {key: whole()[key] for key in ("commit", "dirty", "cpu")}
    return {"gpu": gpu, "torch": torch.__version__, "triton": version, "python": platform.python_version(), **code}


def triple(ratio: Ratio) -> list[float]:
    """Median and 95 % interval."""
    return [ratio.median, ratio.low, ratio.high]


def seconds(timings: Timings) -> dict[str, list[float]]:
    """Median and quartiles by name."""
    return {name: [t.median_s, t.q1_s, t.q3_s] for name, t in timings.by_name.items()}


def speedups(timings: Timings, rays: Mapping[str, int]) -> dict[str, list[float]]:
    """``ours/base`` -> how many times more rays per second ``ours`` makes than ``base``, with its interval, for every Switch-NeRF as base.

    Args:
        rays: of one call, by name: forms may take different numbers of rays.
    """
    return {
        f"{name}/{base}": [rays[name] / rays[base] * value for value in triple(timings.ratio(base, name))]
        for name in timings.by_name
        for base in timings.by_name
        if base.startswith("switch")
    }


def rays_per_s(timings: Timings, rays: Mapping[str, int]) -> dict[str, float]:
    """Rays per second by name."""
    return {name: rays[name] / t.median_s for name, t in timings.by_name.items()}
