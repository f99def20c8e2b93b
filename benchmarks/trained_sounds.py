"""Sounds for the trained networks that hear: tones of known pitch, voices of pulses and formants, and no voices."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

RATE = 16_000
"""Samples per second."""

VOICES = (90.0, 110.0, 130.0, 150.0, 180.0)
"""Mean pitch of each voice in Hz, those of a man, as the vowels are."""

_VOWELS = np.array([(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)], float)
"""First three formants in Hz of the vowels of father, see, boot, bed and law (Peterson and Barney, 1952)."""


def tones(pitches: np.ndarray) -> Tensor:
    """Windows with eight falling harmonics of each pitch, of mean 0 and deviation 1: [pitches, 1024]."""
    t = np.arange(1024) / RATE
    windows = [sum(np.sin(2 * np.pi * f * k * t + k) / k for k in range(1, 9) if f * k < 7500) for f in pitches]
    x = torch.from_numpy(np.stack(windows).astype(np.float32))
    x = x - x.mean(1, keepdim=True)
    return x / x.std(1, keepdim=True)


def voice(seconds: float, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """Vowels in a row, five and a half a second: glottal pulses through three resonances that move."""
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    knots = np.arange(int(seconds / 0.18) + 2) * 0.18
    vowels = _VOWELS[rng.integers(len(_VOWELS), size=len(knots))] * rng.uniform(0.95, 1.1)
    jitter = 1 + 0.01 * np.repeat(rng.standard_normal(n // 80 + 1), 80)[:n]
    f0 = pitch * np.interp(t, knots, rng.uniform(0.85, 1.2, len(knots))) * (1 - 0.1 * t / seconds) * jitter
    phase = np.mod(np.cumsum(f0) / RATE, 1)
    opening = (phase < 0.45) * (0.5 - 0.5 * np.cos(np.pi * phase / 0.45))
    closing = ((phase >= 0.45) & (phase < 0.6)) * np.cos(np.pi * (phase - 0.45) / 0.3)
    sound = np.diff(opening + closing, prepend=0) + 0.002 * rng.standard_normal(n)
    for formant, bandwidth in enumerate((70, 90, 130)):
        frequency = np.interp(t, knots, vowels[:, formant])
        radius = math.exp(-math.pi * bandwidth / RATE)
        state, filtered = np.zeros(2), np.zeros(n)
        for start in range(0, n, 80):
            cosine = 2 * radius * math.cos(2 * math.pi * frequency[start] / RATE)
            poles = [1, -cosine, radius**2]
            filtered[start : start + 80], state = lfilter([sum(poles)], poles, sound[start : start + 80], zi=state)
        sound = filtered
    loudness = np.interp(t, np.arange(2 * len(knots)) * 0.09, np.tile([1.0, 0.25], len(knots)))
    sound = sound * loudness
    return 0.3 * sound / np.abs(sound).max()


def voices_and_others(seconds: float) -> tuple[Tensor, Tensor]:
    """Sounds, [10, samples], and which of them are voices, [10]: five voices, noise, tone, chirp, clicks, silence."""
    rng = np.random.default_rng(0)
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    voiced = [voice(seconds, pitch, rng) for pitch in VOICES]
    others = [
        0.05 * rng.standard_normal(n),
        0.3 * np.sin(2 * np.pi * 440 * t),
        0.3 * np.sin(2 * np.pi * (100 * t + 400 * t**2)),
        0.3 * (np.arange(n) % 4000 < 8),
        np.zeros(n),
    ]
    sounds = torch.from_numpy(np.stack(voiced + others).astype(np.float32))
    return sounds, torch.arange(len(sounds)) < len(voiced)
