"""Speed of kernels and of both networks at full size on a CUDA device, and a training run of config A; all numbers in one JSON file.

``python -m papers.switchnerf.gpu --out FILE.json [--only check,encode,render,train,skew,city] [--city-budget-s 120] [--city-arms hmohe]``;
without CUDA, ``--smoke`` runs every line on tiny sizes. Random weights decide no time except where the gate's choice does (``skew``). Rays
are camera rays over the procedural city: uniformly random points have no locality. Needs torch, triton, numpy and scipy only.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from papers.switchnerf import city as scene
from papers.switchnerf.hashgrid import GridSpec, HashEncoding, encode_reference, experts_of
from papers.switchnerf.hmohe import CONFIG_A, PROPOSALS, HMoHE, HMoHEConfig, Proposal
from papers.switchnerf.peers import nerfstudio_encode, scalings
from papers.switchnerf.rays import Ellipsoid, Rays
from papers.switchnerf.render import (
    HMoHERenderer,
    ProposalSampling,
    Renderer,
    Rendering,
    SwitchRenderer,
    SwitchSampling,
)
from papers.switchnerf.switch import SwitchConfig, SwitchNeRF, background
from shared.measure import Ratio, Timings, measure

SECTIONS = ("check", "encode", "render", "train", "skew", "city")
DISTRICTS, LOTS = 16, 12  # of the large city
FULL_RAYS, MICRO_RAYS = 8192, 1024  # a step; what Switch-NeRF takes at once (its recipe's share of one GPU)
TINY = replace(
    CONFIG_A,
    experts=tuple(replace(grid, levels=4, n_max=64, log2_size=9) for grid in CONFIG_A.experts[:4]),
    gate=GridSpec(2, 4, 8, 8),
)


class Bench:
    """One run: device, sizes, results so far."""

    def __init__(
        self, out: Path, smoke: bool, city_budget_s: float = 60.0, city_arms: tuple[str, ...] = ("hmohe",)
    ) -> None:
        self.out, self.smoke, self.device = out, smoke, "cpu" if smoke else "cuda"
        self.city_budget_s, self.city_arms = city_budget_s, city_arms
        self.results: dict[str, Any] = {"environment": environment(self.device)}
        self.config = TINY if smoke else CONFIG_A
        self.city = scene.build_city(0, 2 if smoke else DISTRICTS, 6 if smoke else LOTS)

    def save(self) -> None:
        """Write what there is."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def measure(self, functions: Mapping[str, Callable[[], object]], rounds: int = 10, warmup: int = 3) -> Timings:
        """Alternating timings, devices synchronised by events."""
        if self.smoke:
            return measure(functions, rounds=6, min_round_s=0.0, warmup=1)
        return measure(functions, device=self.device, rounds=rounds, min_round_s=0.02, warmup=warmup)

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
        self, config: HMoHEConfig | None = None, backend: str = "auto", sampling: ProposalSampling | None = None
    ) -> HMoHERenderer:
        """Config A with its proposals around the city."""
        torch.manual_seed(0)
        middle, half = self.city.extent / 2, self.city.extent / 2
        if sampling is None:
            sampling = ProposalSampling((16, 8), 8, "linear") if self.smoke else ProposalSampling(spacing="linear")
        grids = [replace(grid, log2_size=8) for grid in PROPOSALS] if self.smoke else list(PROPOSALS)
        with torch.device(self.device):
            nets = [Proposal(grid, backend=backend) for grid in grids]  # type: ignore[arg-type]
            field = HMoHE(replace(config or self.config, images=512), backend)  # type: ignore[arg-type]
        centre, size = torch.tensor([middle, middle, 0.07]), torch.tensor([half, half, 0.1])
        return HMoHERenderer(field, nets, centre, size, sampling).to(self.device)

    def switch(
        self,
        with_background: bool = False,
        compiled: Literal["", "train", "eval"] = "",
        sampling: SwitchSampling | None = None,
    ) -> SwitchRenderer:
        """Switch-NeRF as released, with or without its background; ``compiled``: what surrounds the routing through torch.compile."""
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
            for name in ("embedded", "_gate"):
                setattr(network, name, torch.compile(getattr(network, name)))
            if compiled == "train":
                network.experts.compile()
            else:  # segments have any length
                network.experts.one = torch.compile(network.experts.one, dynamic=True)  # type: ignore[method-assign]
            network.head.compile()
            if behind is not None:
                behind.compile()
        return SwitchRenderer(network, behind, region, sampling).to(self.device)


