"""Which output of a block is which speaker: agreement where blocks overlap, and likeness of voices.

A separator gives its outputs in any order, so that the blocks must be matched. Two things tell how:
where there is speech in the overlap of two blocks, the outputs that agree belong together, and each
output has a voice (see `voices`). Both are log-likelihoods, and the orders with the highest sum are
looked for: block by block as they come (`order`), then in all blocks together (`reorder`), which
mends what was decided before the voices were known. There each half of a block has an order of its
own, since a separator may put two speakers who take turns into one output.
"""

import itertools
from typing import NamedTuple

import numpy as np

from .voices import FEATURES, Listener, each, evidence

OVERLAP_WEIGHT = 10.0  # log-likelihood of a second of full agreement
TOGETHER = 0.4  # s: as if that much of the two halves of a block overlapped
NEW_SPEAKER = 20.0  # log-likelihood that one speaker more must gain, once all is known,
AT_ONCE = 1.0  # and when only what came before is
LEAST = 1e-6  # gain of log-likelihood that is one
ALL_LENGTHS, GROWTH = 32, 1.25  # of a stretch of halves, in halves: all up to that, then some


class Part(NamedTuple):
    """What is kept of a block, or of half of one.

    Attributes:
        precisions, voices (numpy.ndarray): As `Listener.voices` gives them.
        agreement (numpy.ndarray): Of outputs of the part before (first axis) and of this one, in
            seconds, (n_src, n_src).
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
        live (bool): Whether nothing is kept for `reorder`, as where a stream never ends.
    """

    def __init__(self, n_src, sample_rate, memory=True, live=False):
        self.memory = memory
        self.live = live
        self.permutations = np.array(list(itertools.permutations(range(n_src))))
        self.listener = Listener(sample_rate)
        self.orders, self.halves = [], []
        self.last = None  # start and outputs of the last block
        self.precisions = np.zeros((n_src, len(FEATURES)))  # sums, of each speaker so far
        self.voices = np.zeros((n_src, sum(FEATURES)))

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
        if self.live:
            self.orders.clear()
        self.orders.append(order)
        return order

    def reorder(self):
        """The orders of the halves of all blocks, now that all of them are known.

        As long as the likelihood grows by it, the speakers of stretches of halves change places:
        of all stretches and permutations those that gain most.

        Returns:
            numpy.ndarray: As `order` gives them, (blocks, 2, n_src).
        """
        orders = np.repeat(self.orders, 2, axis=0)
        shape = len(self.orders), 2, orders.shape[1]
        if not self.memory or shape[0] == 1 or shape[2] == 1:
            return orders.reshape(shape)
        precisions, voices, agreements = map(np.array, zip(*self.halves))
        voices -= each(precisions) * _mean(precisions.sum((0, 1)), voices.sum((0, 1)))
        rows = np.arange(len(orders))[:, None]
        changed = True
        while changed:
            sums = [_sums_before(x[rows, orders]) for x in (precisions, voices)]
            links = self._links(agreements[rows[1:, None], orders[:-1, :, None], orders[1:, None]])
            changes = [self._changes(length, sums, links) for length in _lengths(len(orders))]
            changed = self._change(orders, sums, np.concatenate(changes))
        return orders.reshape(shape)

    def _change(self, orders, sums, changes):
        """Makes changes, of those that touch each other the one that gains most (bool: if any)."""
        totals, free = [x[-1] for x in sums], np.ones(len(orders) + 1, bool)
        for gain, link, start, end, k in changes[changes[:, 0].argsort()[::-1]]:
            stretch, permutation = slice(int(start), int(end)), self.permutations[int(k)]
            touched = slice(stretch.start - 1, stretch.stop + 1)
            if not gain >= LEAST:
                break
            if not free[touched].all():
                continue
            inside = [x[stretch.stop] - x[stretch.start] for x in sums]
            new = [t - x + x[permutation] for t, x in zip(totals, inside)]
            gain = evidence(*new, NEW_SPEAKER).sum() - evidence(*totals, NEW_SPEAKER).sum() + link
            if gain >= LEAST:  # after the changes so far
                orders[stretch] = orders[stretch, permutation]
                totals, free[touched] = new, False
        return not free.all()

    def _links(self, agreements):
        """Log-likelihood gained where a stretch that changes places begins, and where it ends.

        Args:
            agreements (numpy.ndarray): Of speakers before and behind each border between halves.

        Returns:
            list of numpy.ndarray: By border, ends of the recording included, and permutation, of
            which the first changes nothing and is left out.
        """
        speakers, permutations = np.arange(agreements.shape[-1]), self.permutations[1:]
        stays = agreements[:, speakers, speakers].sum(-1, keepdims=True)
        begins = agreements[:, speakers, permutations].sum(-1) - stays
        ends = agreements[:, permutations, speakers].sum(-1) - stays
        return [OVERLAP_WEIGHT * np.pad(x, ((1, 1), (0, 0))) for x in (begins, ends)]

    def _changes(self, length, sums, links):
        """The best change of places in each stretch of some halves; the last are up to the end.

        Args:
            length (int): In halves.
            sums (list of numpy.ndarray): Precisions and voices of the speakers before each border.
            links (list of numpy.ndarray): As `_links` gives them.

        Returns:
            numpy.ndarray: Gain, what of it is of the links, start, end and number of the
            permutation, (stretches, 5).
        """
        n_halves = len(sums[0]) - 1
        starts = np.arange(1, n_halves)
        ends = np.minimum(starts + length, n_halves)
        inside, totals = [x[ends] - x[starts] for x in sums], [x[-1] for x in sums]
        link = links[0][starts] + links[1][ends]
        gains = link - evidence(*totals, NEW_SPEAKER).sum()
        for k, permutation in enumerate(self.permutations[1:]):
            changed = [t - x + x[:, permutation] for t, x in zip(totals, inside)]
            gains[:, k] += evidence(*changed, NEW_SPEAKER).sum(-1)
        best = gains.argmax(1)
        rows = np.arange(len(best))
        return np.stack([gains[rows, best], link[rows, best], starts, ends, best + 1], axis=1)

    def _gains(self, block):
        """Log-likelihood that each output (second axis) adds to the speakers (first axis)."""
        sums = [np.concatenate(x).sum(0) for x in zip((self.precisions, self.voices), block[:2])]
        so_far = self.voices - each(self.precisions) * _mean(*sums)
        new = block.voices - each(block.precisions) * _mean(*sums)
        together = self.precisions[:, None] + block.precisions, so_far[:, None] + new
        before = evidence(self.precisions, so_far, AT_ONCE)[:, None]
        return evidence(*together, AT_ONCE) - before

    def _listen(self, estimates, start):
        """What is to be kept of a block (Part); its halves are kept for later."""
        heard = self.listener.hear(estimates)
        agreement = np.zeros((len(estimates),) * 2)
        if self.last is not None:
            before = self.last[1][:, start - self.last[0] :]
            agreement = self._agreement(before, estimates, heard.speech)
        self.last = start, estimates
        if not self.live:
            self._keep_halves(heard, agreement)
        return Part(*self.listener.voices(heard), agreement)

    def _keep_halves(self, heard, agreement):
        middle, held = len(heard.speech) // 2, TOGETHER * np.eye(len(agreement))
        self.halves.append(Part(*self.listener.voices(heard, slice(middle)), agreement))
        self.halves.append(Part(*self.listener.voices(heard, slice(middle, None)), held))

    def _agreement(self, before, estimates, speech):
        """Correlation of two blocks' outputs in each frame of speech, summed, in seconds."""
        half = self.listener.half
        n = min(before.shape[1] // half, len(speech))
        old, new = (x[:, : n * half].reshape(len(x), n, half) for x in (before, estimates))
        power = (old**2).sum((0, 2)) + (new**2).sum((0, 2))
        products = np.einsum("ith,jth->ijt", old, new) * 2 / (power + 1e-12)
        return (products * speech[:n]).sum(-1) * self.listener.seconds_a_frame


def _mean(precisions, voices):
    """Mean of voices, of the sums of their precisions and of voices times these."""
    return voices / np.maximum(each(precisions), 1e-9)


def _sums_before(x):
    """Sums of all rows before each, and of all of them."""
    return np.concatenate([np.zeros_like(x[:1]), x.cumsum(0)])


def _lengths(n_halves):
    """Lengths of the stretches of halves that may change places; the last is up to the end."""
    length = 1
    while length < n_halves:
        yield length
        length = max(length + 1, int(length * GROWTH)) if length >= ALL_LENGTHS else length + 1
    yield n_halves
