"""`Sepformer` is SepFormer: it computes what SpeechBrain's computes, and keeps less of it."""

import pytest
import torch

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


class SavedBytes:
    """Counts the unique bytes that autograd keeps for the backward pass, parameters aside."""

    def __init__(self, module):
        self.own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.kept = {}

    def count(self):
        """A context in which what is kept is counted."""

        def pack(tensor):
            # the tensor is held, so that no later one can have its address
            self.kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    @property
    def total(self):
        kept = {key: tensor for key, tensor in self.kept.items() if key not in self.own}
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def saved_bytes(model, n_samples=16000):
    """Bytes kept at the end of forward, and those of the largest recomputed layer."""
    model.train()
    checkpointed = model.masker.checkpoint_activations if hasattr(model, "masker") else False
    saved = SavedBytes(model)
    with saved.count():
        model(torch.randn(1, n_samples)).sum()
    if not checkpointed:
        return saved.total
    segments = []

    def count(layer, args):
        inside = SavedBytes(layer)
        with inside.count():
            layer.forward(args[0].detach().requires_grad_(), *args[1:])
        segments.append(inside.total)

    layer = model.masker.intra[0].layers[0], model.masker.inter[0].layers[0]
    hooks = [one.register_forward_pre_hook(count) for one in layer]
    model(torch.randn(1, n_samples))
    for hook in hooks:
        hook.remove()
    return saved.total + max(segments)


def test_less_is_kept_for_backward_than_speechbrain_keeps():
    peer = saved_bytes(SpeechBrainSepformer())
    assert saved_bytes(Sepformer.from_preset("sepformer")) <= 0.70 * peer
    assert saved_bytes(TinySepformer.from_preset("tiny-sepformer-s")) <= 0.62 * peer
    for model_class, preset in [(Sepformer, "sepformer"), (TinySepformer, "tiny-sepformer-s")]:
        lean = model_class.from_preset(preset, checkpoint_activations=True)
        assert saved_bytes(lean) <= 0.13 * peer