def environment(device: str) -> dict[str, Any]:
    """Machine and versions behind the numbers."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": version, "python": platform.python_version()}


def triple(ratio: Ratio) -> list[float]:
    """Median and 95 % interval."""
    return [ratio.median, ratio.low, ratio.high]


def seconds(timings: Timings) -> dict[str, list[float]]:
    """Median and quartiles by name."""
    return {name: [t.median_s, t.q1_s, t.q3_s] for name, t in timings.by_name.items()}


def points_of(bench: Bench, count: int, experts: int, coherent: bool = True) -> tuple[Tensor, Tensor]:
    """Points sorted by expert and equal segments: along camera rays, experts by strips of x; or uniformly random."""
    if coherent:
        rays, cube = bench.rays(count // 16), bench.hmohe(replace(TINY, appearance=0)).cube
        steps = torch.linspace(0.05, 0.95, 16, device=bench.device)
        x = cube(rays.at(rays.near[:, None] + (rays.far - rays.near)[:, None] * steps)).flatten(0, 1)
        chunks = x[x[:, 0].argsort(stable=True)].chunk(experts)
        # Back into ray order inside each strip, as a stable dispatch leaves it: neighbours on a ray stay neighbours.
        x = torch.cat([part[part[:, 1].mul(64).floor().argsort(stable=True)] for part in chunks])
    else:
        x = torch.rand(count, 3, device=bench.device)
    return x.contiguous(), torch.linspace(0, len(x), experts + 1, device=bench.device).long()


def check(bench: Bench) -> None:
    """The compiled encode against the reference, forward and backward: config A's grids, float32 and half tables."""
    rows: list[dict[str, Any]] = []
    bench.results["check"] = rows
    count = 256 if bench.smoke else 20_000
    for kind, specs in (
        ("tcnn", bench.config.experts),
        ("torch", tuple(replace(grid, convention="torch") for grid in bench.config.experts)),
    ):
        encoding = HashEncoding(specs).to(bench.device)
        encoding.table.data.normal_()
        x, offsets = points_of(bench, count, len(specs), coherent=False)
        experts, weight = experts_of(offsets, len(x)), torch.randn(len(x), encoding.width, device=bench.device)
        out = encoding(x, offsets)
        (ours,) = torch.autograd.grad((out * weight).sum(), encoding.table)
        want = encode_reference(x, encoding.table, encoding.layout, experts)
        (grad,) = torch.autograd.grad((want * weight).sum(), encoding.table)
        row = {"convention": kind, "forward_error": float((out - want).detach().abs().max()),
               "gradient_error": float((ours - grad).abs().max()), "gradient_size": float(grad.abs().max())}  # fmt: skip
        if not bench.smoke:
            encoding.table.data = encoding.table.data.half()
            row["half_error"] = float((encoding(x, offsets).float() - want).detach().abs().max())
        rows.append(row)


