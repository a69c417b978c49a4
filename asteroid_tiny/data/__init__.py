"""The one road for data: Kaldi data dir -> mixture list -> dataset that mixes on the fly."""

from .kaldi import NoiseDir, SpeechDir, check_disjoint
from .mixing import (
    DynamicMixtures,
    EpochSampler,
    MixtureList,
    RepeatedMixtures,
    SharedOut,
    draw_list,
    read_list,
    write_list,
)

__all__ = [
    "DynamicMixtures",
    "EpochSampler",
    "MixtureList",
    "NoiseDir",
    "RepeatedMixtures",
    "SharedOut",
    "SpeechDir",
    "check_disjoint",
    "draw_list",
    "read_list",
    "write_list",
]
