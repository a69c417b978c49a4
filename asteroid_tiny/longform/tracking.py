"""Which output of a block is which speaker: agreement where blocks overlap, and a memory of voices.

A separator gives its outputs in any order, so that neighbouring blocks must be matched. Where there
is speech in their overlap, the outputs that agree belong together. Where there is none, what helps
is how each speaker sounded so far: the mean mel cepstrum of the frames in which he was the loudest,
without its first coefficient, so that it does not depend on the level. Both are log-likelihoods,
and the permutation with the highest sum is taken at once: nothing waits for later blocks.

The memory is a Gaussian for each speaker, a two-covariance model (N. Brümmer & E. de Villiers, "The
speaker partitioning problem", Odyssey 2010) with diagonal covariances in closed form: for
coefficient c, 3 s of one speaker vary by WITHIN / c^1.25, and speakers by twice that. This was
measured on 291 speakers of read English.
"""

import functools
import itertools

import numpy as np

FRAME = 0.032  # s, half of which is the hop
MEL_BANDS, CEPSTRA = 24, 16
WITHIN, BETWEEN = 2.5, 5.0  # variances of the first coefficient, for 3 s of speech
FADING = 1.25  # exponent with which both fall
OVERLAP_WEIGHT = 10.0  # log-likelihood of a second of full agreement
MEMORY_WEIGHT = 1.0  # of the Gaussians, which see estimates and no clean speech
LONGEST = 60.0  # s of speech that a memory weighs; older speech fades
SHORTEST = 0.3  # s of speech below which a block says nothing of a voice
RANGE = 35.0  # dB below the loudest frame in which speech is looked for
DOMINANCE = 6.0  # dB by which the loudest output must exceed the others to be remembered