def encode(bench: Bench) -> None:
    """Encode, forward and forward with backward: Triton against vectorised torch, its compiled form, and nerfstudio's algorithm."""
    table: list[dict[str, Any]] = []
    bench.results["encode"] = table
    specs = bench.config.experts
    count = 1024 if bench.smoke else 2**18
    for coherent in (True, False):
        x, offsets = points_of(bench, count, len(specs), coherent)
        fast = HashEncoding(specs).to(bench.device)
        experts, bounds = experts_of(offsets, len(x)), offsets.tolist()
        peer = [replace(grid, convention="torch") for grid in specs]
        tables = [torch.randn(grid.entries, 2, device=bench.device).mul_(1e-3).requires_grad_() for grid in peer]
        scales = [scalings(grid, bench.device) for grid in peer]
        compiled = torch.compile(encode_reference, dynamic=False)

        def nerfstudio(
            x: Tensor = x, bounds: list[int] = bounds, t: Any = tables, s: Any = scales, g: Any = peer
        ) -> Tensor:
            parts = [nerfstudio_encode(x[bounds[e] : bounds[e + 1]], t[e], s[e], g[e].log2_size) for e in range(len(g))]
            return torch.cat(parts)

        forms: dict[str, Callable[[], Tensor]] = {
            "ours": lambda x=x, o=offsets, f=fast: f(x, o),  # type: ignore[misc]
            "reference": lambda x=x, e=experts, f=fast: encode_reference(x, f.table, f.layout, e),  # type: ignore[misc]
            "nerfstudio": nerfstudio,
        }
        if not bench.smoke:
            forms["compiled"] = lambda x=x, e=experts, f=fast, c=compiled: c(x, f.table, f.layout, e)  # type: ignore[misc]
        grad = torch.randn(len(x), fast.width, device=bench.device)

        def both(form: Callable[[], Tensor], grad: Tensor = grad, f: HashEncoding = fast, t: Any = tables) -> None:
            f.table.grad = None
            for one in t:
                one.grad = None
            form().backward(grad)

        for name, calls in (
            ("forward", {k: (lambda v=v: v().detach()) for k, v in forms.items()}),
            ("forward and backward", {k: (lambda v=v: both(v)) for k, v in forms.items()}),
        ):
            try:
                timings = bench.measure(calls)
            except Exception:  # the compiled form may not build on a machine without a compiler
                traceback.print_exc()
                calls.pop("compiled", None)
                timings = bench.measure(calls)
            ratios = {k: triple(timings.ratio(k, "ours")) for k in calls}
            table.append({
                "what": name, "points": len(x), "order": "camera rays" if coherent else "uniformly random",
                "seconds": seconds(timings), "speedup_of_ours": ratios,
                "corner_reads_per_s": len(x) * 8 * fast.layout.levels / timings.by_name["ours"].median_s,
            })  # fmt: skip
            bench.save()


