"""Whole files: what a reader, a second writer and a failed write see."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shared.files import set_aside, whole_file, write_whole


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_whole(path, b"old")

    def half_written() -> None:
        with whole_file(path) as file:
            file.write(b"new, but not all of it")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_written()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.bin"
    with whole_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_two_writers_at_once_both_succeed(tmp_path: Path) -> None:
    """With one temporary name for both, the second rename finds nothing to rename."""
    path, both_open = tmp_path / "x.bin", threading.Barrier(2, timeout=10)
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            with whole_file(path) as file:
                both_open.wait()
                file.write(content)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(bytes([letter]) * 100_000,)) for letter in b"ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    assert path.read_bytes() in {b"a" * 100_000, b"b" * 100_000}
    assert list(tmp_path.iterdir()) == [path]


def test_setting_aside_what_another_process_has_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"damaged")
    assert set_aside(path, "corrupt") == set_aside(path, "corrupt") == tmp_path / "x.bin.corrupt"
    assert (tmp_path / "x.bin.corrupt").read_bytes() == b"damaged"
