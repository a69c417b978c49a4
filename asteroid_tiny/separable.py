"""How models are given signals and files: as Asteroid's are, without what fails there.

Asteroid's `separate` scales estimates by sums of samples, which overflow in 16 bits and are 0 of
silence; it takes no `Path` and no signal without a dimension of channels, and makes no folder.
"""

import os

import numpy as np
import torch
from asteroid.separate import separate as by_asteroid

from .errors import UserError
from .files import make_folder


class Separable:
    """A model of mixtures, (batch, 1, time) -> (batch, n_src, time), that separates files, too."""

    def forward_wav(self, wav, *args, **kwargs):
        """As `forward`, for samples of any type; Asteroid's `separate` calls it.

        Raises:
            UserError: If the mixture holds samples that are NaN or infinite.
        """
        wav = wav.to(getattr(next(self.parameters(), None), "dtype", torch.float32))
        if not wav.isfinite().all():
            raise UserError("the mixture holds samples that are NaN or infinite")
        estimates = self(wav, *args, **kwargs)
        if not estimates.any():  # of silence: `separate` divides by their sum
            estimates = estimates + torch.finfo(estimates.dtype).tiny
        return estimates.float() if estimates.dtype.itemsize < 4 else estimates

    def separate(self, wav, output_dir=None, *args, **kwargs):
        """Separates a file or signals, as `asteroid.separate.separate`.

        Args:
            wav (str, Path, np.ndarray or torch.Tensor): A file, whose estimates are written beside
                it or to `output_dir`, or signals.
            output_dir (str or Path, optional): Where to; it is made if there is none.
            *args, **kwargs: Asteroid's, such as `force_overwrite` and `resample`.

        Returns:
            np.ndarray or torch.Tensor: The estimates of signals, of a file None.

        Shape:
            (time,) -> (n_src, time), (1, time) or (batch, 1, time) -> (batch, n_src, time).

        Raises:
            UserError: If the folder cannot be made, or samples are NaN or infinite.
        """
        return separate(self, wav, output_dir, *args, **kwargs)


def separate(model, wav, output_dir=None, *args, **kwargs):
    """As `Separable.separate`, by any of Asteroid's models."""
    if output_dir is not None:
        make_folder(output_dir)
    if isinstance(wav, np.ndarray):
        wav = torch.from_numpy(np.ascontiguousarray(wav))
        return separate(model, wav, None, *args, **kwargs).numpy()
    if isinstance(wav, torch.Tensor):
        wav = wav if wav.dtype == torch.float64 else wav.float()
        estimates = by_asteroid(model, wav[None] if wav.ndim == 1 else wav, None, *args, **kwargs)
        return estimates[0] if wav.ndim == 1 else estimates
    wav = str(wav) if isinstance(wav, os.PathLike) else wav
    return by_asteroid(model, wav, output_dir, *args, **kwargs)
