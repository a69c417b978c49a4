"""What is heard of a voice in an output, and how likely voices are of one speaker.

A voice is heard in the frames in which an output is the loudest by far: their mean mel cepstrum
without the first coefficient, so that it does not depend on the level, and the logarithm of the
median pitch of those that are voiced.

The voices of one speaker are Gaussian about a mean that is Gaussian itself, a two-covariance model
(N. Brümmer & E. de Villiers, "The speaker partitioning problem", Odyssey 2010) with diagonal
covariances in closed form. Here all are divided by the standard deviation between speakers. On 291
speakers of read English coefficient c varies by 5 c^-1.25 from speaker to speaker, and the first
one by half as much from one 3 s of a speaker to another. Estimates are no clean speech, and what
changes from one utterance of a speaker to the next does not average out: `WITHIN` is twice that at
3 s, chosen among values with 80 conversations of training speakers and 60 recordings of one.
"""

from typing import NamedTuple

import numpy as np

FRAME = 0.032  # s, half of which is the hop
MEL_BANDS, CEPSTRA = 24, 16
FEATURES = CEPSTRA, 1  # of a voice, whose last is the pitch; each has a precision of its own
#: Standard deviations from speaker to speaker.
SPREAD = np.append(5**0.5 * np.arange(1, CEPSTRA + 1) ** -0.625, 0.3)
#: Variance of a speaker's voice over that between speakers is a (1 + b / s) after s seconds.
WITHIN, PITCH_WITHIN = (0.65, 1.5), (0.15, 0.5)
SHORTEST = 0.3  # s of speech below which an output says nothing of a voice,
SHORTEST_PITCH = 0.08  # and of voiced speech
RANGE = 35.0  # dB below the loudest frame in which speech is looked for
DOMINANCE = 6.0  # dB by which the loudest output must exceed the others to be heard
LOWEST, HIGHEST = 60.0, 400.0  # Hz, of the pitch
VOICED = 0.6  # correlation of a period with the next from which on it has a pitch
OCTAVE_COST = 0.02  # of that, for one octave lower


class Heard(NamedTuple):
    """What is heard in the frames of a block.

    Attributes:
        speech (numpy.ndarray): Where there is speech, (frames,).
        alone (numpy.ndarray): Where it is in one output, (n_src, frames).
        features (numpy.ndarray): Cepstra and log pitch, which is NaN where an output is not alone
            or not voiced, (n_src, frames, sum(FEATURES)).
    """

    speech: np.ndarray
    alone: np.ndarray
    features: np.ndarray


