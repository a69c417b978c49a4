"""Which output of a block is which speaker: agreement where blocks overlap, and likeness of voices.

A separator gives its outputs in any order, so that the blocks must be matched. Two things tell how.
Where there is speech in the overlap of two blocks, the outputs that agree belong together. And each
output has a voice: the mean mel cepstrum of the frames in which it is the loudest, without the
first coefficient, so that it does not depend on the level. Both are log-likelihoods, and the orders
of all blocks with the highest sum are looked for: block by block as they come (`order`), then in
all of them together (`reorder`), which mends what was decided before the voices were known.

The voices of one speaker are Gaussian about a mean that is Gaussian itself, a two-covariance model
(N. Brümmer & E. de Villiers, "The speaker partitioning problem", Odyssey 2010) with diagonal
covariances in closed form, of which coefficient c has a part of c^-1.25. On 291 speakers of read
English the first coefficient varies by `BETWEEN` from speaker to speaker, and by half as much from
one 3 s of a speaker to another. An output of s seconds gets `WITHIN` (1 + 1.5 / s): half as much
again at 3 s, since estimates are no clean speech.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

FRAME = 0.032  # s, half of which is the hop
MEL_BANDS, CEPSTRA = 24, 16
WITHIN, BETWEEN = 2.5, 5.0  # variances of the first coefficient
FADING = 1.25  # exponent with which both fall
OVERLAP_WEIGHT = 10.0  # log-likelihood of a second of full agreement
NEW_SPEAKER = 10.0  # log-likelihood that one speaker more must gain, once all is known,
AT_ONCE = 1.0  # and when only what came before is
SHORTEST = 0.3  # s of speech below which an output says nothing of a voice
RANGE = 35.0  # dB below the loudest frame in which speech is looked for
DOMINANCE = 6.0  # dB by which the loudest output must exceed the others to be heard
ALL_LENGTHS, GROWTH = 32, 1.25  # of a stretch of blocks, in blocks: all up to that, then some


class Block(NamedTuple):
    """What is kept of a block.

    Attributes:
        precisions (numpy.ndarray): Inverse variance of the voice of each output, 0 without speech,
            (n_src,).
        voices (numpy.ndarray): Voices of unit variance, times their precisions, (n_src, CEPSTRA).
        agreement (numpy.ndarray): Of outputs of the block before (first axis) and of this one where
            they overlap, in seconds, (n_src, n_src).
    """

    precisions: np.ndarray
    voices: np.ndarray
    agreement: np.ndarray


class SpeakerTracker:
    """Puts the outputs of each block in the order of the speakers.

    Args:
        n_src (int): Number of outputs.
        sample_rate (float): In Hz.
        memory (bool): Whether voices count; else the overlaps decide alone.
    """

    def __init__(self, n_src, sample_rate, memory=True):
        self.memory = memory
        self.permutations = np.array(list(itertools.permutations(range(n_src))))
        self.frame = 2 * round(FRAME / 2 * sample_rate)
        self.seconds_a_frame = self.frame / 2 / sample_rate
        self.to_cepstrum = _mel_cepstrum(self.frame, sample_rate)
        self.loudest, self.floor = -np.inf, np.inf  # dB, of the frames so far
        self.blocks, self.orders = [], []
        self.last = None  # start and outputs of the last block
        self.precisions = np.zeros(n_src)  # sums, of each speaker so far
        self.voices = np.zeros((n_src, CEPSTRA))

    def order(self, estimates, start):
        """The order in which the outputs of the next block belong to the speakers so far.

        Args:
            estimates (numpy.ndarray): Outputs of the block, (n_src, time).
            start (int): Sample of the recording at which the block begins.

        Returns:
            numpy.ndarray: Which output is that of speaker 0, 1, ..., (n_src,).
        """
        block = self._listen(estimates, start)
        scores = np.zeros_like(block.agreement)  # speaker, output
        if self.orders:
            scores += OVERLAP_WEIGHT * block.agreement[self.orders[-1]]
        if self.memory:
            scores += self._gains(block)
        speakers = np.arange(len(scores))
        order = self.permutations[scores[speakers, self.permutations].sum(1).argmax()]
        self.precisions += block.precisions[order]
        self.voices += block.voices[order]
        self.blocks.append(block)
        self.orders.append(order)
        return order

    def reorder(self):
        """The orders of all blocks, now that all of them are known.

        As long as the likelihood grows by it, the speakers of a stretch of blocks change places: of
        all stretches and permutations those that gain most.

        Returns:
            numpy.ndarray: As `order` gives them, (blocks, n_src).
        """
        orders = np.array(self.orders)
        if not self.memory or orders.shape[1] == 1 or len(orders) == 1:
            return orders
        precisions, voices, agreements = map(np.array, zip(*self.blocks))
        voices -= precisions[..., None] * (voices.sum((0, 1)) / max(precisions.sum(), 1e-9))
        rows = np.arange(len(orders))[:, None]
        while True:
            sums = [_sums_before(x[rows, orders]) for x in (precisions, voices)]
            links = self._links(agreements[rows[1:, None], orders[:-1, :, None], orders[1:, None]])
            changes = (self._best_change(length, sums, links) for length in _lengths(len(orders)))
            gain, start, end, permutation = max(changes, key=lambda change: change[0])
            if not gain >= 1e-6:
                return orders
            orders[start:end] = orders[start:end, permutation]

    def _links(self, agreements):
        """Log-likelihood gained where a stretch that changes places begins, and where it ends.

        Args:
            agreements (numpy.ndarray): Of speakers before and behind each border between blocks.

        Returns:
            list of numpy.ndarray: By border, ends of the recording included, and permutation, of
            which the first changes nothing and is left out.
        """
        speakers, permutations = np.arange(agreements.shape[-1]), self.permutations[1:]
        stays = agreements[:, speakers, speakers].sum(-1, keepdims=True)
        begins = agreements[:, speakers, permutations].sum(-1) - stays
        ends = agreements[:, permutations, speakers].sum(-1) - stays
        return [OVERLAP_WEIGHT * np.pad(x, ((1, 1), (0, 0))) for x in (begins, ends)]

    def _best_change(self, length, sums, links):
        """The best change of places in stretches of some blocks, or what is left at the end.

        Args:
            length (int): In blocks.
            sums (list of numpy.ndarray): Precisions and voices of the speakers before each border.
            links (list of numpy.ndarray): As `_links` gives them.

        Returns:
            tuple: Gain, start, end and permutation.
        """
        n_blocks = len(sums[0]) - 1
        starts = np.arange(1, n_blocks)
        ends = np.minimum(starts + length, n_blocks)
        inside, totals = [x[ends] - x[starts] for x in sums], [x[-1] for x in sums]
        gains = links[0][starts] + links[1][ends] - _evidence(*totals, NEW_SPEAKER).sum()
        for k, permutation in enumerate(self.permutations[1:]):
            changed = [t - x + x[:, permutation] for t, x in zip(totals, inside)]
            gains[:, k] += _evidence(*changed, NEW_SPEAKER).sum(-1)
        row, k = np.unravel_index(gains.argmax(), gains.shape)
        return gains[row, k], starts[row], ends[row], self.permutations[1 + k]

    def _gains(self, block):
        """Log-likelihood that each output (second axis) adds to the speakers (first axis)."""
        total = self.precisions.sum() + block.precisions.sum()
        mean = (self.voices.sum(0) + block.voices.sum(0)) / max(total, 1e-9)
        so_far = self.voices - self.precisions[:, None] * mean
        new = block.voices - block.precisions[:, None] * mean
        together = self.precisions[:, None] + block.precisions, so_far[:, None] + new
        before = _evidence(self.precisions, so_far, AT_ONCE)[:, None]
        return _evidence(*together, AT_ONCE) - before

    def _listen(self, estimates, start):
        """What is to be kept of a block (Block)."""
        powers = self._powers(estimates)  # (n_src, frames, bins)
        levels = 10 * np.log10(powers.sum(-1) + 1e-12)
        speech = self._find_speech(levels)
        agreement = np.zeros((len(estimates),) * 2)
        if self.last is not None:
            before = self.last[1][:, start - self.last[0] :]
            agreement = self._agreement(before, estimates, speech)
        self.last = start, estimates
        return Block(*self._hear(powers, levels, speech), agreement)

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
        """Precision and voice of each output, as `Block` has them."""
        n_src = len(powers)
        others = np.array([np.delete(levels, k, 0).max(0, initial=-np.inf) for k in range(n_src)])
        alone = speech & (levels > others + DOMINANCE)
        seconds = alone.sum(1) * self.seconds_a_frame
        heard = seconds >= SHORTEST
        variances = WITHIN * (1 + 1.5 / np.maximum(seconds, SHORTEST))
        precisions = np.where(heard, 1 / variances, 0.0)
        voices = np.zeros((n_src, CEPSTRA))
        for k in np.flatnonzero(heard):
            voices[k] = self.to_cepstrum(powers[k, alone[k]]).mean(0)
        deviations = np.arange(1, CEPSTRA + 1) ** (-FADING / 2)
        return precisions, precisions[:, None] * voices / deviations

    def _agreement(self, before, estimates, speech):
        """Correlation of two blocks' outputs in each frame of speech, summed, in seconds."""
        half = self.frame // 2
        n = min(before.shape[1] // half, len(speech))
        old, new = (x[:, : n * half].reshape(len(x), n, half) for x in (before, estimates))
        power = (old**2).sum((0, 2)) + (new**2).sum((0, 2))
        products = np.einsum("ith,jth->ijt", old, new) * 2 / (power + 1e-12)
        return (products * speech[:n]).sum(-1) * self.seconds_a_frame


def _evidence(precisions, voices, cost):
    """Log-likelihood that voices are of one speaker, but for what is the same in any order.

    Args:
        precisions (numpy.ndarray): Sum of the precisions, of any shape.
        voices (numpy.ndarray): Sum of the voices times precisions, about their mean, with one
            dimension more.
        cost (float): What is taken off where there are voices.
    """
    prior = 1 / BETWEEN
    fit = (voices**2).sum(-1) / (precisions + prior) - CEPSTRA * np.log1p(precisions / prior)
    return fit / 2 - cost * (precisions > 1e-9)


def _sums_before(x):
    """Sums of all rows before each, and of all of them."""
    return np.concatenate([np.zeros_like(x[:1]), x.cumsum(0)])


def _lengths(n_blocks):
    """Lengths of the stretches of blocks that may change places; the last is up to the end."""
    length = 1
    while length < n_blocks:
        yield length
        length = max(length + 1, int(length * GROWTH)) if length >= ALL_LENGTHS else length + 1
    yield n_blocks


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
