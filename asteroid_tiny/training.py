"""Training: Asteroid's `System` with a permutation-invariant loss, a schedule counted in steps,
and checkpoints from which a killed run continues as if nothing had happened.

An "epoch" is a fixed number of steps, after each of which the model is validated and saved.
"""

import logging
import random
import re
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from asteroid.engine.system import System
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from .data import DynamicMixtures, EpochSampler, MixtureList, RepeatedMixtures, SharedOut
from .errors import UserError
from .report import write_curves
from .weights import load_weights_only, save_whole

PATIENCE = timedelta(minutes=10)  # with another process, before it is given up
BEST_POSSIBLE_DB = 30.0  # mixtures separated better than this teach nothing more

say = rank_zero_only(print)


def separation_loss(estimates, sources):
    """Negative SI-SDR in dB under the best permutation of each item, at least -30, averaged.

    Args:
        estimates (torch.Tensor): (batch, n_src, time).
        sources (torch.Tensor): (batch, n_src, time).

    Returns:
        torch.Tensor: The mean over the batch, a scalar.

    Examples:
        >>> sources = torch.randn(3, 2, 4000)
        >>> separation_loss(sources.flip(1), sources)
        tensor(-30.)
    """
    # under bf16 autocast the best permutation would be rounded to a tenth of a dB
    with torch.autocast(estimates.device.type, enabled=False):
        pairwise = pairwise_neg_sisdr(estimates.float(), sources.float())
        loss, _ = PITLossWrapper.find_best_perm(pairwise)
    return loss.clamp(min=-BEST_POSSIBLE_DB).mean()


class Schedule(torch.optim.lr_scheduler.LRScheduler):
    """Warm-up, halving on plateau, and a final descent to zero; counted in steps.

    The rate rises linearly over `warmup_steps`, is halved whenever `observe` has seen no better
    validation loss `patience` times in a row after the first `hold_steps`, and over the last
    `cooldown_steps` of `total_steps` falls linearly to zero.

    Args:
        optimizer (torch.optim.Optimizer): Whose rates are set.
        total_steps (int): Steps of the whole training.
        warmup_steps (int): Steps of the rise.
        cooldown_steps (int): Steps of the descent; 0 for none.
        patience (int): Validations without a better loss before the rate is halved.
        hold_steps (int): First steps, in which it is not halved and nothing is observed.
    """

    def __init__(
        self, optimizer, total_steps, warmup_steps=0, cooldown_steps=0, patience=2, hold_steps=0
    ):
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.patience = patience
        self.hold_steps = hold_steps
        self.best = float("inf")
        self.n_worse = 0
        self.n_halvings = 0
        super().__init__(optimizer)

    def get_lr(self):
        step = self.last_epoch + 1  # the step that this rate is for, counted from one
        factor = 0.5**self.n_halvings
        if self.warmup_steps:
            factor *= min(1.0, step / self.warmup_steps)
        if self.cooldown_steps:
            factor *= min(1.0, max(0, self.total_steps - step + 1) / self.cooldown_steps)
        return [base * factor for base in self.base_lrs]

    def observe(self, val_loss):
        """Takes note of a validation loss (float), which counts from the next `step` on."""
        if self.last_epoch < self.hold_steps:
            return
        if val_loss < self.best:
            self.best, self.n_worse = val_loss, 0
            return
        self.n_worse += 1
        if self.n_worse > self.patience:
            self.n_halvings, self.n_worse = self.n_halvings + 1, 0


