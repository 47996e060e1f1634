"""Transfer: the stand-ins at reduced scale and the real data sets at full scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from papers.mobiletl.experiments.setup import MB, switches
from shared.experiment import (
    Context,
    Measurement,
    NotTested,
    Plot,
    Result,
    Table,
    experiment,
    mean_interval,
    seed_measurement,
)

_STAND_IN_CLAIMS = [
    "standin_loss", "accuracy_at_equal_memory", "accuracy_at_equal_blocks", "accuracy_grows_with_blocks", "blocks_beat_shifts",
    "blocks_beat_side_modules",
]  # fmt: skip


def _arms(cfg: Any, *, ablations: bool) -> list[dict[str, Any]]:
    """Every way of transfer; ``standin.trains=head`` leaves the blocks of all arms frozen."""
    arms: list[dict[str, Any]] = [
        {"name": name, "method": name, "blocks": 0} for name in ("last", "bias", "lite_bias", "norm", "ft_all")
    ]
    for method, counts, options in (
        ("ft_blocks", cfg.standin.ft_blocks, {}),
        ("mobiletl", cfg.standin.mobiletl_blocks, switches(cfg)),
    ):
        for k in counts:
            blocks = k if cfg.standin.trains == "blocks" else 0
            arms.append({"name": f"{method}-{k}", "method": method, "blocks": blocks, **options})
    if ablations:
        for name, act, norm in (
            ("step alone", "step", "full"),
            ("shift alone", "exact", "shift"),
            ("2 bits", "2bit", "shift"),
        ):
            options = {"act_backward": act, "inner_norm": norm}
            arms.append({"name": f"mobiletl-3, {name}", "method": "mobiletl", "blocks": 3, **options})
    return arms


class _Outcome:
    """Test accuracies of one stand-in at each arm's rate, by (network, arm), one per seed; and the rates."""

    def __init__(
        self, results: Mapping[tuple[str, str, int], Any], rates: Mapping[tuple[str, str], str], seeds: Sequence[int]
    ) -> None:
        self.rate = dict(rates)
        self.test = {key: [results[(*key, seed)][rate]["test"] for seed in seeds] for key, rate in rates.items()}

    def difference(self, network: str, ours: str, theirs: str) -> list[float]:
        """Points by which ``ours`` lies above ``theirs``, per seed."""
        pairs = zip(self.test[network, ours], self.test[network, theirs], strict=True)
        return [a - b for a, b in pairs]


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(columns) for column in zip(*columns, strict=True)]


def _run(
    cfg: Any, ctx: Context, title: str, data: Mapping[str, Any], source: Any, networks: Sequence[str], only: Sequence[str] = ()
) -> tuple[_Outcome, list[float]]:  # fmt: skip
    """Every arm (or ``only`` some) of every network from its own pre-trained weights; and the networks' source accuracies.

    The first seed runs every arm at every rate; the rate that is best on its validation images is the arm's for all seeds.
    """
    from omegaconf import OmegaConf

    from papers.mobiletl.standin import WEIGHTS, best_rate, pretrain_job, transfer_job

    sources = [{"seed": s, "network": n, "data": dict(data), "source": source} for n in networks for s in ctx.seeds]
    weights, scores = {}, []
    for job, result, workdir in ctx.map(f"{title}: source", pretrain_job, sources):
        weights[job["network"], job["seed"]] = str(workdir / WEIGHTS)
        scores.append(result["source_accuracy"])
    target: Any = OmegaConf.to_container(cfg.standin.target)
    arms = {
        (network, arm["name"]): arm
        for network in networks
        for arm in _arms(cfg, ablations=network == "tiny_v3")
        if not only or arm["name"] in only
    }
    found: dict[tuple[str, str, int], Any] = {}

    def transfer(rates: Mapping[tuple[str, str], list[float]], seeds: Sequence[int]) -> None:
        jobs = [
            {
                "seed": seed,
                "network": key[0],
                "data": dict(data),
                "target": {**target, "rates": rates[key]},
                "arm": arm,
                "weights": weights[key[0], seed],
            }
            for key, arm in arms.items()
            for seed in seeds
        ]
        for job, result, _ in ctx.map(title, transfer_job, jobs):
            found[job["network"], job["arm"]["name"], job["seed"]] = result

    first, *others = ctx.seeds
    transfer(dict.fromkeys(arms, target["rates"]), [first])
    best = {key: best_rate(found[(*key, first)]) for key in arms}
    transfer({key: [float(best[key])] for key in arms}, others)
    return _Outcome(found, best, ctx.seeds), scores


