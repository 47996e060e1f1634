"""The hardware model: both networks on the chosen device and on a sweep of devices (H1, H2, B5 to B7); nothing is fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.experiment import Context, Measurement, Picture, Plot, Result, Table, experiment

if TYPE_CHECKING:
    from papers.switchnerf.hardware import Assumed, RayCost
    from shared.hardware import Device

V100 = "v100_sxm2_32gb"


def assumed_of(h: Any) -> Assumed:
    """The config's assumptions; shares end at 1, where a sensitivity study would go on."""
    from papers.switchnerf.hardware import Assumed

    return Assumed(min(h.assumed.compute, 1.0), min(h.assumed.bandwidth, 1.0), h.assumed.overhead_s)


def device_of(name: str, h: Any) -> Device:
    """A device of the sweep; a V100 runs bfloat16 products on other units."""
    from shared.hardware import load_device

    device = load_device(name)
    return device.model_copy(update={"runs_as": dict(h.v100_runs_as)}) if name == V100 else device


def between(
    device: Device, dtype: str, h: Any, training: bool, kind: str = "switch", share: float | None = None
) -> tuple[float, float]:
    """Seconds and saved bytes per ray of the baseline, with the background on a share of the rays."""
    from papers.switchnerf.hardware import switch_ray
    from papers.switchnerf.render import SwitchSampling

    sampling = SwitchSampling(int(256 * h.samples_scale), int(512 * h.samples_scale))
    share = min(h.background_share, 1.0) if share is None else share
    pair = [
        switch_ray(device, dtype, assumed_of(h), training=training, with_background=b, kind=kind, sampling=sampling)
        for b in (False, True)
    ]
    mixed = [
        (1 - share) * getattr(pair[0], name) + share * getattr(pair[1], name) for name in ("seconds", "saved_bytes")
    ]
    return mixed[0], mixed[1]


