"""Asteroid's filterbanks as the models use them, and a start for the learned one.

Random filters have to learn first to give a signal back at all. Sinusoids in pairs of opposite
sign do so from the first step, also behind a ReLU, since relu(x) - relu(-x) = x: with all masks at
one the model returns the mixture, and what remains to be learned is separation. The filters stay
free to move.
"""

import contextlib
import inspect
import math
import threading

import asteroid_filterbanks
import numpy as np
import torch

from .errors import UserError


def build_filterbank(fb_name, n_filters, kernel_size, stride, sample_rate, fb_init, **fb_kwargs):
    """Encoder and decoder of a family of asteroid_filterbanks.

    Args:
        fb_name (str or class): The family, as `make_enc_dec` takes it.
        n_filters, kernel_size, stride, sample_rate: As `make_enc_dec` takes them.
        fb_init (str): ``"random"``, as the family starts, or ``"sinusoids"``, which the family
            ``"free"`` can start as; see `sinusoid_pairs`.
        **fb_kwargs: Further arguments of the family.

    Returns:
        tuple: `asteroid_filterbanks.Encoder` and `Decoder`.

    Raises:
        UserError: If the family does not have an argument, which it would silently swallow.
        ValueError: If the start does not fit the family or the sizes.
    """
    takers = asteroid_filterbanks.make_enc_dec, asteroid_filterbanks.get(fb_name)
    known = {
        name
        for taker in takers
        for name, parameter in inspect.signature(taker).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    }
    for name in fb_kwargs:
        if name not in known:
            raise UserError(f"there is no argument {name!r}, of the model or of its filterbank")
    with LENDING, _old_numpy_names():
        encoder, decoder = asteroid_filterbanks.make_enc_dec(
            fb_name, n_filters, kernel_size, stride=stride, sample_rate=sample_rate, **fb_kwargs
        )
    if fb_init == "sinusoids" and asteroid_filterbanks.get(fb_name) is asteroid_filterbanks.FreeFB:
        for coder in (encoder, decoder):
            coder.filterbank._filters.data.copy_(sinusoid_pairs(n_filters, kernel_size))
    elif fb_init != "random":
        raise ValueError(f"fb_init must be 'random', or for free filters 'sinusoids': {fb_init!r}")
    return encoder, decoder


LENDING = threading.RLock()  # one thread at a time lends, as the first to end takes back


@contextlib.contextmanager
def _old_numpy_names():
    """Lends NumPy the two names that the gammatone family asks for and NumPy 2 has no more."""
    lent = {
        name: thing for name, thing in (("float", float), ("math", math)) if name not in vars(np)
    }
    for name, thing in lent.items():
        setattr(np, name, thing)
    try:
        yield
    finally:
        for name in lent:
            delattr(np, name)


def sinusoid_pairs(n_filters, kernel_size):
    """Filters for an encoder with ReLU and for its decoder, with a hop of half their length.

    The first half of the filters are the lowest rows of an orthonormal real Fourier basis under a
    sine window, the second half the same with opposite sign. With `n_filters` = 2 `kernel_size`
    reconstruction is exact away from the borders; with fewer the highest frequencies lack.

    Args:
        n_filters (int): Number of filters, even, at most 2 `kernel_size`.
        kernel_size (int): Length of the filters in samples, even.

    Returns:
        torch.Tensor: Filters of encoder and decoder alike, (n_filters, 1, kernel_size).

    Raises:
        ValueError: If the sizes do not fit.

    Examples:
        >>> from torch.nn.functional import conv1d, conv_transpose1d
        >>> filters, x = sinusoid_pairs(32, 16), torch.randn(1, 1, 160)
        >>> y = conv_transpose1d(conv1d(x, filters, stride=8).relu(), filters, stride=8)
        >>> torch.allclose(x[..., 8:-8], y[..., 8:-8], atol=1e-5)
        True
    """
    if n_filters % 2 or kernel_size % 2 or n_filters > 2 * kernel_size:
        raise ValueError(
            f"sinusoids need an even kernel_size ({kernel_size}) and an even n_filters "
            f"({n_filters}) of at most twice that"
        )
    time = torch.arange(kernel_size, device="cpu")  # on the meta device slow, see `weights`
    rows = [torch.full((kernel_size,), math.sqrt(0.5), device="cpu")]
    for k in range(1, kernel_size // 2):
        angle = 2 * math.pi * k * time / kernel_size
        rows += [torch.cos(angle), torch.sin(angle)]
    rows.append(math.sqrt(0.5) * torch.cos(math.pi * time))
    basis = torch.stack(rows[: n_filters // 2]) * math.sqrt(2 / kernel_size)
    half = basis * torch.sin(math.pi * (time + 0.5) / kernel_size)
    return torch.cat([half, -half]).unsqueeze(1)
