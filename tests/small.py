"""Small models for the tests, and how to compare them."""

import pytest
import torch

from asteroid_tiny import Sepformer, TinySepformer
from asteroid_tiny.layers import INTER, INTRA

CLASSES = [TinySepformer, Sepformer]
SIZES = dict(
    n_filters=16,
    bn_chan=16,
    n_heads=2,
    ff_hid=32,
    chunk_size=10,
    n_repeats=2,
    n_intra_layers=2,
    n_inter_layers=2,
)

both_classes = pytest.mark.parametrize("model_class", CLASSES)
both_axes = pytest.mark.parametrize("axis", [INTRA, INTER], ids=["intra", "inter"])


def small(model_class=TinySepformer, n_src=2, **sizes):
    return shaken(model_class(n_src, **{**SIZES, **sizes})).eval()


def shaken(module):
    """The module with norms and biases moved off their ones and zeros, which would hide mix-ups."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def ratio_db(estimate, reference):
    return float(10 * torch.log10(reference.square().sum() / (estimate - reference).square().sum()))


def first_layer(model):
    return model.masker.intra[0].layers[0]


class Shares(torch.nn.Module):
    """Gives every source a fixed share of the mixture."""

    def __init__(self, *shares, sample_rate=8000):
        super().__init__()
        self.shares, self.sample_rate = torch.tensor(shares)[:, None], sample_rate
        self.batches = []

    def forward(self, mixtures):
        self.batches.append(tuple(mixtures.shape))
        return mixtures[:, None] * self.shares
