"""Claims with a clock: packed binary similarity on this CPU, encoder and head on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, Result, Table, experiment


@experiment(claims=["binary_speedup"], config=["speed"])
def packed_speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    import torch

    from papers.ear.packed import hamming, pack
    from shared.measure import measure

    s = cfg.speed
    rows = []
    for dim, exemplars, batch in ((s.dim, s.exemplars, s.batch), (2048, 40, 1), (s.dim, s.exemplars, 256)):
        generator = torch.Generator().manual_seed(ctx.seed)
        queries = torch.randn(batch, dim, generator=generator).sign()
        memory = torch.randn(exemplars, dim, generator=generator).sign()
        packed_queries, packed_memory = pack(queries), pack(memory)
        transposed = memory.T

        def dense(q: Any = queries, m: Any = transposed) -> Any:
            return q @ m

        def packed(q: Any = packed_queries, m: Any = packed_memory) -> Any:
            return hamming(q, m)

        timings = measure({"dense": dense, "packed": packed if s.packed else dense}, rounds=11, min_round_s=0.02)
        ratio = timings.ratio("dense", "packed")
        if not rows:
            floats, bits = 4e-6 * dim * exemplars, dim * exemplars / 8e6
            note = f"{timings.device}, one thread; the float exemplars take {floats:.1f} MB, the packed {bits:.2f} MB"
            yield Measurement("binary_speedup", ratio.median, ratio.low, ratio.high, note=note)
        micro = {name: 1e6 * t.median_s for name, t in timings.by_name.items()}
        rows.append(
            {
                "D": dim,
                "exemplars": exemplars,
                "images": batch,
                "dense µs": micro["dense"],
                "packed µs": micro["packed"],
                "ratio": ratio.median,
            }
        )
    yield Table(
        "packed",
        "Similarity search, dense float against packed bits",
        rows,
        note="at large batches the dense product is bound by compute and its lead in arithmetic per cycle returns",
    )


@experiment(claims=["hdc_gpu_share"], config=["gpu"], gpu=True)
def gpu(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.gpu import BATCHES, PRECISIONS, environment, measure_share

    g = cfg.gpu
    main = measure_share(name=g.encoder, dim=g.dim, batch=g.batch, exemplars=g.exemplars)
    yield Measurement(
        "hdc_gpu_share", main["share_percent"], main["share_low"], main["share_high"], note=environment()["device"]
    )
    rows = [
        main
        if (p, b) == (main["precision"], main["batch"])
        else measure_share(
            name=g.encoder, dim=g.dim, batch=b, precision=p, exemplars=g.exemplars, rounds=7, min_round_s=0.1
        )
        for p in PRECISIONS
        for b in BATCHES
    ]
    yield Table(
        "gpu",
        "Encoder and head on the GPU",
        [
            {
                "precision": r["precision"],
                "batch": r["batch"],
                "HDC %": r["share_percent"],
                "images/s": r["images_per_s"],
            }
            for r in rows
        ],
    )
