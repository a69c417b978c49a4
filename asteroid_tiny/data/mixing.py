"""Mixtures: how one is drawn, how a list of them is kept, and how its audio is made.

A `Mixture` says which utterances are summed, from where to where, how loud and how fast. A list of
them is a CSV file.
"""

import collections
import csv
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.signal import oaconvolve, resample_poly, welch

from ..errors import UserError
from ..files import whole_file

LEVEL_DB = -28.0  # of the loudest source, root mean square re full scale: mixtures rarely clip
BANDS = 16  # of `same_colour`, from 0 to half the sample rate
MOST_GAIN = 24.0  # dB by which it may raise or lower a band
TURN = (0.5, 3.0)  # s: how long speakers of a conversation talk
PAUSE = (-1.0, 1.0)  # s: between their turns; below 0 they overlap
SILENT = 1e-4  # root mean square under which a stretch of an utterance is not worth training on


class Source(NamedTuple):
    """One source of a mixture.

    Attributes:
        utterance (str): Id of the utterance.
        start (int): First sample taken from the utterance, at the rate of its recording.
        length (int): Number of samples taken, at the rate of its recording.
        offset (int): Sample of the mixture at which it begins.
        gain (float): Gain in dB.
        speed (int): Playback speed in percent.
    """

    utterance: str
    start: int
    length: int
    offset: int
    gain: float
    speed: int = 100


class Mixture(NamedTuple):
    """A mixture: its id, length in samples, sources, and noise, a `Source` too, or None."""

    mixture_id: str
    length: int
    sources: tuple
    noise: Source = None


def draw_mixture(
    speech,
    rng,
    speakers,
    length,
    max_gap=5.0,
    speeds=(100,),
    overlap_ratio=1.0,
    level=LEVEL_DB,
    mixture_id="",
):
    """Draws a mixture of one utterance of each speaker.

    Utterances are drawn in proportion to their lengths among those that fill their share of the
    mixture; a speaker who has none such gives a shorter one, set at a random place.

    Args:
        speech (SpeechDir): Where the utterances are.
        rng (np.random.Generator): Source of chance.
        speakers (sequence of str): One speaker a source.
        length (int): Length in samples.
        max_gap (float): The loudest source is up to this many dB above each of the others.
        speeds (sequence of int): Playback speeds in percent to draw from.
        overlap_ratio (float): How much of the mixture two neighbours share, from 0 (one after the
            other) to 1 (all speak all the time). Between two speakers who set in one after the
            other it is the share of the mixture in which both speak.
        level (float): Root mean square of the loudest source, dB re full scale.
        mixture_id (str): Its id.

    Returns:
        Mixture: What was drawn.
    """
    levels = level - _gaps(rng, len(speakers), max_gap)
    share = round(length * (1 + (len(speakers) - 1) * overlap_ratio) / len(speakers))
    later = (length - share) // max(len(speakers) - 1, 1)  # each than the one before
    sources = []
    for i, speaker in enumerate(speakers):
        source = _draw_audible(speech, rng, speaker, share, int(rng.choice(speeds)), levels[i])
        sources.append(source._replace(offset=source.offset + i * later))
    return Mixture(mixture_id, length, tuple(sources))


def draw_turns(speech, rng, speakers, length, max_gap=5.0, speeds=(100,), level=LEVEL_DB):
    """Draws a conversation: speakers who take turns, pause, and set in before others have ended.

    Turns take `TURN` seconds, and after three of four another speaker goes on. Between two turns
    there are `PAUSE` seconds, of which less than none is an overlap.

    Args:
        speech, rng, speakers, length, max_gap, speeds, level: See `draw_mixture`.

    Returns:
        list of Mixture: The turns of each speaker, who may have none, as sources of one.
    """
    levels = level - _gaps(rng, len(speakers), max_gap)
    speeds = rng.choice(speeds, len(speakers))
    turns = [[] for _ in speakers]
    ends = np.zeros(len(speakers), int)
    rate = speech.sample_rate
    who, start = int(rng.integers(len(speakers))), 0
    while not ends.any() or length - start > TURN[0] * rate:
        taken = min(round(rng.uniform(*TURN) * rate), length - start)
        turn = _draw_audible(speech, rng, speakers[who], taken, int(speeds[who]), levels[who])
        turns[who].append(turn._replace(offset=turn.offset + start))
        ends[who] = start + taken
        if rng.random() < 0.75:
            who = (who + int(rng.integers(1, max(len(speakers), 2)))) % len(speakers)
        start = max(start + taken + round(rng.uniform(*PAUSE) * rate), start, ends[who])
    return [Mixture("", length, tuple(own)) for own in turns]


