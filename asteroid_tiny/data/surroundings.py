"""Surroundings: mixtures as they are heard in rooms, in noise, and by microphones.

The response of a room is the direct sound, then noise that decays exponentially, as by J.-D.
Polack, "La transmission de l'énergie sonore dans les salles", 1988. It has the reverberation of a
room, but no single reflections. Simulated noise is Gaussian, of a random spectrum, and slowly grows
louder and softer, as that of fans, traffic, rain or a cheap microphone does; it has no voices or
knocks. `RecordedNoise` has what was recorded. A microphone is the frequency response of all that is
between the air and the file, telephones included; it has no distortion and no codec.
"""

import math
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from scipy.signal import oaconvolve, resample_poly
from tqdm import tqdm

from ..errors import UserError
from ..files import files_below
from .kaldi import BAR, check_finite, open_info
from .mixing import SILENT, as_loud_as
from .own import SUFFIXES

DECAY = 0.1, 0.7  # s in which reverberation falls by 60 dB
DIRECT = -12.0, 6.0  # dB of the direct sound re all reverberation: a few metres away, or close by
FIRST = 0.002  # s after the direct sound, before which nothing comes back
SNR = 0.0, 25.0  # dB of all speech re the noise
LOWEST = 50.0  # Hz, below which the spectrum of noise is flat
SLOPE = -7.0, 1.0  # dB per octave above, from brown noise (-6) over pink (-3) to white (0)
BUMPS = 4.0  # dB, standard deviation of the spectrum at each octave about that slope
SWELL = 0.0, 4.0  # dB, standard deviation of the level of noise from one second to the next
LOW_CUT = 20.0, 450.0  # Hz, where what a microphone hears has fallen by 3 dB; 300 of telephones
HIGH_CUT = 2500.0, 1.5  # Hz, and share of half the sample rate; 3400 Hz of telephones
ORDER = 1, 8  # of the Butterworth filters that cut so
TILT = -3.0, 6.0  # dB per octave between
UNEVEN = 3.0  # dB, standard deviation at each octave about that


def in_a_room(sources, rng, sample_rate):
    """Lets all sources of a mixture be heard in one room, drawn at random, each from its place.

    Args:
        sources (torch.Tensor): (n_src, time).
        rng (np.random.Generator): Source of chance.
        sample_rate (int): In Hz.

    Returns:
        torch.Tensor: (n_src, time); the level of each source stays what it was.
    """
    decay = rng.uniform(*DECAY)
    time = np.arange(round(decay * sample_rate)) / sample_rate
    heard = []
    for samples in sources.numpy():
        response = rng.normal(size=len(time)) * 10 ** (-3 * time / decay) * (time >= FIRST)
        response *= 10 ** (-rng.uniform(*DIRECT) / 20) / np.linalg.norm(response)
        response[0] = 1
        new = oaconvolve(samples, response.astype(np.float32))[: len(samples)]
        heard.append(as_loud_as(samples, new))
    return torch.from_numpy(np.stack(heard).astype(np.float32))


def noise_for(mixture, rng, sample_rate, snr, recorded=None):
    """Draws noise for a mixture.

    Args:
        mixture (torch.Tensor): (time,).
        rng (np.random.Generator): Source of chance.
        sample_rate (int): In Hz.
        snr (float): Level of the mixture re the noise, in dB.
        recorded (RecordedNoise, optional): Where noise is taken from; without, it is simulated.

    Returns:
        torch.Tensor: (time,); silence for a silent mixture.

    Raises:
        UserError: If a recording is broken.
    """
    draw = recorded.draw if recorded else _simulated
    noise = draw(len(mixture), rng, sample_rate)
    wanted = mixture.numpy() * 10 ** (-snr / 20)
    return torch.from_numpy(as_loud_as(wanted, noise).astype(np.float32))


def _simulated(length, rng, sample_rate):
    frequencies = np.fft.rfftfreq(length, 1 / sample_rate)
    spectrum = _sloping(frequencies, rng, SLOPE, BUMPS)
    waves = rng.normal(size=(2, len(spectrum))) * 10 ** (spectrum / 20)
    seconds = np.arange(length) / sample_rate
    swell = rng.uniform(*SWELL) * rng.normal(size=2 + math.ceil(length / sample_rate))
    noise = np.fft.irfft(waves[0] + 1j * waves[1], length)
    return noise * 10 ** (np.interp(seconds, np.arange(len(swell)), swell) / 20)


def _sloping(frequencies, rng, slopes, bumps):
    """A curve in dB that slopes by one of `slopes` per octave, uneven from octave to octave."""
    octaves = np.log2(np.maximum(frequencies / LOWEST, 1))
    uneven = rng.normal(0, bumps, 1 + math.ceil(octaves.max()))
    return rng.uniform(*slopes) * octaves + np.interp(octaves, np.arange(len(uneven)), uneven)


