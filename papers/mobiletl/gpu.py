"""Step time and peak memory on an NVIDIA GPU: ``python -m papers.mobiletl.gpu --out FILE.json``.

Needs torch, timm, triton, numpy and scipy alone. Every way of transfer trains the same network on the same images with the same fused
Adam; times are paired ratios in one process: with eager launches, with forward and backward replayed as CUDA graphs in an ordinary
loop (:func:`papers.mobiletl.graphs.graphed`, the fused path), and with the whole step as one graph.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from papers.mobiletl.convert import adapt, convert_block, parameter_groups
from papers.mobiletl.functional import shift_act
from papers.mobiletl.graphs import graphed
from papers.mobiletl.models import create, fig1_block
from papers.mobiletl.peers import checkpointed, compiled
from shared.measure import Ratio, measure, peak_allocated_bytes

MODELS = ("mobilenetv3_small_100", "mobilenetv2_100")
RESOLUTION = 224


@dataclass(frozen=True)
class Step:
    """A training step on fixed images, and what it holds on the device between steps."""

    run: Callable[[], object]
    resident_bytes: int


def variants(base: nn.Module, blocks: int) -> dict[str, Callable[[], nn.Module]]:
    """Every way of transfer, by name; built when called."""
    return {
        "ft_all": lambda: adapt(base, "ft_all"),
        "ft_blocks": lambda: adapt(base, "ft_blocks", blocks),
        "mobiletl": lambda: adapt(base, "mobiletl", blocks),
        "mobiletl_recompute": lambda: adapt(base, "mobiletl", blocks, recompute=True),
        "ft_blocks_checkpoint": lambda: checkpointed(base, blocks),
        "norm": lambda: adapt(base, "norm"),
        "bias": lambda: adapt(base, "bias"),
        "last": lambda: adapt(base, "last"),
    }


def training_step(model: nn.Module, batch: int, *, device: str = "cuda") -> Step:
    """A step of Adam on a batch of random images."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = model.to(device).train()
    optimizer = torch.optim.Adam(
        parameter_groups(model, lr=1e-4), lr=1e-4, fused=device == "cuda", capturable=device == "cuda"
    )
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):  # allocates the optimizer's state
        run()
    optimizer.zero_grad(set_to_none=True)
    return Step(run, (torch.cuda.memory_allocated() if device == "cuda" else 0) - before)


