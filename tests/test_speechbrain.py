"""`Sepformer` is SepFormer: it computes what SpeechBrain's computes, and keeps less of it."""

import pytest
import torch
from memory import saved_bytes

from asteroid_tiny import Sepformer, TinySepformer

pytest.importorskip("speechbrain")
from speechbrain_peer import SpeechBrainSepformer, copy_weights


@pytest.mark.parametrize("n_src, n_repeats, n_layers, chunk_size", [(2, 2, 8, 250), (3, 1, 2, 50)])
def test_outputs_agree_with_speechbrain(n_src, n_repeats, n_layers, chunk_size):
    torch.manual_seed(0)
    peer = SpeechBrainSepformer(n_src, n_repeats, n_layers, chunk_size).eval()
    for parameter in peer.parameters():  # ones and zeros of norms and biases would hide mix-ups
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    sizes = dict(n_repeats=n_repeats, n_intra_layers=n_layers, n_inter_layers=n_layers)
    model = Sepformer(n_src, chunk_size=chunk_size, **sizes).eval()
    copy_weights(peer, model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    for n_samples in (8 * 250 + 8, 8000, 4321):  # whole chunks; whole strides; neither
        mixture = torch.randn(1, n_samples)
        with torch.inference_mode():
            ours, theirs = model(mixture), peer(mixture)
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_less_is_kept_for_backward_than_speechbrain_keeps():
    peer = saved_bytes(SpeechBrainSepformer())
    assert saved_bytes(Sepformer.from_preset("sepformer")) <= 0.70 * peer
    assert saved_bytes(TinySepformer.from_preset("tiny-sepformer-s")) <= 0.62 * peer
    for model_class, preset in [(Sepformer, "sepformer"), (TinySepformer, "tiny-sepformer-s")]:
        lean = model_class.from_preset(preset, checkpoint_activations=True)
        assert saved_bytes(lean) <= 0.13 * peer
