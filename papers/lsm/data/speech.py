"""Formant speech before a 64-channel cochlea (stand-in B), and an order task on it (B2). All utterances run through the filters together.

Words are strings of phonemes: pulses or band-passed noise through three resonators, with speakers that differ in formants, tempo and pitch.
The cochlea: band-passes from 100 to 7,000 Hz, half-wave, 50 Hz low-pass, square root, integrate and fire. numba compiles the filters.
"""
# mypy: allow-untyped-defs, disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

RATE_HZ = 16_000
FRAME = 16  # samples of a millisecond
CHANNELS, BINS = 64, 129
GAIN, FIRE = 0.12, 0.9
LOUDNESS = 2.3  # utterances are levelled to this many times their mean envelope: spikes in 19 % of bins and channels
BANDWIDTHS_HZ = (80.0, 100.0, 140.0)

# First three formants in Hz, after Peterson and Barney.
VOICED = {
    "IY": (270, 2290, 3010), "IH": (390, 1990, 2550), "EH": (530, 1840, 2480), "AA": (730, 1090, 2440), "AO": (570, 840, 2410),
    "UW": (300, 870, 2240), "AH": (640, 1190, 2390), "R": (310, 1060, 1380), "N": (280, 1700, 2600), "W": (300, 610, 2200),
}  # fmt: skip
NOISE = {
    "S": (4000, 7500), "Z": (4000, 7500), "F": (1500, 7000), "TH": (1500, 7000), "V": (1500, 7000), "T": (3000, 6500), "K": (1500, 3000),
}  # fmt: skip
# Durations in ms, 30 to 180 as in speech: vowels long, consonants short, bursts shortest.
DURATION_MS = {
    **dict.fromkeys(VOICED, 140), "R": 70, "N": 80, "W": 60, "S": 110, "Z": 90, "F": 100, "TH": 80, "V": 60, "T": 30, "K": 30,
}  # fmt: skip
WORDS = {
    "1": "W AH N", "2": "T UW", "3": "TH R IY", "4": "F AO R", "5": "F AA IH V", "6": "S IH K S", "7": "S EH V AH N", "8": "EH IH T",
    "9": "N AA IH N", "z": "Z IY R AO UW", "o": "AO UW",
}  # fmt: skip
ORDER_PAIRS = (("IY", "AA"), ("UW", "EH"), ("S", "AO"), ("IH", "N"), ("F", "AH"))


@dataclass(frozen=True)
class Speaker:
    """How one utterance differs: formant factor, tempo, pitch in Hz."""

    formant: float
    tempo: float
    pitch_hz: float


def draw_speakers(n: int, rng: np.random.Generator) -> list[Speaker]:
    return [
        Speaker(f, t, p)
        for f, t, p in zip(rng.uniform(0.88, 1.15, n), rng.uniform(0.8, 1.25, n), rng.uniform(90, 230, n), strict=True)
    ]