def _gaps(rng, n_speakers, max_gap):
    """By how many dB each speaker is softer than the loudest."""
    gaps = rng.uniform(0, max_gap, n_speakers)
    gaps[rng.integers(n_speakers)] = 0.0
    return gaps


def is_silent(samples):
    """Whether samples (numpy.ndarray) hold nothing, or a mere offset, which cannot be heard."""
    return np.std(samples) <= SILENT


def _draw_audible(speech, rng, speaker, length, speed, level):
    """A stretch at a level; if ten in a row are silent, the last of them."""
    for _ in range(10):
        source = _draw_stretch(speech, rng, speaker, length, speed)
        stretch = _stretch(speech, source)
        if not is_silent(stretch):
            break
    loudness = np.sqrt(np.mean(stretch**2))
    return source._replace(gain=round(float(level - 20 * np.log10(max(loudness, SILENT))), 3))


def _draw_stretch(speech, rng, speaker, length, speed):
    up, down = _rates(speech, speed)
    needed = -(-length * down // up)
    keys = speech.by_speaker[speaker]
    lengths = np.array([speech.utterances[key].length for key in keys])
    weights = np.maximum(lengths - needed + 1, 0) if lengths.max() >= needed else lengths
    chosen = rng.choice(len(keys), p=weights / weights.sum())
    taken = min(needed, int(lengths[chosen]))
    start = int(rng.integers(lengths[chosen] - taken + 1))
    spare = length - -(-taken * up // down)
    offset = int(rng.integers(spare + 1)) if spare > 0 else 0
    return Source(keys[chosen], start, taken, offset, 0.0, speed)


def draw_list(speech, n_mixtures, n_src, length, seed, max_gap=5.0, overlap_ratio=1.0):
    """Draws a fixed list in which all combinations of speakers are equally frequent.

    Args:
        speech (SpeechDir): Where the utterances are.
        n_mixtures (int): Number of mixtures.
        n_src (int): Number of sources.
        length (int): Length in samples.
        seed (int): Seed of the draw.
        max_gap, overlap_ratio (float): See `draw_mixture`.

    Returns:
        list of Mixture: The list.

    Raises:
        UserError: If there are fewer speakers than sources, or `overlap_ratio` is not from 0 to 1.
    """
    check_speakers(speech, n_src)
    if not 0 <= overlap_ratio <= 1:
        raise UserError(f"overlap_ratio must be from 0 to 1, not {overlap_ratio:g}")
    rng = np.random.default_rng(seed)
    groups = _draw_groups(list(speech.by_speaker), n_mixtures, n_src, rng)
    draw = functools.partial(
        draw_mixture, speech, rng, length=length, max_gap=max_gap, overlap_ratio=overlap_ratio
    )
    return [
        draw(group, mixture_id=f"mix{i:05d}")
        for i, group in zip(range(n_mixtures), itertools.cycle(groups))
    ]


def _draw_groups(speakers, n_groups, n_src, rng):
    """All combinations of speakers, or `n_groups` different ones where there are more."""
    if math.comb(len(speakers), n_src) <= n_groups:
        return list(itertools.combinations(speakers, n_src))
    groups = {}  # in the order drawn; there may be too many combinations to list them all
    while len(groups) < n_groups:
        chosen = sorted(rng.choice(len(speakers), n_src, replace=False))
        groups[tuple(speakers[i] for i in chosen)] = True
    return list(groups)


def check_speakers(speech, n_src):
    """Raises a `UserError` if there are fewer speakers than sources."""
    if len(speech.by_speaker) < n_src:
        raise UserError(
            f"{speech.path} has {len(speech.by_speaker)} speaker(s); "
            f"mixtures of {n_src} need at least {n_src}"
        )


def write_list(path, mixtures, sample_rate):
    """Writes a mixture list: a CSV with one row a mixture and six columns a source or noise.

    Raises:
        UserError: If there is no mixture, they have unequal numbers of sources, or the file cannot
            be written.
    """
    if len({(len(mixture.sources), mixture.noise is None) for mixture in mixtures}) != 1:
        raise UserError(f"{path} must list mixtures, all of as many sources, with noise or without")
    parts = _parts(len(mixtures[0].sources), mixtures[0].noise)
    header = ["mixture_id", "sample_rate", "length"]
    header += [f"{part}_{name}" for part in parts for name in Source._fields]
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for mixture in mixtures:
            noise = (mixture.noise,) if mixture.noise else ()
            flat = itertools.chain.from_iterable(mixture.sources + noise)
            writer.writerow([mixture.mixture_id, sample_rate, mixture.length, *flat])


def _parts(n_src, has_noise):
    """What the names of the columns of a list begin with."""
    return [f"source_{i}" for i in range(1, n_src + 1)] + ["noise"] * bool(has_noise)


def read_list(path, speech, noise=None):
    """Reads a mixture list and checks it against its speech.

    Args:
        path (str or Path): The CSV file.
        speech (SpeechDir): Where its utterances are.
        noise (NoiseDir, optional): Where its noises are.

    Returns:
        list of Mixture: The list.

    Raises:
        UserError: If the file is missing, broken, of another rate, or names what `speech` lacks.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"mixture list {path} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"mixture list {path} holds no mixture")
    mixtures = []
    for number, row in enumerate(rows, 2):
        try:
            mixture, sample_rate = _parse_row(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"mixture list {path}, line {number}, is broken") from None
        if sample_rate != speech.sample_rate:
            raise UserError(
                f"mixture list {path} is for {sample_rate} Hz, its speech has "
                f"{speech.sample_rate} Hz"
            )
        for source in mixture.sources:
            utterance = speech.utterances.get(source.utterance)
            if utterance is None or source.start + source.length > utterance.length:
                raise UserError(
                    f"mixture list {path}, line {number}: {speech.path} does not have that much "
                    f"of utterance {source.utterance!r}"
                )
        if mixture.noise and (noise is None or mixture.noise.utterance not in noise.utterances):
            where = noise.path if noise else "there is no folder of noise, which"
            raise UserError(
                f"mixture list {path}, line {number}: {where} does not have noise "
                f"{mixture.noise.utterance!r}"
            )
        mixtures.append(mixture)
    check_ids(path, mixtures)
    return mixtures


def check_ids(path, mixtures):
    """Raises a `UserError` if two mixtures have one id."""
    ids = collections.Counter(mixture.mixture_id for mixture in mixtures)
    (most_frequent, count), *_ = ids.most_common(1)
    if count > 1:
        raise UserError(f"mixture list {path} has the id {most_frequent!r} {count} times")


def _parse_row(row):
    n_src = sum(name.startswith("source_") and name.endswith("_utterance") for name in row)
    length = int(row["length"])
    parts = _parts(n_src, "noise_utterance" in row)
    sources = [_parse_source(row, part, length) for part in parts]
    if not n_src:
        raise ValueError
    mixture = Mixture(row["mixture_id"], length, tuple(sources[:n_src]), *sources[n_src:])
    return mixture, int(row["sample_rate"])


def _parse_source(row, part, mixture_length):
    fields = {name: row[f"{part}_{name}"] for name in Source._fields}
    numbers = {name: int(fields[name]) for name in ("start", "length", "offset", "speed")}
    gain = float(fields["gain"])
    if numbers["start"] < 0 or min(numbers["length"], numbers["speed"]) < 1:
        raise ValueError
    if not 0 <= numbers["offset"] < mixture_length or not np.isfinite(gain):
        raise ValueError
    return Source(**{**fields, **numbers, "gain": gain})


def render(speech, mixture, noise=None):
    """Makes the audio of a mixture.

    Args:
        speech (SpeechDir): Where its utterances are.
        mixture (Mixture): What to mix.
        noise (NoiseDir, optional): Where its noise is.

    Returns:
        tuple of torch.Tensor: Mixture, (time,), and its sources, (n_src, time), float32. The
        mixture is the sum of the sources and the noise; where it would clip, all of them are
        scaled alike.
    """
    parts = [_placed(speech, source, mixture.length) for source in mixture.sources]
    if mixture.noise:
        parts.append(_placed(noise, mixture.noise, mixture.length))
    mixed, parts = _summed(torch.stack(parts))
    return mixed, parts[: len(mixture.sources)]


def render_turns(speech, turns):
    """Makes the audio of a conversation.

    Args:
        speech (SpeechDir): Where its utterances are.
        turns (list of Mixture): The turns of each speaker, as `draw_turns` gives them.

    Returns:
        tuple of torch.Tensor: As `render`.
    """
    sources = torch.zeros(len(turns), turns[0].length)
    for source, own in zip(sources, turns):
        for turn in own.sources:
            source += _placed(speech, turn, own.length)
    return _summed(sources)


def _summed(parts):
    """The sum of the parts, (n_parts, time), and they; scaled alike where the sum would clip."""
    parts /= max(1.0, float(parts.sum(0).abs().max()))
    return parts.sum(0), parts


def _placed(speech, source, length):
    """A source in its place in a mixture of `length` samples, silence around it (torch.Tensor)."""
    placed = np.zeros(length, dtype=np.float32)
    samples = _stretch(speech, source)[: length - source.offset]
    placed[source.offset : source.offset + len(samples)] = samples
    return torch.from_numpy(placed)


def same_colour(sources, rng, spread):
    """Filters the sources of a mixture so that all have one long-term spectrum, drawn at random.

    Where speakers are few and each has a microphone of his own, a model can tell them apart by
    that, which does not help with others. After this their long-term spectra are alike.

    Args:
        sources (torch.Tensor): (n_src, time).
        rng (np.random.Generator): Source of chance.
        spread (float): Standard deviation in dB, at each of `BANDS`, of the drawn spectrum about
            one that falls by 12 dB to half the sample rate.

    Returns:
        torch.Tensor: (n_src, time); the level of each source stays what it was.
    """
    wanted = np.linspace(0, -12, BANDS) + rng.normal(0, spread, BANDS)
    filtered = []
    for samples in sources.numpy().astype(np.float64):
        padded = np.pad(samples, (0, max(0, 256 - len(samples))))
        _, power = welch(padded, nperseg=256)
        own = 10 * np.log10(power[:-1].reshape(BANDS, -1).mean(axis=1) + 1e-12)
        gains = wanted - (own - own.mean())
        gains = np.clip(gains - gains.mean(), -MOST_GAIN, MOST_GAIN)
        response = np.interp(np.linspace(0, BANDS - 1, 65), np.arange(BANDS), gains)
        taps = np.roll(np.fft.irfft(10 ** (response / 20)), 64) * np.hanning(128)
        new = oaconvolve(samples, taps, mode="same")
        filtered.append(as_loud_as(samples, new))
    return torch.from_numpy(np.stack(filtered).astype(np.float32))


def as_loud_as(samples, new):
    """`new` at the root mean square of `samples` (numpy.ndarray); silence stays silent."""
    return new * np.sqrt(np.mean(samples**2) / max(np.mean(new**2), 1e-12))


def _stretch(speech, source):
    """The samples of a source at its gain and speed, and at the rate of the mixture."""
    samples = speech.read(source.utterance, source.start, source.length)
    samples = samples * 10 ** (source.gain / 20)
    up, down = _rates(speech, source.speed)
    if up != down:
        samples = resample_poly(samples, up, down)
    return samples.astype(np.float32)


def _rates(speech, speed):
    """Samples of a mixture, and those of a recording that they are made of at a speed."""
    up, down = 100 * speech.sample_rate, speed * speech.recorded_rate
    common = math.gcd(up, down)
    return up // common, down // common
