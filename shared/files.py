"""Files that are whole or absent, whoever is killed and however many processes write them: a name of one's own, then a rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; when the block ends it is on the disk and takes the place of ``path``, at once.

    A reader sees the old file or the new one, and of two writers at the same time both succeed. If the block raises, ``path`` stays as
    it was. The folder is made if need be.

    Raises:
        OSError: the folder cannot be written or the disk is full; no partial file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """``data`` as a :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a damaged file to ``<name>.<suffix>``; another process may have done so already."""
    aside = path.with_name(f"{path.name}.{suffix}")
    with suppress(FileNotFoundError):
        os.replace(path, aside)
    return aside


def _sync_folder(folder: Path) -> None:
    """The rename itself is safe on the disk only when its folder is; not every file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
