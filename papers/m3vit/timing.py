"""Encoder forward time on a real device (C12): dense, experts one after the other, experts grouped; random weights, batch 1.

``python -m papers.m3vit.timing --out FILE.json`` writes all numbers. Needs torch, numpy and scipy only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from papers.m3vit.model import Backbone, preset
from papers.m3vit.moe import MoE
from shared.measure import Timings, measure

IMAGES = ((512, 512), (480, 640))  # PASCAL-Context, NYUD-v2


def time_encoders(*, size: str, heads: int, device: str, rounds: int = 25, extended: bool = False) -> dict[str, Any]:
    """Time the encoder in its forms, in alternation.

    The forms ``… again`` run the same code a second time: their ratio to the first shows what this measurement cannot resolve.

    Args:
        size: tiny, small or base.
        heads: attention heads, the same in all forms.
        device: ``cuda`` or ``cpu``.
        rounds: of each form.
        extended: batches of 8 images, bf16, and CUDA graphs beside the paper's fp32 at batch 1.

    Returns:
        ``device``, ``torch``, ``rows`` (one a form and setting), ``ratios`` (of fp32, batch 1, 512 x 512: median, low, high).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    settings = [(image, 1, torch.float32) for image in IMAGES]
    if extended:
        settings += [
            (IMAGES[0], batch, dtype) for batch, dtype in ((1, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16))
        ]
    name = ""
    for image, batch, dtype in settings:
        forms = _forms(size, heads, image, batch, dtype, device, graphs=extended and device.startswith("cuda"))
        with torch.inference_mode():
            timings = measure(forms, device=device, rounds=rounds, min_round_s=0.05, warmup=5)
        name = timings.device
        for form, timing in timings.by_name.items():
            rows.append(
                {
                    "image": f"{image[0]}x{image[1]}",
                    "batch": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "form": form,
                    "median ms": 1e3 * timing.median_s,
                    "q1 ms": 1e3 * timing.q1_s,
                    "q3 ms": 1e3 * timing.q3_s,
                    "over dense": timings.ratio(form, "dense").median,
                }
            )
        if (image, batch, dtype) == (IMAGES[0], 1, torch.float32):
            ratios = _ratios(timings)
    return {"device": name, "torch": torch.__version__, "rounds": rounds, "rows": rows, "ratios": ratios}


def _ratios(timings: Timings) -> dict[str, dict[str, float]]:
    pairs = (
        ("expert_by_expert", "dense"),
        ("dense again", "dense"),
        ("expert_by_expert", "grouped"),
        ("expert_by_expert", "expert_by_expert again"),
        ("grouped", "dense"),
    )
    return {f"{a}/{b}": vars(timings.ratio(a, b)) for a, b in pairs}


def _forms(
    size: str, heads: int, image: tuple[int, int], batch: int, dtype: torch.dtype, device: str, graphs: bool
) -> Mapping[str, Callable[[], object]]:
    torch.manual_seed(0)
    dense = Backbone(preset(size, image, heads=heads, router="none"), 1).to(device, dtype).eval()
    experts = Backbone(preset(size, image, heads=heads, router="single"), 1).to(device, dtype).eval()
    images = torch.randn(batch, 3, *image, device=device, dtype=dtype)

    def ordered(order: str) -> Callable[[], object]:
        def run() -> object:
            for module in experts.modules():
                if isinstance(module, MoE):
                    module.order = order
            return experts(images)

        return run

    forms: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(images),
        "expert_by_expert": ordered("expert_by_expert"),
        "grouped": ordered("grouped"),
        "dense again": lambda: dense(images),
        "expert_by_expert again": ordered("expert_by_expert"),
    }
    if graphs:
        forms["dense, CUDA graph"] = _captured(forms["dense"])
        forms["grouped, CUDA graph"] = _captured(forms["grouped"])
    return forms


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` as a CUDA graph: one launch for all kernels."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = function()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="small")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--extended", action="store_true")
    options = parser.parse_args()
    result = time_encoders(
        size=options.size, heads=options.heads, device=options.device, rounds=options.rounds, extended=options.extended
    )
    options.out.write_text(json.dumps(result, indent=1))
    for row in result["rows"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    print(result["ratios"])


if __name__ == "__main__":
    _main()
