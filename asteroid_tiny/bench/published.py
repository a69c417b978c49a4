"""The quality of separation models as their papers tell it, against what they cost."""

from ..models import PRESETS
from ..plots import Axes

#: Published SI-SNRi on WSJ0-2mix in dB: the model here whose operations were counted, or
#: the published 1e9 multiply-accumulates a second; quality; where it was read. Without dynamic
#: mixing but where it says DM.
PUBLISHED = {
    "Tiny-Sepformer-S": ("tiny-sepformer-s", 15.16, "plot in the repository of Papez"),
    "SepFormer": ("sepformer", 20.4, "Subakan et al. 2021"),
    "RE-SepFormer (DM)": ("speechbrain-re-sepformer", 18.6, "Della Libera et al. 2022"),
    "ConvTasNet": ("conv-tasnet", 15.3, "Luo and Mesgarani 2019"),
    "DPRNN, kernel 16": ("dprnn", 17.7, "README of Asteroid's egs/wham/DPRNN"),
    "Papez": (21.5, 19.2, "Oh et al. 2023; operations counted in its code, worst case"),
    "TDANet": (9.0, 18.5, "Li et al. 2023"),
    "SepReformer-T": (10.0, 22.4, "Shin et al. 2024"),
}


def places(counted):
    """Where models lie in the plot.

    Args:
        counted (dict): 1e9 multiply-accumulates for a second of audio, by model.

    Returns:
        dict: The same, the quality in dB and its source, by the model's published name; without
        those that were not counted.

    Examples:
        >>> places({"sepformer": 59.0})["SepFormer"]
        (59.0, 20.4, 'Subakan et al. 2021')
    """
    found = {}
    for name, (cost, quality, source) in PUBLISHED.items():
        cost = counted.get(cost, 0) if isinstance(cost, str) else cost
        if cost:
            found[name] = cost, quality, source
    return found


def quality_plot(counted):
    """Published quality against operations (SVG), None if none were counted; see `places`."""
    found = places(counted)
    if not counted:
        return None
    xs, ys, _ = zip(*found.values())
    axes = Axes(
        xs,
        ys,
        "GMAC per second of audio",
        "published SI-SNRi on WSJ0-2mix (dB)",
        log="x",
        right=100,
    )
    colours = [0 if PUBLISHED[name][0] in PRESETS else 1 for name in found]
    for x, y, name, colour in zip(xs, ys, found, colours):
        axes.dots([x], [y], [name], colour=colour)
    axes.words(xs, ys, [*found], colours)
    return axes.svg()


def quality_words(counted):
    """The plot, and where its figures are from; see `places`."""
    sources = "; ".join(
        f"{name} {quality:g} dB ({source})"
        for name, (_, quality, source) in places(counted).items()
    )
    return (
        "![published SI-SNRi against operations](quality.svg)\n\n"
        "None of these qualities was measured here: they are published, on WSJ0-2mix, without "
        f"dynamic mixing but where it says DM. {sources}. The operations are counted here for the "
        "models above and published for TDANet and SepReformer."
    )
