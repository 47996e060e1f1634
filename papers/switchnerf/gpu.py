"""Speed of kernels and of both networks at full size on a CUDA device, and a training run of config A; all numbers in one JSON file.

``python -m papers.switchnerf.gpu --out FILE.json [--only check,encode,render,train,skew,city] [--city-budget-s 120] [--city-arms hmohe]``;
without CUDA, ``--smoke`` runs every line on tiny sizes. Random weights decide no time except where the gate's choice does (``skew``). Rays
are camera rays over the procedural city: uniformly random points have no locality. Needs torch, triton, numpy and scipy only.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.switchnerf.gpu_bench import (
    DISTRICTS,
    TINY,
    Bench,
    Call,
    Training,
    gpu_settings,
    rays_per_s,
    seconds,
    speedups,
    triple,
)
from papers.switchnerf.hashgrid import HashEncoding, encode_reference, experts_of
from papers.switchnerf.peers import nerfstudio_encode, scalings
from papers.switchnerf.rays import Rays
from papers.switchnerf.render import HMoHERenderer, Renderer, Rendering

SECTIONS = ("check", "encode", "render", "train", "skew", "city")
FULL_RAYS, MICRO_RAYS = 8192, 1024  # a step; what Switch-NeRF takes at once (its recipe's share of one GPU)


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
    for coherent in (True,) if bench.claims_only else (True, False):
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
        }
        if not bench.claims_only:
            forms["nerfstudio"] = nerfstudio
        if not bench.smoke and not bench.claims_only:
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
    """Rays per second of rendering, no gradients: Switch-NeRF eager, compiled and captured, HMoHE eager and captured.

    Beyond what the claims need: Switch-NeRF with its background, HMoHE with half tables and with the plain torch encode.
    """
    few, many = (16, 32) if bench.smoke else (2**12, 2**15)
    rays: dict[str, int] = {}

    def call(name: str, renderer: Renderer, some: Rays) -> Call:
        renderer.eval()
        rays[name] = len(some)

        def run() -> Rendering:
            with torch.no_grad(), bench.autocast():
                return renderer(some)

        return run

    def half_tables() -> HMoHERenderer:
        renderer = bench.hmohe()
        if not bench.smoke:  # compiled loops on a CPU know no half precision
            renderer.network.encoding.table.data = renderer.network.encoding.table.data.half()
        return renderer

    near, hash_rays = bench.rays(few), bench.rays(many)
    compiled, ours = bench.switch(compiled=True), bench.hmohe()
    forms: dict[str, Callable[[], Call]] = {
        "switch": lambda: call("switch", bench.switch(), near),
        "switch compiled": lambda: call("switch compiled", compiled, near),
        "hmohe": lambda: call("hmohe", ours, hash_rays),
    }
    if not bench.claims_only:
        endless, some = bench.rays(few, far=1e5), bench.rays(many // 8)
        forms |= {
            "switch with background": lambda: call("switch with background", bench.switch(True), endless),
            "switch compiled with background": lambda: call(
                "switch compiled with background", bench.switch(True, True), endless
            ),
            "hmohe half tables": lambda: call("hmohe half tables", half_tables(), hash_rays),
            "hmohe plain torch": lambda: call("hmohe plain torch", bench.hmohe(backend="reference"), some),
        }
    calls = bench.ready("render", forms)
    captured = {
        "switch captured": call("switch captured", compiled, near),
        "hmohe captured": call("hmohe captured", ours, hash_rays),
    }
    timings, _ = bench.with_captured("render", calls, captured, rounds=10)
    speed = rays_per_s(timings, rays)
    bench.results["render"] = {
        "rays_per_s": speed, "seconds": seconds(timings), "speedups": speedups(timings, rays),
        "image": {name: {"1152x864_s": 1152 * 864 / v, "1080p_s": 1920 * 1080 / v} for name, v in speed.items()},
    }  # fmt: skip


def training_step(
    bench: Bench, renderer: Renderer, rays: Rays, micro: int, update_proposals: bool = True
) -> Callable[[], None]:
    """Forward, backward in portions of ``micro`` rays, and Adam."""
    renderer.train()
    kind: dict[str, Any] = {} if bench.smoke else {"fused": True, "capturable": True}
    optimizer = torch.optim.Adam(renderer.parameters(), lr=1e-3, eps=1e-15, **kind)
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
    """Rays per second of a training step (8,192 rays with Adam) in the forms of :func:`render`, and its peak memory."""
    total, micro = (32, 8) if bench.smoke else (FULL_RAYS, MICRO_RAYS)
    rays = bench.rays(total)
    compiled = training_step(bench, bench.switch(compiled=True), rays, micro)
    ours = training_step(bench, bench.hmohe(), rays, total)
    forms: dict[str, Callable[[], Call]] = {
        "switch": lambda: training_step(bench, bench.switch(), rays, micro),
        "switch compiled": lambda: compiled,
        "hmohe": lambda: ours,
    }
    if not bench.claims_only:
        endless = bench.rays(total, far=1e5)
        forms |= {
            "switch with background": lambda: training_step(bench, bench.switch(True), endless, micro),
            "switch compiled with background": lambda: training_step(bench, bench.switch(True, True), endless, micro),
            "hmohe proposals fixed": lambda: training_step(bench, bench.hmohe(), rays, total, update_proposals=False),
            "hmohe plain torch": lambda: training_step(bench, bench.hmohe(backend="reference"), rays, total // 8),
        }
    calls = bench.ready("train", forms)
    captured = {"switch captured": compiled, "hmohe captured": ours}
    timings, timed = bench.with_captured("train", calls, captured, rounds=8)
    count = dict.fromkeys(timed, total)
    result: dict[str, Any] = {
        "rays_per_s": rays_per_s(timings, count),
        "seconds": seconds(timings),
        "speedups": speedups(timings, count),
        "hours_for_4.096e9_rays": {name: 4.096e9 / total * t.median_s / 3600 for name, t in timings.by_name.items()},
    }
    if not bench.smoke and not bench.claims_only:
        from shared.measure import peak_allocated_bytes

        result["peak_bytes_above_states"] = {name: peak_allocated_bytes(call) for name, call in calls.items()}
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

    def forward(expert: Tensor | None) -> Call:
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

    for arm in bench.training.arms:
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
    parser.add_argument("--claims-only", action="store_true", help="only the forms that the claims compare")
    parser.add_argument("--city-budget-s", type=float, default=120.0)
    parser.add_argument("--city-arms", default="hmohe")
    parser.add_argument("--city-districts", type=int, default=DISTRICTS, help="along a side of the city to train on")
    options = parser.parse_args()
    training = Training(options.city_budget_s, tuple(options.city_arms.split(",")), options.city_districts)
    bench = Bench(options.out, options.smoke, training, options.claims_only)
    sections = {"check": check, "encode": encode, "render": render, "train": train, "skew": skew, "city": city}
    for name in options.only.split(","):
        started = time.monotonic()
        try:
            with gpu_settings():
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