def by_a_microphone(mixture, sources, rng, sample_rate):
    """Lets a mixture be heard by a microphone of a frequency response that is drawn at random.

    It is a product of Butterworth filters that cut low and high frequencies, a tilt, and what is
    uneven from octave to octave, without phase.

    Args:
        mixture (torch.Tensor): (time,).
        sources (torch.Tensor): (n_src, time).
        rng (np.random.Generator): Source of chance.
        sample_rate (int): In Hz.

    Returns:
        tuple of torch.Tensor: Mixture and sources as they are heard, by one gain, with which the
        mixture is as loud as it was.
    """
    low = math.exp(rng.uniform(*np.log(LOW_CUT)))
    highest = max(HIGH_CUT[0], HIGH_CUT[1] * sample_rate / 2)
    high = math.exp(rng.uniform(math.log(HIGH_CUT[0]), math.log(highest)))
    low_order, high_order = rng.integers(ORDER[0], ORDER[1] + 1, 2)
    length = len(mixture) + round(0.1 * sample_rate)  # in which the filters ring out
    frequencies = np.fft.rfftfreq(length, 1 / sample_rate)
    decibels = _sloping(frequencies, rng, TILT, UNEVEN)
    decibels -= 10 * np.log10(1 + (low / np.maximum(frequencies, 1)) ** (2 * low_order))
    decibels -= 10 * np.log10(1 + (frequencies / high) ** (2 * high_order))
    signals = np.concatenate([mixture.numpy()[None], sources.numpy()])
    heard = np.fft.irfft(np.fft.rfft(signals, length) * 10 ** (decibels / 20), length)
    heard = heard[:, : len(mixture)]
    gain = math.sqrt(np.mean(signals[0] ** 2) / max(np.mean(heard[0] ** 2), 1e-12))
    heard = torch.from_numpy((gain * heard).astype(np.float32))
    return heard[0], heard[1:]


class RecordedNoise:
    """Recordings of noise below a folder, at any depth, of any rate, length and channels.

    Args:
        folder (str or Path): The folder.

    Raises:
        UserError: If there is none, it holds no recordings, or one is no audio.
    """

    def __init__(self, folder):
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder} with recordings of noise")
        found = [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]
        infos = [open_info(path) for path in tqdm(found, **BAR)]
        self.recordings = [
            (str(path), info.samplerate, info.frames)
            for path, info in zip(found, infos)
            if info.frames
        ]
        self.seconds = np.array([frames / rate for _, rate, frames in self.recordings])
        if not self.recordings:
            raise UserError(f"{folder} holds no recordings of noise")

    def draw(self, length, rng, sample_rate):
        """A stretch of noise, of any place in any recording, each as likely as the others.

        Args:
            length (int): In samples; what is shorter begins again.
            rng (np.random.Generator): Source of chance.
            sample_rate (int): In Hz, to which the recording is converted.

        Returns:
            np.ndarray: (length,), float32, the mean of the channels; of ten attempts the first that
            is not all but silent, else the last.

        Raises:
            UserError: If a recording is broken.
        """
        for _ in range(10):
            number = rng.choice(len(self.seconds), p=self.seconds / self.seconds.sum())
            noise = self._stretch(*self.recordings[number], length, rng, sample_rate)
            if np.mean(noise**2) > SILENT**2:
                break
        return noise

    def _stretch(self, path, rate, frames, length, rng, sample_rate):
        wanted = math.ceil(length * rate / sample_rate)
        start = rng.integers(max(frames - wanted, 0) + 1)
        try:
            samples, _ = sf.read(path, wanted, start, dtype="float32", always_2d=True)
        except (sf.LibsndfileError, OSError) as error:
            raise UserError(f"{path} cannot be decoded: {error}") from None
        check_finite(path, samples)
        if len(samples) < min(wanted, frames - start):
            raise UserError(f"{path} is damaged, or shorter than it was")
        samples = np.resize(samples.mean(1), wanted)  # again from its start where it ends
        common = math.gcd(rate, sample_rate)
        return resample_poly(samples, sample_rate // common, rate // common)[:length]


class InSurroundings(torch.utils.data.Dataset):
    """The mixtures of a list without noise, each in surroundings of its own, always the same.

    Args:
        mixtures (MixtureList): The list.
        seed (int): Of the surroundings.
        reverb (bool): Whether each mixture is heard in a room.
        snr (float, optional): Level of all speech re noise, in dB; None for no noise.
        recorded (RecordedNoise, optional): See `noise_for`.
        microphone (bool): Whether each mixture is heard by a microphone of its own.

    Shape:
        Items are (mixture, sources): (time,) and (n_src, time), the sources as they are heard.
    """

    def __init__(self, mixtures, seed, reverb=False, snr=None, recorded=None, microphone=False):
        self.mixtures = mixtures
        self.seed = seed
        self.reverb = reverb
        self.snr = snr
        self.recorded = recorded
        self.microphone = microphone
        self.sample_rate = mixtures.sample_rate

    def __len__(self):
        return len(self.mixtures)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        sources = self.mixtures[index][1]
        if self.reverb:
            sources = in_a_room(sources, rng, self.sample_rate)
        mixture = sources.sum(0)
        if self.snr is not None:
            noise = noise_for(mixture, rng, self.sample_rate, self.snr, self.recorded)
            mixture = mixture + noise
        if self.microphone:
            mixture, sources = by_a_microphone(mixture, sources, rng, self.sample_rate)
        return mixture, sources

    def describe(self, index):
        """See `MixtureList.describe`."""
        return self.mixtures.describe(index)
