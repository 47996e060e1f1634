"""Expert parallelism over NCCL: alpha and bandwidth of the all-to-all, bytes and time of a layer at every tau, model against measurement.

``torchrun --standalone --nproc_per_node 2 -m papers.moepp.parallel_gpu --out FILE.json``; ``--smoke`` runs it at toy size over gloo.
Routing is exact and synthetic. The model adds the fitted all-to-alls to the layer's local work, which is timed without any communication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from papers.moepp.bench import environment
from papers.moepp.layer import MoE, MoEPlusPlus
from papers.moepp.parallel import ExpertParallel
from papers.moepp.routing import Experts
from papers.moepp.shape import SHAPES, TAUS
from papers.moepp.synthetic import exact_routing


def fit_alpha_beta(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Startup (s) and bandwidth (bytes/s) of t = alpha + bytes/B, least squares of the relative error."""
    rows = np.stack([np.ones_like(sizes), sizes], 1) / seconds[:, None]
    alpha, per_byte = np.linalg.lstsq(rows, np.ones_like(seconds), rcond=None)[0]
    return float(max(alpha, 0.0)), float(1.0 / per_byte)


class Clock:
    """Times a collective call: the median over repetitions of the slowest rank."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object], repetitions: int = 12) -> float:
        for _ in range(3):
            call()
        seconds = []
        for _ in range(repetitions):
            self._wait()
            dist.barrier()
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return statistics.median(slowest.tolist())

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def collectives(clock: Clock, smoke: bool) -> dict[str, Any]:
    """Alpha and bandwidth of the all-to-all, fitted on every other size and judged on the rest."""
    ranks, points = dist.get_world_size(), []
    for exponent in range(14, 18 if smoke else 29):
        data = torch.zeros(2**exponent, dtype=torch.uint8, device=clock.device)
        out = torch.empty_like(data)
        taken = clock(partial(dist.all_to_all_single, out, data))
        points.append({"sent_bytes": 2**exponent * (ranks - 1) / ranks, "seconds": taken})
    sizes, seconds = (np.array([p[key] for p in points]) for key in ("sent_bytes", "seconds"))
    alpha, bandwidth = fit_alpha_beta(sizes[::2], seconds[::2])
    error = np.abs((alpha + sizes[1::2] / bandwidth) / seconds[1::2] - 1)
    return {
        "points": points,
        "alpha_s": alpha,
        "bandwidth_bytes_per_s": bandwidth,
        "held_out_error_rel": float(error.max()),
    }


class _Landed:
    def wait(self) -> None:
        """Nothing was sent."""


class LocalWork(ExpertParallel):
    """A layer that does all that a rank does itself, on as many rows as it would receive, and sends nothing."""

    def _counts(self, sent: torch.Tensor) -> torch.Tensor:
        return sent

    def _exchange(self, rows: torch.Tensor, send: list[int], receive: list[int], works: list[Any]) -> torch.Tensor:
        works.append(_Landed())
        if sum(receive) == rows.shape[0]:
            return rows
        return rows.new_zeros(sum(receive), rows.shape[1])


def layers(clock: Clock, smoke: bool, link: dict[str, Any]) -> list[dict[str, Any]]:
    """Time and traffic of one layer per model and tau."""
    table = []
    dtype = torch.float32 if smoke else torch.bfloat16
    for name, tokens in (("1B", 65_536), ("7B", 65_536)):
        s, t = SHAPES[name], 240 if smoke else tokens
        d, h = (32, 32) if smoke else (s.d_model, s.d_expert)
        vanilla_s = vanilla_bytes = 0.0
        for tau in (None, *TAUS):
            torch.manual_seed(0)
            counts = s.experts
            with torch.device(clock.device):
                whole: MoEPlusPlus = (
                    MoE(d, h, counts.ffn)
                    if tau is None
                    else MoEPlusPlus(
                        d, h, counts.ffn, n_constant=counts.constant, n_copy=counts.copy, n_zero=counts.zero
                    )
                )
            layer = ExpertParallel(whole.to(dtype))
            x = torch.randn(t, d, device=clock.device, dtype=dtype)
            experts = Experts(counts.ffn) if tau is None else counts
            ids = exact_routing(t, s.k, experts, tau or 1.0, seed=dist.get_rank()).to(clock.device)
            gates = torch.rand(t, s.k, device=clock.device)
            row: dict[str, Any] = {"model": name, "tokens": t, "tau": tau, "rho": 1.0 if tau is None else s.rho(tau)}
            way_chosen, layer.layer.path = layer.layer.path, "sorted"
            want = layer.compute(x, ids, gates).float()
            layer.layer.path = way_chosen
            row["difference"] = float((layer.compute(x, ids, gates).float() - want).norm() / want.norm())
            for way in ("overlapped", "in_turn"):
                layer.overlap = way == "overlapped"
                row[f"{way}_s"] = clock(partial(layer.compute, x, ids, gates))
            assert layer.traffic is not None
            sent = torch.tensor([layer.traffic.sent_bytes], device=clock.device, dtype=torch.float64)
            dist.all_reduce(sent)
            row["sent_bytes"] = float(sent) / dist.get_world_size()
            layer.__class__ = LocalWork
            row["local_s"] = clock(partial(layer.compute, x, ids, gates))
            exchange = 2 * (link["alpha_s"] + row["sent_bytes"] / link["bandwidth_bytes_per_s"]) + link["alpha_s"]
            row["modelled_s"] = row["local_s"] + exchange
            if tau is None:
                vanilla_s, vanilla_bytes = row["overlapped_s"], row["sent_bytes"]
            row |= {"speedup": vanilla_s / row["overlapped_s"], "bytes_ratio": row["sent_bytes"] / vanilla_bytes}
            table.append(row)
            del whole, layer
    return table


def main(arguments: list[str] | None = None) -> None:
    """The entry point; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    device = "cpu"
    if options.smoke:
        torch.set_num_threads(1)
    else:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.smoke else "nccl")
    result: dict[str, Any] = {
        "environment": environment("cpu" if options.smoke else "cuda"),
        "ranks": dist.get_world_size(),
    }

    def save() -> None:
        if dist.get_rank() == 0:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        result["link"] = collectives(Clock(device), options.smoke)
        save()
        result["layers"] = layers(Clock(device), options.smoke, result["link"])
        save()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
