"""The device file of a calibrated machine: a data sheet (GPU) or the machine's own best rates (CPU), with the fitted figures put in."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from shared.calibrate.fit import FEWEST, Fit, Samples
from shared.calibrate.measure import Measured
from shared.calibrate.points import DTYPES
from shared.errors import UserError
from shared.hardware import list_devices, load_device
from shared.hardware.device import DEVICE_FOLDER
from shared.hardware.efficiency import LIKE, MATRIX, measured_class
from shared.hardware.schema import OPERATOR_CLASSES

NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
START_BYTES = {
    "l3": 3e7
}  # a last cache that other processors share; also about where a C library asks for new pages at each call
# Classes that may compute longer than they move; on a CPU simple elementwise work in half precision is among them.
COMPUTING = (
    "attention",
    "special",
    "layer_norm",
    "batch_norm",
    "softmax",
    "reduction",
    "pool",
    "integer",
    "division",
    "sort",
    "topk",
)
FEWEST_APART = 8  # points of a class, in each precision, that has a law apart from that of the class it is most like
TILED_ONLY = ("conv1x1_odd", "stem")  # kernels that only a GPU's library chooses apart
SHORT = 16  # elements of a row: without rows so short the points do not tell what short ones cost
MEMORY_SLACK = 0.06  # what a driver keeps for itself


def figure(
    value: float, unit: str, source: str, rel_unc: float = 0.1, tag: str = "measured", **scope: str
) -> dict[str, Any]:
    """A figure as the files have it, rounded to four digits."""
    return {"value": _rounded(value), "unit": unit, "rel_unc": round(rel_unc, 3), "tag": tag, "source": source, **scope}


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def draft(measured: Measured, samples: Samples, base: str | None) -> dict[str, Any]:
    """A device file before the fit, with starting values.

    Args:
        base: id of the data sheet of a GPU; found by number of units and size of memory where it is not given.

    Raises:
        UserError: no data sheet fits, or several do.
    """
    data = _cpu(measured, samples) if measured.machine["device"] == "cpu" else _gpu(measured, base)
    source = "starting value of the fit"
    tiled = measured.machine["device"] != "cpu"
    operators: dict[str, dict[str, Any]] = {}
    classes = _merged(samples, [name for name in OPERATOR_CLASSES if tiled or name not in TILED_ONLY])
    for name in OPERATOR_CLASSES:
        for precision in sorted(set(samples.precisions.tolist())):
            chosen = (classes == name) & (samples.precisions == precision)
            if chosen.sum() >= FEWEST:
                has_vector = bool((samples.arrays.vector_ops[chosen] > 0).any())
                lengths = samples.arrays.shapes()[chosen, 3]
                has_short = bool(((lengths > 0) & (lengths <= SHORT)).any())
                operators.setdefault(name, {})[precision] = _law(name, tiled, has_vector, has_short, source)
    caches = [level for level in ("l2", "l3") if level in data["memory"]]
    for level, faster in zip(caches, (4.0, 2.0), strict=False):
        cache = data["memory"][level]
        cache.setdefault("bandwidth", figure(faster * data["memory"]["dram"]["bandwidth"]["value"], "B/s", source))
        cache["usable"] = figure(START_BYTES.get(level, cache["size"]["value"]), "B", source)
    calibration = {
        "method": "laws by class of operator (shared/hardware/efficiency.py), fitted to micro-benchmarks of single operators",
        "operators": operators,
        "caches": caches,
        "bandwidth_fraction": figure(0.7, "ratio", source),
        "compute_fraction": figure(0.5, "ratio", source),
        "overhead": figure(1e-5, "s", source),
    }
    if tiled:
        calibration["tile_half"] = figure(64.0, "count", source)
    data["calibration"] = calibration
    return data


def _merged(samples: Samples, allowed: Sequence[str]) -> npt.NDArray[np.str_]:
    """Classes of the points. One without points enough goes with the class that it is most like, and so does one that leaves that none."""

    def fewest(name: str) -> int:
        rows = samples.precisions[samples.classes == name]
        return min((int((rows == precision).sum()) for precision in set(rows.tolist())), default=0)

    apart = [n for n in allowed if n not in LIKE or (fewest(n) >= FEWEST_APART and fewest(LIKE[n]) >= FEWEST)]
    return np.array([measured_class(apart, name) for name in samples.classes])


def _law(name: str, tiled: bool, has_vector: bool, has_short: bool, source: str) -> dict[str, Any]:
    """Starting values; which figures a class has follows from what its kernels do, and from what the points can tell."""
    law: dict[str, Any] = {"bandwidth": figure(1.0, "ratio", source), "overhead": figure(3e-6, "s", source)}
    if name in MATRIX:
        law["compute"] = figure(0.01 if name == "depthwise" else 0.3, "ratio", source)
        law["serial"] = figure(0.3, "ratio", source)
        halves = {"attention": "k", "depthwise": ""}.get(name, "k" if tiled else "mnk")
    else:
        by_rows = name in ("layer_norm", "softmax", "gather_rows", "batch_norm") or (name == "reduction" and has_short)
        halves = "k" if by_rows else ""
    if has_vector and (name in COMPUTING or (not tiled and name in ("pointwise", "broadcast", "batch_norm"))):
        law["vector"] = figure(0.3, "ratio", source)
    return law | {f"{x}_half": figure(64.0, "count", source) for x in halves}


def _cpu(measured: Measured, samples: Samples) -> dict[str, Any]:
    """A CPU tells no data sheet: its peaks are the best rates that any micro-benchmark reached."""
    machine, arrays, seconds = measured.machine, samples.arrays, samples.seconds
    source = "best rate of any micro-benchmark"
    peak = {}
    for dtype, name in NAMES.items():
        rows = (arrays.flops > 0) & np.array([entry == dtype for entry in arrays.dtype])
        if rows.any():
            peak[name] = figure(math.ceil((arrays.flops / seconds)[rows].max() / 1e9) * 1e9, "op/s", source)
    peak["vector"] = figure(float((arrays.vector_ops / seconds)[arrays.flops == 0].max()), "op/s", source)
    memory: dict[str, Any] = {}
    beyond = arrays.bytes_moved > 4 * machine["caches"].get("l2", 0)
    streams = beyond & np.isin(samples.classes, ("pointwise", "special", "copy", "strided"))
    rate = (arrays.bytes_moved / seconds)[streams].max()
    memory["dram"] = {
        "size": figure(machine["memory_bytes"], "B", "operating system", 0.0),
        "bandwidth": figure(
            rate, "B/s", "best stream of operands beyond the second-level caches, whatever lies behind them"
        ),
    }
    for level, size in machine["caches"].items():
        memory[level] = {"size": figure(size, "B", "operating system, of the cores in use", 0.0)}
    return {
        "id": f"cpu_{_slug(machine['name'])}_{machine['threads']}_threads",
        "title": f"{machine['name']}, {machine['threads']} of {machine['cores']} cores",
        "kind": "cpu",
        "compute": {"cores": figure(machine["threads"], "count", "torch threads", 0.0)},
        "peak": peak,
        "memory": memory,
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\(r\)|\(tm\)", "", text.lower())).strip("_")


def _gpu(measured: Measured, base: str | None) -> dict[str, Any]:
    name = base or _data_sheet(measured.machine)
    if name not in list_devices():
        raise UserError(f"base={name} is no device of conf/device: it has {', '.join(list_devices())}")
    data: dict[str, Any] = yaml.safe_load((DEVICE_FOLDER / f"{name}.yaml").read_text())
    data = {key: value for key, value in data.items() if key != "calibration"}
    data["id"], data["title"] = f"{name}_calibrated", f"{data['title']}, calibrated"
    data["compute"]["units"] = figure(measured.machine["units"], "count", "driver", 0.0)
    return data


def _data_sheet(machine: Mapping[str, Any]) -> str:
    """The device file with as many units and as much memory. No name is matched: variants of a board share names."""
    fitting = []
    for name in list_devices():
        device = load_device(name)
        dram = device.memory.get("dram")
        if (
            device.kind != "gpu"
            or device.compute.units is None
            or dram is None
            or dram.size is None
            or "_calibrated" in name
        ):
            continue
        same_memory = abs(dram.size.value / machine["memory_bytes"] - 1) < MEMORY_SLACK
        if device.compute.units.value == machine["units"] and same_memory:
            fitting.append(name)
    if len(fitting) != 1:
        found = f"several data sheets fit ({', '.join(fitting)})" if fitting else "no data sheet in conf/device fits"
        raise UserError(
            f"{found} {machine['name']} with {machine['units']} units and {machine['memory_bytes'] / 1e9:.0f} GB: "
            "say which with base=ID, or write one first"
        )
    return fitting[0]


def with_fit(data: Mapping[str, Any], fit: Fit, measured: Measured) -> dict[str, Any]:
    """The draft with fitted values in place."""
    result = copy.deepcopy(dict(data))
    machine = measured.machine
    source = f"fit to {len(measured.points)} micro-benchmarks, {machine['name']}, torch {machine['torch']}, {machine['date']}"
    for path, value in fit.values.items():
        node: Any = result
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        unit = node[last]["unit"]
        uncertainty = fit.uncertainty[path]
        node[last] = figure(value, unit, source, uncertainty)
        if unit == "ratio" and value * (1 + uncertainty) > 1 >= value:  # a share has an end
            del node[last]["rel_unc"]
            node[last] |= {"lo": _rounded(value * (1 - uncertainty)), "hi": 1.0}
    errors = fit.all_errors
    result["calibration"]["fit_error_rel"] = _error(
        errors, "micro-benchmarks: mean absolute error; lo is the median, hi the 90th percentile"
    )
    return result


def _error(errors: Any, source: str) -> dict[str, Any]:
    """An error figure: the mean, with the median and the 90th percentile as its range."""
    mean, median, p90 = (max(float(x), 1e-6) for x in (np.mean(errors), np.median(errors), np.percentile(errors, 90)))
    entry = {"value": mean, "unit": "ratio", "lo": min(mean, median), "hi": max(mean, p90)}
    return {
        **{key: _rounded(value) if isinstance(value, float) else value for key, value in entry.items()},
        "tag": "measured",
        "source": source,
    }


def with_errors(data: Mapping[str, Any], errors: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Error figures put into ``calibration``: name -> (absolute relative errors, source)."""
    result = copy.deepcopy(dict(data))
    for name, (values, source) in errors.items():
        result["calibration"][name] = _error(values, source)
    return result


class _Dumper(yaml.SafeDumper):
    """Figures on one line, floats as YAML 1.1 reads them."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if "e" in text:
        digits, exponent = text.split("e")
        text = f"{digits if '.' in digits else digits + '.0'}e{'+' if exponent[0] not in '+-' else ''}{exponent}"
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _mapping(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    flow = "value" in value and "unit" in value
    return dumper.represent_mapping("tag:yaml.org,2002:map", value.items(), flow_style=flow)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(dict, _mapping)


def write(data: Mapping[str, Any], path: Path, heading: str) -> None:
    """Write a device file after checking it. Raises UserError where the schema does not hold."""
    load_device(data)
    body = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    path.write_text("".join(f"# {line}\n" for line in heading.splitlines()) + body)