class SeparationSystem(System):
    """Asteroid's `System` with SI-SDR in its logs and a validation loss that all processes share.

    Its batches are (mixtures, sources): (batch, time) and (batch, n_src, time).
    """

    def training_step(self, batch, batch_nb):
        loss = self.common_step(batch, batch_nb)
        if not torch.isfinite(loss):
            raise UserError(
                f"the training loss became {loss.item()} at step {self.global_step}; "
                "try a lower --lr"
            )
        self.log("loss", loss)
        self.log("si_sdr", -loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_nb):
        loss = self.common_step(batch, batch_nb, train=False)
        # Lightning averages the counts over the processes in whole numbers, so make them divide
        count = len(batch[0]) * self.trainer.world_size
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=count)
        self.log("val_si_sdr", -loss, prog_bar=True, sync_dist=True, batch_size=count)

    def on_load_checkpoint(self, checkpoint):
        # before the first batch is drawn: worker processes begin with that ahead of Lightning
        self.train_loader.sampler.set_epoch(checkpoint["global_step"] // len(self.train_loader))

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.lr_schedulers().observe(float(self.trainer.callback_metrics["val_loss"]))


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


class Curves(pl.Callback):
    """Draws the curves of a run anew after each validation."""

    def __init__(self, exp_dir):
        self.exp_dir = exp_dir

    def on_validation_end(self, trainer, system):
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # what it still holds of the log
            write_curves(self.exp_dir)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without unpickling code."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        save_whole(checkpoint, path)

    def load_checkpoint(self, path, map_location="cpu", weights_only=True):
        try:  # on the CPU first, which every machine has
            return load_weights_only(path, map_location)
        except UserError as error:
            raise UserError(f"{error}; delete it to go on without it") from None


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without its version number, and quiet where nobody watches."""

    def __init__(self):
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 25)

    def get_metrics(self, trainer, model):
        metrics = super().get_metrics(trainer, model)
        return {key: value for key, value in metrics.items() if key != "v_num"}


def train(model, train_speech, valid_set, exp_dir, conf):
    """Trains a model, or continues to, and leaves it with the best weights by validation loss.

    With `average` in `conf` the weights that are validated, and kept as the best, are a running
    average of those that are trained.

    Args:
        model (torch.nn.Module): (batch, time) -> (batch, n_src, time).
        train_speech (SpeechDir or MixtureList): Speech from which training mixtures are drawn, or
            a list of training mixtures.
        valid_set (MixtureList): Validation mixtures; one at a time if they differ in length.
        exp_dir (str or Path): Where `checkpoints/` and `logs/` go; an interrupted training that
            lies there is continued.
        conf (dict): The keys of the `data` and `training` sections of conf.yml.

    Returns:
        dict: `steps`, `val_si_sdr` (best, dB); None in all processes but the first.

    Raises:
        UserError: If a checkpoint is broken, the disk is full or the loss is no number.
    """
    exp_dir = Path(exp_dir)
    whole = whole_epochs(conf)
    changed = {key: value for key, value in whole.items() if value != conf[key]}
    if changed:
        told = ", ".join(f"{key} {value}" for key, value in changed.items())
        say(f"  for whole epochs and the whole schedule: {told}")
    conf = whole
    system = build_system(model, train_speech, valid_set, conf)
    best = checkpoints(exp_dir, "best", monitor="val_loss")
    average = [EMAWeightAveraging(decay=conf["average"])] if conf["average"] else []
    epochs = conf["steps"] // conf["steps_per_epoch"]
    trainer = build_trainer(exp_dir, conf, [*average, best], max_epochs=epochs)
    fit(trainer, system, exp_dir)
    if not trainer.is_global_zero:
        return None
    weights = load_weights_only(best.best_model_path)["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    return {"steps": trainer.global_step, "val_si_sdr": -float(best.best_model_score)}


def whole_epochs(conf):
    """The settings of a training of whole epochs into which its schedule fits.

    Args:
        conf (dict): The keys of the `training` section.

    Returns:
        dict: The same with `steps` a multiple of `steps_per_epoch`, which is at most `steps`, and
        with `warmup_steps` and `cooldown_steps` shortened alike where together they are more than
        `steps`, so that `lr` is reached.

    Examples:
        >>> conf = dict(steps=450, steps_per_epoch=100, warmup_steps=100, cooldown_steps=700)
        >>> whole_epochs(conf)
        {'steps': 400, 'steps_per_epoch': 100, 'warmup_steps': 50, 'cooldown_steps': 350}
    """
    per_epoch = min(conf["steps"], conf["steps_per_epoch"])
    steps = round(conf["steps"] / per_epoch) * per_epoch
    ramps = {key: conf[key] for key in ("warmup_steps", "cooldown_steps")}
    share = min(1.0, steps / max(1, sum(ramps.values())))
    ramps = {key: int(share * n) for key, n in ramps.items()}
    return {**conf, "steps": steps, "steps_per_epoch": per_epoch, **ramps}


def build_system(model, train_speech, valid_set, conf):
    """What Lightning trains: the model with its batches, loss, optimiser and schedule.

    Args:
        model, train_speech, conf: As in `train`; `conf` as `whole_epochs` gives it.
        valid_set (MixtureList): As in `train`; None to go without.
    """
    pl.seed_everything(conf["seed"], verbose=False)
    if conf["compile"]:
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=conf["lr"], weight_decay=conf["weight_decay"]
    )
    schedule = Schedule(
        optimizer,
        conf["steps"],
        *(conf[key] for key in ("warmup_steps", "cooldown_steps", "patience", "hold_steps")),
    )
    return SeparationSystem(
        model=model,
        optimizer=optimizer,
        loss_func=separation_loss,
        train_loader=training_loader(train_speech, conf),
        val_loader=None if valid_set is None else validation_loader(valid_set, conf),
        scheduler={"scheduler": schedule, "interval": "step"},
        config=conf,
    )


def build_trainer(exp_dir, conf, callbacks, **options):
    """Lightning's trainer, which logs into a folder and keeps the last checkpoint there.

    Args:
        exp_dir (Path): The folder.
        conf (dict): As in `train`.
        callbacks (list): More callbacks.
        **options: More arguments of the trainer.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    board = TensorBoardLogger(exp_dir, "logs")
    return pl.Trainer(
        accelerator=conf["accelerator"],
        devices=conf["devices"],
        num_nodes=conf["num_nodes"],
        strategy=strategy(conf),
        precision=precision(conf),
        gradient_clip_val=conf["grad_clip"],
        default_root_dir=exp_dir,
        logger=[board, CSVLogger(exp_dir, "logs", version=board.version)],
        callbacks=[
            *callbacks,
            checkpoints(exp_dir, "last"),
            RandomStates(),
            LearningRateMonitor("step"),
            Curves(exp_dir),
            ProgressBar(),
        ],
        plugins=[WholeCheckpoints()],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        **options,
    )


def fit(trainer, system, exp_dir):
    """Trains on from the last checkpoint if there is one (Trainer, SeparationSystem, Path).

    Raises:
        UserError: If another process of the training died.
    """
    last = exp_dir / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(system, ckpt_path=str(last) if last.exists() else None)
    except RuntimeError as error:
        if trainer.world_size == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        raise UserError(
            "another process of the training ended; the same command continues from the last "
            "checkpoint"
        ) from error


def per_process(conf):
    """Mixtures of a batch that each process takes.

    Raises:
        UserError: If the batch cannot be shared out evenly.
    """
    processes = conf["devices"] * conf["num_nodes"]
    if conf["batch_size"] % processes:
        raise UserError(
            f"a batch_size of {conf['batch_size']} cannot be shared out to {processes} processes; "
            "take a multiple"
        )
    return conf["batch_size"] // processes


def strategy(conf):
    """How Lightning trains: in one process, or in several that exchange gradients."""
    if conf["devices"] * conf["num_nodes"] == 1:
        return "auto"
    # buffers are constants, and processes may have unequal numbers of validation batches
    return DDPStrategy(broadcast_buffers=False, timeout=PATIENCE)


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


def training_loader(speech, conf):
    """Batches of training mixtures, `steps_per_epoch` of them an epoch.

    Args:
        speech (SpeechDir or MixtureList): To draw mixtures from afresh, or to take them from.
        conf (dict): As in `train`.
    """
    size = conf["steps_per_epoch"] * conf["batch_size"]
    common = dict(
        length=round(conf["segment"] * speech.sample_rate),
        seed=conf["seed"],
        speeds=range(100 - conf["speed_perturb"], 101 + conf["speed_perturb"]),
        size=size,
    )
    if isinstance(speech, MixtureList):
        mixtures = RepeatedMixtures(speech, **common)
    else:
        mixtures = DynamicMixtures(
            speech,
            conf["n_src"],
            **{key: conf[key] for key in ("max_gap", "overlap_ratio", "level_spread", "colour")},
            **common,
        )
    return DataLoader(
        mixtures,
        batch_size=per_process(conf),
        sampler=EpochSampler(size),
        num_workers=conf["num_workers"],
        persistent_workers=conf["num_workers"] > 0,
        pin_memory=torch.cuda.is_available(),
    )


def validation_loader(valid_set, conf):
    """Batches of validation mixtures; one at a time if they differ in length."""
    return DataLoader(
        valid_set,
        batch_size=per_process(conf) if valid_set.is_of_one_length() else 1,
        sampler=SharedOut(len(valid_set)),
    )


def precision(conf):
    """Lightning's name of the precision: bf16 on a GPU that has it, or what `conf` says."""
    if conf["precision"] != "auto":
        return conf["precision"]
    on_gpu = conf["accelerator"] != "cpu" and torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"
