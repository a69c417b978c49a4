"""The benchmark: its peers are what they claim, its counts are right, its tables tell the truth."""

import sys

import pytest
import torch
from small import n_parameters

from asteroid_tiny.peers import PEERS, build_peer

#: Millions of parameters, as published or measured in other places.
SIZES = {
    "speechbrain-sepformer": 25.68,
    "speechbrain-re-sepformer": 7.96,
    "conv-tasnet": 5.05,
    "dprnn": 3.65,
    "dptnet": 2.86,
    "sudormrf": 2.63,
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_size_of_its_recipe_and_learns_from_a_batch(name):
    peer = build_peer(name, n_src=2, sample_rate=8000).eval()
    assert n_parameters(peer) / 1e6 == pytest.approx(SIZES[name], abs=0.006)
    assert peer.sample_rate == 8000
    mixtures = torch.randn(2, 999)  # no whole number of strides or chunks
    estimates = peer(mixtures)
    assert estimates.shape == (2, 2, 999)
    assert torch.allclose(estimates[:1], peer(mixtures[:1]), atol=1e-4)  # items are kept apart
    estimates.square().sum().backward()
    assert next(peer.encoder.parameters()).grad.abs().max() > 0


def test_a_peer_that_is_missing_is_named(monkeypatch, refused):
    with refused("there is no peer 'sepfromer'", "conv-tasnet"):
        build_peer("sepfromer")
    monkeypatch.setitem(sys.modules, "speechbrain", None)
    with refused("speechbrain-sepformer needs the package speechbrain"):
        build_peer("speechbrain-sepformer")
