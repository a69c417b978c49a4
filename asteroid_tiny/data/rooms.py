"""Rooms: mixtures as they are heard where walls throw speech back.

The response of a room is the direct sound, then noise that decays exponentially, as by J.-D.
Polack, "La transmission de l'énergie sonore dans les salles", 1988. It has the reverberation of a
room, but no single reflections.
"""

import numpy as np
import torch
from scipy.signal import oaconvolve

from .mixing import as_loud_as

DECAY = 0.1, 0.7  # s in which reverberation falls by 60 dB
DIRECT = -12.0, 6.0  # dB of the direct sound re all reverberation: a few metres away, or close by
FIRST = 0.002  # s after the direct sound, before which nothing comes back


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


class InRooms(torch.utils.data.Dataset):
    """The mixtures of a list without noise, each in a room of its own, always the same one.

    Args:
        mixtures (MixtureList): The list.
        seed (int): Of the rooms.

    Shape:
        Items are (mixture, sources): (time,) and (n_src, time), the sources as they are heard.
    """

    def __init__(self, mixtures, seed):
        self.mixtures = mixtures
        self.seed = seed
        self.sample_rate = mixtures.sample_rate

    def __len__(self):
        return len(self.mixtures)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        sources = in_a_room(self.mixtures[index][1], rng, self.sample_rate)
        return sources.sum(0), sources

    def describe(self, index):
        """See `MixtureList.describe`."""
        return self.mixtures.describe(index)
