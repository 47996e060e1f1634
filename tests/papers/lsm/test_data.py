"""Readers of the real formats on small files, the event-camera emulator, the cochlea and the shared-kinematics curves."""

from __future__ import annotations

import builtins
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from papers.lsm.data.camera import Camera, events, place, saccade_digits, saccade_path
from papers.lsm.data.curves import shared_kinematics
from papers.lsm.data.real import (
    bin_chunks,
    bin_events,
    filled_bins,
    load_emnist_letters,
    load_handwriting,
    load_nmnist,
    load_ntidigits,
    parse_aer,
    parse_ntidigits,
    rate_code,
)
from papers.lsm.data.speech import WORDS, band_pass, centres_hz, cochlea, order_task, spoken_digits
from shared.errors import UserError

# --- N-MNIST ---


def _event(x: int, y: int, polarity: int, time_us: int) -> bytes:
    return bytes([x, y, polarity << 7 | time_us >> 16, time_us >> 8 & 255, time_us & 255])


def test_address_events_of_the_documented_bytes() -> None:
    e = parse_aer(bytes([0x11, 0x05, 0x80, 0x01, 0x00]))
    assert (e.x[0], e.y[0], e.polarity[0]) == (17, 5, 1)
    assert e.time_s[0] == pytest.approx(256e-6)
    full = parse_aer(bytes([0, 0, 0x7F, 0xFF, 0xFF]))
    assert full.polarity[0] == 0
    assert full.time_s[0] == pytest.approx((2**23 - 1) * 1e-6)


def test_overflow_markers_are_dropped_and_move_later_times() -> None:
    data = _event(1, 2, 1, 100) + _event(0, 240, 0, 0) + _event(3, 4, 0, 50) + _event(0, 240, 0, 0) + _event(5, 6, 1, 1)
    e = parse_aer(data)
    assert e.x.tolist() == [1, 3, 5]
    np.testing.assert_allclose(e.time_s, [100e-6, (50 + 8192) * 1e-6, (1 + 2 * 8192) * 1e-6])


def test_a_damaged_file_is_refused() -> None:
    with pytest.raises(UserError, match="five bytes"):
        parse_aer(b"123456", "00001.bin")


def test_nmnist_folder_becomes_frames(tmp_path: Path) -> None:
    for digit, polarity in ((0, 0), (7, 0), (7, 1)):
        folder = tmp_path / "Train" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the central crop (9 … 24), outside it, and later than 50 bins of 6 ms.
        data = _event(9, 24, polarity, 6_001) + _event(8, 10, polarity, 10) + _event(10, 10, polarity, 300_001)
        (folder / f"{polarity}.bin").write_bytes(data)
    x, y = load_nmnist(tmp_path, train=True)
    assert y.tolist() == [0, 7, 7]
    assert x.shape == (3, 50, 256)
    assert x.flatten(1).sum(1).tolist() == [1, 1, 0]  # polarity 1 is not read by default
    assert x[0, 1, 15 * 16 + 0] == 1  # bin 1, row 24 - 9, column 9 - 9
    assert load_nmnist(tmp_path, train=True, polarity=1)[0].flatten(1).sum(1).tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="folder per digit"):
        load_nmnist(tmp_path, train=False)


def test_events_of_one_bin_are_or_ed() -> None:
    e = parse_aer(_event(10, 10, 1, 10) * 3)
    assert int(bin_events(e).sum()) == 1


# --- N-TIDIGITS ---


@pytest.mark.parametrize(("duration", "filled"), [(129, 129), (130, 65), (258, 129), (259, 87), (800, 115), (900, 129)])
def test_filled_bins_drop_when_the_chunk_grows(duration: int, filled: int) -> None:
    assert filled_bins(duration) == filled
    # Events every millisecond up to D - 1.5: nothing lies behind the last filled bin, and the one before the last holds some.
    times = (np.arange(1, duration) - 0.5) / 1e3
    frames = bin_chunks(np.zeros(duration - 1, int), times)
    assert not frames[filled:].any()
    assert frames[filled - 2, 0]
    assert int(frames.sum()) >= filled - 1


def test_chunks_are_or_ed_and_padded_to_the_right() -> None:
    frames = bin_chunks(np.array([3, 3, 5]), np.array([0.0, 0.001, 0.2585]))  # D = 260: chunks of 3 ms
    assert frames.shape == (129, 64)
    assert frames.nonzero().tolist() == [[0, 3], [86, 5]]


