"""Readers of the paper's data sets: N-MNIST .bin, N-TIDIGITS18 HDF5, handwriting BCI .mat, E-MNIST letters IDX. They need the files.

Formats as published by the data sets and parsed by the paper's code; bins and label maps say which convention they follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError

EVENT_BYTES = 5
OVERFLOW_ROW, OVERFLOW_US = 240, 2**13
NMNIST_SIDE = 34
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The paper's code maps zero to 0 and "oh" to 10; Tonic does it the other way round.
LABEL_MAPS = {
    "paper": {**{str(d): d for d in range(1, 10)}, "z": 0, "o": 10},
    "tonic": {**{str(d): d for d in range(1, 10)}, "o": 0, "z": 10},
}


@dataclass(frozen=True)
class Events:
    """Address events: x, y, polarity (1 is ON) and time in seconds."""

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    polarity: NDArray[np.int64]
    time_s: NDArray[np.float64]


def parse_aer(data: bytes, name: str = "data") -> Events:
    """Events of an N-MNIST file: five bytes each, x, y, polarity in the top bit, then 23 bits of microseconds, big-endian.

    Rows of 240 mark a timer overflow: they are dropped and 2**13 µs are added to all later times.

    Raises:
        UserError: the length is no multiple of five.
    """
    if len(data) % EVENT_BYTES:
        raise UserError(f"{name} has {len(data)} bytes, N-MNIST files have five bytes per event: the file is damaged")
    rows = np.frombuffer(data, np.uint8).reshape(-1, EVENT_BYTES).astype(np.int64)
    time_us = ((rows[:, 2] & 127) << 16) | (rows[:, 3] << 8) | rows[:, 4]
    overflow = rows[:, 1] == OVERFLOW_ROW
    time_us = time_us + OVERFLOW_US * np.cumsum(overflow)
    kept = ~overflow
    return Events(rows[kept, 0], rows[kept, 1], rows[kept, 2] >> 7, time_us[kept] * 1e-6)


def bin_events(
    events: Events, *, polarity: int = 1, bins: int = 50, bin_s: float = 6e-3, side: int = NMNIST_SIDE, crop: int = 16
) -> Tensor:
    """(T, crop²) uint8: one polarity, the central ``crop`` pixels, a bin is set where there was an event; later events are dropped."""
    first = (side - crop) // 2
    x, y = events.x - first, events.y - first
    index = np.floor(events.time_s / bin_s).astype(np.int64)
    inside = (x >= 0) & (x < crop) & (y >= 0) & (y < crop) & (index < bins) & (events.polarity == polarity)
    frames = np.zeros((bins, crop, crop), np.uint8)
    frames[index[inside], y[inside], x[inside]] = 1
    return torch.from_numpy(frames.reshape(bins, crop * crop))


def load_nmnist(
    root: Path | str, *, train: bool, polarity: int = 0, limit_per_digit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Spike trains (N, 50, 256) and labels from ``<root>/Train/<digit>/*.bin``; polarity index 0 as in the paper's code.

    Raises:
        UserError: no such files.
    """
    folder = Path(root) / ("Train" if train else "Test")
    trains, labels = [], []
    for digit in range(10):
        paths = sorted((folder / str(digit)).glob("*.bin"))[:limit_per_digit]
        for path in paths:
            trains.append(bin_events(parse_aer(path.read_bytes(), path.name), polarity=polarity))
            labels.append(digit)
    if not trains:
        raise UserError(f"no N-MNIST files under {folder}: it must hold a folder per digit with .bin files")
    return torch.stack(trains), torch.tensor(labels)


def filled_bins(duration: int, bins: int = 129) -> int:
    """How many of the bins a raster of ``duration`` milliseconds fills: ceil(D / k) with chunks of k = ceil(D / bins)."""
    return math.ceil(duration / math.ceil(duration / bins))


