"""The datasets that mix on the fly, and the samplers that say which of their items come when.

Validation and test have a fixed list (`MixtureList`). For training a mixture is drawn afresh for
every item (`DynamicMixtures`), from a random state of its own that depends on the seed and the
item's number alone: not on the number of workers or processes, nor on where a run was interrupted.
"""

import itertools
import logging

import numpy as np
import torch

from ..errors import UserError
from .mixing import (
    LEVEL_DB,
    SILENT,
    check_speakers,
    draw_mixture,
    draw_turns,
    read_list,
    render,
    render_turns,
    same_colour,
)
from .surroundings import SNR, by_a_microphone, in_a_room, noise_for

log = logging.getLogger(__name__)

MOST_BROKEN = 0.01  # share of the recordings without which training goes on


class MixtureList(torch.utils.data.Dataset):
    """The mixtures of a list, mixed on the fly.

    Args:
        speech (SpeechDir): Where the utterances are.
        path (str or Path): The list, as `write_list` writes it.
        noise (NoiseDir, optional): Where the noises are, if the list has some.

    Shape:
        Items are (mixture, sources): (time,) and (n_src, time).
    """

    def __init__(self, speech, path, noise=None):
        self.speech = speech
        self.noise = noise
        self.mixtures = read_list(path, speech, noise)
        self.sample_rate = speech.sample_rate

    def __len__(self):
        return len(self.mixtures)

    def __getitem__(self, index):
        return render(self.speech, self.mixtures[index], self.noise)

    def is_of_one_length(self):
        """Whether all mixtures are equally long."""
        return len({mixture.length for mixture in self.mixtures}) == 1

    def describe(self, index):
        """Who speaks in a mixture: dict of mixture_id, speakers, genders and productions."""
        mixture = self.mixtures[index]
        speakers = tuple(self.speech.utterances[s.utterance].speaker for s in mixture.sources)
        return {
            "mixture_id": mixture.mixture_id,
            "speakers": speakers,
            "genders": tuple(self.speech.spk2gender.get(s, "unknown") for s in speakers),
            "productions": tuple(self.speech.spk2production.get(s) for s in speakers),
        }


class EndlessMixtures(torch.utils.data.Dataset):
    """Training mixtures without end: item i is always the same one, and no two are alike.

    Recordings that turn out to be broken are named and passed over. Classes derived from this have
    `speech`, a `SpeechDir`, and `_item(rng, index, attempt)`.

    Args:
        seed (int): Seed; together with the item's number it settles the item.
        size (int): What `len` says, the mixtures of one epoch.
        reverb (float): Share of the mixtures, 0 to 1, that are heard in a room, see `in_a_room`.
        noise (float): Share of the mixtures, 0 to 1, to which noise is added, see `noise_for`.
        recorded (RecordedNoise, optional): Where that noise is taken from.
        microphone (float): Share of the mixtures, 0 to 1, that are heard by a microphone of a
            response of its own, see `by_a_microphone`.

    Raises:
        UserError: From an item on at which more than `MOST_BROKEN` of the recordings are broken.

    Shape:
        Items are (mixture, sources): (time,) and (n_src, time).
    """

    def __init__(self, seed, size, reverb, noise, recorded, microphone):
        self.seed = seed
        self.size = size
        self.reverb = reverb
        self.noise = noise
        self.recorded = recorded
        self.microphone = microphone
        self.broken = set()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        for attempt in itertools.count():
            seed = [self.seed, index] + [attempt] * (attempt > 0)
            try:
                return self._item(np.random.default_rng(seed), index, attempt)
            except UserError as error:
                self._pass_over(str(error))

    def _pass_over(self, reason):
        if reason not in self.broken:
            log.warning("%s; training goes on without it", reason)
        self.broken.add(reason)
        n_recordings = len(self.speech.wavs)
        if self.noise and self.recorded is not None:
            n_recordings += len(self.recorded.recordings)
        if len(self.broken) > MOST_BROKEN * n_recordings:
            raise UserError(
                f"{len(self.broken)} of {n_recordings} recordings are broken, the last one: "
                f"{reason}"
            )

    def _in_surroundings(self, rng, mixed, sources):
        if self.reverb and rng.random() < self.reverb:
            heard = in_a_room(sources, rng, self.speech.sample_rate)
            mixed, sources = mixed + (heard - sources).sum(0), heard
        if self.noise and rng.random() < self.noise:
            snr, rate = rng.uniform(*SNR), self.speech.sample_rate
            mixed = mixed + noise_for(sources.sum(0), rng, rate, snr, self.recorded)
        if self.microphone and rng.random() < self.microphone:
            mixed, sources = by_a_microphone(mixed, sources, rng, self.speech.sample_rate)
        return mixed, sources


