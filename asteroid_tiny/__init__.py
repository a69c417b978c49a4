"""Compact speech separation for Asteroid: Tiny-Sepformer, its baseline and the road around them."""

from .errors import UserError, stopped_in_one_line

with stopped_in_one_line():  # these take seconds
    from .export import OnnxSeparator
    from .hub import example_mixture, list_models
    from .models import PRESETS, Sepformer, TinySepformer, from_pretrained
    from .transfer import average

__all__ = [
    "PRESETS",
    "OnnxSeparator",
    "Sepformer",
    "TinySepformer",
    "UserError",
    "average",
    "example_mixture",
    "from_pretrained",
    "list_models",
]
__version__ = "0.1.0"
