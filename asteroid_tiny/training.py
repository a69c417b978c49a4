"""Training: Asteroid's `System` with a permutation-invariant loss, in one process or several.

An "epoch" is a fixed number of steps, after each of which the model is validated and saved.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from asteroid.engine.system import System
from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr, pairwise_neg_snr
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    Timer,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.distributed import is_torchelastic_launched
from torch.utils.data import DataLoader

from .checkpointing import RandomStates, WholeCheckpoints, checkpoints
from .config import DRAWN, per_process
from .data import (
    DynamicMixtures,
    EpochSampler,
    MixtureList,
    RecordedNoise,
    RepeatedMixtures,
    SharedOut,
)
from .data.mixing import SILENT
from .errors import UserError
from .files import reason
from .report import write_curves
from .schedule import Schedule, whole_epochs
from .weights import load_weights_only

#: Settings that are arguments of `DynamicMixtures`, as `DRAWN` are, and of `RepeatedMixtures`.
CHANGED = "silent_sources", "reverb", "noise", "microphone"
PATIENCE = timedelta(minutes=10)  # with another process, before it is given up
UNWRITABLE = errno.ENOSPC, errno.EDQUOT, errno.EROFS  # errors of disks
BEST_POSSIBLE_DB = 30.0  # sources estimated better than this teach nothing more

say = rank_zero_only(print)


def separation_loss(estimates, sources, keep_levels=False):
    """Negative SI-SDR in dB under the best permutation of each item, averaged.

    A silent source has no SI-SDR. In its place stands the energy of its estimate as a share of that
    of all estimates, in dB, as by S. Wisdom et al., "What's all the fuss about free universal sound
    separation data?" (ICASSP 2021), but with the estimates for the mixture, since SI-SDR leaves
    their scale open. Neither counts for more than -30.

    SI-SDR leaves also open how loud the estimates are beside each other, of which a model can make
    use where sources are silent: it has the same output 30 dB softer than the others in every
    mixture. `keep_levels` takes that away: instead of SI-SDR it is the SDR of the estimates under
    the one gain, for all of a mixture, with which their sum fits that of the sources best.

    Args:
        estimates (torch.Tensor): (batch, n_src, time).
        sources (torch.Tensor): (batch, n_src, time); silent are those below `SILENT`.
        keep_levels (bool): Whether estimates have to be as loud beside each other as the sources.

    Returns:
        torch.Tensor: The mean over the batch, a scalar.

    Examples:
        >>> sources = torch.randn(3, 2, 4000)
        >>> separation_loss(sources.flip(1), sources)
        tensor(-30.)
        >>> sources[:, 0] = 0
        >>> separation_loss(sources, sources)
        tensor(-30.)
    """
    # under bf16 autocast the best permutation would be rounded to a tenth of a dB
    with torch.autocast(estimates.device.type, enabled=False):
        estimates, sources = estimates.float(), sources.float()
        energy = estimates.square().sum(-1, keepdim=True)
        share = energy / (energy.sum(1, keepdim=True) + 1e-8)
        leak = 10 * torch.log10(share + 10 ** (-BEST_POSSIBLE_DB / 10))
        silent = sources.square().mean(-1) < SILENT**2
        if keep_levels:
            total = estimates.sum(1, keepdim=True)
            fit = (total * sources.sum(1, keepdim=True)).sum(-1, keepdim=True)
            gain = fit / (total.square().sum(-1, keepdim=True) + 1e-8)
            pairwise = pairwise_neg_snr(gain * estimates, sources)
        else:
            pairwise = pairwise_neg_sisdr(estimates, sources)
        pairwise = pairwise.clamp(min=-BEST_POSSIBLE_DB)
        loss, _ = PITLossWrapper.find_best_perm(torch.where(silent[:, None], leak, pairwise))
    return loss.mean()


class SeparationSystem(System):
    """Asteroid's `System` with SI-SDR in its logs and a validation loss that all processes share.

    Its batches are (mixtures, sources): (batch, time) and (batch, n_src, time). A training that has
    silent sources, or speakers who take turns, keeps levels, see `separation_loss`.
    """

    def common_step(self, batch, batch_nb, train=True):
        mixtures, sources = batch
        keep_levels = train and any(self.config.get(key) for key in ("silent_sources", "turns"))
        return self.loss_func(self(mixtures), sources, keep_levels=keep_levels)

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


class Curves(pl.Callback):
    """Draws the curves of a run anew after each validation."""

    def __init__(self, exp_dir):
        self.exp_dir = exp_dir

    def on_validation_end(self, trainer, system):
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # what it still holds of the log
            write_curves(self.exp_dir)


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
        dict: `steps`, `minutes` (all starts together, up to the checkpoints they went on from),
        `val_si_sdr` (best, dB); None in all processes but the first.

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
    if conf["hold_steps"] >= conf["steps"] and not conf["cooldown_steps"]:
        say(
            f"  note: the learning rate never falls: hold_steps {conf['hold_steps']} is not below "
            f"steps {conf['steps']}, and cooldown_steps is 0"
        )
    system = build_system(model, train_speech, valid_set, conf)
    best = checkpoints(exp_dir, "best", monitor="val_loss")
    average = [EMAWeightAveraging(decay=conf["average"])] if conf["average"] else []
    epochs = conf["steps"] // conf["steps_per_epoch"]
    timer = Timer()
    trainer = build_trainer(exp_dir, conf, [*average, best, timer], max_epochs=epochs)
    fit(trainer, system, exp_dir)
    if not trainer.is_global_zero:
        return None
    try:
        weights = load_weights_only(best.best_model_path)["state_dict"]
    except UserError as error:
        raise UserError(
            f"{error}. Without it there is no best model; to train anew, delete "
            f"{exp_dir / 'checkpoints'}"
        ) from None
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    return {
        "steps": trainer.global_step,
        "minutes": round(timer.time_elapsed() / 60, 1),
        "val_si_sdr": -float(best.best_model_score),
    }


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

    Raises:
        UserError: If the machine does not have what is asked for.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    board = TensorBoardLogger(exp_dir, "logs")
    options = dict(
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
    try:
        return pl.Trainer(**options)
    except MisconfigurationException as error:
        where = " ".join(f"--{key} {conf[key]}" for key in ("accelerator", "devices", "num_nodes"))
        raise UserError(f"no training with {where}: {' '.join(str(error).split())}") from None


def fit(trainer, system, exp_dir):
    """Trains on from the last checkpoint if there is one (Trainer, SeparationSystem, Path).

    Raises:
        UserError: If another process of the training or one that mixes died, the disk is full, the
            device lacks memory, the model cannot be compiled there, or somebody stopped it
            (Ctrl-C).
    """
    last = exp_dir / "checkpoints" / "last.ckpt"
    try:
        with quiet_threads():
            trainer.fit(system, ckpt_path=str(last) if last.exists() else None)
    except SystemExit:  # by Lightning, without a word
        if not trainer.interrupted:
            raise
        raise UserError("stopped; the same command continues from the last checkpoint") from None
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(f"{exp_dir} could not be written: {reason(error)}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory for this training; take a smaller --batch_size or "
            "--segment, or --checkpoint_activations true, and another --tag"
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"the model could not be compiled ({str(error).splitlines()[0]}); --compile false "
            "trains without"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):  # by PyTorch, of one that ended without a word
            raise UserError(
                "a process that mixes died, often for lack of memory, in a container of shared "
                "memory; the same command continues from the last checkpoint, with fewer such "
                "processes if you add a lower --num_workers"
            ) from error
        if trainer.world_size == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        raise UserError(
            "another process of the training ended; the same command continues from the last "
            "checkpoint"
        ) from error


@contextlib.contextmanager
def quiet_threads():
    """Without the traceback of TensorBoard's thread on a full disk: it hands its error on, too."""
    before = threading.excepthook

    def hook(told):
        if not (isinstance(told.exc_value, OSError) and told.exc_value.errno in UNWRITABLE):
            before(told)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def strategy(conf):
    """How Lightning trains: in one process, or in several that exchange gradients.

    Raises:
        UserError: If torchrun started another number of processes.
    """
    wanted = conf["devices"] * conf["num_nodes"]
    started = int(os.environ["WORLD_SIZE"]) if is_torchelastic_launched() else wanted
    if started != wanted:  # with one wanted, each would train by itself, in one folder
        raise UserError(
            f"torchrun started {started} process(es), but the run is for {wanted}; prepare it by "
            f"./run.sh --stop_stage 1 with --devices and --num_nodes whose product is {started}"
        )
    if wanted == 1:
        return "auto"
    # buffers are constants, and processes may have unequal numbers of validation batches
    return DDPStrategy(broadcast_buffers=False, timeout=PATIENCE)


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
        recorded=RecordedNoise(conf["noise_dir"]) if conf.get("noise_dir") else None,
        **{key: conf[key] for key in CHANGED if key in conf},
    )
    if isinstance(speech, MixtureList):
        mixtures = RepeatedMixtures(speech, **common)
    else:
        drawn = {key: conf[key] for key in DRAWN if key in conf}
        mixtures = DynamicMixtures(speech, conf["n_src"], **drawn, **common)
    return DataLoader(
        mixtures,
        batch_size=per_process(conf),
        sampler=EpochSampler(size),
        generator=own_generator(conf),
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
        generator=own_generator(conf),
    )


def own_generator(conf):
    """A loader's own chance; by a draw from that of dropout a run that continues would differ."""
    return torch.Generator().manual_seed(conf["seed"])


def precision(conf):
    """Lightning's name of the precision: bf16 on a GPU that has it, or what `conf` says."""
    if conf["precision"] != "auto":
        return conf["precision"]
    on_gpu = conf["accelerator"] != "cpu" and torch.cuda.is_available()
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"