def captured(step: Step) -> Callable[[], object]:
    """The same step captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return graph.replay


def graphed_loop(model: nn.Module, batch: int) -> Callable[[], object]:
    """A step whose forward and backward passes :func:`papers.mobiletl.graphs.graphed` replays; loss and optimizer are launched."""
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, device="cuda")
    labels = torch.randint(0, 10, (batch,), device="cuda")
    model = model.to("cuda").train()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-4), lr=1e-4, fused=True)
    model = graphed(model, images)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def saved_bytes(model: nn.Module, batch: int) -> int:
    """Bytes that autograd keeps for one backward pass: each storage once, parameters and buffers not."""
    model = model.to("cuda").train()
    persistent = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in persistent:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(batch, 3, RESOLUTION, RESOLUTION, device="cuda"))
    return sum(size for size, _ in kept.values())


def kernel_errors() -> dict[str, float]:
    """Largest relative error of the Triton path against the torch path in float64, over shapes, layouts and activations."""
    errors: dict[str, float] = {"y": 0.0, "dx": 0.0, "dbias": 0.0}
    torch.manual_seed(0)
    for shape in ((8, 576, 7, 7), (128, 96, 14, 14), (3, 5, 9, 7), (16, 32, 56, 56)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for activation in ("relu", "relu6", "hard_swish", "silu"):
                x = (3 * torch.randn(shape, device="cuda")).to(memory_format=layout)
                weight, bias, mean, var = (torch.rand(shape[1], device="cuda") + 0.5 for _ in range(4))
                u = (x - mean.view(1, -1, 1, 1)) * (weight * torch.rsqrt(var + 1e-5)).view(1, -1, 1, 1) + bias.view(
                    1, -1, 1, 1
                )
                x = torch.where(u.abs() < 1e-4, x + 0.01, x)  # a sign that rounding decides is nobody's error
                dy = torch.randn(shape, device="cuda")
                results = []
                for dtype in (torch.float32, torch.float64):
                    xs, b = x.to(dtype).detach().requires_grad_(), bias.to(dtype).requires_grad_()
                    arguments = (xs, weight.to(dtype), b, mean.to(dtype), var.to(dtype), 1e-5, activation)
                    y = shift_act(*arguments)
                    results.append((y.detach(), *torch.autograd.grad(y, (xs, b), dy.to(dtype))))
                for name, ours, reference in zip(errors, *results, strict=True):
                    errors[name] = max(errors[name], float((ours - reference).norm() / reference.norm()))
    return errors


def block_errors() -> dict[str, float]:
    """Largest relative error of result and gradients of a fused block in float32 against float64, TF32 off; by block and gradient."""
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    for version in ("v2", "v3"):
        holder = nn.Sequential(fig1_block(version)).cuda().train()
        convert_block(holder, "0", act_backward="step", inner_norm="shift", recompute=False)
        x, dy = (torch.randn(8, 96, 7, 7, device="cuda", dtype=torch.float64) for _ in range(2))
        results: list[dict[str, torch.Tensor]] = []
        for dtype in (torch.float32, torch.float64):
            block = copy.deepcopy(holder).to(dtype)
            inputs = x.to(dtype).requires_grad_()
            y = block(inputs)
            y.backward(dy.to(dtype))
            found = {"y": y.detach(), "dx": inputs.grad, **{name: p.grad for name, p in block.named_parameters()}}
            results.append({name: value.double() for name, value in found.items() if value is not None})
        for name, reference in results[1].items():
            errors[f"{version} {name}"] = float((results[0][name] - reference).norm() / reference.norm())
    torch.backends.cudnn.allow_tf32 = tf32
    return errors


def graph_errors() -> dict[str, float]:
    """Largest relative error of a gradient and largest difference of a statistic, ``graphed`` against eager, after two steps."""
    torch.manual_seed(0)
    base, images = create(MODELS[0]), torch.randn(8, 3, RESOLUTION, RESOLUTION, device="cuda")
    labels = torch.randint(0, 10, (8,), device="cuda")
    eager, replayed = (adapt(base, "mobiletl", 5).cuda().train() for _ in range(2))
    replayed = graphed(replayed, images)
    for _ in range(2):
        for model in (eager, replayed):
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
    pairs = [(p.grad, q.grad) for p, q in zip(eager.parameters(), replayed.parameters(), strict=True)]
    gradient = max(
        float((b - a).norm() / a.norm().clamp_min(1e-6)) for a, b in pairs if a is not None and b is not None
    )
    buffers = zip(eager.buffers(), replayed.buffers(), strict=True)
    return {"gradient": gradient, "statistic": max(float((b - a).abs().float().max()) for a, b in buffers)}


def kernel_times() -> list[dict[str, Any]]:
    """Forward and backward of one internal norm and activation: trained norm + Hard-Swish against the fused layer; µs and GB/s."""
    rows = []
    for shape in ((8, 576, 7, 7), (128, 576, 7, 7), (128, 240, 14, 14)):
        x = torch.randn(shape, device="cuda").requires_grad_()
        dy = torch.randn(shape, device="cuda")
        parts = [torch.rand(shape[1], device="cuda") + 0.5 for _ in range(4)]
        weight, bias = parts[0].clone().requires_grad_(), parts[1].clone().requires_grad_()

        def plain(x: Any = x, dy: Any = dy, w: Any = weight, b: Any = bias, p: Any = parts) -> None:
            y = F.hardswish(F.batch_norm(x, p[2], p[3], w, b, training=True))
            torch.autograd.grad(y, (x, w, b), dy)

        def fused(x: Any = x, dy: Any = dy, b: Any = bias, p: Any = parts) -> None:
            y = shift_act(x, p[0], b, p[2], p[3], 1e-5, "hard_swish")
            torch.autograd.grad(y, (x, b), dy)

        functions = {"plain": captured(Step(plain, 0)), "fused": captured(Step(fused, 0))}
        timings = measure(functions, device="cuda", rounds=15, min_round_s=0.01)
        bytes_moved = 4 * x.numel() * 4 + 2 * x.numel() / 8
        fused_s = timings.by_name["fused"].median_s
        rows.append(
            {"shape": list(shape), "plain_s": timings.by_name["plain"].median_s, "fused_s": fused_s,
             "ratio": _ratio(timings.ratio("fused", "plain")), "fused_bytes_per_s": bytes_moved / fused_s}
        )  # fmt: skip
    return rows


def compiler(name: str, batch: int, blocks: int) -> dict[str, Any]:
    """The same for fine-tuning that torch.compile has partitioned, against eager fine-tuning and MobileTL."""
    torch.manual_seed(0)
    base = create(name)
    builders = {key: build for key, build in variants(base, blocks).items() if key in ("ft_blocks", "mobiletl")}
    steps = {key: training_step(build(), batch) for key, build in builders.items()}
    steps["ft_blocks_compiled"] = training_step(compiled(base, blocks), batch)
    timings = measure({key: step.run for key, step in steps.items()}, device="cuda", rounds=15, min_round_s=0.03)
    rows = {
        key: {"peak_bytes": peak_allocated_bytes(step.run), "step_s": timings.by_name[key].median_s,
              "over_ft_blocks": _ratio(timings.ratio(key, "ft_blocks"))}
        for key, step in steps.items()
    }  # fmt: skip
    return {"model": name, "batch": batch, "blocks": blocks, "rows": rows}


def network(name: str, batch: int, blocks: int) -> dict[str, Any]:
    """Memory and time of every way of transfer for one network and batch."""
    torch.manual_seed(0)
    base = create(name)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    builders = variants(base, blocks)
    for key, build in builders.items():
        step = training_step(build(), batch)
        peak = peak_allocated_bytes(step.run)
        rows[key] = {
            "peak_bytes": peak,
            "resident_bytes": step.resident_bytes,
            "saved_bytes": saved_bytes(build(), batch),
        }
        steps[key] = step
    timings = measure({key: step.run for key, step in steps.items()}, device="cuda", rounds=15, min_round_s=0.03)
    graphs = {
        key: captured(steps[key])
        for key in ("ft_all", "ft_blocks", "mobiletl", "mobiletl_recompute", "ft_blocks_checkpoint")
    }
    replays = measure(graphs, device="cuda", rounds=15, min_round_s=0.03)
    loops = {key: graphed_loop(builders[key](), batch) for key in ("ft_blocks", "mobiletl", "mobiletl_recompute")}
    loop_times = measure(loops, device="cuda", rounds=21, min_round_s=0.05)
    for key, row in rows.items():
        timing = timings.by_name[key]
        row |= {"step_s": timing.median_s, "q1_s": timing.q1_s, "q3_s": timing.q3_s}
        row["over_ft_blocks"] = _ratio(timings.ratio(key, "ft_blocks"))
        if key in graphs:
            row |= {
                "graph_step_s": replays.by_name[key].median_s,
                "graph_over_ft_blocks": _ratio(replays.ratio(key, "ft_blocks")),
            }
        if key in loops:
            row |= {
                "loop_step_s": loop_times.by_name[key].median_s,
                "loop_over_ft_blocks": _ratio(loop_times.ratio(key, "ft_blocks")),
            }
    return {"model": name, "batch": batch, "blocks": blocks, "rows": rows}


def _ratio(ratio: Ratio) -> list[float]:
    return [ratio.median, ratio.low, ratio.high]


def measure_all(
    blocks: int, batches: tuple[int, ...], *, compile_peer: bool, save: Callable[[dict[str, Any]], object],
    models: Sequence[str] = MODELS,
) -> dict[str, Any]:  # fmt: skip
    """All numbers; ``save`` gets the growing result after each part, so that a broken part does not lose the others."""
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "date": time.strftime("%Y-%m-%d"),
        "copy_bytes_per_s": copy_bandwidth_bytes_per_s(),
        "kernel_errors": kernel_errors(),
        "block_errors": block_errors(),
        "graph_errors": graph_errors(),
        "networks": [],
    }
    for name in models:
        for batch in batches:
            result["networks"].append(network(name, batch, blocks))
            save(result)
    result["kernels"] = kernel_times()
    save(result)
    if compile_peer:
        result["compiler"] = compiler(MODELS[0], max(batches), blocks)
        save(result)
    return result


def copy_bandwidth_bytes_per_s() -> float:
    """Bytes read and written per second by a device-to-device copy of 1 GB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    arguments = parser.parse_args()

    def save(result: dict[str, Any]) -> None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")

    result = measure_all(arguments.blocks, tuple(arguments.batches), compile_peer=not arguments.no_compile, save=save)
    for entry in result["networks"]:
        for key, row in entry["rows"].items():
            print(
                f"{entry['model']:24s} {entry['batch']:4d} {key:22s} peak {row['peak_bytes'] / 1e6:8.1f} MB  "
                f"saved {row.get('saved_bytes', float('nan')) / 1e6:8.1f} MB  step {1e3 * row['step_s']:7.2f} ms  "
                f"ratio {row['over_ft_blocks'][0]:.3f}  graph {1e3 * row.get('graph_step_s', float('nan')):7.2f} ms "
                f"{row.get('graph_over_ft_blocks', [float('nan')])[0]:.3f}"
            )
    print(json.dumps({key: value for key, value in result.items() if key != "networks"}, indent=1))


if __name__ == "__main__":
    main()
