"""Claims without a clock and without learning: bits that must not change, counts at full size, the model of the boards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.experiment import Context, Measurement, Plot, Result, Table, experiment

ENCODERS = ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "deit_tiny_patch16_224")
SETS = {"PACS": (4, 7), "Office-31": (3, 31), "Office-Home": (4, 65), "DomainNet": (6, 345)}  # domains, classes


@experiment(claims=["encoder_fixed", "old_domains_unchanged"], config=["frozen"])
def frozen(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.frozen import check_frozen

    f = cfg.frozen
    found = check_frozen(seed=ctx.seed, images=f.images, train_encoder=f.train_encoder, share_adaptor=f.share_adaptor)
    note = f"of {found.tensors} tensors, batch statistics included; {found.with_gradient} got a gradient"
    yield Measurement("encoder_fixed", found.changed_tensors, note=note)
    yield Measurement(
        "old_domains_unchanged", found.changed_logits, note=f"of {found.compared_logits} comparisons, three domains"
    )


@experiment(
    claims=[
        "adaptor_params",
        "adaptor_params_share",
        "adaptor_macs_share",
        "hdc_macs_share",
        "training_share",
        "projection_against_encoder",
        "mahalanobis_memory",
    ],
    config=["hardware"],
)
def counts(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.adaptors import Architecture
    from papers.ear.counts import adaptor_work, encoder_counts, mahalanobis_entries, projection_entries, projection_work
    from papers.ear.hardware import growth, search_macs, training_share

    h = cfg.hardware
    dim, classes, epochs = int(h.dim), int(h.classes), float(h.epochs)
    base, architecture = encoder_counts(h.encoder), Architecture.parse(h.adaptor)
    work, projection = adaptor_work(architecture, base), projection_work(base, dim)
    native = adaptor_work(architecture, base, side=None)
    yield Measurement("adaptor_params", work.num_parameters)
    yield Measurement("adaptor_params_share", 100 * work.num_parameters / base.headless_params)
    yield Measurement(
        "adaptor_macs_share",
        100 * work.macs / base.macs,
        note=f"{100 * native.macs / base.macs:.2f} % at the taps' own resolution",
    )
    yield Measurement("hdc_macs_share", 100 * projection.macs / base.macs)
    one_pass = work.macs + projection.macs + dim * classes
    yield Measurement("training_share", 100 * training_share(base.macs, one_pass, epochs, cached=bool(h.cached)))
    stored = growth(base, work.num_parameters, classes, dim, h.form).projection_bytes / 4
    yield Measurement("projection_against_encoder", stored / base.headless_params)
    yield Measurement("mahalanobis_memory", stored / mahalanobis_entries(base.channels))

    rows = []
    for name in ENCODERS:
        c = encoder_counts(name)
        entries = projection_entries(c.channels, dim)
        rows.append(
            {
                "encoder": name,
                "parameters": c.params,
                "headless": c.headless_params,
                "MACs": c.macs,
                "sum c": sum(c.channels),
                "projection MACs": entries,
                "share %": 100 * entries / c.macs,
                "fp32 MB": 4e-6 * entries,
                "1-bit MB": entries / 8e6,
                "covariance entries": mahalanobis_entries(c.channels),
            }
        )
    yield Table("counts", f"Encoders and their hyperdimensional projection, D = {dim:,}", rows)
    memory = growth(base, work.num_parameters, classes, dim)
    yield Table(
        "exemplars",
        "Exemplars of all domains",
        [
            {
                "set": s,
                "domains": d,
                "classes": k,
                "entries": d * k * dim,
                "fp32 MB": 4e-6 * d * k * dim,
                "1-bit MB": d * k * dim / 8e6,
            }
            for s, (d, k) in SETS.items()
        ],
        note=f"a domain adds {(memory.adaptor_bytes + memory.head_bytes) / 1e6:.2f} MB with {classes} classes: adaptor, C and exemplars",
    )
    search = search_macs(base.macs, one_pass, candidates=40)
    full = 3 * epochs * 1000 * base.macs
    yield Table(
        "training",
        f"MACs of adapting to 1,000 images, {epochs:g} epochs",
        [
            {"way": "full fine-tune", "GMAC": full / 1e9},
            {"way": "EAR, cached taps", "GMAC": 1000 * (base.macs + 3 * epochs * one_pass) / 1e9},
            {"way": "EAR, taps computed anew", "GMAC": 1000 * epochs * (base.macs + 3 * one_pass) / 1e9},
            {"way": "zero-shot search, 40 candidates", "GMAC": search / 1e9},
        ],
        Plot("bar", "way", "GMAC", ylabel="GMAC", log_y=True),
    )


@experiment(claims=["binomial_false_rate"], config=["false_rate"])
def false_rate(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.growth import GrowthRule, false_growth_rate

    g = cfg.false_rate
    rule = GrowthRule("binomial", alpha=float(g.nominal_rate))
    limit = rule.limit(g.window)
    yield Measurement("binomial_false_rate", false_growth_rate(limit, g.window, int(g.held_out)))
    rows = []
    for held_out in (50, 100, 150, 250, 375, 500, 1000, 5000):
        calibrated = GrowthRule("calibrated", alpha=float(g.nominal_rate)).limit(g.window, held_out)
        rows.append(
            {
                "images behind the threshold": held_out,
                "rate": false_growth_rate(limit, g.window, held_out),
                "limit that keeps the rate": calibrated,
                "binomial limit": limit,
            }
        )
    plot = Plot("line", "images behind the threshold", "rate", log_x=True, log_y=True, hline=float(g.nominal_rate))
    yield Table("false_growth", f"False growth of a window of {g.window} under the plain binomial rule", rows, plot)


@experiment(claims=["hdc_latency", "hdc_latency_share", "hdc_latency_binary"], config=["hardware", "device"])
def boards(cfg: Any, ctx: Context) -> Iterator[Result]:
    from papers.ear.adaptors import Architecture
    from papers.ear.counts import adaptor_work, encoder_counts
    from papers.ear.hardware import FORMS, encoder_part, plan_board, projection_part
    from shared.errors import UserError
    from shared.hardware import load_device

    h = cfg.hardware
    dim, device, base = int(h.dim), load_device(cfg.device), encoder_counts(h.encoder)
    encoder = encoder_part(base, h.batch)
    hdc, binary = projection_part(base, dim, h.form, batch=h.batch), projection_part(base, dim, "binary", batch=h.batch)
    note = f"bound at the peaks; encoder {1e3 * encoder.bound_s(device):.2f} ms; {hdc.name} is bound by {hdc.bound_by(device)}"
    yield Measurement("hdc_latency", 1e3 * hdc.bound_s(device), note=note)
    yield Measurement("hdc_latency_share", 100 * hdc.bound_s(device) / encoder.bound_s(device))
    yield Measurement("hdc_latency_binary", 1e3 * binary.bound_s(device), note=f"bound by {binary.bound_by(device)}")

    latency, plans, left_out = [], [], []
    for board in h.boards:
        chip = load_device(board)
        for name in ("resnet50", "mobilenetv2_100"):
            c = encoder_counts(name)
            times = {form: 1e3 * projection_part(c, dim, form).bound_s(chip) for form in FORMS}
            row = {"board": chip.id, "encoder": name, "encoder ms": 1e3 * encoder_part(c).bound_s(chip)}
            latency.append({**row, **{f"{form} ms": t for form, t in times.items()}})
        work = adaptor_work(Architecture.parse(h.adaptor), base)
        for form, packed in (("dense", False), ("binary", False), ("hadamard", True)):
            try:
                plan = plan_board(
                    chip,
                    base,
                    adaptor_params=work.num_parameters,
                    adaptor_macs=work.macs,
                    classes=int(h.classes),
                    dim=dim,
                    form=form,
                    binary_head=packed,
                    reserve_bytes=float(h.reserve_bytes),
                )
            except UserError as error:
                left_out.append(str(error))
                continue
            plans.append(
                {
                    "board": plan.device,
                    "projection": form,
                    "exemplars": "1-bit" if packed else "fp32",
                    "latency ms": 1e3 * plan.latency_s,
                    "projection % of time": 100 * plan.projection_share,
                    "domains that fit": plan.domains,
                    "images to cache": plan.cache_images,
                }
            )
    yield Table("boards", "Latency bound of one image by form of the projection, fp32 arithmetic", latency)
    yield Table(
        "planner",
        f"How many domains fit, {h.encoder}, {h.classes} classes",
        plans,
        note="; ".join(sorted(set(left_out))),
    )
    curve = [
        {
            "board": board,
            "batch": b,
            "share %": 100 * projection_part(base, dim, batch=b).bound_s(d) / encoder_part(base, b).bound_s(d),
        }
        for board in h.boards
        for d in [load_device(board)]
        for b in (1, 2, 4, 8, 16, 32, 64)
    ]
    yield Table(
        "batching",
        "Dense projection over encoder, by batch size",
        curve,
        Plot(
            "line",
            "batch",
            "share %",
            "board",
            xlabel="batch",
            ylabel="% of the encoder's time",
            log_x=True,
            log_y=True,
        ),
    )
    yield Table(
        "energy", "Energy of one image by counting events (an accelerator at 45 nm)", list(_energy(cfg, base, dim))
    )


def _energy(cfg: Any, base: Any, dim: int) -> Iterator[dict[str, Any]]:
    from papers.ear.hardware import EventEnergy, encoder_part, projection_part

    events = EventEnergy(**cfg.hardware.events)
    encoder, dense = encoder_part(base), projection_part(base, dim)
    binary = projection_part(base, dim, "binary")
    yield {"part": "encoder", "mJ": 1e3 * events.inference_j(encoder.ops / 2, encoder.bytes)}
    yield {"part": dense.name, "mJ": 1e3 * events.inference_j(dense.ops / 2, dense.bytes)}
    yield {"part": binary.name, "mJ": 1e3 * events.inference_j(0, binary.bytes, binary_steps=binary.ops / 2)}
