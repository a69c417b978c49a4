"""The one road for data: Kaldi data dir -> mixture list -> dataset that mixes on the fly."""

from .kaldi import SpeechDir, check_disjoint
from .mixing import (
    DynamicMixtures,
    EpochSampler,
    MixtureList,
    draw_list,
    read_list,
    write_list,
)

__all__ = [
    "DynamicMixtures",
    "EpochSampler",
    "MixtureList",
    "SpeechDir",
    "check_disjoint",
    "draw_list",
    "read_list",
    "write_list",
]
