"""A start for learned filterbanks: windowed sinusoids in pairs of opposite sign.

Random filters have to learn first to give a signal back at all. These do so from the first step,
also behind a ReLU, since relu(x) - relu(-x) = x: with all masks at one the model returns the
mixture, and what remains to be learned is separation. The filters stay free to move.
"""

import math

import torch


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
    time = torch.arange(kernel_size)
    rows = [torch.full((kernel_size,), math.sqrt(0.5))]
    for k in range(1, kernel_size // 2):
        angle = 2 * math.pi * k * time / kernel_size
        rows += [torch.cos(angle), torch.sin(angle)]
    rows.append(math.sqrt(0.5) * torch.cos(math.pi * time))
    basis = torch.stack(rows[: n_filters // 2]) * math.sqrt(2 / kernel_size)
    half = basis * torch.sin(math.pi * (time + 0.5) / kernel_size)
    return torch.cat([half, -half]).unsqueeze(1)
