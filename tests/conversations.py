"""Conversations of real speech, a separator that knows them, and how often speakers change files.

`python tests/conversations.py` prints the table of the README (minutes);
`python tests/conversations.py MODEL DIR` that of a model with speakers of a Kaldi data dir, with
`rooms` at its end that of conversations in rooms, with `short` that of 120 of 5 to 12 s.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

from asteroid_tiny import from_pretrained
from asteroid_tiny.data import SpeechDir
from asteroid_tiny.data.mixing import same_colour
from asteroid_tiny.data.surroundings import in_a_room
from asteroid_tiny.longform import separate_long, separate_stream
from asteroid_tiny.longform.blocks import cut

RATE = 8000
DATA = Path(__file__).resolve().parents[1] / "egs" / "minispeech" / "TinySepformer" / "data"


def conversation(speech, speakers, seconds, seed=0):
    """Turns of 1 to 8 s, pauses of 0.5 to 4 s between them, or overlaps of 0.5 to 3 s.

    Args:
        speech (SpeechDir): Where the utterances are.
        speakers (list of str): Who talks.
        seconds (float): Length.
        seed (int): Seed of the draw.

    Returns:
        numpy.ndarray: Sources, (n_src, time), the speakers 0 to 5 dB apart.
    """
    rng, rate = np.random.default_rng(seed), speech.sample_rate
    voices = [_Voice(speech, speaker, rng) for speaker in speakers]
    sources = np.zeros((len(speakers), round(seconds * rate)), np.float32)
    start, who = 0, 0
    while start < sources.shape[1]:
        samples = voices[who].talk(round(rng.uniform(1, 8) * rate))
        place = sources[who, start : start + len(samples)]
        place += samples[: len(place)]
        last, who = who, int(rng.integers(len(speakers)))
        gap = rng.uniform(0.5, 4)
        if who != last and rng.random() < 0.4:
            gap = -min(rng.uniform(0.5, 3), 0.7 * len(samples) / rate)
        start += len(samples) + round(gap * rate)
    return sources * 10 ** (-rng.uniform(0, 5, (len(speakers), 1)) / 20).astype(np.float32)


class _Voice:
    def __init__(self, speech, speaker, rng):
        self.speech, self.rest = speech, np.zeros(0, np.float32)
        self.utterances = itertools.cycle(rng.permutation(speech.by_speaker[speaker]))

    def talk(self, n_samples):
        while len(self.rest) < n_samples:
            new = self.speech.read(next(self.utterances))
            self.rest = np.append(self.rest, new * (0.05 / np.sqrt(np.mean(new**2))))
        now, self.rest = self.rest[:n_samples], self.rest[n_samples:]
        return now


class Oracle:
    """A separator that knows the sources, and gives those of each block in a random order, with
    leakage (12 dB below, give or take 3) and noise (40 dB below speech).

    Args:
        sources (numpy.ndarray): (n_src, time)
        starts (iterable of int): Where the blocks begin that it will be given, in turn.
    """

    sample_rate = RATE

    def __init__(self, sources, starts, seed=0):
        self.sources, self.starts = sources, iter(starts)
        self.rng = np.random.default_rng(seed)

    def __call__(self, mixtures):
        return torch.stack([self._separate(len(mixture)) for mixture in mixtures])

    def _separate(self, n):
        start = next(self.starts)
        padded = np.pad(self.sources[:, max(start, 0) : max(start + n, 0)], ((0, 0), (0, n)))
        padded = np.roll(padded, max(-start, 0), axis=1)[:, :n]
        sources = self.rng.permutation(padded)
        leakage = 10 ** ((self.rng.normal(-12, 3)) / 20)
        noise = 0.0005 * self.rng.normal(size=sources.shape)
        found = sources + leakage * (sources.sum(0) - sources) + noise
        return torch.from_numpy(found.astype(np.float32))


def wrong_share(sources, tracks, frame=RATE // 4):
    """Share of the time of speech in which a speaker is not in the file that is his otherwise, by
    frames of so many samples."""
    n_src = len(sources)
    n_frames = sources.shape[1] // frame
    cut_up = [x[:, : n_frames * frame].reshape(n_src, n_frames, frame) for x in (sources, tracks)]
    levels = (cut_up[0] ** 2).mean(-1) / (sources**2).mean(-1, keepdims=True)
    speaks = levels > 1e-3
    norms = [np.sqrt((x**2).sum(-1)) + 1e-6 for x in cut_up]
    likeness = np.einsum("itf,jtf->ijt", *cut_up) / norms[0][:, None] / norms[1].max(0)
    permutations = np.array(list(itertools.permutations(range(n_src))))
    scores = np.array([likeness[range(n_src), p].sum(0) for p in permutations])
    place = permutations[scores.argmax(0)].T  # (n_src, frames)
    return min((speaks & (place != p[:, None])).sum() / speaks.sum() for p in permutations)


def ours(sources, block, memory=True):
    """Tracks by `separate_long` with half overlapping blocks."""
    options = dict(block=block, overlap=block / 2, memory=memory)
    return separate_long(_oracle(sources, block), sources.sum(0), **options)


def streamed(sources, block):
    """Tracks by `separate_stream`, which knows nothing of later blocks."""
    options = dict(block=block, overlap=block / 2)
    parts = separate_stream(_oracle(sources, block), [sources.sum(0)], **options)
    return np.concatenate(list(parts), axis=1)


def _oracle(sources, block):
    size, hop = round(block * RATE), round(block * RATE / 2)
    return Oracle(sources, [start for start, _ in cut([sources[0]], size, hop)])


def peer(sources, block):
    """Tracks by Asteroid's `LambdaOverlapAdd` with the same blocks."""
    from asteroid.dsp.overlap_add import LambdaOverlapAdd

    size, n = round(block * RATE), sources.shape[1]
    starts = range(-size, n + 1, size // 2)
    mixture = torch.from_numpy(sources.sum(0))[None, None]
    return LambdaOverlapAdd(Oracle(sources, starts), len(sources), size)(mixture)[0].numpy()


def best_order(model, sources, n_samples):
    """Tracks of which every block of so many samples is in the order that fits the sources best: a
    lower bound."""
    tracks = np.zeros_like(sources)
    for start in range(0, sources.shape[1], n_samples):
        part = sources[:, start : start + n_samples]
        with torch.inference_mode():
            found = model(torch.from_numpy(part.sum(0))).reshape(part.shape).numpy()
        lengths = np.linalg.norm(found, axis=1, keepdims=True) + 1e-9
        fit = ((found / lengths) @ part.T) ** 2
        orders = itertools.permutations(range(len(part)))
        order = max(orders, key=lambda p: sum(fit[k, i] for i, k in enumerate(p)))
        tracks[:, start : start + part.shape[1]] = found[list(order)]
    return tracks


def with_model(name, folder, how=None):
    """The same with a true model and speakers of a Kaldi data dir, of a kind of conversations."""
    from asteroid.dsp.overlap_add import LambdaOverlapAdd

    model = from_pretrained(name).eval()
    rate = round(model.sample_rate)
    speech = SpeechDir(folder, rate, convert=True)
    rng = np.random.default_rng(0)
    short = (4,), 120, (5, 12)
    blocks, n_conversations, seconds = short if how == "short" else ((4, 8), 12, (90, 90))
    print("block   peer  without voices  as a stream  as a whole  best order")
    for block in blocks:
        shares = []
        for seed in range(n_conversations):
            sources = _drawn(speech, model.n_src, seconds, rng, seed)
            if how == "rooms":
                room = np.random.default_rng(seed)
                sources = in_a_room(torch.from_numpy(sources), room, rate).numpy()
            mixture, half = sources.sum(0), block / 2
            with torch.inference_mode():
                added = LambdaOverlapAdd(model, model.n_src, block * rate)(
                    torch.from_numpy(mixture)[None, None]
                )
            tracks = [
                added[0].numpy(),
                separate_long(model, mixture, block=block, overlap=half, memory=False),
                np.concatenate(list(separate_stream(model, [mixture], block, half)), axis=1),
                separate_long(model, mixture, block=block, overlap=half),
                best_order(model, sources, block * rate),
            ]
            shares.append([wrong_share(sources, np.asarray(x), rate // 4) for x in tracks])
        means = "  ".join(f"{100 * share:9.1f} %" for share in np.mean(shares, axis=0))
        print(f"{block:3} s {means}", flush=True)


def _drawn(speech, n_src, seconds, rng, seed):
    """A conversation in which all of them speak, of a length between two."""
    sources = np.zeros((n_src, 1))
    while not sources.any(1).all():
        speakers = list(rng.permutation(list(speech.by_speaker))[:n_src])
        length = np.random.default_rng(seed).uniform(*seconds)
        sources, seed = conversation(speech, speakers, length, seed), seed + 1000
    return sources


def main(n_conversations=12, seconds=180):
    print("speakers  block  spectra   peer  without voices  as a stream  as a whole")
    rows = [(2, 4, False), (2, 4, True), (2, 8, False), (3, 4, False), (3, 8, False)]
    for n_src, block, alike in rows:
        shares = []
        for split in ("valid", "test"):
            speech = SpeechDir(DATA / split, RATE)
            groups = itertools.cycle(itertools.combinations(speech.by_speaker, n_src))
            for seed, speakers in zip(range(n_conversations // 2), groups):
                sources = conversation(speech, speakers, seconds, seed)
                if alike:  # as if by one microphone
                    rng = np.random.default_rng(seed)
                    sources = same_colour(torch.from_numpy(sources), rng, spread=0).numpy()
                tracks = [
                    peer(sources, block),
                    ours(sources, block, memory=False),
                    streamed(sources, block),
                    ours(sources, block),
                ]
                shares.append([wrong_share(sources, x) for x in tracks])
        means = "  ".join(f"{100 * share:9.1f} %" for share in np.mean(shares, axis=0))
        print(f"{n_src:8}  {block:3} s  {'alike' if alike else 'own':7} {means}", flush=True)


if __name__ == "__main__":
    sys.exit(with_model(*sys.argv[1:]) if sys.argv[1:] else main())