def bin_chunks(channels: NDArray[Any], times_s: NDArray[Any], *, num_channels: int = 64, bins: int = 129) -> Tensor:
    """(T, channels) uint8 as the paper's code bins speech: a raster of 1 ms, chunks of equal size, OR, zeros to the right."""
    time_ms = np.asarray(times_s, np.float64) * 1e3
    duration = math.ceil(float(time_ms.max())) + 1 if len(time_ms) else 1
    chunk = math.ceil(duration / bins)
    result = np.zeros((bins, num_channels), np.uint8)
    result[time_ms.astype(np.int64) // chunk, np.asarray(channels, np.int64)] = 1
    return torch.from_numpy(result)


def parse_ntidigits(file: Mapping[str, Any], *, train: bool, label_map: str = "paper") -> tuple[Tensor, Tensor]:
    """Single spoken digits (N, 129, 64) and labels of an open N-TIDIGITS18 file (or any mapping of its layout)."""
    part, mapping = ("train" if train else "test"), LABEL_MAPS[label_map]
    trains, labels = [], []
    for name in file[f"{part}_labels"]:
        text = name.decode() if isinstance(name, bytes) else str(name)
        spoken = text.rpartition("-")[2]
        if len(spoken) != 1:
            continue
        addresses = np.asarray(file[f"{part}_addresses"][text])
        times = np.asarray(file[f"{part}_timestamps"][text])
        trains.append(bin_chunks(addresses, times))
        labels.append(mapping[spoken])
    if not trains:
        raise UserError(f"the file holds no single digits under {part}_labels: is it n-tidigits.hdf5?")
    return torch.stack(trains), torch.tensor(labels)


def load_ntidigits(path: Path | str, *, train: bool, label_map: str = "paper") -> tuple[Tensor, Tensor]:
    """The same from ``n-tidigits.hdf5``.

    Raises:
        UserError: h5py is missing, or the file cannot be read.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading N-TIDIGITS18 needs the package h5py: install it") from error
    try:
        with h5py.File(path, "r") as file:
            return parse_ntidigits(file, train=train, label_map=label_map)
    except OSError as error:
        raise UserError(f"cannot read {path} as HDF5: it must be n-tidigits.hdf5") from error


def load_handwriting(path: Path | str, letters: Sequence[str] = LETTERS) -> tuple[Tensor, Tensor]:
    """Threshold-crossing counts (N, 201, 192), z-scored by block, and labels from ``singleLetters.mat`` of the handwriting BCI set.

    Trials come in nine blocks of three; the block's mean is subtracted and the recording's standard deviation divides.

    Raises:
        UserError: the file cannot be read, or lacks a letter.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(str(path))
    except (OSError, ValueError, NotImplementedError, MatReadError) as error:
        raise UserError(f"cannot read {path} as a MATLAB file: it must be singleLetters.mat") from error
    try:
        means, spread = content["meansPerBlock"], content["stdAcrossAllData"].ravel()
        cubes = [content[f"neuralActivityCube_{letter}"].astype(np.float64) for letter in letters]
    except KeyError as error:
        raise UserError(f"{path} has no {error}: it must be singleLetters.mat") from error
    trials, labels = [], []
    for index, cube in enumerate(cubes):
        block = np.arange(len(cube)) * len(means) // len(cube)
        trials.append((cube - means[block][:, None, :]) / np.maximum(spread, 1e-9))
        labels += [index] * len(cube)
    return torch.from_numpy(np.concatenate(trials)).float(), torch.tensor(labels)


def load_emnist_letters(root: Path | str, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) in [0, 1] and labels 0 … 25 from ``emnist-letters-{train,test}-*-ubyte``; the files store them transposed.

    Raises:
        UserError: the files are not there, or cannot be read.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    stem = Path(root) / f"emnist-letters-{'train' if train else 'test'}"
    try:
        images, labels = read_image_file(f"{stem}-images-idx3-ubyte"), read_label_file(f"{stem}-labels-idx1-ubyte")
    except (OSError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"no readable {stem.name} files under {root}: unpack the four IDX files of E-MNIST letters there"
        ) from error
    return images.transpose(1, 2).float() / 255, labels.long() - 1


def rate_code(images: Tensor, seed: int, *, steps: int = 49, spikes: float = 20.0, window: int = 50) -> Tensor:
    """(N, steps, pixels) uint8: a full-intensity pixel spikes ``spikes`` times in ``window`` steps on average, as in the paper's code."""
    flat = images.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(len(flat), steps, flat.shape[1], generator=generator)
    return (chance < flat[:, None] * spikes / window).to(torch.uint8)
