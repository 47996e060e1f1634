"""Everything that is timed on the machine. Needs torch and timm alone; what it writes is data for the fit, which may run elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shared.calibrate import clock, power
from shared.calibrate.models import HeldOut, held_out_models
from shared.calibrate.points import DTYPES, Limits, Point, build, micro_benchmarks
from shared.runner.environment import cpu_name, environment, num_cores

Progress = Callable[[str, int, int], None]  # what, done, of

DENSITY = {"cpu": 1.0, "cuda": 3.0}  # of the micro-benchmarks: a GPU takes a few seconds for all
LIMITS = {"cpu": Limits(5e9, 1e8), "cuda": Limits(4e12, 6e9)}
EAGER_SIZES: dict[str, tuple[int, ...]] = {  # small calls, for the time of a launch
    "linear": (16, 64, 64), "bmm": (4, 16, 16, 16), "conv": (1, 16, 16, 8, 3, 1, 1), "attention": (1, 2, 64, 64),
    "relu": (2, 16, 64), "add": (2, 16, 64), "batch_norm": (1, 16, 8, 8), "gelu": (2, 16, 64), "layer_norm": (2, 16, 64),
    "softmax": (2, 16, 64), "mean": (1, 16, 8, 8), "gather": (1000, 16, 64), "cat": (2, 16, 64), "transpose": (2, 16, 2, 32),
    "scatter": (64, 16, 64), "add_rows": (64, 16, 64), "sort": (64,), "topk": (64, 16), "sum": (64, 4, 4),
}  # fmt: skip
ENERGY_POINTS = (  # what the power model is fitted to: products, streams and vector work, none of a held-out model
    Point("linear", (8192, 8192, 8192), "bf16"),
    Point("linear", (4096, 1024, 1024), "bf16"),
    Point("linear", (65536, 640, 640), "bf16"),
    Point("linear", (4096, 4096, 4096), "fp32"),
    Point("attention", (32, 16, 512, 64), "bf16"),
    Point("conv", (64, 128, 128, 32, 3, 1, 1), "bf16"),
    Point("conv", (64, 256, 256, 32, 1, 1, 1), "bf16"),
    Point("add", (64, 1024, 8192), "bf16"),
    Point("add", (8, 512, 512), "bf16"),
    Point("batch_norm", (64, 128, 64, 64), "bf16"),
    Point("layer_norm", (64, 512, 512), "bf16"),
    Point("gelu", (256, 1024, 4096), "bf16"),
)
ENERGY_MODELS = ("deit_small_patch16_224", "routed_experts_384", "resnet50")
ENERGY_BATCH = 64
ENERGY_REPEATS = 3


@dataclass
class Measured:
    """What one machine gave. Lists of plain rows, as the JSON file has them."""

    machine: dict[str, Any]
    spread: float
    points: list[dict[str, Any]]
    host: dict[str, float]
    held_out: list[dict[str, Any]]
    energy: list[dict[str, Any]]
    failures: list[str]


def measure(
    device: str,
    *,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    save: Callable[[Measured], None] = lambda measured: None,
    progress: Progress = lambda what, done, total: None,
    share: float = 1.0,
    with_energy: bool = True,
) -> Measured:
    """Time the micro-benchmarks and the held-out models on ``device`` (``cpu`` or ``cuda``).

    Args:
        save: called after every part, so that a killed run keeps what it measured.
        share: of the micro-benchmarks, for a test of the code path.

    Raises:
        UserError: the machine is too noisy.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    with torch.inference_mode():
        found = Measured(machine(device), clock.require_quiet(device), [], {}, [], [], [])
        points = micro_benchmarks(dtypes, LIMITS[device], density=DENSITY[device])
        points = points[: max(1, round(len(points) * share))]
        for number, point in enumerate(points):
            with _kept_going(found, str(point)):
                found.points.append({**asdict(point), "seconds": _seconds(*build(point, device), device)})
            progress("micro-benchmarks", number + 1, len(points))
        save(found)
        if device == "cuda":
            for op, sizes in EAGER_SIZES.items():
                module, inputs = build(Point(op, sizes, "bf16"), device)
                found.host[op] = clock.host_seconds(lambda module=module, inputs=inputs: module(*inputs))  # type: ignore[misc]
            save(found)
        models = held_out_models()[: max(1, round(100 * share))]
        for number, model in enumerate(models):
            for row in _held_out(model, device, dtypes, found):
                found.held_out.append(row)
            save(found)
            progress("held-out models", number + 1, len(models))
        read_j = power.counter(device) if with_energy else None
        if read_j is not None:
            for row in _energy(device, read_j, progress, found):
                found.energy.append(row)
                save(found)
        found.spread = max(found.spread, clock.require_quiet(device))  # and it was quiet to the end
        save(found)
    return found