def synthesise(
    phonemes: Sequence[Sequence[str]], speakers: Sequence[Speaker], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Waveforms (B, L), zero after their end, and their lengths in frames of 1 ms."""
    spans = [
        [max(1, round(DURATION_MS[p] / s.tempo)) for p in word] for word, s in zip(phonemes, speakers, strict=True)
    ]
    frames = np.array([sum(s) for s in spans])
    batch, longest = len(phonemes), int(frames.max())
    formants = np.full((3, batch, longest), 500.0, np.float32)
    voice, hiss = np.zeros((batch, longest), np.float32), np.zeros((batch, longest), np.float32)
    low, high = np.full((batch, longest), 2000.0, np.float32), np.full((batch, longest), 4000.0, np.float32)
    for b, (word, span) in enumerate(zip(phonemes, spans, strict=True)):
        edges = np.concatenate([[0], np.cumsum(span)])
        targets, centres = [], []
        for p, start, stop in zip(word, edges[:-1], edges[1:], strict=True):
            if p in VOICED:
                voice[b, start:stop] = 1.0
                targets.append(VOICED[p])
                centres.append((start + stop) / 2)
            else:
                hiss[b, start:stop] = 1.0
                low[b, start:stop], high[b, start:stop] = NOISE[p]
        if targets:  # linear transitions between the centres of segments
            now = np.arange(frames[b])
            for k in range(3):
                formants[k, b, : frames[b]] = speakers[b].formant * np.interp(now, centres, [t[k] for t in targets])
    decay = np.exp(-np.pi * np.array(BANDWIDTHS_HZ) / RATE_HZ).astype(np.float32)[:, None, None]
    b1 = 2 * decay * np.cos(2 * np.pi * formants / RATE_HZ)
    b2 = -(decay**2) * np.ones_like(formants)
    gain = 1 - b1 - b2
    h0, h1, h2 = band_pass(np.sqrt(low * high), np.sqrt(low * high) / (high - low))
    pitch = np.array([s.pitch_hz for s in speakers], np.float32) / RATE_HZ
    noise = rng.standard_normal((batch, longest * FRAME), dtype=np.float32)
    gain, b1, b2 = (np.ascontiguousarray(f, np.float32) for f in (gain, b1, b2))
    wave = np.zeros((batch, longest * FRAME), np.float32)
    _speak(gain, b1, b2, voice, hiss, h0, h1, h2, pitch, noise, wave)
    return wave, frames


@njit(cache=True, nogil=True)
def _speak(gain, b1, b2, voice, hiss, h0, h1, h2, pitch, noise, wave):
    """Fill ``wave`` (B, L): pulses of ``pitch`` through three resonators, and band-passed noise. Others are (…, B, frames)."""
    for b in range(wave.shape[0]):
        y1, y2 = np.zeros(3, np.float32), np.zeros(3, np.float32)
        phase = n1 = n2 = z1 = z2 = np.float32(0.0)
        for i in range(wave.shape[1]):
            f = i // FRAME
            phase += pitch[b]
            x = np.float32(0.0)
            if phase >= np.float32(1.0):
                x = voice[b, f] * np.float32(8.0)
                phase -= np.float32(1.0)
            for k in range(3):
                x = gain[k, b, f] * x + b1[k, b, f] * y1[k] + b2[k, b, f] * y2[k]
                y2[k], y1[k] = y1[k], x
            z = noise[b, i] * hiss[b, f]
            n = h0[b, f] * (z - z2) - h1[b, f] * n1 - h2[b, f] * n2
            z2, z1, n2, n1 = z1, z, n1, n
            wave[b, i] = x + n


def band_pass(
    centre_hz: NDArray[np.floating], quality: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """b0, a1, a2 of y = b0 (x - x[-2]) - a1 y[-1] - a2 y[-2]: second order, gain 1 at the centre."""
    omega = 2 * np.pi * np.asarray(centre_hz) / RATE_HZ
    alpha = np.sin(omega) / (2 * np.asarray(quality))
    scale = 1 / (1 + alpha)
    return (
        (alpha * scale).astype(np.float32),
        (-2 * np.cos(omega) * scale).astype(np.float32),
        ((1 - alpha) * scale).astype(np.float32),
    )


def centres_hz() -> NDArray[np.float64]:
    """Centre frequencies of the channels, evenly spaced in log frequency."""
    return np.geomspace(100.0, 7000.0, CHANNELS)


def cochlea(wave: NDArray[np.float32], frames: NDArray[np.int64]) -> Tensor:
    """Spike trains (B, 129, 64) uint8 of waveforms (B, L); an utterance fills all bins, whatever its length."""
    centre = centres_hz()
    b0, a1, a2 = band_pass(centre, centre / (24.7 * (4.37e-3 * centre + 1)))  # equivalent rectangular bandwidths
    smooth = np.float32(1 - np.exp(-2 * np.pi * 50.0 / RATE_HZ))
    spikes = np.zeros((len(wave), BINS, CHANNELS), np.uint8)
    _hear(wave, frames, b0, a1, a2, smooth, np.float32(GAIN), np.float32(FIRE), np.float32(LOUDNESS), spikes)
    return torch.from_numpy(spikes)


@njit(cache=True, nogil=True)
def _hear(wave, frames, b0, a1, a2, smooth, gain, fire, loudness, spikes):
    """Fill spikes (B, bins, channels): the smoothed half-wave of every band-pass, its level set over the utterance, integrated to fire."""
    _, bins, channels = spikes.shape
    longest = wave.shape[1] // FRAME
    for b in range(wave.shape[0]):
        y1, y2, level = np.zeros(channels, np.float32), np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        envelope = np.empty((longest, channels), np.float32)
        for f in range(longest):
            for i in range(f * FRAME, (f + 1) * FRAME):
                difference = wave[b, i] - wave[b, i - 2] if i >= 2 else wave[b, i]
                for c in range(channels):
                    y = difference * b0[c] - y1[c] * a1[c] - y2[c] * a2[c]
                    y2[c] = y1[c]
                    y1[c] = y
                    level[c] += (max(y, np.float32(0.0)) - level[c]) * smooth
            envelope[f] = level
        total = 0.0
        for value in envelope.flat:
            total += value
        scale = np.float32(1.0 / max(loudness * total / (channels * frames[b]), 1e-9))
        potential = np.zeros(channels, np.float32)
        for f in range(frames[b]):
            now = spikes[b, min(f * bins // frames[b], bins - 1)]
            for c in range(channels):
                potential[c] += gain * np.sqrt(envelope[f, c] * scale)
                if potential[c] >= fire:
                    potential[c] -= fire
                    now[c] = 1


def utterances(words: Sequence[Sequence[str]], seed: int) -> Tensor:
    """Spike trains of phoneme strings, each by a speaker of its own."""
    rng = np.random.default_rng(seed)
    wave, frames = synthesise(words, draw_speakers(len(words), rng), rng)
    return cochlea(wave, frames)


def spoken_digits(per_class: int, seed: int, words: Sequence[str] = tuple("123456789")) -> tuple[Tensor, Tensor]:
    """Stand-in B: (N, 129, 64) uint8 and labels 0 … K - 1 in the order of ``words``, interleaved by class."""
    labels = torch.arange(len(words)).repeat(per_class)
    return utterances([WORDS[words[k]].split() for k in labels.tolist()], seed), labels


def order_task(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stand-in B2: five pairs of phonemes in both orders, ten classes; counts alone hardly tell the orders apart."""
    classes = [pair[::step] for pair in ORDER_PAIRS for step in (1, -1)]
    labels = torch.arange(len(classes)).repeat(per_class)
    return utterances([classes[k] for k in labels.tolist()], seed), labels
