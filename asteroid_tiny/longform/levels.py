"""Estimates brought to sum to their mixture, who gets how much of what they leave of it, and what
of a mixture no model is asked about."""

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, sosfiltfilt

WINDOW = 0.04  # s over which an amplitude is measured
RUMBLE = 40.0  # Hz: what is below is no speech
FLOOR = 1e-12  # of a squared amplitude; where there is less, all get the same share


def make_consistent(estimates, mixture, sample_rate):
    """Brings estimates to sum to their mixture.

    Training on SI-SDR leaves scale and sign open (estimates five times too loud were seen), so
    first all get the gain with which their sum fits best. What is still missing is shared out
    sample by sample in proportion to their amplitudes (`shares`); by equal parts or by power, as in
    S. Wisdom et al., "Differentiable consistency constraints for improved deep speech enhancement",
    ICASSP 2019, it would be heard where one speaks alone, or go to errors. A single estimate is all
    that is wanted of the mixture, and gets the gain alone.

    Args:
        estimates (numpy.ndarray): (n_src, time)
        mixture (numpy.ndarray): (time,)
        sample_rate (float): Of both, in Hz.

    Returns:
        numpy.ndarray: (n_src, time), whose sum is the mixture, if there are several.

    Examples:
        >>> sources = np.random.default_rng(0).normal(size=(2, 8000))
        >>> np.allclose(make_consistent(5 * sources, sources.sum(0), 8000), sources)
        True
    """
    total = estimates.sum(0)
    gain = float(total @ mixture) / (float(total @ total) + 1e-12)
    if len(estimates) == 1:
        return gain * estimates
    rest = mixture - gain * total
    share = shares(gain * estimates.T, sample_rate).T
    return gain * estimates + (share * rest).astype(estimates.dtype)


def shares(signals, sample_rate):
    """Shares of the amplitude that signals have around each sample.

    Args:
        signals (numpy.ndarray): (time, n_src)
        sample_rate (float): In Hz.

    Returns:
        numpy.ndarray: (time, n_src), whose sum over the signals is 1.
    """
    power = uniform_filter1d(np.square(signals, dtype=np.float64), reach(sample_rate) * 2 + 1, 0)
    amplitude = np.sqrt(power.clip(FLOOR))
    return amplitude / amplitude.sum(axis=1, keepdims=True)


def reach(sample_rate):
    """Samples on either side on which `shares` depend (int)."""
    return round(WINDOW / 2 * sample_rate)


def below_speech(mixtures, sample_rate):
    """What recordings hold below speech: an offset, wind, steps.

    With an offset as large as the speech the packaged weights would lose half of what they reach.

    Args:
        mixtures (numpy.ndarray): (n_mixtures, time)
        sample_rate (float): In Hz.

    Returns:
        numpy.ndarray: (n_mixtures, time), by a filter without phase, with which it is 6 dB down at
        `RUMBLE`; of less than a tenth of a second the mean.

    Examples:
        >>> time = np.arange(8000) / 8000
        >>> low, high = np.sin(2 * np.pi * 5 * time), 0.5 * np.sin(2 * np.pi * 200 * time)
        >>> found = below_speech((1 + low + high)[None], 8000)[0]
        >>> bool(np.abs(found - 1 - low)[400:-400].max() < 0.01)
        True
    """
    n_samples = mixtures.shape[-1]
    if n_samples < sample_rate / 10:
        return np.broadcast_to(mixtures.mean(axis=-1, keepdims=True), mixtures.shape)
    sos = butter(2, min(RUMBLE, sample_rate / 8), fs=sample_rate, output="sos")
    reach = min(n_samples - 1, round(sample_rate / RUMBLE * 4))
    return sosfiltfilt(sos, mixtures, padlen=reach, padtype="even").astype(mixtures.dtype)
