"""What models cost: multiply-accumulates and bytes kept for the backward pass, counted, and the
training that follows from them."""

import copy
from pathlib import Path
from unittest import mock

import torch

from . import layers
from .files import read_json
from .models import PRESETS

FULL_HOURS = 2000  # of mixtures: some 65 epochs of WSJ0-2mix's 30 h
GPU_FLOPS = 50e12  # a second, sustained in bf16: what a large GPU may reach with such layers


def training_cost(exp_dir, settings, model):
    """What the training took in floating-point operations, and what a full one would take.

    Arithmetic, exact in the operations: two a multiply-accumulate, and a backward pass of twice
    the forward pass.
    """
    done = read_training(exp_dir, device=str)
    hours = done["steps"] * settings["batch_size"] * settings["segment"] / 3600
    with torch.device("meta"):  # shapes alone are enough to count
        models = {name: of.from_preset(name) for name, (of, _) in PRESETS.items()}
    models = {"this model": model.to("meta"), **models}
    lines = [
        f"Trained for {done['steps']} steps on {hours:.1f} h of mixtures ({done['device']}).",
        f"On a GPU, give it a larger model and {FULL_HOURS} h of mixtures (such as --preset "
        "tiny-sepformer-s --segment 4",
        f"--steps {FULL_HOURS * 3600 // 64} --batch_size 16 --cooldown_steps 40000), at "
        f"{GPU_FLOPS / 1e12:.0f} TFLOP/s sustained (assumed, not measured):",
    ]
    for name, model in models.items():
        macs = count_macs(model)
        gpu_hours = 6 * macs * FULL_HOURS * 3600 / GPU_FLOPS / 3600
        size = sum(p.numel() for p in model.parameters()) / 1e6
        lines.append(
            f"  {name:18} {size:5.2f} M parameters  {macs / 1e9:5.1f} GMAC a second of audio  "
            f"{gpu_hours:6.1f} h"
        )
    return "\n".join(lines)


def read_training(exp_dir, **shape):
    """What stage 2 left in training.json (dict): `steps`, and what else must be there.

    Raises:
        UserError: If it is missing or broken.
    """
    hint = "run stage 2 again without best_model.pth"
    return read_json(Path(exp_dir) / "training.json", {"steps": int, **shape}, hint)


def count_macs(model):
    """Multiply-accumulates for one second of audio, the mean over 4 s (float).

    The model must be on the meta device, where attention is made of matrix products to count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 4 * round(model.sample_rate), device="meta"))
    return counter.get_total_flops() / 2 / 4


class SavedBytes:
    """Counts the unique bytes that autograd keeps for the backward pass, parameters aside.

    They are the same on any device.

    Args:
        module (torch.nn.Module): Whose parameters are not counted.

    Examples:
        >>> layer = torch.nn.Linear(8, 8)
        >>> saved = SavedBytes(layer)
        >>> with saved.count():
        ...     _ = layer(torch.zeros(10, 8)).relu()  # keeps its input, and what relu gave
        >>> saved.total
        640
    """

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
    """Bytes that a training step of one mixture keeps for its backward pass (int).

    Of a model of this package with `checkpoint_activations`: those at the end of the forward pass
    and those of the largest part that is recomputed at once.
    """
    model = copy.deepcopy(model).train()
    checkpointed = getattr(getattr(model, "masker", None), "checkpoint_activations", False)
    saved = SavedBytes(model)
    with saved.count():
        model(torch.randn(1, n_samples)).sum()
    if not checkpointed:
        return saved.total
    segments = []

    def count(segment, x, axis, **options):
        inside = SavedBytes(model)
        with inside.count():
            segment(x.detach().requires_grad_(), axis)
        segments.append(inside.total)
        return segment(x, axis)

    with mock.patch.object(layers, "checkpoint", count), torch.random.fork_rng():
        model(torch.randn(1, n_samples))
    return saved.total + max(segments)
