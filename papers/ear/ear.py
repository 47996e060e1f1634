"""EAR as a library: a frozen encoder, a memory of domains, and an adaptor with a head for each of them.

>>> ear = EAR("resnet50", classes=7)                       # or a module of one's own with the names of its tap layers
>>> ear.fit_domain(photos, labels, "photo")                # memory, zero-shot search, training; nothing old is touched
>>> if ear.observe(window).grow: ear.fit_domain(window, window_labels, "sketch")
>>> ear.predict(images).labels
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from papers.ear.adaptors import Architecture
from papers.ear.encoder import FrozenEncoder, timm_encoder
from papers.ear.feature_cache import check_fits
from papers.ear.growth import GrowthRule, WindowReport, examine, route
from papers.ear.hdc import DomainMemory, HDEncoder, HDSettings, cosine, remember
from papers.ear.learner import AdaptorNet, Features, TrainSettings, new_net, rebundle, take, train_net
from papers.ear.search import SearchSettings, search
from shared.errors import UserError, unknown

FORMAT = 1
Mode = Literal["route", "all"]


@dataclass(frozen=True)
class EARSettings:
    """All choices of an EAR; the defaults suit a full-size encoder.

    ``architecture`` fixes the adaptor (``conv/8-conv/8-conv/8-conv/8``); ``None`` searches it for every domain. ``rebundle`` makes C anew
    from the trained adaptor, which class-incremental use needs.
    """

    detector: HDSettings = field(default_factory=lambda: HDSettings(dim=10_000, grid=1))
    head: HDSettings = field(default_factory=lambda: HDSettings(dim=10_000, grid=1, seed=1))
    train: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=10, lr=1e-3))
    search: SearchSettings = field(default_factory=lambda: SearchSettings(reductions=(1 / 16, 1 / 8, 1 / 4)))
    architecture: str | None = None
    growth: GrowthRule = field(default_factory=GrowthRule)
    held_out_fraction: float = 0.1
    standardise: bool = False
    rebundle: bool = False
    seed: int = 0


@dataclass
class Domain:
    """One known domain: what it looks like, and the net that serves it. Never changed once stored."""

    name: str
    memory: DomainMemory
    net: AdaptorNet

    @property
    def num_params(self) -> int:
        """Adaptor parameters, classifier and exemplars."""
        adaptor = sum(p.numel() for p in self.net.adaptor.parameters())
        return adaptor + self.net.classifier.numel() + self.memory.exemplars.numel()


@dataclass(frozen=True)
class Prediction:
    """Classes and the domain that each image was routed to (of the winning task under ``mode="all"``)."""

    labels: Tensor
    domains: Tensor
    logits: Tensor = field(repr=False)


class EAR:
    """Edge adaptation with a fixed encoder (abstract of the paper).

    Args:
        encoder: a timm name, a :class:`FrozenEncoder`, or any module with ``taps``.
        taps: names of submodules whose outputs are the taps, for a module of one's own.
        classes: K, over all domains and tasks.
        settings: see :class:`EARSettings`.
        image_shape: one image, used to learn the taps' shapes.
        memory_bytes: what the feature cache of one domain may take; ``None`` for no limit.
        pretrained: whether a timm encoder is loaded with its weights (downloaded by timm if absent).

    Raises:
        UserError: the encoder is not usable, or classes are fewer than 2.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        taps: Sequence[str] | None = None,
        *,
        classes: int,
        settings: EARSettings | None = None,
        image_shape: Sequence[int] = (3, 224, 224),
        memory_bytes: float | None = None,
        pretrained: bool = False,
    ) -> None:
        if classes < 2:
            raise UserError(f"classes={classes} must be at least 2")
        self.settings = settings or EARSettings()
        self.classes, self.memory_bytes = classes, memory_bytes
        if isinstance(encoder, str):
            encoder = timm_encoder(encoder, pretrained=pretrained, image_size=image_shape[-1])
        elif not isinstance(encoder, FrozenEncoder):
            encoder = _hooked(encoder, taps, image_shape)
        self.encoder: FrozenEncoder = encoder
        self.tap_shapes = tuple(tuple(t.shape[1:]) for t in encoder.features(torch.zeros(1, *image_shape)))
        self.hd = HDEncoder(encoder.channels, self.settings.detector)
        self.domains: list[Domain] = []

    # --- learning ---

    def fit_domain(self, images: Tensor, labels: Tensor, name: str | None = None) -> Domain:
        """Grow: remember the domain, search its adaptor, train it. Images in [0, 1]: (N, channels, H, W); labels (N,).

        Raises:
            UserError: the taps of the images do not fit the memory, or the labels do not fit the classes.
        """
        check_fits(len(images), self.tap_shapes, self.memory_bytes)
        return self.fit_features(self.encoder.features(images), labels, name)

    def fit_features(self, taps: Features, labels: Tensor, name: str | None = None) -> Domain:
        """:meth:`fit_domain` on taps that are already cached."""
        if len(labels) != len(taps[0]) or int(labels.min()) < 0 or int(labels.max()) >= self.classes:
            raise UserError(f"labels must be {len(taps[0])} numbers from 0 to {self.classes - 1}")
        s, index = self.settings, len(self.domains)
        if not self.domains:
            self.hd.fit(taps)  # centring, if asked for, is that of the first domain
        memory = remember(
            self.embed(taps), labels, self.classes,
            held_out_fraction=s.held_out_fraction, percentile=100 * s.growth.fail_rate, binary=s.detector.binary, seed=s.seed + index,
        )  # fmt: skip
        domain = Domain(name or f"domain{index}", memory, self._train(taps, labels, s.seed + index))
        self.domains.append(domain)
        return domain

    def _train(self, taps: Features, labels: Tensor, seed: int) -> AdaptorNet:
        s, channels = self.settings, self.encoder.channels
        if s.architecture is not None:
            architecture = Architecture.parse(s.architecture)
        else:
            budget = s.search
            if budget.max_params is None:  # an adaptor is to be small: 4 % of the encoder
                budget = replace(budget, max_params=int(0.04 * sum(p.numel() for p in self.encoder.parameters())))
            architecture = search(taps, labels, channels, self.classes, s.head, budget, seed=seed)
        net = new_net(architecture, channels, self.classes, s.head, seed, s.train.scale)
        train_net(net, taps, labels, s.train, seed=seed)
        if s.rebundle:
            rebundle(net, taps, labels)
        return net.requires_grad_(False).eval()

    # --- use ---

    @torch.no_grad()
    def embed(self, taps: Features) -> Tensor:
        """q(x) of cached taps: (B, D)."""
        return torch.cat([self.hd([t[i : i + 1024] for t in taps]) for i in range(0, len(taps[0]), 1024)])

    def observe(self, images: Tensor) -> WindowReport:
        """Test a window of the stream for a shift; ``grow`` says that a new domain should be fitted."""
        return self.observe_features(self.encoder.features(images))

    def observe_features(self, taps: Features) -> WindowReport:
        """:meth:`observe` on cached taps."""
        return examine(self.embed(taps), self._memories(), self.settings.growth)

    def predict(self, images: Tensor, mode: Mode = "route") -> Prediction:
        """Classes of images. ``route``: the net of the most familiar domain; ``all``: the largest cosine over all tasks' classes."""
        return self.predict_features(self.encoder.features(images), mode)

    def predict_features(self, taps: Features, mode: Mode = "route", domains: Tensor | None = None) -> Prediction:
        """:meth:`predict` on cached taps; ``domains`` overrides the routing (an oracle, for analysis alone)."""
        if mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
        if mode == "all":
            return self._predict_all(taps)
        if domains is None:
            domains = route(self.embed(taps), self._memories(), standardise=self.settings.standardise)
        logits = torch.zeros(len(domains), self.classes)
        for index, domain in enumerate(self.domains):
            mine = (domains == index).nonzero().squeeze(1)
            if len(mine):
                logits[mine] = domain.net.evaluate(take(taps, mine))
        return Prediction(logits.argmax(1), domains, logits)

    def _predict_all(self, taps: Features) -> Prediction:
        self._memories()
        cosines = [
            cosine(d.net.embed_all(taps), d.net.classifier).masked_fill(~d.net.seen, -torch.inf) for d in self.domains
        ]
        best = torch.stack(cosines)  # (domains, B, K): a class not in a task cannot win there
        logits, winner = best.max(0)
        labels = logits.argmax(1)
        return Prediction(labels, winner.gather(1, labels[:, None]).squeeze(1), logits)

    def _memories(self) -> list[DomainMemory]:
        if not self.domains:
            raise UserError("this EAR knows no domain yet: call fit_domain first")
        return [d.memory for d in self.domains]

    @property
    def num_params_added(self) -> int:
        """Parameters of all domains: what growth has cost."""
        return sum(d.num_params for d in self.domains)

    # --- save and load ---

    def save(self, folder: Path | str) -> None:
        """Write the state; a domain already on disk is left alone, so saving costs what was added."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index, d in enumerate(self.domains):
            path = folder / f"domain{index:04d}.pt"
            if not path.exists():
                memory = {"exemplars": d.memory.exemplars, "seen": d.memory.seen, "threshold": d.memory.threshold}
                content = {**memory, "held_out": d.memory.held_out, "name": d.name, "net": d.net.state_dict()}
                torch.save({**content, "architecture": str(d.net.adaptor.architecture)}, path)
        torch.save(self.hd.state_dict(), folder / "detector.pt")
        meta = {
            "format": FORMAT,
            "classes": self.classes,
            "domains": len(self.domains),
            "settings": asdict(self.settings),
        }
        (folder / "ear.json").write_text(json.dumps({**meta, "encoder": self.encoder.fingerprint()}, indent=1))

    @classmethod
    def load(
        cls, folder: Path | str, encoder: str | nn.Module, taps: Sequence[str] | None = None, **options: Any
    ) -> EAR:
        """The state that :meth:`save` wrote, on the same encoder.

        Raises:
            UserError: no such state, or the encoder has other weights.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "ear.json").read_text())
        except OSError as error:
            raise UserError(f"{folder} holds no saved EAR ({error.strerror})") from error
        ear = cls(encoder, taps, classes=meta["classes"], settings=_settings(meta["settings"]), **options)
        if ear.encoder.fingerprint() != meta["encoder"]:
            raise UserError(f"the encoder differs from the one that {folder} was saved with: give the same weights")
        ear.hd.load_state_dict(torch.load(folder / "detector.pt", weights_only=True))
        s = ear.settings
        for index in range(meta["domains"]):
            content = torch.load(folder / f"domain{index:04d}.pt", weights_only=True)
            architecture = Architecture.parse(content["architecture"])
            net = new_net(architecture, ear.encoder.channels, ear.classes, s.head, s.seed, s.train.scale)
            net.load_state_dict(content["net"])
            memory = DomainMemory(content["exemplars"], content["seen"], content["threshold"], content["held_out"])
            ear.domains.append(Domain(content["name"], memory, net.requires_grad_(False).eval()))
        return ear


