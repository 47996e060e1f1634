"""The published table: how wrong each calibrated device is on models outside its fit, next to the datasheet roofline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from shared.calibrate.results import Calibrated
from shared.calibrate.validate import summary
from shared.hardware import Device
from shared.hardware.figure import Figure

INTRODUCTION = """\
# How wrong the device models are

Made by `python run.py calibrate=table` from the measurements in this folder; `calibrate=cpu` and `calibrate=cuda` add a machine.
The figures of a device are fitted to micro-benchmarks of single operators. None of the models below, and no shape of theirs, is in a
fit, and there is no constant for a model; which form a law has was decided by micro-benchmarks left out of the fit
([docs/calibration.md](../../docs/calibration.md)). *calibrated*: the laws of `shared/hardware/efficiency.py`; *three figures*: one
share of the matrix peak, one of the bandwidth and one overhead, from the same micro-benchmarks; *roofline*: peaks alone (of a CPU, which
has no data sheet: the best rates that any micro-benchmark reached). Errors are absolute and relative to the measured time. *graph*: the
device alone, replaying a CUDA graph; *eager*: each operator is launched from Python.
"""


PUBLIC = """\
## Devices that others measured

Constants fitted to public measured sets, with the error of those fits: no machine here stood behind them. They enter by the same device
files and the same cost model as ours; the sets themselves are not carried. Latency: t = max(F / (P e_f), B / (W e_b)) + t0. The data of
microsoft/vidur are under the MIT licence; single figures of te42kyfo/gpu-benches (GPL-3.0) are quoted.
"""


def write_table(results: Sequence[Calibrated], path: Path, devices: Sequence[Device] = ()) -> Path:
    """Write the page: our machines, and of ``devices`` those that carry a fit of others."""
    lines = [INTRODUCTION, *(line for result in results for line in _section(result)), *_public(devices)]
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(text)
    return path


def _public(devices: Sequence[Device]) -> Iterator[str]:
    latency, power, collectives = [], [], []
    for device in devices:
        c, board = device.calibration, device.energy.board
        if not c.operators and c.held_out_error_rel and c.compute_fraction and c.bandwidth_fraction and c.overhead:
            errors = [_figure(error) for error in (c.fit_error_rel, c.held_out_error_rel, c.roofline_error_rel)]
            constants = (
                f"{c.compute_fraction.value:.3g} | {c.bandwidth_fraction.value:.3g} | {1e6 * c.overhead.value:.3g}"
            )
            latency.append(f"| {device.id} | {constants} | {' | '.join(errors)} | {c.compute_fraction.source} |")
        if not c.operators and board and board.fit_error_rel:
            (unit, op), byte = next(iter(board.per_op.items())), next(iter(board.per_byte.values()))
            floor = f"{board.floor.value:.4g}" if board.floor else "not known"
            constants = f"{floor} | {1e12 * op.value:.3g} ({unit}) | {1e12 * byte.value:.3g}"
            power.append(
                f"| {device.id} | {constants} | {_figure(board.fit_error_rel)} | {board.fit_error_rel.source} |"
            )
        if not c.operators:
            for name, fit in device.collective.items():
                if fit.fit_error_rel and fit.alpha:
                    constants = f"{1e6 * fit.alpha.value:.3g} | {fit.bandwidth.value:.3g}"
                    collectives.append(
                        f"| {device.id} | {name} | {constants} | {_figure(fit.fit_error_rel)} | {fit.bandwidth.source} |"
                    )
    if not latency + power + collectives:
        return
    yield PUBLIC
    yield "| latency | e_f | e_b | t0, us | error of the fit | error, other models | of the roofline | source |"
    yield "| :-- | --: | --: | --: | :-- | :-- | :-- | :-- |"
    yield from latency
    yield "\n| power of the board | floor, W | pJ/op | pJ/B | error of the fit | source |\n| :-- | --: | --: | --: | :-- | :-- |"
    yield from power
    yield "\n| all-reduce | topology | alpha, us | bus bandwidth, B/s | error of the fit | source |\n| :-- | :-- | --: | --: | :-- | :-- |"
    yield from collectives


def _figure(error: Figure | None) -> str:
    """An error and its range."""
    if error is None:
        return "not known"
    spread = (
        f" ({_percent(error.low)} to {_percent(error.high)})" if error.lo is not None and error.low < error.high else ""
    )
    return _percent(error.value) + spread


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _section(result: Calibrated) -> Iterator[str]:
    machine = result.measured.machine
    yield f"## {result.data['id']}\n"
    yield (
        f"{machine['name']}, {machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, measured on {machine['date']} "
        f"at commit {machine['commit'] or 'unknown'}; the machine's own spread was {_percent(result.measured.spread)}.\n"
    )
    yield "| held out | runs | calibrated, median | 90th pct. | three figures, median | 90th pct. | roofline, median | 90th pct. |"
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: |"
    for row in summary(result.predictions):
        cells = [
            _percent(row[f"{which}_{what}"])
            for which in ("calibrated", "simple", "roofline")
            for what in ("median", "p90")
        ]
        yield f"| {row['group']} | {row['n']} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Error on the micro-benchmarks of the fit, by class of operator (median): "
        + ", ".join(
            f"{name} {_percent(float(np.median(np.abs(errors))))}" for name, errors in result.fit.errors.items()
        )
        + ".\n"
    )
    yield "<details><summary>All held-out runs</summary>\n"
    yield "| model | batch | precision | mode | measured, ms | calibrated | three figures | roofline |"
    yield "| :-- | --: | :-- | :-- | --: | --: | --: | --: |"
    for p in result.predictions:
        cells = [f"{100 * p.error_rel(which):+.0f} %" for which in ("calibrated", "simple", "roofline")]
        yield f"| {p.model} | {p.batch} | {p.dtype} | {p.mode} | {1e3 * p.measured_s:.3g} | {' | '.join(cells)} |"
    yield "\n</details>\n"
    if result.energy:
        yield "Energy by the board's counter (windows of at least 5 s after a warm-up) against the model with its own time:\n"
        yield "| model | batch | precision | windows | measured, J | range | mean power, W | modelled, J | error | error of the time |"
        yield "| :-- | --: | :-- | --: | --: | :-- | --: | --: | --: | --: |"
        for e in result.energy:
            yield (
                f"| {e.model} | {e.batch} | {e.dtype} | {e.windows} | {e.measured_j:.4g} | {e.low_j:.4g} to {e.high_j:.4g} | "
                f"{e.power_w:.0f} | {e.modelled_j:.4g} | {100 * e.error_rel:+.1f} % | {100 * (e.modelled_s / e.measured_s - 1):+.1f} % |"
            )
        yield ""
    elif not result.measured.energy:
        yield "No energy: this machine has no counter that can be read.\n"
    if result.left_out:
        yield f"Left out ({len(result.left_out)}): " + "; ".join(result.left_out) + "\n"