def test_single_digits_are_parsed_with_the_papers_labels() -> None:
    names = [b"man-aa-1", b"man-aa-z", b"man-aa-o", b"man-aa-12", b"man-aa-9"]
    file = {
        "train_labels": names,
        "train_addresses": {n.decode(): np.array([0, 63]) for n in names},
        "train_timestamps": {n.decode(): np.array([0.001, 0.4]) for n in names},
    }
    x, y = parse_ntidigits(file, train=True)
    assert y.tolist() == [1, 0, 10, 9]
    assert parse_ntidigits(file, train=True, label_map="tonic")[1].tolist() == [1, 10, 0, 9]
    assert x.shape == (4, 129, 64)
    with pytest.raises(UserError, match="single digits"):
        parse_ntidigits({"test_labels": []}, train=False)


def test_missing_h5py_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="h5py"):
        load_ntidigits(tmp_path / "n-tidigits.hdf5", train=True)


def test_hdf5_file_is_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "n.hdf5", "w") as file:
        file["train_labels"] = np.array([b"a-b-3"])
        file.create_group("train_addresses")["a-b-3"] = np.array([2])
        file.create_group("train_timestamps")["a-b-3"] = np.array([0.0])
    x, y = load_ntidigits(tmp_path / "n.hdf5", train=True)
    assert y.tolist() == [3]
    assert x[0].nonzero().tolist() == [[0, 2]]


# --- handwriting, E-MNIST ---


def test_handwriting_is_z_scored_by_block(tmp_path: Path) -> None:
    trials, bins, channels = 27, 6, 4
    block = np.arange(trials) // 3
    means = np.arange(9)[:, None] * np.ones(channels) * 10.0
    cube = means[block][:, None, :] + 2.0 * np.ones((trials, bins, channels))
    savemat(
        tmp_path / "singleLetters.mat",
        {
            "neuralActivityCube_a": cube,
            "neuralActivityCube_b": cube + 2,
            "meansPerBlock": means,
            "stdAcrossAllData": 2 * np.ones(channels),
        },
    )
    x, y = load_handwriting(tmp_path / "singleLetters.mat", letters="ab")
    assert x.shape == (54, bins, channels)
    assert y.tolist() == [0] * 27 + [1] * 27
    torch.testing.assert_close(x[:27], torch.ones(27, bins, channels))
    torch.testing.assert_close(x[27:], 2 * torch.ones(27, bins, channels))
    with pytest.raises(UserError, match="neuralActivityCube_c"):
        load_handwriting(tmp_path / "singleLetters.mat", letters="c")
    (tmp_path / "broken.mat").write_bytes(b"no")
    with pytest.raises(UserError, match="MATLAB"):
        load_handwriting(tmp_path / "broken.mat")


def test_emnist_letters_are_turned_upright(tmp_path: Path) -> None:
    image = np.zeros((2, 28, 28), np.uint8)
    image[0, 3, 20] = 255  # stored transposed: row 20, column 3 of the letter
    header = struct.pack(">IIII", 2051, 2, 28, 28)
    (tmp_path / "emnist-letters-train-images-idx3-ubyte").write_bytes(header + image.tobytes())
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 2) + bytes([1, 26]))
    x, y = load_emnist_letters(tmp_path, train=True)
    assert y.tolist() == [0, 25]
    assert x[0].nonzero().tolist() == [[20, 3]]
    assert float(x.max()) == 1.0
    with pytest.raises(UserError, match="E-MNIST"):
        load_emnist_letters(tmp_path, train=False)


def test_rate_code_gives_twenty_spikes_in_fifty_steps() -> None:
    spikes = rate_code(torch.tensor([[[1.0, 0.5, 0.0]]]).expand(2000, 1, 3), seed=0)
    assert spikes.shape == (2000, 49, 3)
    counts = spikes.float().sum(1).mean(0)
    assert counts.tolist() == pytest.approx([49 * 0.4, 49 * 0.2, 0.0], abs=0.35)


# --- the emulator ---


