"""Counts on the paper's full-size networks: stored bytes, FLOPs, training memory, and what autograd really keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from papers.mobiletl.experiments.setup import MB, MILLION, switches, traced
from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

_BLOCK_INPUT = (8, 96, 7, 7)


def _block_bytes(version: str, cfg: Any) -> tuple[Any, Any, Any]:
    from papers.mobiletl.counts import block_roles, trace_layers
    from papers.mobiletl.models import fig1_block

    layers = trace_layers(fig1_block(version), _BLOCK_INPUT)
    return layers, block_roles(layers, "ft_blocks"), block_roles(layers, "mobiletl", **switches(cfg))


@experiment(
    claims=[
        "block_reduction_v2",
        "block_reduction_v3",
        "block_bytes_v2",
        "block_bytes_v3",
        "block_factor_v2",
        "block_factor_v3",
    ],
    config=["method"],
)
def block(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Fig. 1: what one block keeps, layer by layer."""
    from papers.mobiletl.accounting import layer_bytes, stored_bytes

    rows = []
    for version in ("v2", "v3"):
        layers, base, ours = _block_bytes(version, cfg)
        base_bytes, our_bytes = stored_bytes(layers, base), stored_bytes(layers, ours)
        yield Measurement(f"block_reduction_{version}", 100.0 * (1.0 - our_bytes / base_bytes))
        yield Measurement(f"block_bytes_{version}", our_bytes)
        yield Measurement(f"block_factor_{version}", base_bytes / our_bytes)
        for kind, layer_roles in (("fine-tuning", base), ("MobileTL", ours)):
            for layer, role in zip(layers, layer_roles, strict=True):
                if stored := layer_bytes(layer, role):
                    rows.append({"block": f"Mobile{version.upper()} {kind}", "layer": layer.path, "MB": stored / MB})
    yield Table(
        "block_bytes", "What a block keeps for the backward pass (Fig. 1)", rows,
        Plot("stacked", x="block", y="MB", series="layer", ylabel="MB kept"),
        note="8 images, 96 channels, expansion 6, 7 x 7 maps.",
    )  # fmt: skip


@experiment(claims=["derivative_one_bit"])
def derivative(cfg: Any, ctx: Context) -> Iterator[Result]:
    """How close Hard-Swish's derivative in b bits is to the exact one, for u ~ N(0, 1), and what the V3 block then keeps."""
    import torch

    from papers.mobiletl.accounting import stored_bytes
    from papers.mobiletl.counts import block_roles, trace_layers
    from papers.mobiletl.functional import derivative_codes, derivative_levels
    from papers.mobiletl.models import fig1_block

    u = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    weight = torch.exp(-u * u / 2)
    weight /= weight.sum()
    exact = ((2 * u + 3) / 6).where(u.abs() <= 3, (u > 0).double())
    layers = trace_layers(fig1_block("v3"), _BLOCK_INPUT)
    rows = []
    for bits, act_backward in ((1, "step"), (2, "2bit"), (4, "4bit"), (32, "exact")):
        coarse = exact
        if bits < 32:
            coarse = torch.tensor(derivative_levels(bits), dtype=u.dtype)[derivative_codes(u, bits).long()]
        cosine = float(
            (weight * exact * coarse).sum() / ((weight * exact**2).sum() * (weight * coarse**2).sum()).sqrt()
        )
        error = float((weight * (exact - coarse) ** 2).sum())
        kept = stored_bytes(layers, block_roles(layers, "mobiletl", act_backward=act_backward))
        rows.append({"bits": bits, "cosine": cosine, "mean squared error": error, "V3 block MB": kept / MB})
    yield Measurement("derivative_one_bit", rows[0]["cosine"])
    yield Table(
        "derivative_bits", "Hard-Swish's derivative in few bits", rows,
        Plot("line", x="V3 block MB", y="cosine", xlabel="MB that the V3 block keeps", ylabel="cosine with the exact derivative"),
        note="Inputs drawn from N(0, 1). Levels are means over equal intervals of [-3, 3]; one bit is the step, 32 are exact.",
    )  # fmt: skip


