"""Claims with a clock: the encoder on this CPU against loops, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, NotTested, Result, Table, experiment


@experiment(claims=["cpu_over_torch", "cpu_over_snntorch"], config=["speed"])
def cpu_speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    from importlib.util import find_spec

    import torch

    from papers.lsm.data.camera import place, spike_trains
    from papers.lsm.encoder import Liquid
    from papers.lsm.peers import measure_cpu
    from papers.lsm.weights import gaussian
    from shared.data.digits import load_digits

    s = cfg.speed
    if s.backend == "events" and find_spec("numba") is None:
        for claim in ("cpu_over_torch", "cpu_over_snntorch"):
            yield NotTested(claim, "needs the package numba: install it, or use speed.backend=gather")
        return
    images = load_digits()[0][: s.batch, 0]
    spikes = spike_trains(place(images, torch.Generator().manual_seed(ctx.seed)), ctx.seed)
    liquid = Liquid.of(gaussian(256, 200, ctx.seed), decay=0.9, v_th=5.0, const=s.const)
    found = measure_cpu(liquid, spikes, backend=s.backend, threads=s.threads, rounds=s.rounds)
    for claim, peer in (("cpu_over_torch", "torch loop"), ("cpu_over_snntorch", "snnTorch update")):
        ratio = found[peer]
        note = f"{s.threads} threads, {1e3 * found['seconds']['ours']:.2f} ms against {1e3 * found['seconds'][peer]:.1f} ms"
        yield Measurement(claim, ratio["median"], ratio["low"], ratio["high"], note=note)
    yield Table(
        "cpu",
        f"Encoding {s.batch} saccade digits, N = 200, T = 50, {s.threads} threads, {found['device']}",
        [
            {
                "encoder": name, "ms": 1e3 * seconds, "samples/s": s.batch / seconds,
                "counts that differ from ours": found.get(f"{name}: counts that differ", 0),
            }
            for name, seconds in found["seconds"].items()
        ],
        note="snnTorch's zero reset also wipes the input of the step after a spike, so its counts differ",
    )  # fmt: skip


@experiment(claims=["gpu_encode_time", "gpu_over_loop", "gpu_over_whole_loop"], config=["gpu"], gpu=True)
def gpu_speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.lsm.gpu import environment, measure_encode

    g = cfg.gpu
    found = measure_encode(samples=g.samples, batch=g.batch, backends=(g.backend,))
    rounds, card = sorted(found["rounds_s"][g.backend]), environment()["device"]
    yield Measurement("gpu_encode_time", found["seconds"][g.backend], rounds[0], rounds[-1], note=card)
    for claim, loop in (("gpu_over_loop", "loop"), ("gpu_over_whole_loop", "loop whole")):
        ratio = found["ratios"][f"{loop}/{g.backend}"]
        yield Measurement(claim, ratio["median"], ratio["low"], ratio["high"], note=card)
    yield Table(
        "gpu",
        f"Encoding {g.samples:,} samples, N = 200, T = 50, on {card}",
        [
            {"encoder": name, "ms": 1e3 * s, "samples/s": g.samples / s, "same bits": found["identical"][name]}
            for name, s in found["seconds"].items()
        ],
    )