class Listener:
    """Listens to the outputs of one block after another.

    Args:
        sample_rate (float): In Hz.
    """

    def __init__(self, sample_rate):
        self.sample_rate = sample_rate
        self.half = round(FRAME / 2 * sample_rate)
        self.seconds_a_frame = self.half / sample_rate
        self.bands, self.cosines = _mel_cepstrum(2 * self.half, sample_rate)
        self.loudest, self.floor = -np.inf, np.inf  # dB, of the frames so far

    def hear(self, estimates):
        """What is heard in a block (Heard) of estimates, (n_src, time)."""
        n_frames = max(1, estimates.shape[1] // self.half - 1)
        frames = self._frames(estimates, 0, 2, n_frames)
        powers = np.abs(np.fft.rfft(frames * np.hanning(2 * self.half))) ** 2
        levels = 10 * np.log10(powers.sum(-1) + 1e-12)
        speech = self._find_speech(levels)
        others = [np.delete(levels, k, 0).max(0, initial=-np.inf) for k in range(len(levels))]
        alone = speech & (levels > np.array(others) + DOMINANCE)
        features = np.full((*alone.shape, sum(FEATURES)), np.nan)
        floor = 1e-10 * powers.sum(-1, keepdims=True) + 1e-12
        features[..., :-1] = np.log(powers @ self.bands.T + floor) @ self.cosines.T
        if alone.any():
            long_frames = self._frames(estimates, 1, 4, n_frames)[alone]
            features[alone, -1] = np.log(pitch(long_frames, self.sample_rate))
        return Heard(speech, alone, features / SPREAD)

    def voices(self, heard, part=slice(None)):
        """The voices in some of the frames that were heard.

        Returns:
            tuple: Inverse variances of each output's cepstra and pitch, 0 where it says nothing,
            (n_src, 2); and voices times these, (n_src, sum(FEATURES)).
        """
        precisions = np.zeros((len(heard.alone), len(FEATURES)))
        voices = np.zeros((len(heard.alone), sum(FEATURES)))
        for k, alone in enumerate(heard.alone[:, part]):
            features = heard.features[k, part][alone]
            voiced = features[np.isfinite(features[:, -1]), -1]
            seconds, pitched = (len(x) * self.seconds_a_frame for x in (features, voiced))
            if seconds < SHORTEST:
                continue
            voices[k, :-1] = features[:, :-1].mean(0)
            precisions[k, 0] = _precision(seconds, *WITHIN)
            if pitched >= SHORTEST_PITCH:
                voices[k, -1] = np.median(voiced)
                precisions[k, 1] = _precision(pitched, *PITCH_WITHIN)
        return precisions, each(precisions) * voices

    def _frames(self, signals, n_before, n_halves, n_frames):
        """Frames of some halves, of which some are before; (n_src, frames, time)."""
        size = (n_frames + n_halves - 1) * self.half
        padded = np.pad(signals, ((0, 0), (n_before * self.half, size)))[:, :size]
        halves = padded.reshape(len(signals), -1, self.half)
        return np.concatenate([halves[:, k : k + n_frames] for k in range(n_halves)], axis=-1)

    def _find_speech(self, levels):
        """In which frames there is speech: well above the noise, not far below the loudest."""
        levels = levels.max(0)
        self.loudest = max(self.loudest, levels.max())
        self.floor = max(min(self.floor, np.percentile(levels, 5)), self.loudest - 2 * RANGE)
        return levels > (self.loudest + self.floor) / 2


def each(precisions):
    """The precision of each feature, (.., 2) -> (.., sum(FEATURES))."""
    return np.repeat(precisions, FEATURES, axis=-1)


def evidence(precisions, voices, cost):
    """Log-likelihood that voices are of one speaker, but for what is the same in any order.

    Args:
        precisions (numpy.ndarray): Sums of the precisions, (.., 2).
        voices (numpy.ndarray): Sums of the voices times precisions, about their mean,
            (.., sum(FEATURES)).
        cost (float): What is taken off where there are voices.

    Returns:
        numpy.ndarray: (..)
    """
    squares = np.stack([(voices[..., :-1] ** 2).sum(-1), voices[..., -1] ** 2], axis=-1)
    fit = squares / (precisions + 1) - FEATURES * np.log1p(precisions)
    return fit.sum(-1) / 2 - cost * (precisions[..., 0] > 1e-9)


def pitch(frames, sample_rate):
    """Fundamental frequency, where the autocorrelation is highest.

    As P. Boersma, "Accurate short-term analysis of the fundamental frequency and the
    harmonics-to-noise ratio of a sampled sound", 1993: that of the windowed frame over that of the
    window, with a preference for high frequencies, but without the path through the frames.

    Args:
        frames (numpy.ndarray): (frames, time), of a few periods each.
        sample_rate (float): In Hz.

    Returns:
        numpy.ndarray: In Hz, NaN where a frame is not voiced, (frames,).

    Examples:
        >>> time = np.arange(512) / 8000
        >>> hum = np.sign(np.sin(2 * np.pi * 125 * time))
        >>> noise = np.random.default_rng(0).normal(size=512)
        >>> pitch(np.stack([hum, noise]), 8000)
        array([125.,  nan])
    """
    window = np.hanning(frames.shape[1])
    lags = np.arange(int(sample_rate / HIGHEST) - 1, int(sample_rate / LOWEST) + 2)
    expected = _autocorrelation(window)
    found = _autocorrelation((frames - frames.mean(1, keepdims=True)) * window)
    found = found[:, lags] / (found[:, :1] + 1e-12) / (expected[lags] / expected[0])
    inner = found[:, 1:-1]
    peaks = (inner >= found[:, :-2]) & (inner >= found[:, 2:]) & (inner > VOICED)
    scores = np.where(peaks, inner - OCTAVE_COST * np.log2(lags[1:-1]), -np.inf)
    periods = lags[1:-1][scores.argmax(1)] / sample_rate
    return np.where(peaks.any(1), 1 / periods, np.nan)


def _autocorrelation(signals):
    n = signals.shape[-1]
    return np.fft.irfft(np.abs(np.fft.rfft(signals, 2 * n)) ** 2)[..., :n]


def _precision(seconds, long, short):
    return 1 / (long * (1 + short / seconds))


def _mel_cepstrum(frame, sample_rate):
    """Mel bands of power spectra, (MEL_BANDS, bins), and cosines of their logarithms' cepstrum."""
    top = min(3800, 0.475 * sample_rate)
    edges = 700 * (np.geomspace(1 + 100 / 700, 1 + top / 700, MEL_BANDS + 2) - 1)
    bins = np.fft.rfftfreq(frame, 1 / sample_rate)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None)
    angles = np.pi / MEL_BANDS * np.outer(np.arange(1, CEPSTRA + 1), np.arange(MEL_BANDS) + 0.5)
    return bands, np.sqrt(2 / MEL_BANDS) * np.cos(angles)
