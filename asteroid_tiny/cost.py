"""What models cost: multiply-accumulates, counted, and the training that follows from them."""

import json
from pathlib import Path

import torch

from .models import PRESETS

FULL_HOURS = 2000  # of mixtures: some 65 epochs of WSJ0-2mix's 30 h
GPU_FLOPS = 50e12  # a second, sustained in bf16: what a large GPU may reach with such layers


def training_cost(exp_dir, settings, model):
    """What the training took in floating-point operations, and what a full one would take.

    Arithmetic, exact in the operations: two a multiply-accumulate, and a backward pass of twice
    the forward pass.
    """
    done = json.loads((Path(exp_dir) / "training.json").read_text())
    hours = done["steps"] * settings["batch_size"] * settings["segment"] / 3600
    with torch.device("meta"):  # shapes alone are enough to count
        models = {name: of.from_preset(name) for name, (of, _) in PRESETS.items()}
    models = {"this model": model.to("meta"), **models}
    lines = [
        f"Trained for {done['steps']} steps on {hours:.1f} h of mixtures ({done['device']}).",
        f"On a GPU, give it a larger model and {FULL_HOURS} h of mixtures (such as --preset "
        "tiny-sepformer-s --segment 4",
        f"--steps {FULL_HOURS * 3600 // 64} --batch_size 16), at {GPU_FLOPS / 1e12:.0f} TFLOP/s "
        "sustained (assumed, not measured):",
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


def count_macs(model):
    """Multiply-accumulates for one second of audio, the mean over 4 s (float).

    The model must be on the meta device, where attention is made of matrix products to count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 4 * round(model.sample_rate), device="meta"))
    return counter.get_total_flops() / 2 / 4