def _settings(data: dict[str, Any]) -> EARSettings:
    parts = {"detector": HDSettings, "head": HDSettings, "train": TrainSettings, "growth": GrowthRule}
    made: dict[str, Any] = {name: kind(**data[name]) for name, kind in parts.items()}
    made["search"] = SearchSettings(**{**data["search"], "reductions": tuple(data["search"]["reductions"])})
    return EARSettings(**{**data, **made})


class _HookedTaps(nn.Module):
    """Outputs of named submodules during a forward pass."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net, self._kept = net, {}
        modules = dict(net.named_modules())
        for name in names:
            if name not in modules:
                raise unknown("tap layer", name, [n for n in modules if n])
            modules[name].register_forward_hook(
                lambda module, inputs, output, name=name: self._kept.update({name: output})
            )
        self.names = tuple(names)

    def forward(self, images: Tensor) -> list[Tensor]:
        self.net(images)
        return [self._kept.pop(name) for name in self.names]


def _hooked(encoder: nn.Module, taps: Sequence[str] | None, image_shape: Sequence[int]) -> FrozenEncoder:
    if not taps:
        raise UserError(
            "an encoder of your own needs taps=[...], the names of the layers whose outputs adaptors are put on"
        )
    hooked = _HookedTaps(encoder, taps).eval()
    with torch.no_grad():
        maps = hooked(torch.zeros(1, *image_shape))
    for name, tap in zip(taps, maps, strict=True):
        if tap.dim() != 4:
            raise UserError(
                f"the output of layer '{name}' has shape {tuple(tap.shape)}, a tap is (batch, channels, height, width)"
            )
    return FrozenEncoder(hooked, [m.shape[1] for m in maps])