@experiment(claims=["motivation_dense", "motivation_irb", "motivation_factor"])
def motivation(cfg: Any, ctx: Context) -> Iterator[Result]:
    """The motivation table: a dense 5 x 5 convolution against an inverted residual block of expansion 1; maps alone, ReLU at 1 bit."""
    from timm.models._efficientnet_blocks import ConvBnAct, InvertedResidual
    from torch import nn

    from papers.mobiletl.accounting import Rules, stored_bytes
    from papers.mobiletl.counts import block_roles, trace_layers

    rules = Rules(vectors=False, relu6_bits=1)
    dense = trace_layers(ConvBnAct(96, 96, 5, act_layer=nn.ReLU6), _BLOCK_INPUT)
    irb = trace_layers(InvertedResidual(96, 96, 5, exp_ratio=1.0, act_layer=nn.ReLU6), _BLOCK_INPUT)
    dense_bytes = stored_bytes(dense, block_roles(dense, "ft_blocks"), rules)
    irb_bytes = stored_bytes(irb, block_roles(irb, "ft_blocks"), rules)
    yield Measurement("motivation_dense", dense_bytes / MB)
    yield Measurement("motivation_irb", irb_bytes / MB)
    yield Measurement("motivation_factor", irb_bytes / dense_bytes)


