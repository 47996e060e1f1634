"""Hot paths of the liquid state machine: encoding on a CPU against snnTorch's update and a torch loop, and zero-shot heads.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papers.lsm.encoder import Liquid
from papers.lsm.gpu import step_loop
from papers.lsm.peers import RecurrentLeaky, measure_cpu
from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import AlignSettings, Modality, align, all_pairs


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
    if backend == "events":
        pytest.importorskip("numba")
    counts = benchmark.pedantic(lambda: liquid.encode(spikes, backend=backend), rounds=5, warmup_rounds=1)
    w = liquid.weights
    assert torch.equal(counts.float(), step_loop(spikes.float(), w.input, w.recurrent, liquid.decay, liquid.threshold))


def test_encode_against_loops_on_two_threads(benchmark: Any, liquid: Liquid, spikes: torch.Tensor) -> None:
    pytest.importorskip("numba")
    found = measure_cpu(liquid, spikes, backend="events", threads=2, rounds=6 if benchmark.disabled else 15)
    assert found["torch loop: counts that differ"] == 0
    for peer in ("torch loop", "snnTorch update"):
        benchmark.extra_info[f"ratio: ours / {peer}"] = 1 / found[peer]["median"]
    benchmark(lambda: liquid.encode(spikes, backend="events"))
    assert found["torch loop"]["median"] > 2  # the claim's bar of 5 is judged by the suite, on a quiet machine
    assert found["snnTorch update"]["median"] > 2


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
    g = torch.Generator().manual_seed(0)
    audio, image = (Modality(*(torch.rand(9, n, 200, generator=g) for n in (20, 5, 5))) for _ in range(2))
    found = benchmark.pedantic(
        lambda: align(audio, image, all_pairs(), AlignSettings(epochs=1), 0), rounds=2, warmup_rounds=1
    )
    assert found.test_unseen.shape == (1, 36)
