"""What a recording holds above the band of a model, given to the speakers.

A model for 8000 Hz hears nothing above 4000 Hz, where a recording of a higher rate has much of its
clarity. What the estimates leave of the recording is shared out sample by sample, in proportion to
the amplitude that they have in the upper part of their own band around it: whoever makes an "s"
there makes it above, too. (Shared by power, the band above has 0.6 dB less SDR with the estimates
of the packaged model.) The tracks then sum to the recording, also to one of a lower rate than the
model's, of which the conversion takes a little off the top.
"""

import itertools

import numpy as np

from .levels import reach, shares

DIFFERENCES = 5  # taken of the estimates, which leaves the upper part of their band
APART = 1 / 16000  # s between the two samples of a difference, at least one


def share_rest(tracks, mixture, sample_rate):
    """Adds to each track its share of what the tracks leave of their mixture.

    Args:
        tracks (iterable of numpy.ndarray): Estimates at the rate of the mixture, (time, n_src)
            each, of any lengths; in all not longer than the mixture.
        mixture (iterable of numpy.ndarray): The mixture, (time,) each, of any lengths.
        sample_rate (int): Of both, in Hz.

    Yields:
        numpy.ndarray: (time, n_src), in all as long as the tracks, whose sum is the mixture.

    Examples:
        >>> mixture = np.random.default_rng(0).normal(size=4000)
        >>> tracks = np.outer(mixture, [0.2, 0.7])
        >>> shared = np.concatenate(list(share_rest([tracks], [mixture], 16000)))
        >>> np.allclose(shared.sum(1), mixture)
        True
    """
    margin = reach(sample_rate) + DIFFERENCES * _lag(sample_rate)  # what a share depends on
    held = None
    for piece in _side_by_side(tracks, mixture, sample_rate):
        if held is None:
            around = np.zeros((margin, piece.shape[1]))
            held = around
        held = np.concatenate([held, piece])
        if len(held) > 2 * margin:
            yield _shared(held, sample_rate, margin)
            held = held[-2 * margin :]
    if held is not None:
        yield _shared(np.concatenate([held, around]), sample_rate, margin)


def _shared(held, sample_rate, margin):
    """What `share_rest` makes of all samples but `margin` on either side."""
    tracks, mixture = held[:, :-1], held[:, -1:]
    upper, lag = tracks, _lag(sample_rate)
    for _ in range(DIFFERENCES):
        upper = upper - np.concatenate([np.zeros_like(upper[:lag]), upper[:-lag]])
    rest = mixture - tracks.sum(axis=1, keepdims=True)
    return (tracks + shares(upper, sample_rate) * rest)[margin:-margin]


def _lag(sample_rate):
    """Samples from one to the other of a difference (int)."""
    return max(1, round(APART * sample_rate))


def _side_by_side(tracks, mixture, sample_rate):
    """Yields (time, n_src + 1): the tracks and, last, the mixture."""
    held, mixture = np.zeros(0), itertools.chain(mixture, itertools.repeat(np.zeros(sample_rate)))
    for piece in tracks:
        while len(held) < len(piece):
            held = np.concatenate([held, next(mixture)])
        yield np.column_stack([piece, held[: len(piece)]])
        held = held[len(piece) :]
