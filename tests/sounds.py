"""Signals for the tests, and what is measured of signals."""

import numpy as np

RATE = 8000
RNG = np.random.default_rng(0)
NOISE = RNG.integers(-3000, 3000, 4 * RATE).astype(np.int16)


def tone(frequency, seconds=4.0, amplitude=8000):
    time = np.arange(round(seconds * RATE)) / RATE
    return np.round(amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.int16)


def peak_frequency(samples):
    spectrum = np.abs(np.fft.rfft(np.asarray(samples) * np.hanning(len(samples))))
    return spectrum.argmax() * RATE / len(samples)


def level(samples):
    return 10 * np.log10(np.mean(np.asarray(samples, dtype=np.float64) ** 2))