class DynamicMixtures(EndlessMixtures):
    """Training mixtures drawn afresh.

    Args:
        speech (SpeechDir): Where the utterances are.
        n_src (int): Number of sources, of different speakers.
        length (int): Length in samples.
        seed, size, reverb, noise, recorded, microphone: See `EndlessMixtures`.
        max_gap, overlap_ratio (float): See `draw_mixture`.
        least_overlap (float): Each mixture overlaps by a ratio drawn from this to `overlap_ratio`,
            if it is less.
        turns (float): Share of the mixtures, 0 to 1, that are conversations, see `draw_turns`;
            `overlap_ratio` is of the others.
        silent_sources (float): Share of the mixtures, 0 to 1, in which some sources are silent: at
            least one is, and at least one is not.
        speeds (sequence of int): Playback speeds in percent.
        level_spread (float): Levels lie up to this many dB above or below `LEVEL_DB`.
        colour (float): Spread of the spectrum of `same_colour` in dB; 0 leaves the spectra.
    """

    def __init__(
        self,
        speech,
        n_src,
        length,
        seed,
        max_gap=5.0,
        speeds=(100,),
        overlap_ratio=1.0,
        least_overlap=1.0,
        turns=0.0,
        silent_sources=0.0,
        level_spread=0.0,
        colour=0.0,
        reverb=0.0,
        noise=0.0,
        recorded=None,
        microphone=0.0,
        size=1,
    ):
        super().__init__(seed, size, reverb, noise, recorded, microphone)
        check_speakers(speech, n_src)
        self.speech = speech
        self.n_src = n_src
        self.length = length
        self.draw = dict(max_gap=max_gap, speeds=speeds)
        self.overlap_ratio = overlap_ratio
        self.least_overlap = least_overlap
        self.turns = turns
        self.silent_sources = silent_sources
        self.level_spread = level_spread
        self.colour = colour

    def _item(self, rng, index, attempt):
        speakers = rng.choice(list(self.speech.by_speaker), self.n_src, replace=False)
        level = LEVEL_DB + self.level_spread * rng.uniform(-1, 1)
        overlap_ratio = self.overlap_ratio
        if self.least_overlap < overlap_ratio:
            overlap_ratio = rng.uniform(self.least_overlap, overlap_ratio)
        if self.n_src > 1 and self.silent_sources and rng.random() < self.silent_sources:
            speakers = speakers[: rng.integers(1, self.n_src)]
        draw = dict(speakers=speakers, length=self.length, level=level, **self.draw)
        if self.turns and rng.random() < self.turns:
            mixed, sources = render_turns(self.speech, draw_turns(self.speech, rng, **draw))
        else:
            drawn = draw_mixture(self.speech, rng, overlap_ratio=overlap_ratio, **draw)
            mixed, sources = render(self.speech, drawn)
        if self.colour:
            sources = same_colour(sources, rng, self.colour)
            mixed = sources.sum(0)
        mixed, sources = self._in_surroundings(rng, mixed, sources)
        silent = self.n_src - len(sources)
        return mixed, torch.nn.functional.pad(sources, (0, 0, 0, silent))


class RepeatedMixtures(EndlessMixtures):
    """Training mixtures of a list: one pass after another, each in an order of its own.

    Of each mixture a stretch is taken at random, one in which all sources can be heard if ten
    attempts find one; a shorter mixture is followed by silence.

    Args:
        mixtures (MixtureList): The list.
        length (int): Length in samples.
        seed, size, reverb, noise, recorded, microphone: See `EndlessMixtures`.
        speeds (sequence of int): Playback speeds in percent, drawn for each source.
        silent_sources (float): See `DynamicMixtures`; sources are taken out of the mixture.
    """

    def __init__(
        self,
        mixtures,
        length,
        seed,
        speeds=(100,),
        silent_sources=0.0,
        reverb=0.0,
        noise=0.0,
        recorded=None,
        microphone=0.0,
        size=1,
    ):
        super().__init__(seed, size, reverb, noise, recorded, microphone)
        self.mixtures = mixtures.mixtures
        self.speech = mixtures.speech
        self.noises = mixtures.noise
        self.length = length
        self.speeds = speeds
        self.silent_sources = silent_sources

    def _item(self, rng, index, attempt):
        n_passes, place = divmod(index + attempt, len(self.mixtures))
        rng_of_pass = np.random.default_rng([self.seed, n_passes, 0, 1])  # which is no item's
        order = rng_of_pass.permutation(len(self.mixtures))
        mixture = self.mixtures[order[place]]
        sources = [s._replace(speed=int(rng.choice(self.speeds))) for s in mixture.sources]
        signals = render(self.speech, mixture._replace(sources=tuple(sources)), self.noises)
        missing = max(0, self.length - mixture.length)
        signals = [torch.nn.functional.pad(signal, (0, missing)) for signal in signals]
        for _ in range(10):
            start = int(rng.integers(mixture.length + missing - self.length + 1))
            mixed, sources = (signal[..., start : start + self.length] for signal in signals)
            if (sources.square().mean(-1) > SILENT**2).all():
                break
        if len(sources) > 1 and self.silent_sources and rng.random() < self.silent_sources:
            silent = rng.permutation(len(sources))[rng.integers(1, len(sources)) :]
            mixed, sources = mixed - sources[silent].sum(0), sources.clone()
            sources[silent] = 0
        return self._in_surroundings(rng, mixed, sources)


class SharedOut(torch.utils.data.Sampler):
    """The numbers from 0 on, shared out to the processes of a training; none is there twice.

    Args:
        size (int): How many, over all processes.
        rank (int, optional): This process, and
        world_size (int, optional): the number of processes; those of `torch.distributed` by
            default, asked for when they are needed.
    """

    def __init__(self, size, rank=None, world_size=None):
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def mine(self):
        """The numbers of this process (range)."""
        rank, world_size = self.rank, self.world_size
        if world_size is None:
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if together else 0
            world_size = torch.distributed.get_world_size() if together else 1
        return range(rank, self.size, world_size)

    def __len__(self):
        return len(self.mine())

    def __iter__(self):
        return iter(self.mine())


class EpochSampler(SharedOut):
    """The numbers of one epoch's mixtures: epoch e of size n has e n to (e + 1) n - 1.

    Together with `DynamicMixtures` it makes a run that continues draw what it would have drawn.
    Lightning calls `set_epoch`.
    """

    def __init__(self, size, rank=None, world_size=None):
        super().__init__(size, rank, world_size)
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (self.epoch * self.size + number for number in self.mine())
