"""Encoder and hyperdimensional head on a GPU: which share of the time the head takes. Plain torch and timm.

python -m papers.ear.gpu --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from papers.ear.encoder import timm_encoder
from papers.ear.hdc import HDEncoder, HDSettings, cosine
from shared.measure import measure

PRECISIONS = ("fp32", "tf32", "bf16")
BATCHES = (1, 256)


def measure_share(
    *, name: str = "resnet50", dim: int = 10_000, batch: int = 256, precision: str = "fp32", exemplars: int = 260,
    image_size: int = 224, device: str = "cuda", rounds: int = 15, min_round_s: float = 0.2,
) -> dict[str, Any]:  # fmt: skip
    """Times of the encoder, of the head on its taps (pooling, projection, cosines to all exemplars), and of both together.

    ``precision`` is that of all matrix products and convolutions; weights and the projection stay in fp32, or bf16 for ``bf16``.
    ``exemplars`` is domains x classes (Office-Home: 4 x 65). Weights are random: only the time matters.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    encoder = timm_encoder(name, side=None, image_size=image_size).to(device, dtype)
    encoder = encoder.to(memory_format=torch.channels_last)
    head = HDEncoder(encoder.channels, HDSettings(dim=dim, grid=1)).to(device, dtype)
    memory = torch.randn(exemplars, dim, device=device, dtype=dtype)
    images = torch.rand(batch, 3, image_size, image_size, device=device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        taps = encoder(images)
        timings = measure(
            {
                "encoder": lambda: encoder(images),
                "head": lambda: cosine(head(taps), memory).max(1).values,
                "both": lambda: cosine(head(encoder(images)), memory).max(1).values,
            },
            device=device, rounds=rounds, min_round_s=min_round_s,
        )  # fmt: skip
    seconds = {key: t.median_s for key, t in timings.by_name.items()}
    rounds_s = {key: t.rounds_s for key, t in timings.by_name.items()}
    shares = [100 * h / b for h, b in zip(rounds_s["head"], rounds_s["both"], strict=True)]
    q1, median, q3 = statistics.quantiles(shares, n=4)
    return {
        "encoder": name, "dim": dim, "batch": batch, "precision": precision, "exemplars": exemplars,
        "seconds": seconds, "rounds_s": {key: list(value) for key, value in rounds_s.items()},
        "share_percent": median, "share_q1": q1, "share_q3": q3, "share_low": min(shares), "share_high": max(shares),
        "images_per_s": batch / seconds["both"],
    }  # fmt: skip


def environment(device: str = "cuda") -> dict[str, str]:
    """What the numbers were measured with."""
    import timm

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "timm": timm.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every batch size and precision, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--dim", type=int, default=10_000)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("papers.ear.gpu needs a CUDA device, this machine has none", file=sys.stderr)
        return 2
    rows = []
    for precision in PRECISIONS:
        for batch in BATCHES:
            rows.append(measure_share(name=options.encoder, dim=options.dim, batch=batch, precision=precision))
            print(
                f"{precision} batch {batch}: HDC {rows[-1]['share_percent']:.2f} % of {1e3 * rows[-1]['seconds']['both']:.3f} ms",
                flush=True,
            )
    options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
