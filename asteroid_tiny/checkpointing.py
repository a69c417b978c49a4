"""Checkpoints from which a killed training continues as if nothing had happened.

They appear whole or not at all, hold the states of all random generators, are read without
unpickling code, and may move to another folder or device.
"""

import random
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from .errors import UserError
from .weights import load_weights_only, save_whole


class Checkpoints(ModelCheckpoint):
    """Lightning's, which knows its files again in a folder that was moved."""

    def load_state_dict(self, state):
        def here(path):
            return str(Path(self.dirpath) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = {**state, "dirpath": self.dirpath, **{key: here(state[key]) for key in paths}}
        state["best_k_models"] = {here(path): v for path, v in state["best_k_models"].items()}
        super().load_state_dict(state)


def checkpoints(exp_dir, name, monitor=None):
    """Keeps checkpoints/NAME.ckpt: of the last epoch, or of that with the least of a metric."""
    return Checkpoints(
        exp_dir / "checkpoints",
        filename=name,
        monitor=monitor,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class RandomStates(pl.Callback):
    """Keeps the states of all random generators in the checkpoints."""

    def state_dict(self):
        version, state, gauss = random.getstate()
        states = {"torch": torch.get_rng_state(), "python": [version, list(state), gauss]}
        name, keys, position, has_gauss, cached = np.random.get_state()
        states["numpy"] = [name, keys.tolist(), position, has_gauss, cached]
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state_all()
        return states

    def load_state_dict(self, states):
        torch.set_rng_state(states["torch"])
        version, state, gauss = states["python"]
        random.setstate((version, tuple(state), gauss))
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without unpickling code."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        save_whole(checkpoint, path)

    def load_checkpoint(self, path, map_location="cpu", weights_only=True):
        try:  # on the CPU first, which every machine has
            return load_weights_only(path, map_location)
        except UserError as error:
            raise UserError(f"{error}; delete it to go on without it") from None
