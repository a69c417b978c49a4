"""Compact speech separation for Asteroid: Tiny-Sepformer, its baseline and the road around them."""

from .errors import UserError
from .models import PRESETS, Sepformer, TinySepformer

__all__ = ["PRESETS", "Sepformer", "TinySepformer", "UserError"]
__version__ = "0.1.0"