def _seconds(module: Callable[..., Any], inputs: tuple[torch.Tensor, ...], device: str) -> float:
    call = lambda: module(*inputs)  # noqa: E731
    return clock.cpu_seconds(call) if device == "cpu" else clock.gpu_seconds(call)


def _held_out(model: HeldOut, device: str, dtypes: Sequence[str], found: Measured) -> Iterator[dict[str, Any]]:
    for dtype in [name for name in dtypes if name in model.dtypes]:
        gpu_batches = model.gpu_batches[:-1] if dtype == "fp32" and "bf16" in model.dtypes else model.gpu_batches
        for batch in model.cpu_batches if device == "cpu" else gpu_batches:
            row = {"model": model.name, "batch": batch, "dtype": dtype}
            with _kept_going(found, str(row)):
                module, inputs = model.build(batch, DTYPES[dtype], device)
                call = lambda module=module, inputs=inputs: module(*inputs)  # noqa: E731
                if device == "cpu":
                    yield {**row, "mode": "eager", "seconds": clock.cpu_seconds(call, limit_s=1.2)}
                    continue
                yield {**row, "mode": "eager", "seconds": clock.eager_seconds(call)}
                yield {**row, "mode": "graph", "seconds": clock.gpu_seconds(call, calls=1)}


def _energy(device: str, read_j: Callable[[], float], progress: Progress, found: Measured) -> Iterator[dict[str, Any]]:
    """Energy of the micro-benchmarks of the power model, once each, and of held-out models, several windows each."""
    models = {model.name: model for model in held_out_models()}
    total = len(ENERGY_POINTS) + len(ENERGY_MODELS)
    for number, point in enumerate(ENERGY_POINTS):
        with _kept_going(found, f"energy of {point}"):
            seen = power.window(_work(*build(point, device), device), read_j, device, warmup_s=1.0, seconds=3.0)
            yield {**asdict(point), **asdict(seen)}
        progress("energy", number + 1, total)
    for number, name in enumerate(ENERGY_MODELS):
        with _kept_going(found, f"energy of {name}"):
            work = _work(*models[name].build(ENERGY_BATCH, torch.bfloat16, device), device)
            for repeat in range(ENERGY_REPEATS):
                seen = power.window(work, read_j, device, warmup_s=0.0 if repeat else power.WARMUP_S)
                yield {"model": name, "batch": ENERGY_BATCH, "dtype": "bf16", "repeat": repeat, **asdict(seen)}
        progress("energy", len(ENERGY_POINTS) + number + 1, total)


def _work(module: Callable[..., Any], inputs: tuple[torch.Tensor, ...], device: str) -> Callable[[], Any]:
    if device == "cpu":
        return lambda: module(*inputs)
    return clock.graph_of(lambda: module(*inputs), 1).replay


@contextmanager
def _kept_going(found: Measured, what: str) -> Iterator[None]:
    """A benchmark that this machine cannot run (memory, an operator without a kernel) is noted, and the rest goes on."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        found.failures.append(f"{what}: {' '.join(str(error).split())[:200]}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    """Name and place of the measurement: processor, versions, date, commit."""
    code = environment()
    described: dict[str, Any] = {
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": str(code["commit"] or "")[:7] + " with local changes" * bool(code["dirty"]),
        "torch": torch.__version__,
        "cores": num_cores(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "name": torch.cuda.get_device_name(0),
            "units": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    else:
        described |= {
            "name": described["cpu"],
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }
    return described


def _caches() -> dict[str, int]:
    """Bytes of the caches of as many cores as torch has threads, by level (``l2``, ``l3``), as Linux tells."""
    found: dict[tuple[str, str], int] = {}
    for core in sorted(os.sched_getaffinity(0))[: torch.get_num_threads()] if hasattr(os, "sched_getaffinity") else ():
        for folder in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
            level, kind = (folder / "level").read_text().strip(), (folder / "type").read_text().strip()
            if kind != "Instruction":
                size = (folder / "size").read_text().strip()
                shared = (folder / "shared_cpu_list").read_text().strip()
                found[f"l{level}", shared] = int(size.rstrip("KM")) * (2**20 if size.endswith("M") else 2**10)
    totals: dict[str, int] = {}
    for (level, _), size_bytes in found.items():
        totals[level] = totals.get(level, 0) + size_bytes
    return {level: totals[level] for level in ("l2", "l3") if level in totals}


def save_json(measured: Measured, path: Path) -> None:
    """Write, whole or not at all, one row of each list a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(measured), separators=(",", ":"))
    for start in ('{"op":', '{"model":'):
        text = text.replace(start, "\n" + start)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)
