"""Recordings of any length: block by block, in bounded memory, each speaker in one place.

Blocks overlap. Every sample is the mean of what the blocks around it say, weighted by a Hann window
over each block and divided by the sum of the windows, so that any hop gives the right level. Which
output of a block is which speaker is up to `tracking`: of a stream it is decided at once, of a
recording once all its blocks are separated, which is more often right. A short recording is one
block, though longer than others: so there is nothing to decide.
"""

import contextlib
import io
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..files import reason
from .audio import check_formats, check_peak, fit, open_recording, resample, scratch, write_tracks
from .levels import below_speech, make_consistent
from .tracking import SpeakerTracker
from .upper_band import share_rest

BLOCK, OVERLAP = 4.0, 2.0  # s
#: Blocks; a recording that is no longer is one block. In 120 conversations of 5 to 12 s of
#: validation speakers 8.9 % of the speech was then in the wrong file, else 12.0; at 24 s more was.
SHORT = 3
FADE = 0.02  # s, where a block's outputs change places in its middle
LOUDEST = 1e6  # of a recording; squares of what is far louder leave the range of float32
ABSURD = 1e15  # of estimates, likewise; NaN is not below it either


def separate_stream(
    model,
    pieces,
    block=BLOCK,
    overlap=OVERLAP,
    batch_size=1,
    mixture_consistency=True,
    memory=True,
):
    """Separates a recording that comes and goes in pieces, and gives out what it can at once.

    Args:
        model (callable): (batch, time) -> (batch, n_src, time), with a `sample_rate`; on its
            device and in eval mode.
        pieces (iterable of numpy.ndarray): The recording, (time,) each, of any lengths.
        block (float): Length of a block in seconds.
        overlap (float): Overlap of two blocks in seconds, shorter than the block.
        batch_size (int): Blocks that the model gets at a time.
        mixture_consistency (bool): Whether the outputs are brought to sum to the recording, see
            `levels.make_consistent`.
        memory (bool): Whether voices count in who is who, see `SpeakerTracker`.

    Yields:
        numpy.ndarray: (n_src, time) float32, in all as many samples as the recording. A recording
        that fits in one block is separated as the model does it, but for `levels.below_speech`,
        which the model does not hear; all sources get the same of it, without
        `mixture_consistency` and from models of one source none.

    Raises:
        UserError: If samples are not finite, or the overlap does not fit the block.
    """
    tracker = joined = None
    for start, estimates, rumble in _separate_blocks(
        model, pieces, block, overlap, batch_size, mixture_consistency
    ):
        if tracker is None:
            tracker = SpeakerTracker(len(estimates), model.sample_rate, memory, live=True)
            joined = _Join(len(estimates))
        yield joined.take(until=start)
        joined.add(estimates[tracker.order(estimates, start)] + rumble)
    if joined is not None:
        yield joined.take()


def separate_long(model, mixture, **options):
    """Separates a recording that is in memory.

    Args:
        model (callable): See `separate_stream`.
        mixture (numpy.ndarray): (time,)
        **options: See there. A recording of up to `SHORT` blocks is separated as one.

    Returns:
        numpy.ndarray: (n_src, time) float32.

    Raises:
        UserError: As there; also if the recording is empty, or of several channels.

    Examples:
        >>> from asteroid_tiny import TinySepformer
        >>> model = TinySepformer.from_preset("tiny-sepformer-xs").eval()
        >>> separate_long(model, np.random.randn(20000), block=1.0, overlap=0.3).shape
        (2, 20000)
    """
    mixture = np.asarray(mixture, np.float32)
    if mixture.ndim != 1:
        raise UserError(f"the recording has the shape {mixture.shape}; it should be (time,)")
    whole = _Whole(io.BytesIO(), "the estimates")
    for _ in whole.separate(model, [mixture], **options):
        pass
    if whole.n_src is None:
        raise UserError("there is nothing to separate: the recording holds no samples")
    return np.concatenate(list(whole.tracks()), axis=1)


