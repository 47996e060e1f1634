"""Hot paths of the liquid state machine: encoding on a CPU against loops, training of the compared networks, and zero-shot heads.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from papers.lsm.baselines import SRNN, PlainRNN
from papers.lsm.bits import pack
from papers.lsm.encoder import Liquid
from papers.lsm.gpu import step_loop
from papers.lsm.peers import RecurrentLeaky, measure_cpu
from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import AlignSettings, Modality, align, all_pairs
from shared.measure import measure


@pytest.fixture
def liquid() -> Liquid:
    return Liquid.of(gaussian(256, 200, 0), decay=0.9, v_th=5.0, const=0.07)


@pytest.fixture
def spikes() -> torch.Tensor:
    from papers.lsm.data.camera import place, spike_trains
    from shared.data.digits import load_digits

    return spike_trains(place(load_digits()[0][:500, 0], torch.Generator().manual_seed(0)), 0)


@pytest.mark.parametrize("backend", ["events", "gather", "dense"])
def test_encode_a_batch_of_500(benchmark: Any, liquid: Liquid, spikes: torch.Tensor, backend: str) -> None:
    """On one thread."""
    if backend == "events":
        pytest.importorskip("numba")
    w, floats = liquid.weights, spikes.float()
    functions = {
        backend: lambda: liquid.encode(spikes, backend=backend),
        "torch loop": lambda: step_loop(floats, w.input, w.recurrent, liquid.decay, liquid.threshold),
    }
    assert torch.equal(functions[backend]().float(), functions["torch loop"]())
    timings = measure(functions, rounds=6 if benchmark.disabled else 9)
    benchmark.extra_info[f"ratio: {backend} / torch loop"] = timings.ratio(backend, "torch loop").median
    benchmark(functions[backend])


def test_encode_of_packed_words(benchmark: Any, liquid: Liquid, spikes: torch.Tensor) -> None:
    """Sets are kept packed: reading their words must cost no more than bytes do, which are packed first."""
    pytest.importorskip("numba")
    words = pack(spikes)
    functions = {"words": lambda: liquid.encode_words(words), "bytes": lambda: liquid.encode(spikes, backend="events")}
    assert torch.equal(functions["words"](), functions["bytes"]())
    timings = measure(functions, rounds=6 if benchmark.disabled else 15)
    benchmark.extra_info["ratio: words / bytes"] = timings.ratio("words", "bytes").median
    benchmark(functions["words"])


def test_read_noise_against_the_noiseless_oracle(benchmark: Any, liquid: Liquid, spikes: torch.Tensor) -> None:
    """Means and variances of all currents: twice the products of the dense back end, and a normal number for each."""
    noisy = replace(liquid, read_noise=0.02)
    functions = {"noise": lambda: noisy.encode(spikes), "dense": lambda: liquid.encode(spikes, backend="dense")}
    timings = measure(functions, rounds=6 if benchmark.disabled else 9)
    benchmark.extra_info["ratio: noise / dense"] = timings.ratio("noise", "dense").median
    benchmark(functions["noise"])


def test_encode_against_loops_on_two_threads(benchmark: Any, liquid: Liquid, spikes: torch.Tensor) -> None:
    pytest.importorskip("numba")
    found = measure_cpu(liquid, spikes, backend="events", threads=2, rounds=6 if benchmark.disabled else 15)
    assert found["torch loop: counts that differ"] == 0
    for peer in ("torch loop", "snnTorch update"):
        benchmark.extra_info[f"ratio: ours / {peer}"] = 1 / found[peer]["median"]
    benchmark(lambda: liquid.encode(spikes, backend="events"))
    assert found["torch loop"]["median"] > 4  # the claim's bar of 5 is judged by the suite, on a quiet machine
    assert found["snnTorch update"]["median"] > 4


def test_the_written_update_is_snntorchs(liquid: Liquid, spikes: torch.Tensor) -> None:
    """Against the library where it is installed; else by hand: after a spike the whole update of the next step is wiped."""
    peer = RecurrentLeaky(liquid)
    with torch.no_grad():
        high = torch.full((1, 200), 100.0)
        fired, wiped = peer.step(torch.ones(1, 200), torch.zeros(1, 200), high)
        assert not wiped.any()
        assert not fired.any()
        _, kept = peer.step(torch.ones(1, 200), torch.zeros(1, 200), torch.full((1, 200), 10.0))
        torch.testing.assert_close(kept, torch.full((1, 200), 0.9 * 10.0 + 1.0))
        try:
            import snntorch
        except ImportError:
            return
        layer = snntorch.RLeaky(
            beta=liquid.decay, threshold=liquid.threshold, linear_features=200, all_to_all=True, reset_mechanism="zero"
        )
        layer.recurrent.weight.copy_(liquid.weights.recurrent.T)
        layer.recurrent.bias.zero_()
        spk, mem = layer.init_rleaky()
        counts = torch.zeros(20, 200)
        for t in range(50):
            spk, mem = layer(peer.fc(spikes[:20, t].float()), spk, mem)
            counts += spk
        torch.testing.assert_close(counts, peer(spikes[:20].float()))


def test_heads_of_36_problems(benchmark: Any) -> None:
    """All pairs in one batch of products, against one pair after the other."""
    g = torch.Generator().manual_seed(0)
    audio, image = (Modality(*(torch.rand(9, n, 200, generator=g) for n in (20, 5, 5))) for _ in range(2))
    settings, pairs = AlignSettings(epochs=1), all_pairs()
    functions: dict[str, Callable[[], Any]] = {
        "together": lambda: align(audio, image, pairs, settings, 0),
        "one by one": lambda: [align(audio, image, [pair], settings, 0) for pair in pairs],
    }
    assert functions["together"]().test_unseen.shape == (1, 36)
    timings = measure(functions, rounds=6 if benchmark.disabled else 9)
    benchmark.extra_info["ratio: together / one by one"] = timings.ratio("together", "one by one").median
    benchmark(functions["together"])


@pytest.mark.parametrize("kind", ["spiking", "plain"])
def test_back_propagation_through_time(benchmark: Any, spikes: torch.Tensor, kind: str) -> None:
    """A training step's forward and backward pass of the compared networks, against torch's own loop and layer."""
    x, g = spikes[:32], torch.Generator().manual_seed(0)
    if kind == "spiking":
        pytest.importorskip("numba")
        body = SRNN(256, 200, decay=0.9, v_th=0.3, const=0.004, seed=0)
        weight = torch.randn(32, 200, generator=g)

        def ours() -> None:
            body.zero_grad()
            (weight * body(x)).sum().backward()

        def loop() -> None:
            body.zero_grad()
            current = x.transpose(0, 1).float() @ body.w_in
            u = s = total = torch.zeros(32, 200)
            for t in range(len(current)):
                u = 0.9 * u * (1 - s) + current[t] + s @ body.w_rec
                s = torch.sigmoid((u - 0.3) / 0.05)  # any smooth surrogate: the cost is what counts
                total = total + s
            (weight * total).sum().backward()
    else:
        model, layer = PlainRNN(256, 200, 10), torch.nn.RNN(256, 200, batch_first=True)

        def ours() -> None:
            model.zero_grad()
            model(x).sum().backward()

        def loop() -> None:
            layer.zero_grad()
            layer(x.float())[0][:, -1].sum().backward()

    timings = measure({"ours": ours, "torch": loop}, rounds=6 if benchmark.disabled else 9)
    benchmark.extra_info["ratio: ours / torch"] = timings.ratio("ours", "torch").median
    benchmark(ours)
