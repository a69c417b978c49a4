"""Recordings of any length and format, from samples to folders of files.

`audio` reads and writes files piece by piece, `blocks` separates what comes, `levels` brings the
estimates to sum to it, `tracking` keeps each speaker in one place by what `voices` hears,
`upper_band` shares what lies above the model's band, and `folder` does all recordings that are
named.
"""

from .blocks import separate_file, separate_long, separate_stream

__all__ = ["separate_file", "separate_long", "separate_stream"]