def test_saccades_form_a_closed_triangle() -> None:
    sx, sy = saccade_path(torch.tensor([0.0, 1 / 3, 2 / 3 - 1e-6, 1.0]))
    torch.testing.assert_close(sx, torch.tensor([0.0, 3.5, 7.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(sy, torch.tensor([0.0, 7.0, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_a_dark_scene_emits_nothing_and_a_bar_emits_both_polarities() -> None:
    camera = Camera(noise=0.0)
    g = torch.Generator().manual_seed(0)
    on, off = events(torch.zeros(1, 28, 28), g, camera)
    assert not on.any()
    assert not off.any()
    bar = torch.zeros(1, 28, 28)
    bar[0, :, 13:15] = 1.0
    on, off = events(bar, g, camera, crop=None)
    assert on.shape == (1, 50, 34, 34)
    assert on.any()
    assert off.any()
    # In the last saccade the view moves left along the row, so that a vertical bar passes right: ON in front of it, OFF behind.
    last_on, last_off = on[0, 40].nonzero()[:, 1].float().mean(), off[0, 40].nonzero()[:, 1].float().mean()
    assert last_on > last_off


def test_contrast_steps_are_counted_by_the_threshold() -> None:
    # A pixel that goes from 0 to 1 changes log(I + 0.1) by log 11 = 2.40: five crossings of 0.4 at most, none above 2.4.
    image = torch.zeros(1, 28, 28)
    image[0, 10:, :] = 1.0
    g = torch.Generator().manual_seed(0)
    assert events(image, g, Camera(threshold=2.39, noise=0.0))[0].any()
    assert not events(image, g, Camera(threshold=2.41, noise=0.0))[0].any()


def test_digits_are_placed_at_offsets_of_three_to_five() -> None:
    canvas = place(torch.ones(60, 8, 8), torch.Generator().manual_seed(0))
    first = (canvas.amax(2) > 0).float().argmax(1)
    assert set(first.tolist()) == {3, 4, 5}
    assert torch.equal((canvas > 0).flatten(1).sum(1), torch.full((60,), 400))


def test_saccade_digits_have_the_expected_density() -> None:
    x, y = saccade_digits(0)
    assert x.shape == (1797, 50, 256)
    assert 0.07 < float(x[:300].float().mean()) < 0.1
    assert len(y) == 1797


# --- speech and curves ---


def test_words_fill_all_bins_and_repeat_with_the_seed() -> None:
    x, y = spoken_digits(2, 3)
    assert x.shape == (18, 129, 64)
    assert y.tolist() == list(range(9)) * 2
    assert torch.equal(x, spoken_digits(2, 3)[0])
    assert not torch.equal(x, spoken_digits(2, 4)[0])
    assert float(x[:, -40:].float().mean()) > 0.01  # the last third is not padding
    assert set(WORDS) == set("123456789zo")


def test_a_band_pass_has_gain_one_at_its_centre() -> None:
    b0, a1, a2 = (float(v) for v in band_pass(np.array(1000.0), np.array(5.0)))
    z = np.exp(-2j * np.pi * 1000.0 / 16000)
    assert abs(b0 * (1 - z**2) / (1 + a1 * z + a2 * z**2)) == pytest.approx(1.0, rel=1e-4)


def test_a_tone_excites_the_channel_of_its_frequency() -> None:
    tone = np.sin(2 * np.pi * 1000.0 * np.arange(16000 // 4) / 16000).astype(np.float32)[None]
    counts = cochlea(tone, np.array([250]))[0].sum(0)
    best = centres_hz()[int(counts.argmax())]
    assert 850 < best < 1200
    assert counts[0] < 0.3 * counts.max()


def test_the_orders_of_a_pair_have_like_counts_and_unlike_times() -> None:
    x, y = order_task(12, 0)
    first, second = x[y == 0].float().mean(0), x[y == 1].float().mean(0)  # IY-AA, AA-IY
    by_count = (first.sum(0) - second.sum(0)).abs().sum() / (first.sum() + second.sum())
    by_time = (first - second).abs().sum() / (first.sum() + second.sum())
    assert by_time > 2.5 * by_count


def test_curves_share_the_class_and_nothing_else() -> None:
    c = shared_kinematics(2, 0, classes=5)
    assert c.neural.shape == (10, 201, 192)
    assert c.images.shape == (10, 49, 784)
    assert c.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert 0.1 < float(c.neural.float().mean()) < 0.4
    # Drawings of one class resemble each other more than those of other classes, on average.
    flat = torch.nn.functional.normalize(torch.nn.functional.avg_pool2d(c.drawn, 4).flatten(1), dim=1)
    similar = flat @ flat.T
    same = torch.stack([similar[i, i + 5] for i in range(5)]).mean()
    other = torch.stack([similar[i, 5 + (i + 1) % 5] for i in range(5)]).mean()
    assert same > other