def cut(pieces, size, hop, short=0):
    """Cuts a stream into blocks; the last one ends with the stream and is as long as the others.

    Args:
        pieces (iterable of numpy.ndarray): The stream, (time,) each.
        size (int): Samples of a block; a shorter stream is one shorter block.
        hop (int): Samples from one start to the next, at most `size`; fewer to the last.
        short (int): Samples up to which a stream is one block, too.

    Yields:
        tuple: Start, and block (numpy.ndarray).

    Examples:
        >>> list(cut([np.arange(5), np.arange(5, 7)], size=4, hop=2))
        [(0, array([0, 1, 2, 3])), (2, array([2, 3, 4, 5])), (3, array([3, 4, 5, 6]))]
        >>> list(cut([np.arange(5)], size=4, hop=2, short=5))
        [(0, array([0, 1, 2, 3, 4]))]
    """
    held, start, last, longest = np.zeros(0, np.float32), 0, None, max(size, short)
    for piece in pieces:
        if np.ndim(piece) != 1:
            raise UserError(f"a piece has the shape {np.shape(piece)}; it should be (time,)")
        # a copy in any case: who gives the pieces may use their memory again
        held = np.concatenate([held, piece]) if len(held) else np.array(piece)
        while len(held) > longest:
            last, longest = held[:size], size
            yield start, last
            held, start = held[hop:], start + hop
    if last is not None:
        block = np.concatenate([last[:hop], held])[-size:]
        yield start + len(held) - size, block
    elif len(held):
        yield 0, held


def _separate_blocks(
    model, pieces, block=BLOCK, overlap=OVERLAP, batch_size=1, mixture_consistency=True, short=1,
    name="the recording",
):  # fmt: skip
    """Yields the start and the estimates of all blocks; see `separate_stream`.

    A recording of up to `short` blocks is one; errors call it by its `name`.
    """
    whole = batch_size >= 1 and batch_size % 1 == 0
    if not (math.isfinite(block) and math.isfinite(overlap) and whole):
        raise UserError(
            f"block and overlap must be finite numbers of seconds, batch_size a whole number of at "
            f"least 1, not {block}, {overlap} and {batch_size}"
        )
    size = round(block * model.sample_rate)
    hop = size - round(overlap * model.sample_rate)
    if not 0 < hop <= size:
        raise UserError(
            f"an overlap of {overlap:g} s does not fit in blocks of {block:g} s; take blocks "
            f"longer than {max(overlap, 0):g} s"
        )
    parameter = next(iter(getattr(model, "parameters", list)()), torch.empty(0))
    for batch in _batches(cut(pieces, size, hop, short * size), int(batch_size)):
        mixtures = np.stack([mixture for _, mixture in batch])
        if not np.isfinite(mixtures).all():
            raise UserError(f"{name} holds samples that are NaN or infinite")
        if np.abs(mixtures).max() > LOUDEST:
            raise UserError(f"{name} holds samples beyond {LOUDEST:g}, where 1 is full scale")
        mixtures = mixtures.astype(np.float32)
        rumble = below_speech(mixtures, model.sample_rate)
        heard = torch.from_numpy(mixtures - rumble)
        with torch.inference_mode():
            estimates = model(heard.to(parameter)).float().cpu().numpy()
        if not np.abs(estimates).max() < ABSURD:
            raise UserError(f"of {name} the model gives samples that are NaN or absurdly loud")
        n_src = estimates.shape[1]
        rumble = rumble / n_src if mixture_consistency and n_src > 1 else 0 * rumble
        for (start, _), mixture, found, rest in zip(batch, heard.numpy(), estimates, rumble):
            if mixture_consistency:
                found = make_consistent(found, mixture, model.sample_rate)
            yield start, found, rest


