"""Encoding a whole set on a GPU: the one-pass kernel against step loops in torch. Plain torch, triton and numpy.

python -m papers.lsm.gpu --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.lsm.bits import pack, unpack
from papers.lsm.encoder import Liquid, firing_rate
from papers.lsm.weights import gaussian
from shared.measure import measure

INPUTS, NEURONS, STEPS, DECAY, V_TH, CONST = 256, 200, 50, 0.9, 5.0, 0.07
PAPER_BATCH = 1000  # at which the paper's code encodes
DENSITY = 0.083  # of the saccade digits


def step_loop(x: Tensor, w_in: Tensor, w_rec: Tensor, decay: float, threshold: float) -> Tensor:
    """The plain loop that a user writes: counts (B, N) of float spike trains (B, T, n_in)."""
    u = torch.zeros(x.shape[0], w_in.shape[1], device=x.device, dtype=w_in.dtype)
    s, counts = torch.zeros_like(u), torch.zeros_like(u)
    for t in range(x.shape[1]):
        u = decay * u * (1.0 - s) + (x[:, t] @ w_in + s @ w_rec)
        s = (u > threshold).to(u.dtype)
        counts += s
    return counts


def random_words(samples: int, seed: int, device: str) -> Tensor:
    """Packed random spike trains of the shape and density of saccade digits."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, samples, 5000):
        size = (min(5000, samples - start), STEPS, INPUTS)
        parts.append(pack((torch.rand(size, generator=generator, device=device) < DENSITY).to(torch.uint8)))
    return torch.cat(parts)


def measure_encode(
    *, samples: int = 70_000, batch: int = PAPER_BATCH, device: str = "cuda", rounds: int = 9, min_round_s: float = 0.2,
    backends: Sequence[str] = ("triton",), words: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one encode of ``samples`` by each back end and by torch loops, and whether all counts are the same bits.

    ``loop`` is the torch loop over batches of ``batch`` samples; ``loop whole`` the same in the largest batches that are fastest for it
    (10,000), ``loop fp16`` that with float16 weights and states on the tensor cores, whose counts may differ. All read the same data,
    in float32 (float16) on the device before the clock starts: unpacking is charged to the kernel alone.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    words = random_words(samples, 0, device) if words is None else words.to(device)
    weights = gaussian(INPUTS, NEURONS, 0).to(device)
    liquid = Liquid.of(weights, decay=DECAY, v_th=V_TH, const=CONST)
    decay, threshold = torch.tensor(DECAY).float().item(), torch.tensor(liquid.threshold).float().item()
    dense = torch.cat([unpack(part, INPUTS).to(torch.float16) for part in words.split(5000)])

    def loop(size: int, dtype: torch.dtype) -> Tensor:
        w_in, w_rec = weights.input.to(dtype), weights.recurrent.to(dtype)
        return torch.cat([step_loop(part.to(dtype), w_in, w_rec, decay, threshold) for part in dense.split(size)])

    functions: dict[str, Callable[[], Tensor]] = {}
    for name in backends:
        if name == "triton":
            from papers.lsm.gpu_kernel import encode_packed

            functions[name] = lambda: encode_packed(words, weights, liquid.decay, liquid.threshold)
        else:
            spikes = unpack(words, INPUTS)
            functions[name] = partial(liquid.encode, spikes, backend=name)
    functions["loop"] = lambda: loop(batch, torch.float32)
    functions["loop whole"] = lambda: loop(10_000, torch.float32)
    if device.startswith("cuda"):
        functions["loop fp16"] = lambda: loop(10_000, torch.float16)
    oracle = functions["loop whole"]().to(torch.int16)
    same = {name: bool(torch.equal(function().to(torch.int16), oracle)) for name, function in functions.items()}
    timings = measure(functions, device=device, rounds=rounds, min_round_s=min_round_s)
    ours = backends[0]
    ratios = {}
    for name in functions:
        if name not in backends:
            ratio = timings.ratio(name, ours)
            ratios[f"{name}/{ours}"] = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
    seconds = {name: timing.median_s for name, timing in timings.by_name.items()}
    return {
        "samples": samples, "batch": batch, "rate": firing_rate(oracle, STEPS), "identical": same, "ratios": ratios,
        "seconds": seconds, "samples_per_s": {name: samples / value for name, value in seconds.items()},
        "rounds_s": {name: list(timing.rounds_s) for name, timing in timings.by_name.items()},
    }  # fmt: skip


def check_shapes(device: str = "cuda") -> dict[str, bool]:
    """Bits of the kernel against the dense oracle on the CPU, for several shapes and both generators."""
    from papers.lsm.gpu_kernel import encode_packed
    from papers.lsm.weights import GENERATORS

    result = {}
    for make in ("gaussian", "breakdown"):
        for inputs, neurons, steps, batch in (
            (256, 200, 50, 333),
            (64, 200, 129, 100),
            (33, 17, 21, 5),
            (256, 256, 40, 64),
        ):
            weights = GENERATORS[make](inputs, neurons, 7)
            spikes = (torch.rand(batch, steps, inputs, generator=torch.Generator().manual_seed(1)) < 0.15).to(
                torch.uint8
            )
            liquid = Liquid.of(weights, decay=0.97, v_th=5.3, const=0.08)
            found = encode_packed(pack(spikes.to(device)), weights.to(device), liquid.decay, liquid.threshold).cpu()
            oracle = liquid.encode(spikes, backend="dense")
            result[f"{make} {inputs}-{neurons} T{steps} B{batch}"] = bool(torch.equal(found, oracle)) and bool(
                oracle.any()
            )
    return result


def environment(device: str = "cuda") -> dict[str, str]:
    """What the numbers were measured with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the bits, then measure; the file is written after every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=70_000)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("papers.lsm.gpu needs a CUDA device, this machine has none", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"environment": environment()}

    def save() -> None:
        options.out.write_text(json.dumps(result, indent=1))

    result["shapes"] = check_shapes()
    save()
    print(result["shapes"], flush=True)
    result["encode"] = measure_encode(samples=options.samples)
    save()
    print(result["encode"]["seconds"], result["encode"]["ratios"], flush=True)
    return 0 if all(result["shapes"].values()) and result["encode"]["identical"]["triton"] else 1


if __name__ == "__main__":
    sys.exit(main())
