"""The one road for data: Kaldi data dir -> mixture list -> dataset that mixes on the fly."""

from .datasets import DynamicMixtures, EpochSampler, MixtureList, RepeatedMixtures, SharedOut
from .kaldi import NoiseDir, SpeechDir, check_disjoint
from .mixing import draw_list, read_list, write_list
from .surroundings import InSurroundings, RecordedNoise

__all__ = [
    "DynamicMixtures",
    "EpochSampler",
    "InSurroundings",
    "MixtureList",
    "NoiseDir",
    "RecordedNoise",
    "RepeatedMixtures",
    "SharedOut",
    "SpeechDir",
    "check_disjoint",
    "draw_list",
    "read_list",
    "write_list",
]