def render(bench: Bench) -> None:
    """Rays per second of rendering, no gradients: Switch-NeRF with and without background, HMoHE with plain and compiled encode."""
    switch_rays, hash_rays = (16, 32) if bench.smoke else (2**12, 2**15)
    few, many, endless = bench.rays(switch_rays), bench.rays(hash_rays), bench.rays(switch_rays, far=1e5)
    half = bench.hmohe().eval()
    if not bench.smoke:  # compiled loops on a CPU know no half precision
        half.network.encoding.table.data = half.network.encoding.table.data.half()
    renderers: dict[str, tuple[Renderer, Rays]] = {
        "switch": (bench.switch().eval(), few),
        "switch with background": (bench.switch(True).eval(), endless),
        "switch compiled": (bench.switch(compiled="eval").eval(), few),
        "switch compiled with background": (bench.switch(True, "eval").eval(), endless),
        "hmohe": (bench.hmohe().eval(), many),
        "hmohe half tables": (half, many),
        "hmohe plain torch": (bench.hmohe(backend="reference").eval(), bench.rays(hash_rays // 8)),
    }

    def call(renderer: Renderer, rays: Rays) -> Callable[[], object]:
        def run() -> Rendering:
            with torch.no_grad(), bench.autocast():
                return renderer(rays)

        return run

    timings = bench.measure({name: call(*pair) for name, pair in renderers.items()}, rounds=20, warmup=5)
    per_s = {name: len(renderers[name][1]) / t.median_s for name, t in timings.by_name.items()}
    ratios = {}
    for name in renderers:
        for base in (key for key in renderers if key.startswith("switch")):
            scale = len(renderers[name][1]) / len(renderers[base][1])
            ratios[f"{name}/{base}"] = [scale * v for v in triple(timings.ratio(base, name))]
    images = {name: {"1152x864_s": 1152 * 864 / v, "1080p_s": 1920 * 1080 / v} for name, v in per_s.items()}
    bench.results["render"] = {"rays_per_s": per_s, "seconds": seconds(timings), "ratios": ratios, "image": images}


def training_step(
    bench: Bench, renderer: Renderer, rays: Rays, micro: int, update_proposals: bool = True
) -> Callable[[], None]:
    """Forward, backward in portions of ``micro`` rays, and Adam."""
    optimizer = torch.optim.Adam(renderer.parameters(), lr=1e-3, eps=1e-15, fused=not bench.smoke)
    target = torch.rand(len(rays), 3, device=bench.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rays), micro):
            some = rays.map(lambda t, s=start: t[s : s + micro])  # type: ignore[misc]
            with bench.autocast():
                if isinstance(renderer, HMoHERenderer):
                    out = renderer(some, step=5000, update_proposals=update_proposals)
                else:
                    out = renderer(some)
            loss = (out.colour.float() - target[start : start + micro]).square().mean()
            (loss + 5e-4 * sum(out.losses.values())).backward()
        optimizer.step()

    return run


def train(bench: Bench) -> None:
    """Rays per second of a training step (8,192 rays with Adam), and its peak memory."""
    total, micro = (32, 8) if bench.smoke else (FULL_RAYS, MICRO_RAYS)
    rays, endless = bench.rays(total), bench.rays(total, far=1e5)
    steps = {
        "switch": training_step(bench, bench.switch().train(), rays, micro),
        "switch with background": training_step(bench, bench.switch(True).train(), endless, micro),
        "switch compiled": training_step(bench, bench.switch(compiled="train").train(), rays, micro),
        "switch compiled with background": training_step(bench, bench.switch(True, "train").train(), endless, micro),
        "hmohe": training_step(bench, bench.hmohe().train(), rays, total),
        "hmohe proposals fixed": training_step(bench, bench.hmohe().train(), rays, total, update_proposals=False),
        "hmohe plain torch": training_step(bench, bench.hmohe(backend="reference").train(), rays, total // 8),
    }
    timings = bench.measure(steps, rounds=8, warmup=2)
    result: dict[str, Any] = {
        "rays_per_s": {name: total / t.median_s for name, t in timings.by_name.items()},
        "seconds": seconds(timings),
        "ratios": {
            f"{name}/{base}": triple(timings.ratio(base, name))
            for name in steps
            for base in steps
            if base.startswith("switch")
        },
        "hours_for_4.096e9_rays": {name: 4.096e9 / total * t.median_s / 3600 for name, t in timings.by_name.items()},
    }
    if not bench.smoke:
        from shared.measure import peak_allocated_bytes

        result["peak_bytes_above_states"] = {name: peak_allocated_bytes(step) for name, step in steps.items()}
    bench.results["train"] = result


def skew(bench: Bench) -> None:
    """What the gate's choices cost: even, everything to one expert, strips of space; without a limit, and with capacity 1."""
    renderer = bench.hmohe(replace(bench.config, appearance=0)).eval()
    field, count = renderer.network, 1024 if bench.smoke else 393_216
    experts = len(field.config.experts)
    x, offsets = points_of(bench, count, experts)
    d = torch.nn.functional.normalize(torch.randn_like(x), dim=-1)
    choices = {
        "even": torch.arange(len(x), device=x.device) % experts,
        "one expert": torch.zeros(len(x), dtype=torch.int64, device=x.device),
        "strips": experts_of(offsets, len(x)),
    }

    def forward(expert: Tensor | None) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), bench.autocast():
                return field(x, d, expert=expert)

        return run

    def limited() -> object:
        field.train()
        try:
            return forward(None)()
        finally:
            field.eval()

    calls = {name: forward(choice) for name, choice in choices.items()}
    timings = bench.measure({**calls, "gate, no limit": forward(None), "gate, capacity 1": limited})
    bench.results["skew"] = {"points": len(x), "seconds": seconds(timings)}


def city(bench: Bench) -> None:
    """Train on the large city within a time budget; pictures go into an .npz file beside the numbers."""
    from papers.switchnerf.gpu_city import train_city

    for arm in bench.city_arms:
        try:
            bench.results.setdefault("city", {})[arm] = train_city(bench, arm)
        except Exception:
            traceback.print_exc()
        bench.save()


def main() -> None:
    """Run the sections asked for; what fails is printed and does not stop the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--city-budget-s", type=float, default=120.0)
    parser.add_argument("--city-arms", default="hmohe")
    options = parser.parse_args()
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32, as in the PyTorch 1.10 of Switch-NeRF's public code; for both networks
    bench = Bench(options.out, options.smoke, options.city_budget_s, tuple(options.city_arms.split(",")))
    sections = {"check": check, "encode": encode, "render": render, "train": train, "skew": skew, "city": city}
    for name in options.only.split(","):
        started = time.monotonic()
        try:
            sections[name](bench)
        except Exception:
            traceback.print_exc()
        if not bench.smoke:
            torch.cuda.empty_cache()
        bench.results.setdefault("section_s", {})[name] = time.monotonic() - started
        bench.save()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
