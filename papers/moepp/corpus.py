"""Bytes to learn from: the source of Python's own standard library, or texts under a folder of one's own."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

SKIPPED = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "__pycache__",
)
HELD_OUT = 20  # every twentieth file is for validation
END = b"\n\x00"  # after each file


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes; results compare only on equal ``digest``."""

    train: np.ndarray  # uint8
    validation: np.ndarray
    files: int
    digest: str  # SHA-256 of both parts


def standard_library() -> Path:
    """Where this interpreter keeps its own modules."""
    return Path(sysconfig.get_path("stdlib"))


def load(root: str | None = None) -> Corpus:
    """The standard library's ``*.py``, or all ``*.txt``, ``*.md`` and ``*.py`` under ``root``; sorted by relative path.

    Raises:
        UserError: ``root`` does not exist or holds fewer texts than one for validation needs.
    """
    return _load(root)


@cache
def _load(root: str | None) -> Corpus:
    folder = standard_library() if root is None else Path(root)
    if not folder.is_dir():
        raise UserError(
            f"data.root: there is no folder {folder}; give one with *.txt, *.md or *.py files, or leave it null"
        )
    suffixes = {".py"} if root is None else {".txt", ".md", ".py"}
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes)
    if root is None:
        files = [name for name in files if not any(_skipped(part) for part in name.split("/")[:-1])]
    if len(files) < 2:
        raise UserError(f"data.root: {folder} has {len(files)} texts (*.txt, *.md, *.py), at least 2 are needed")
    every = min(HELD_OUT, len(files))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, name in enumerate(files):
        parts[index % every == every - 1].append((folder / name).read_bytes() + END)
    train, validation = (b"".join(part) for part in parts)
    digest = hashlib.sha256(train + validation).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), len(files), digest)


def _skipped(folder: str) -> bool:
    return folder in SKIPPED or folder.startswith("config-")


def windows(data: np.ndarray, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` random windows: inputs and next bytes, both [count, length] (int64). Drawn from ``seed`` alone.

    Raises:
        UserError: the text is shorter than one window.
    """
    if len(data) <= length:
        raise UserError(
            f"the text has {len(data)} bytes, a window needs {length + 1}: use more text or a shorter sequence"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length, (count, 1), generator=generator)
    both = torch.from_numpy(data[(starts + torch.arange(length + 1)).numpy()].astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
