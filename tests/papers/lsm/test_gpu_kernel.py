"""The Triton kernel in its interpreter, against the dense oracle; and the GPU module stays plain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from papers.lsm.weights import gaussian
from shared.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

CHECK = """
import torch
from papers.lsm.bits import pack
from papers.lsm.encoder import Liquid
from papers.lsm.gpu_kernel import Launch, encode_packed
from papers.lsm.weights import breakdown, gaussian
for inputs, neurons, steps, batch, make in ((70, 50, 12, 21, gaussian), (16, 16, 7, 3, breakdown), (256, 200, 6, 33, gaussian)):
    w = make(inputs, neurons, 5)
    x = (torch.rand(batch, steps, inputs, generator=torch.Generator().manual_seed(1)) < 0.2).to(torch.uint8)
    liquid = Liquid.of(w, decay=0.9, v_th=5.0, const=0.4)
    oracle = liquid.encode(x, backend="dense")
    assert int(oracle.sum()) > 0
    assert torch.equal(encode_packed(pack(x), w, liquid.decay, liquid.threshold, Launch(tile=16)), oracle), (inputs, neurons)
print("equal")
"""


def test_kernel_matches_the_oracle_bit_for_bit() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


def test_the_kernel_refuses_what_a_tile_cannot_hold() -> None:
    pytest.importorskip("triton")
    from papers.lsm.gpu_kernel import encode_packed

    with pytest.raises(UserError, match="backend=dense"):
        encode_packed(torch.zeros(1, 1, 1, dtype=torch.int32), gaussian(4, 300, 0), 0.9, 1.0)
    with pytest.raises(UserError, match="not negative"):
        encode_packed(torch.zeros(1, 1, 1, dtype=torch.int32), gaussian(4, 8, 0), 0.9, -1.0)


def test_gpu_module_imports_nothing_of_the_runner() -> None:
    code = (
        "import sys, papers.lsm.gpu\n"
        "print(sorted({'hydra', 'omegaconf', 'wandb', 'pydantic', 'scipy', 'sklearn', 'numba'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_gpu_measurement_runs_on_the_cpu_at_a_small_size() -> None:
    from papers.lsm.gpu import measure_encode

    found = measure_encode(samples=40, batch=20, device="cpu", rounds=6, min_round_s=0.0, backends=("gather",))
    assert found["identical"]["gather"]
    assert found["identical"]["loop"]
    assert found["seconds"]["loop"] > 0
