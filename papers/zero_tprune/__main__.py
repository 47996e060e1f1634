"""``python -m papers.zero_tprune MODEL --flops 0.65`` prints a schedule for any plain timm ViT, and the lines of code that use it."""

from __future__ import annotations

import argparse
import sys

from papers.zero_tprune.counts import flops
from papers.zero_tprune.hardware import Assumed
from papers.zero_tprune.target import find
from shared.errors import UserError
from shared.hardware import load_device


def main(arguments: list[str] | None = None) -> int:
    """Print the schedule; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m papers.zero_tprune", description=__doc__)
    parser.add_argument("model", help="a timm name")
    parser.add_argument("--weights", help="a checkpoint file of it")
    parser.add_argument(
        "--flops", type=float, help="share of the unpruned blocks' FLOPs, or FLOPs above 1 (1 MAC = 1 FLOP)"
    )
    parser.add_argument("--latency", type=float, help="instead: share of the unpruned model's modelled latency")
    parser.add_argument("--device", default="a100_sxm4_80gb")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    try:
        print("\n".join(report(options)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(options: argparse.Namespace) -> list[str]:
    """The lines to print."""
    device = load_device(options.device)
    found = find(
        options.model, weights=options.weights, flops=options.flops, latency=options.latency, device=device, dtype=options.dtype,
        batch=options.batch, assumed=Assumed(0.7, 0.8, 5e-6),
    )  # fmt: skip
    before, after = flops(found.shape), flops(found.shape, found.plan)
    milliseconds = [1e3 * found.seconds(plan) for plan in (None, found.plan)]
    layers = "".join(f"Layer({y.after}, {y.keep:g}, {y.drop}, {y.iterations}), " for y in found.plan.layers)
    return [
        f"{options.model}: {found.what} {found.got:.4g} of the unpruned model (asked for {found.asked:.4g})",
        "after block   drop   keep   votes   patches",
        *(
            f"{row['after_block']:>11}{row['drop']:>7}{row['keep']:>7.3f}{row['votes']:>8}   {row['patches_in']} -> {row['patches_out']}"
            for row in found.rows()
        ),
        f"GFLOPs: blocks {before.total('blocks') / 1e9:.3f} -> {after.total('blocks') / 1e9:.3f}, whole model "
        f"{before.total('model') / 1e9:.3f} -> {after.total('model') / 1e9:.3f}",
        f"modelled on {device.title}, {options.dtype}, batch {options.batch}: {milliseconds[0]:.3f} -> {milliseconds[1]:.3f} ms",
        "from papers.zero_tprune import Layer, Schedule, prune",
        f"pruner = prune(model, Schedule(({layers.rstrip()})))",
    ]


if __name__ == "__main__":
    sys.exit(main())
