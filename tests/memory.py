"""Counts the memory that a model keeps for its backward pass, on any device alike."""

import torch


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