@experiment(claims=_STAND_IN_CLAIMS, config=["method", "standin"])
def stand_in(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Stand-in A: digits 0 to 4 to 5 to 9, every method on the same learning rates; the rate is chosen on validation images."""
    from omegaconf import OmegaConf

    networks = list(cfg.standin.networks)
    source: Any = OmegaConf.to_container(cfg.standin.source)
    data = {"name": "digits", "train_images": cfg.standin.train_images}
    outcome, sources = _run(cfg, ctx, "transfer between digits", data, source, networks)
    memory = {network: _memory(cfg, network, size=24) for network in networks}

    first = networks[0]
    yield seed_measurement("standin_loss", outcome.difference(first, "ft_all", "mobiletl-5"))
    yield seed_measurement("accuracy_at_equal_memory", _at_equal_memory(cfg, outcome, memory))
    common = [k for k in cfg.standin.mobiletl_blocks if k >= 2 and k in cfg.standin.ft_blocks]
    pairs = [outcome.difference(n, f"mobiletl-{k}", f"ft_blocks-{k}") for n in networks for k in common]
    yield seed_measurement("accuracy_at_equal_blocks", _mean(pairs))
    grows = [outcome.difference(n, "mobiletl-3", "mobiletl-1") for n in networks]
    yield seed_measurement("accuracy_grows_with_blocks", _mean(grows))
    yield seed_measurement("blocks_beat_shifts", _mean([outcome.difference(n, "mobiletl-3", "bias") for n in networks]))
    sided = [outcome.difference(n, _largest_in(cfg, memory[n], memory[n]["lite_bias"]), "lite_bias") for n in networks]
    yield seed_measurement("blocks_beat_side_modules", _mean(sided))
    chosen = "rate chosen on the first one's validation images"
    note = f"{len(ctx.seeds)} seeds, {chosen}; source accuracy {min(sources):.1f} to {max(sources):.1f} %."
    for network in networks:
        yield _pareto(outcome, network, memory[network], note)


def _at_equal_memory(cfg: Any, outcome: _Outcome, memory: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Over all FT-k but the largest: the MobileTL with most blocks that fits into FT-k's memory, minus FT-k."""
    gains = []
    for network, size in memory.items():
        for k in sorted(cfg.standin.ft_blocks)[:-1]:
            ours = _largest_in(cfg, size, size[f"ft_blocks-{k}"])
            gains.append(outcome.difference(network, ours, f"ft_blocks-{k}"))
    return _mean(gains)


def _largest_in(cfg: Any, memory: Mapping[str, float], limit: float) -> str:
    """The MobileTL arm with most blocks that fits into ``limit``."""
    return f"mobiletl-{max(j for j in cfg.standin.mobiletl_blocks if memory[f'mobiletl-{j}'] <= limit)}"


def _memory(cfg: Any, network: str, size: int) -> dict[str, float]:
    """Parameters (4 bytes trained, 1 frozen) and stored activations of every arm in MB."""
    import torch

    from papers.mobiletl.accounting import training_memory
    from papers.mobiletl.anatomy import anatomy
    from papers.mobiletl.counts import roles, trace_layers
    from papers.mobiletl.models import create
    from papers.mobiletl.tinytl import add_lite_residuals

    with torch.device("meta"):
        model, sided = (create(network, 5, in_chans=1) for _ in range(2))
        add_lite_residuals(sided, anatomy(sided).blocks, size)
    shape = (cfg.standin.target.batch, 1, size, size)
    plain, lite = (trace_layers(net, shape) for net in (model, sided))
    found = {}
    for arm in _arms(cfg, ablations=network == "tiny_v3"):
        options = {key: arm[key] for key in ("act_backward", "inner_norm") if key in arm}
        blocks = int(arm["name"].split("-")[1].split(",")[0]) if "-" in arm["name"] else 0
        layers = lite if arm["method"].startswith("lite") else plain
        result = training_memory(layers, roles(model, layers, arm["method"], blocks, **options))
        found[arm["name"]] = (result.parameter_bytes + result.stored_bytes) / MB
    return found


def _pareto(outcome: _Outcome, network: str, memory: Mapping[str, float], note: str) -> Table:
    rows = []
    for (name, arm), values in outcome.test.items():
        if name == network:
            mean, low, high = mean_interval(values)
            family = {"ft_blocks": "FT-BLKs", "mobiletl": "MobileTL"}.get(arm.split("-")[0], "other")
            rows.append(
                {"method": arm, "family": "ablation" if "," in arm else family, "training MB": memory[arm], "top-1 %": mean,
                 "low": low if len(values) > 1 else None, "high": high if len(values) > 1 else None, "rate": outcome.rate[name, arm]}
            )  # fmt: skip
    return Table(
        f"pareto_{network}", f"Accuracy against training memory: digits, {network}", sorted(rows, key=lambda row: row["training MB"]),
        Plot("scatter", x="training MB", y="top-1 %", series="family", xlabel="MB while training", ylabel="top-1 % on the target"),
        note=note,
    )  # fmt: skip


@experiment(claims=["standin_loss_idx"], config=["method", "standin", "data"])
def stand_in_idx(cfg: Any, ctx: Context) -> Iterator[Result]:
    """Stand-in B: MNIST 0 to 4 to inverted 5 to 9, where ``data.root`` holds the files."""
    from omegaconf import OmegaConf

    if not cfg.data.root:
        yield NotTested("standin_loss_idx", "needs MNIST's IDX files: data.root=FOLDER with FOLDER/MNIST/raw")
        return
    idx: Any = OmegaConf.to_container(cfg.standin.idx)
    source: Any = {**OmegaConf.to_container(cfg.standin.source), "epochs": idx.pop("source_epochs")}  # type: ignore[dict-item]
    only, data = idx.pop("arms"), {**idx, "root": str(cfg.data.root)}
    outcome, _ = _run(cfg, ctx, "transfer to inverted digits", data, source, ["tiny_v3"], only)
    yield seed_measurement("standin_loss_idx", outcome.difference("tiny_v3", "ft_all", "mobiletl-5"))
    yield Table(
        "idx_accuracy", f"{idx['name']} with inverted targets, tiny_v3",
        [{"method": arm, "top-1 %": sum(v) / len(v), "rate": outcome.rate[n, arm]} for (n, arm), v in outcome.test.items()],
        Plot("bar", x="method", y="top-1 %", ylabel="top-1 % on the target"),
    )  # fmt: skip


@experiment(claims=["accuracy_loss_cifar10"], config=["method", "real", "data", "model"])
def real_transfer(cfg: Any, ctx: Context) -> Iterator[Result]:
    """C4 on the real data set, from pretrained weights: FT-All against MobileTL-k at each method's best rate."""
    from omegaconf import OmegaConf

    claim = "accuracy_loss_cifar10"
    if ctx.scale != "full" or not cfg.data.root:
        yield NotTested(
            claim, "needs scale=full, data.root=FOLDER with the data set, timm's ImageNet weights and days of a GPU"
        )
        return
    if cfg.real.dataset != "cifar10":
        yield NotTested(claim, f"the claim is about CIFAR-10, this run is on {cfg.real.dataset}")
    from papers.mobiletl.realdata import real_job

    real: Any = OmegaConf.to_container(cfg.real)
    rates = real.pop("rates")
    arms = (("FT-All", "ft_all", 0), (f"FT-{cfg.method.blocks}BLKs", "ft_blocks", cfg.method.blocks),
            (f"MobileTL-{cfg.method.blocks}", "mobiletl", cfg.method.blocks))  # fmt: skip
    common = {**real, **switches(cfg), "root": str(cfg.data.root), "resolution": cfg.model.resolution}
    jobs = [
        {"seed": seed, "method": method, "blocks": blocks, "lr": lr, **common}
        for _, method, blocks in arms
        for lr in rates
        for seed in ctx.seeds
    ]
    accuracies = {
        (j["method"], j["lr"], j["seed"]): r["accuracy"]
        for j, r, _ in ctx.map(f"transfer to {real['dataset']}", real_job, jobs)
    }
    best = {
        method: max(([accuracies[method, lr, seed] for seed in ctx.seeds] for lr in rates), key=sum)
        for _, method, _ in arms
    }
    rows = [{"method": title, "top-1 %": sum(best[method]) / len(best[method])} for title, method, _ in arms]
    yield Table("real_transfer", f"{real['model']} on {real['dataset']}", rows, Plot("bar", x="method", y="top-1 %"))
    if real["dataset"] == "cifar10":
        losses = [a - b for a, b in zip(best["ft_all"], best["mobiletl"], strict=True)]
        measurement = seed_measurement(
            claim, losses, "each method at the rate that is best on the test images, as is usual for this table"
        )
        assert isinstance(measurement, Measurement)
        yield measurement