class SpeakerTracker:
    """Puts the outputs of each block in the order of the speakers.

    Args:
        n_src (int): Number of outputs.
        sample_rate (float): In Hz.
        memory (bool): Whether voices are remembered; else the overlap decides alone.
    """

    def __init__(self, n_src, sample_rate, memory=True):
        self.memory = memory
        self.permutations = np.array(list(itertools.permutations(range(n_src))))
        self.speakers = np.arange(n_src)
        self.frame = 2 * round(FRAME / 2 * sample_rate)
        self.seconds_a_frame = self.frame / 2 / sample_rate
        self.to_cepstrum = _mel_cepstrum(self.frame, sample_rate)
        self.voices = np.zeros((n_src, CEPSTRA))
        self.heard = np.zeros(n_src)  # s of speech behind each voice
        self.loudest, self.floor = -np.inf, np.inf  # dB, of the frames so far

    def order(self, estimates, before=None):
        """The order in which the outputs of the next block belong to the speakers.

        Args:
            estimates (numpy.ndarray): Outputs of the block, (n_src, time).
            before (numpy.ndarray, optional): What was written for the speakers where the block
                begins, (n_src, overlap).

        Returns:
            numpy.ndarray: Which output is that of speaker 0, 1, ..., (n_src,).
        """
        powers = self._powers(estimates)  # (n_src, frames, bins)
        levels = 10 * np.log10(powers.sum(-1) + 1e-12)
        speech = self._find_speech(levels)
        voices, seconds = self._hear(powers, levels, speech)
        scores = np.zeros((len(self.speakers),) * 2)  # speaker, output
        if before is not None:
            scores += OVERLAP_WEIGHT * self._agreement(before, estimates, speech)
        if self.memory:
            scores += MEMORY_WEIGHT * self._likelihoods(voices, seconds)
        order = self.permutations[scores[self.speakers, self.permutations].sum(1).argmax()]
        self._remember(voices[order], seconds[order])
        return order

    def _powers(self, signals):
        half = self.frame // 2
        signals = np.pad(signals, ((0, 0), (0, max(0, self.frame - signals.shape[1]))))
        n_frames = signals.shape[1] // half - 1
        halves = signals[:, : (n_frames + 1) * half].reshape(len(signals), -1, half)
        frames = np.concatenate([halves[:, :-1], halves[:, 1:]], axis=-1)
        return np.abs(np.fft.rfft(frames * np.hanning(self.frame))) ** 2

    def _find_speech(self, levels):
        """In which frames there is speech: well above the noise, not far below the loudest."""
        levels = levels.max(0)
        self.loudest = max(self.loudest, levels.max())
        self.floor = max(min(self.floor, np.percentile(levels, 5)), self.loudest - 2 * RANGE)
        return levels > (self.loudest + self.floor) / 2

    def _hear(self, powers, levels, speech):
        """The voice of each output, and how many seconds of the block it is made of."""
        others = np.array([np.delete(levels, k, 0).max(0, initial=-np.inf) for k in self.speakers])
        alone = speech & (levels > others + DOMINANCE)
        voices = np.zeros_like(self.voices)
        for voice, power, frames in zip(voices, powers, alone):
            if frames.any():
                voice[:] = self.to_cepstrum(power[frames]).mean(0)
        return voices, alone.sum(1) * self.seconds_a_frame

    def _agreement(self, before, estimates, speech):
        """Correlation of speakers and outputs in each frame of speech, summed, in seconds."""
        half = self.frame // 2
        n = min(before.shape[1] // half, len(speech))
        old, new = (x[:, : n * half].reshape(len(x), n, half) for x in (before, estimates))
        power = (old**2).sum((0, 2)) + (new**2).sum((0, 2))
        products = np.einsum("ith,jth->ijt", old, new) * 2 / (power + 1e-12)
        return (products * speech[:n]).sum(-1) * self.seconds_a_frame

    def _likelihoods(self, voices, seconds):
        """Log-likelihood of each output (second axis) being the speaker (first axis)."""
        if not self.heard.any():
            return np.zeros((len(voices),) * 2)
        fading = np.arange(1, CEPSTRA + 1) ** -FADING
        known = self.heard[:, None, None] > 0
        anyone = np.average(self.voices, axis=0, weights=self.heard)
        centre = np.where(known, self.voices[:, None], anyone)
        spread = np.where(known, _within(self.heard)[:, None, None], BETWEEN)
        variance = fading * (spread + _within(seconds)[None, :, None])
        found = -0.5 * ((voices - centre) ** 2 / variance + np.log(variance)).sum(-1)
        return np.where(seconds >= SHORTEST, found, 0.0)

    def _remember(self, voices, seconds):
        for k in np.flatnonzero(seconds >= SHORTEST):
            total = self.heard[k] + seconds[k]
            self.voices[k] += (voices[k] - self.voices[k]) * seconds[k] / total
            self.heard[k] = min(total, LONGEST)


def _within(seconds):
    """Variance of the mean over so many seconds: half of it stays, however long they are."""
    return WITHIN * (0.5 + 1.5 / np.maximum(seconds, SHORTEST))


def _mel_cepstrum(frame, sample_rate):
    """A function from power spectra to mel cepstra: (.., bins) -> (.., CEPSTRA)."""
    top = min(3800, 0.475 * sample_rate)
    edges = 700 * (np.geomspace(1 + 100 / 700, 1 + top / 700, MEL_BANDS + 2) - 1)
    bins = np.fft.rfftfreq(frame, 1 / sample_rate)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None)
    angles = np.pi / MEL_BANDS * np.outer(np.arange(1, CEPSTRA + 1), np.arange(MEL_BANDS) + 0.5)
    cosines = np.sqrt(2 / MEL_BANDS) * np.cos(angles)
    return functools.partial(_cepstrum, bands=bands, cosines=cosines)


def _cepstrum(powers, bands, cosines):
    floor = 1e-10 * powers.sum(-1, keepdims=True) + 1e-12
    return np.log(powers @ bands.T + floor) @ cosines.T
