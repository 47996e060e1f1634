"""Hot paths of EAR on a CPU: packed similarity against the dense product and torch-hd, scoring against training, projection forms.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from papers.ear.adaptors import Architecture
from papers.ear.encoder import STAND_IN_CHANNELS
from papers.ear.hdc import HDEncoder, HDSettings, sign
from papers.ear.learner import TrainSettings, new_net, take, train_net
from papers.ear.packed import hamming, pack
from papers.ear.scores import prepare, score
from shared.measure import measure

DIM, EXEMPLARS = 10_000, 260  # Office-Home: 4 domains x 65 classes


def test_packed_similarity_of_one_image(benchmark: Any) -> None:
    query, memory = sign(torch.randn(1, DIM)), sign(torch.randn(EXEMPLARS, DIM))
    bits, stored, transposed = pack(query), pack(memory), memory.T
    functions = {"packed": lambda: hamming(bits, stored), "dense": lambda: query @ transposed}
    try:
        import torchhd

        bipolar, exemplars = torchhd.MAPTensor(query), torchhd.MAPTensor(memory)
        functions["torch-hd"] = lambda: torchhd.hamming_similarity(bipolar, exemplars)
    except ImportError:
        pass
    timings = measure(functions, rounds=9)
    for peer in functions:
        if peer != "packed":
            benchmark.extra_info[f"ratio: packed / {peer}"] = timings.ratio("packed", peer).median
    benchmark(functions["packed"])
    assert timings.ratio("dense", "packed").low > 5  # the finding binary_speedup


def test_projection(benchmark: Any) -> None:
    """Eight images into D = 4,096 from ResNet-50's taps: against the bare product of the same size, and by Hadamard transform."""
    channels = (256, 512, 1024, 2048)
    taps = [torch.rand(8, c, 7, 7) for c in channels]
    forms = {p: HDEncoder(channels, HDSettings(dim=4096, grid=1, projection=p)) for p in ("orthogonal", "hadamard")}
    pooled, matrix = torch.rand(8, sum(channels)), torch.rand(sum(channels), 4096)
    functions = {name: partial(form, taps) for name, form in forms.items()} | {"product": lambda: pooled @ matrix}
    with torch.no_grad():
        timings = measure(functions, rounds=9)
        benchmark(functions["orthogonal"])
    for one, other in (("orthogonal", "product"), ("hadamard", "orthogonal")):
        benchmark.extra_info[f"ratio: {one} / {other}"] = timings.ratio(one, other).median


def test_projection_of_one_image_is_bound_by_memory(benchmark: Any) -> None:
    """At batch 1 the dense matrix is read once: the share of the rate at which this core reads memory of that size."""
    matrix, tap = torch.rand(DIM, 3840), torch.rand(3840)  # 154 MB, of all taps of ResNet-50
    entries = matrix.view(-1)
    functions = {"read": lambda: entries.dot(entries), "projection": lambda: matrix @ tap}
    timings = measure(functions, rounds=9)
    benchmark.extra_info["share: of the memory bound"] = timings.ratio("read", "projection").median
    benchmark(functions["projection"])


def test_scoring_against_training(benchmark: Any) -> None:
    taps = [torch.rand(512, c, s, s) for c, s in zip(STAND_IN_CHANNELS, (7, 5, 3, 3), strict=True)]
    labels, hd = torch.arange(512) % 10, HDSettings(dim=512, grid=2)
    batch, some = take(taps, slice(0, 256)), labels[:256]
    architecture = Architecture.uniform("conv", 4, 1 / 8)

    def scoring() -> float:
        net = prepare(new_net(architecture, STAND_IN_CHANNELS, 10, hd, 0), batch, some)
        return score(net, "ntk_cond", batch, some)

    def training() -> Any:
        return train_net(
            new_net(architecture, STAND_IN_CHANNELS, 10, hd, 0), taps, labels, TrainSettings(epochs=3), seed=0
        )

    timings = measure({"scoring": scoring, "training": training}, rounds=6, min_round_s=0.0, warmup=1)
    benchmark.extra_info["ratio: scoring / training"] = timings.ratio("scoring", "training").median
    benchmark(scoring)