@experiment(claims=["flops_reduction", "flops_factor", "flops_macs", "flops_of_the_idea"], config=["model", "method"])
def flops(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C3: multiply-accumulates of a step; exact, and silent about element-wise work."""
    from papers.mobiletl.counts import roles
    from papers.mobiletl.flops import mac_flops

    model, layers = traced(cfg)

    def count(method: str) -> float:
        return mac_flops(layers, roles(model, layers, method, cfg.method.blocks)).total

    everything, five = count("ft_all"), count("ft_blocks")
    reduction = 100.0 * (1.0 - five / everything)
    note = "multiply-accumulates alone, 2 FLOPs each; the paper's bars hold element-wise work whose costs it does not print"
    yield Measurement("flops_reduction", reduction, note=note)
    yield Measurement("flops_factor", everything / five, note=note)
    yield Measurement("flops_macs", reduction)
    yield Measurement("flops_of_the_idea", 100.0 * (five - count("mobiletl")) / everything)


@experiment(
    claims=["flops_forward_all", "flops_backward_all", "flops_forward_five", "flops_backward_five"],
    config=["model", "method"],
)
def calibrated_flops(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C7: the rule whose element costs were chosen on these bars."""
    from papers.mobiletl.counts import roles
    from papers.mobiletl.flops import mac_flops, step_flops

    model, layers = traced(cfg)
    rows = []
    for key, title, method in (
        ("all", "FT-All", "ft_all"),
        ("five", "FT-k", "ft_blocks"),
        ("", "MobileTL-k", "mobiletl"),
    ):
        layer_roles = roles(model, layers, method, cfg.method.blocks, **switches(cfg))
        step, macs = step_flops(layers, layer_roles), mac_flops(layers, layer_roles)
        if key:
            yield Measurement(f"flops_forward_{key}", step.forward / MILLION)
            yield Measurement(f"flops_backward_{key}", step.backward / MILLION)
        for name, value, counted in (
            ("forward", step.forward, macs.forward),
            ("backward", step.backward, macs.backward),
        ):
            rows.append({"method": title, "pass": name, "MFLOP": value / MILLION, "of MACs": counted / MILLION})
    yield Table(
        "flops", f"FLOPs of a step by the calibrated rule, k = {cfg.method.blocks}", rows,
        Plot("stacked", x="method", y="MFLOP", series="pass", ylabel="MFLOP of a step"),
        note="The element costs were fitted to the bars of FT-All and FT-5BLKs; MobileTL's row inherits the fit.",
    )  # fmt: skip


@experiment(claims=["memory_reduction", "stored_all", "stored_five"], config=["model", "method"])
def memory(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C5, C6: a whole network; and every way of transfer under the three accountings."""
    from papers.mobiletl.accounting import stored_bytes, tiny_training_bytes, tinytl_bytes, training_memory
    from papers.mobiletl.counts import roles, trained_parameters

    model, layers = traced(cfg)
    k = cfg.method.blocks
    everything = training_memory(layers, roles(model, layers, "ft_all"))
    five = training_memory(layers, roles(model, layers, "ft_blocks", k))
    totals = [m.parameter_bytes + m.stored_bytes for m in (everything, five)]
    yield Measurement("memory_reduction", 100.0 * (1.0 - totals[1] / totals[0]))
    yield Measurement("stored_all", everything.stored_bytes / MB)
    yield Measurement("stored_five", five.stored_bytes / MB)
    rows = []
    for title, method, blocks in (
        ("FT-All", "ft_all", 0), (f"FT-{k}BLKs", "ft_blocks", k), (f"MobileTL-{k}", "mobiletl", k), ("norms + classifier", "norm", 0),
        ("shifts + classifier (TinyTL-B)", "bias", 0), ("classifier", "last", 0),
    ):  # fmt: skip
        layer_roles = roles(model, layers, method, blocks, **switches(cfg))
        rows.append(
            {"method": title, "trained parameters": trained_parameters(layers, layer_roles),
             "stored MB (MobileTL's rules)": stored_bytes(layers, layer_roles) / MB,
             "training MB (TinyTL's rules)": tinytl_bytes(layers, layer_roles) / MB,
             "training MB (tiny-training's rules, batch 1, int8)": tiny_training_bytes(layers, layer_roles).total_bytes / MB}
        )  # fmt: skip
    yield Table(
        "accountings", f"{cfg.model.name}, batch {cfg.model.batch}: one network, three accountings", rows,
        Plot("bar", x="method", y="stored MB (MobileTL's rules)", ylabel="MB kept"),
    )  # fmt: skip


@experiment(
    claims=[
        "proxyless_mobiletl_1",
        "proxyless_ft_1",
        "proxyless_mobiletl_4",
        "proxyless_ft_4",
        "proxyless_tinytl_b",
        "proxyless_tinytl_l",
        "proxyless_gain_1",
    ],
    config=["method"],
)
def proxyless(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C10: parameters and the larger of the inference peak and what training holds, ProxylessNAS-Mobile, 100 classes."""
    import torch

    from papers.mobiletl.accounting import Rules, tinytl_bytes, training_memory
    from papers.mobiletl.anatomy import anatomy
    from papers.mobiletl.counts import roles, trace_layers
    from papers.mobiletl.models import create
    from papers.mobiletl.tinytl import add_lite_residuals

    with torch.device("meta"):
        model = create("proxyless_mobile", 100)
    layers = trace_layers(model, (8, 3, 224, 224))
    totals: dict[tuple[str, int], float] = {}
    rows = []
    for title, method in (("FT-BLKs", "ft_blocks"), ("MobileTL", "mobiletl")):
        for k in (1, 2, 3, 4, 6, 8):
            result = training_memory(
                layers, roles(model, layers, method, k, **switches(cfg)), workspace_bytes=ctx.published["workspace"],
                rules=Rules(vectors=False),
            )  # fmt: skip
            totals[method, k] = result.total_bytes / MB
            rows.append(
                {"method": title, "blocks": k, "training MB": totals[method, k], "stored MB": result.stored_bytes / MB}
            )
    for claim, key in (
        ("mobiletl_1", ("mobiletl", 1)),
        ("ft_1", ("ft_blocks", 1)),
        ("mobiletl_4", ("mobiletl", 4)),
        ("ft_4", ("ft_blocks", 4)),
    ):
        yield Measurement(f"proxyless_{claim}", totals[key])
    yield Measurement(
        "proxyless_tinytl_b", tinytl_bytes(layers, roles(model, layers, "bias")) / MB, note="by TinyTL's profiler rules"
    )
    with torch.device("meta"):
        sided = create("proxyless_mobile", 100)
        add_lite_residuals(sided, anatomy(sided).blocks, 224)
    sided_layers = trace_layers(sided, (8, 3, 224, 224))
    lite = {
        method: tinytl_bytes(sided_layers, roles(sided, sided_layers, method)) / MB for method in ("lite", "lite_bias")
    }
    yield Measurement(
        "proxyless_tinytl_l",
        lite["lite_bias"],
        note=f"by TinyTL's profiler rules, L+B; L alone takes {lite['lite']:.1f} MB",
    )
    yield Measurement("proxyless_gain_1", 100.0 * (1.0 - totals["mobiletl", 1] / totals["ft_blocks", 1]))
    yield Table(
        "proxyless_memory", "Training memory of ProxylessNAS-Mobile", rows,
        Plot("line", x="blocks", y="training MB", series="method", ylabel="MB while training"),
        note="Up to the inference peak of the frozen part, 25.7 MB, training the blocks costs parameters alone.",
    )  # fmt: skip


@experiment(
    claims=["saved_block_v2", "saved_block_v3", "saved_network", "framework_all", "recompute_block"],
    config=["model", "method", "rival"],
)
def saved_tensors(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C16: what autograd holds for the backward pass in this implementation, each storage once, against the accounting."""
    import torch
    from torch import nn

    from papers.mobiletl.accounting import stored_bytes
    from papers.mobiletl.convert import adapt, convert_block
    from papers.mobiletl.counts import block_roles, roles, trace_layers
    from papers.mobiletl.models import fig1_block
    from shared.workload import trace

    def kept(version: str, **options: Any) -> int:
        model = nn.Sequential(fig1_block(version))
        if options:
            convert_block(model, "0", **options)
        return trace(model.train(), torch.zeros(_BLOCK_INPUT), training=True).saved_bytes

    rows = []
    stored: dict[tuple[str, str], int] = {}
    for version in ("v2", "v3"):
        layers = trace_layers(fig1_block(version), _BLOCK_INPUT)
        for method in ("ft_blocks", "mobiletl"):
            stored[version, method] = stored_bytes(layers, block_roles(layers, method))
        ours = kept(version, **switches(cfg), recompute=False)
        yield Measurement(f"saved_block_{version}", 100.0 * abs(ours / stored[version, "mobiletl"] - 1.0))
        rows += [
            {"what": f"{version} block", "method": "fine-tuning", "accounting": stored[version, "ft_blocks"], "kept": kept(version)},
            {"what": f"{version} block", "method": "MobileTL", "accounting": stored[version, "mobiletl"], "kept": ours},
        ]  # fmt: skip
    rival = kept("v2", act_backward="step", inner_norm="shift", recompute=cfg.rival.recompute)
    yield Measurement("recompute_block", 100.0 * (1.0 - rival / stored["v2", "ft_blocks"]))
    rows.append({"what": "v2 block", "method": "MobileTL, recomputing", "accounting": None, "kept": rival})

    model, layers = traced(cfg)
    images = torch.empty(cfg.model.batch, 3, cfg.model.resolution, cfg.model.resolution, device="meta")
    k = cfg.method.blocks
    for title, method, blocks, options in (("FT-All", "ft_all", 0, {}), (f"FT-{k}BLKs", "ft_blocks", k, {}),
                                           (f"MobileTL-{k}", "mobiletl", k, switches(cfg))):  # fmt: skip
        counted = stored_bytes(layers, roles(model, layers, method, blocks))
        held = trace(adapt(model, method, blocks, **options), images, training=True).saved_bytes
        rows.append({"what": cfg.model.name, "method": title, "accounting": counted, "kept": held})
        if method != "ft_blocks":
            claim = "framework_all" if method == "ft_all" else "saved_network"
            yield Measurement(claim, 100.0 * abs(held / counted - 1.0))
    yield Table(
        "saved_tensors", "Bytes: the accounting, and what autograd keeps", rows,
        note="Plain PyTorch keeps a float for ReLU6, which the paper counts at 2 bits, so the real V2 saving is larger than 46 %.",
    )  # fmt: skip