@experiment(
    claims=[
        "switch_training_time",
        "switch_training_memory",
        "mega_training_ratio",
        "mega_training_memory",
        "switch_render_time",
    ],
    config=["hardware"],
)
def baseline_model(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Published times and memory of Switch-NeRF and Mega-NeRF against the model, on the devices that they were stated for."""
    from shared.hardware import load_device

    h, p = cfg.hardware, ctx.published
    v100, rtx = device_of(V100, h), load_device("rtx_3090")
    rays = p["training_rays"] / p["training_gpus"]
    switch_s, switch_bytes = between(v100, h.dtype, h, True)
    mega_s, mega_bytes = between(v100, h.dtype, h, True, h.second)
    hours = switch_s * rays * p["training_steps"] / 3600
    bounds = [between(v100, h.dtype, h, True, share=s)[0] * rays * p["training_steps"] / 3600 for s in (0.0, 1.0)]
    note = f"{bounds[0]:.1f} h with background on no ray, {bounds[1]:.1f} h on all"
    yield Measurement("switch_training_time", hours, note=note)
    yield Measurement("switch_training_memory", switch_bytes * rays / 1e9)
    yield Measurement("mega_training_ratio", switch_s / mega_s)
    yield Measurement("mega_training_memory", mega_bytes * p["mega_rays"] / 1e9)
    image_s = between(rtx, h.dtype, h, False)[0] * p["render_pixels"]
    bounds = [between(rtx, h.dtype, h, False, share=s)[0] * p["render_pixels"] for s in (0.0, 1.0)]
    note = f"{bounds[0]:.1f} s with background on no ray, {bounds[1]:.1f} s on all"
    yield Measurement("switch_render_time", image_s, note=note)
    half_s, half_mega_s = (between(load_device(V100), "float16", h, True, kind)[0] for kind in ("switch", h.second))
    to_hours = rays * p["training_steps"] / 3600
    longer = p["training_time_switch"] / p["training_time_mega"]
    rows = [
        {"what": "training, hours on 8 V100, bfloat16 at the fp32 rate", "published": p["training_time_switch"] / 3600, "modelled": hours},
        {"what": "training, hours on 8 V100, if it ran in float16", "published": p["training_time_switch"] / 3600,
         "modelled": half_s * to_hours},
        {"what": "training time over Mega-NeRF's, fp32 rate", "published": longer, "modelled": switch_s / mega_s},
        {"what": "training time over Mega-NeRF's, float16", "published": longer, "modelled": half_s / half_mega_s},
        {"what": "image on an RTX 3090, s", "published": p["render_time"], "modelled": image_s},
    ]  # fmt: skip
    yield Table("baseline_model", "Published costs of the baseline against the model", rows)


@experiment(claims=["train_speedup", "render_speedup"], config=["hardware", "device"])
def method_model(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Config A against Switch-NeRF on the chosen device, a sweep of devices, and where the time goes."""
    from papers.switchnerf.hardware import energy_j, hmohe_memory_bytes
    from papers.switchnerf.hmohe import CONFIG_A
    from shared.hardware import load_device

    h, device = cfg.hardware, load_device(cfg.device)
    for claim, training in (("train_speedup", True), ("render_speedup", False)):
        theirs = between(device, h.dtype, h, training)[0]
        ours = theirs if h.method == "switch" else _hash(device, h.dtype, h, training, h.order).seconds
        bounds = [between(device, h.dtype, h, training, share=s)[0] / ours for s in (0.0, 1.0)]
        note = f"{bounds[0]:.0f} with background on no ray, {bounds[1]:.0f} on all; table reads in {h.order} order"
        yield Measurement(claim, theirs / ours, note=note)
    parts = []
    for phase, training in (("rendering", False), ("training", True)):
        cost = _hash(device, h.dtype, h, training, h.order)
        parts += [{"phase": phase, "part": name, "us_per_ray": 1e6 * s} for name, s in cost.parts_s.items()]
    plot = Plot("stacked", "phase", "us_per_ray", "part", ylabel="µs per ray")
    yield Table("breakdown", f"Modelled time of config A per ray on {device.title}", parts, plot)
    yield Table("sweep", "Modelled rays per second by device, speed-up of config A", list(_sweep(h)),
                Plot("bar", "device", "speedup", "order and phase"))  # fmt: skip
    yield from _residency(h)
    yield from _measured(h)
    image = 1152 * 864
    watts = [
        {"network": name, "s_per_image": s, "j_per_image_at_most": energy_j(device, s)}
        for name, s in (
            ("Switch-NeRF", between(device, h.dtype, h, False)[0] * image),
            ("HMoHE config A", _hash(device, h.dtype, h, False, h.order).seconds * image),
        )
    ]
    yield Table(
        "energy", f"Image of 1152 x 864 on {device.title}: time and an upper bound of the energy (power limit)", watts
    )
    memory = [
        {"phase": phase, "part": name, "gb": size / 1e9}
        for phase, training in (("rendering", False), ("training", True))
        for name, size in hmohe_memory_bytes(CONFIG_A, training).items()
    ]
    yield Table("memory", "Memory of config A's states", memory, Plot("stacked", "phase", "gb", "part", ylabel="GB"))


def _hash(device: Device, dtype: str, h: Any, training: bool, order: Any) -> RayCost:
    from papers.switchnerf.hardware import hmohe_ray
    from papers.switchnerf.hmohe import CONFIG_A

    rays = h.train_rays if training else h.render_rays
    return hmohe_ray(CONFIG_A, device, dtype, assumed_of(h), training=training, rays=rays, order=order)


def _sweep(h: Any) -> Iterator[dict[str, Any]]:
    from papers.switchnerf.counts import hmohe_ray, switch_ray_flops
    from papers.switchnerf.hardware import peak_ratio

    for name in h.sweep:
        device, dtype = device_of(name, h), h.dtype
        bare = peak_ratio(device, dtype, switch_ray_flops(True), hmohe_ray().reads)
        for phase, training in (("rendering", False), ("training", True)):
            theirs = between(device, dtype, h, training)[0]
            for order in ("point", "level"):
                try:
                    ours = _hash(device, dtype, h, training, order).seconds
                except UserError:  # no published L2 bandwidth
                    continue
                yield {
                    "device": name, "order and phase": f"{order}, {phase}", "switch_rays_per_s": 1 / theirs,
                    "hmohe_rays_per_s": 1 / ours, "speedup": theirs / ours, "speedup_at_equal_peaks": bare,
                }  # fmt: skip


def _residency(h: Any) -> Iterator[Result]:
    """Rays per second by table size in level order: where one level of one expert leaves the L2."""
    from dataclasses import replace

    from papers.switchnerf.hardware import hmohe_ray
    from papers.switchnerf.hmohe import CONFIG_A

    rows = []
    for name in h.sweep:
        device = device_of(name, h)
        for size in h.tables:
            config = replace(CONFIG_A, experts=tuple(replace(g, log2_size=size) for g in CONFIG_A.experts))
            try:
                cost = hmohe_ray(
                    config, device, h.dtype, assumed_of(h), training=False, rays=h.render_rays, order="level"
                )
            except UserError:
                continue
            rows.append({"device": name, "log2_table_size": size, "rays_per_s": cost.rays_per_s})
    title = "Rendering speed by table size, reads in level order (devices with a published L2 bandwidth)"
    yield Table("residency", title, rows, Plot("line", "log2_table_size", "rays_per_s", "device", log_y=True))


def _measured(h: Any) -> Iterator[Result]:
    """Our own GPU timings, kept beside the code: the model against them (no constant was fitted), kernels, and training on the city."""
    import json

    from shared.experiment import asset

    found = {path.stem: json.loads(path.read_text()) for path in sorted(asset(__file__, "../measured").glob("*.json"))}
    rows = [row for name, result in found.items() for row in _validation(h, name, result)]
    title = "The model against our GPU timings (the model knows no fusion and assumes half of the peaks)"
    yield Table("validation", title, rows)
    encode = [
        {"device": name, "what": row["what"], "points": row["order"], "form": form, "ms": 1e3 * times[0]}
        for name, result in found.items()
        for row in result.get("encode", [])
        for form, times in row["seconds"].items()
    ]
    title = "Hash encode on a GPU: 2^18 points, 8 experts, 16 levels (ours is the Triton kernel)"
    yield Table("gpu_encode", title, encode, Plot("bar", "form", "ms", "what", log_y=True))
    city = [
        {"device": name, "field": arm, "districts": run["districts"], "steps": run["steps"], "seconds": run["seconds"],
         "rays_per_s": run["rays_per_s"], "psnr_db": sum(run["psnr"]) / len(run["psnr"]), "ssim": sum(run["ssim"]) / len(run["ssim"]),
         "parameters": run["parameters"], "peak_gb": run["peak_bytes"] / 1e9}
        for name, result in found.items()
        for arm, run in result.get("city", {}).items()
    ]  # fmt: skip
    if city:
        yield Table("gpu_city", "Training on a large city (144 lots a district) for a fixed time", city)
    views = "Config A after that training: unseen views, rendered above and true below; right: the expert of every place from above"
    for kind, title in (("city", views), ("flight", "A flight over that city (an animated PNG)")):
        for path in sorted(asset(__file__, "../measured").glob(f"{kind}_*.png")):
            yield Picture(path.stem, title, path.read_bytes())


def _validation(h: Any, name: str, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Modelled over measured rays per second, by phase and network."""
    from papers.switchnerf.experiments.measured import fastest
    from shared.hardware import load_device

    device = load_device(name)
    for phase, training in (("render", False), ("train", True)):
        if phase not in result:
            continue
        measured = result[phase]["rays_per_s"]
        bare, full = (1 / between(device, h.dtype, h, training, share=share)[0] for share in (0.0, 1.0))
        modelled = {
            ("switch", ""): bare,
            (fastest(result[phase], "switch"), ""): bare,
            ("switch with background", ""): full,
        }
        for order in ("point", "level"):
            with suppress(UserError):  # level order needs a published L2 bandwidth
                modelled["hmohe", f", {order} order"] = 1 / _hash(device, h.dtype, h, training, order).seconds
        for (network, how), speed in modelled.items():
            yield {
                "device": name, "phase": phase, "network": network + how, "measured_rays_per_s": measured[network],
                "modelled_rays_per_s": speed, "modelled_over_measured": speed / measured[network],
            }  # fmt: skip