def _batches(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


class _Join:
    """Joins overlapping blocks: holds what later blocks may still change."""

    def __init__(self, n_src):
        self.total = np.zeros((n_src, 0), np.float32)
        self.weight = np.zeros(0, np.float32)
        self.start = 0

    def add(self, block):
        """Adds a block that begins where this does, and is at least as long."""
        n = block.shape[1]
        window = np.sin(np.pi * (np.arange(n, dtype=np.float32) + 0.5) / n) ** 2  # above zero
        missing = n - len(self.weight)
        self.total = np.pad(self.total, ((0, 0), (0, missing))) + window * block
        self.weight = np.pad(self.weight, (0, missing)) + window

    def take(self, until=None):
        """Gives away what lies before the sample `until` of the recording, or all there is."""
        n = len(self.weight) if until is None else until - self.start
        done = self.total[:, :n] / self.weight[:n]
        self.total, self.weight, self.start = self.total[:, n:], self.weight[n:], self.start + n
        return done


class _Whole:
    """A recording that is separated as a whole: all its blocks, until they can be put in order.

    Args:
        store (file): Takes the estimates, which are too many for the memory.
        name (str or Path): What could not be written, if the disk is full.
    """

    def __init__(self, store, name):
        self.store, self.name = store, name
        self.n_src = None  # until the first block
        self.places, self.orders = [], []  # start and samples of blocks; order of their halves
        self.fade = 1  # samples

    def separate(self, model, pieces, memory=True, **options):
        """Separates all blocks; yields the number of samples that are done (int)."""
        self.fade = max(1, round(FADE * model.sample_rate))
        for start, estimates, rumble in _separate_blocks(model, pieces, short=SHORT, **options):
            if self.n_src is None:
                self.n_src = len(estimates)
                tracker = SpeakerTracker(self.n_src, model.sample_rate, memory)
            tracker.order(estimates, start)
            self.places.append((start, estimates.shape[1]))
            try:
                self.store.write((estimates + rumble).astype(np.float32).tobytes())
                self.store.flush()
            except OSError as error:
                raise UserError(f"{self.name} could not be written: {reason(error)}") from None
            yield start + estimates.shape[1]
        if self.n_src is not None:
            self.orders = tracker.reorder()

    def tracks(self):
        """Yields the tracks of the speakers piece by piece, (n_src, time)."""
        self.store.seek(0)
        joined = _Join(self.n_src)
        for (start, n_samples), order in zip(self.places, self.orders):
            block = np.frombuffer(self.store.read(4 * self.n_src * n_samples), np.float32)
            yield joined.take(until=start)
            joined.add(self._in_order(block.reshape(self.n_src, n_samples), *order))
        yield joined.take()

    def _in_order(self, block, first, second):
        """A block whose halves are in these orders."""
        if (first == second).all():
            return block[first]
        n = block.shape[1]
        share = np.clip((np.arange(n, dtype=np.float32) - n / 2) / self.fade + 0.5, 0, 1)
        return (1 - share) * block[first] + share * block[second]


def separate_file(
    model, path, targets, peak=None, progress=None, mixture_consistency=True, **options
):
    """Separates an audio file into one file a speaker, at the rate of the recording.

    Args:
        model (callable): See `separate_stream`.
        path (str or Path): The recording; its channels are averaged.
        targets (list of str or Path): Files to write, one a speaker, replaced if they are there;
            their suffixes say the format, see `audio.FORMATS`.
        peak (float, optional): See `audio.write_tracks`.
        progress (callable, optional): Told the seconds that were just done, and the length in
            seconds or None.
        mixture_consistency (bool): Whether the files are brought to sum to the recording, in the
            model's band as `levels.make_consistent` does and above as `upper_band` does.
        **options: See `separate_long`.

    Returns:
        dict: `seconds`, `n_channels`, `sample_rate` and `warning` of the recording, see
        `audio.Recording`; `gain` and `levels` of what was written, see `audio.write_tracks`.

    Raises:
        UserError: If the recording cannot be read, or the files cannot be written.
    """
    if isinstance(targets, (str, os.PathLike)):
        raise UserError(f"{targets} is one file; give a list of files, one a speaker")
    rate, targets = model.sample_rate, [Path(target) for target in targets]
    check_formats(targets)
    check_peak(peak)
    there = [target for target in targets if os.path.exists(target) and os.path.exists(path)]
    if any(target.samefile(path) for target in there):
        raise UserError(f"{path} would be written over by its own output")
    with open_recording(path) as recording, scratch(targets[0].parent) as store:
        size = os.path.getsize(path)
        pieces = resample(recording.pieces(), recording.sample_rate, rate)
        total = recording.n_samples and recording.n_samples / recording.sample_rate
        whole, done = _Whole(store, targets[0]), 0
        options |= {"mixture_consistency": mixture_consistency, "name": path}
        for n_samples in whole.separate(model, pieces, **options):
            if whole.n_src != len(targets):
                raise UserError(f"the model gives {whole.n_src} sources, not {len(targets)}")
            if progress is not None:
                progress((n_samples - done) / rate, total)
            done = n_samples
        if whole.n_src is None:  # none, or so few that at the model's rate none are left
            raise UserError(f"{path} holds no samples" + " to speak of" * (recording.n_read > 0))

        def tracks():
            stored = resample((x.T for x in whole.tracks()), rate, recording.sample_rate)
            stored = fit(stored, recording.n_read)
            if not mixture_consistency or recording.sample_rate == rate or whole.n_src == 1:
                yield from stored
                return
            with open_recording(path) as again:
                yield from share_rest(stored, again.pieces(), recording.sample_rate)

        gain, levels = write_tracks(targets, tracks, recording.sample_rate, peak)
        with contextlib.suppress(OSError):  # it may be gone by now
            if os.path.getsize(path) > size:
                recording.warn("it has grown meanwhile; what came late may be missing")
    return {
        "seconds": recording.n_read / recording.sample_rate,
        "n_channels": recording.n_channels,
        "sample_rate": recording.sample_rate,
        "warning": recording.warning,
        "gain": gain,
        "levels": levels,
    }
