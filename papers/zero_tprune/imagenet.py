"""Accuracy on real images: a folder of class folders, the model's own preprocessing, all methods at the same FLOPs.

Layout: ``<root>/val/<class folder>/*.JPEG`` (or the class folders directly under ``<root>``); the class number is the folder's place in
sorted order. A ``train`` folder beside ``val`` serves the schedule search, which never sees ``val``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from papers.zero_tprune.plans import Plan
from papers.zero_tprune.pruner import prune
from shared.errors import UserError


def create(name: str, weights: str | None = None, *, pretrained: bool = False, **options: Any) -> Any:
    """A timm model in evaluation mode: random, pretrained (needs a network or a filled cache), or with the weights of a file.

    A file decides the number of classes, where ``num_classes`` does not.

    Raises:
        UserError: an unknown name, or weights that are missing or belong to another model.
    """
    import difflib

    import timm

    state = None if weights is None else read_weights(Path(weights))
    if state is not None and "head.weight" in state:
        options = {"num_classes": len(state["head.weight"]), **options}
    try:
        model = timm.create_model(name, pretrained=pretrained and weights is None, **options)
    except RuntimeError as error:
        if not timm.is_model(name.split(".")[0]):
            near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
            close = ", ".join(near) or "a name from timm.list_models()"
            raise UserError(f"timm has no model '{name}': try {close}") from None
        raise UserError(f"cannot create {name}: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise UserError(f"no pretrained weights for {name} without a network: give weights=FILE") from error
    if state is not None:
        load_weights(model, state, str(weights))
    return model.eval()


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a file: plain, or under ``model`` or ``state_dict`` as training scripts save it; .safetensors too.

    Raises:
        UserError: no such file, or no state dict in it.
    """
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path)))
    except FileNotFoundError:
        raise UserError(f"weights={path} does not exist") from None
    except Exception as error:  # unpickling raises many kinds, and all of them mean the same here
        raise UserError(f"{path} holds no state dict: {type(error).__name__}") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that came from ``source``.

    Raises:
        UserError: the keys or shapes are another model's.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights in {source} are another model's: {' '.join(str(error).split())[:200]}") from error


def image_folder(root: str | Path, split: str = "val") -> Path:
    """The folder of class folders below a data root.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(root) / split, Path(root)):
        if folder.is_dir() and any(child.is_dir() and any(child.iterdir()) for child in folder.iterdir()):
            return folder
    raise UserError(f"no images under {root}: it needs {split}/<class folder>/*.JPEG")


def loader(folder: Path, model: Any, *, batch: int, workers: int = 0, limit: int | None = None) -> Any:
    """Batches of (images, class numbers), preprocessed as the model's timm configuration says (size, crop, mean, std).

    ``limit``: the first images of a fixed shuffle.
    """
    from timm.data import create_transform, resolve_data_config
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder), create_transform(**resolve_data_config({}, model=model), is_training=False))
    part = data
    if limit is not None and limit < len(data):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit].tolist()
        part = torch.utils.data.Subset(data, chosen)
    return torch.utils.data.DataLoader(part, batch_size=batch, num_workers=workers)


def accuracies(
    model: nn.Module,
    batches: Any,
    plans: dict[str, Plan | None],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Which images each plan gets right, in the same order: one pass over the data for all plans (``None``: unpruned)."""
    from papers.zero_tprune.plans import Schedule

    model = model.eval().to(device)
    hits: dict[str, list[Tensor]] = {name: [] for name in plans}
    with prune(model, Schedule(())) as pruner, torch.inference_mode():
        for number, (images, labels) in enumerate(batches):
            images, labels = images.to(device), labels.to(device)
            for name, plan in plans.items():
                pruner.plan = plan or Schedule(())
                hits[name].append((model(images).argmax(dim=-1) == labels).cpu())
            if progress is not None:
                progress(number + 1, len(batches))
    return {name: torch.cat(found) for name, found in hits.items()}
