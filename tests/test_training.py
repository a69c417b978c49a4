"""Training on real speech: loss, schedule, checkpoints, and what goes wrong."""

import csv
import errno
import math
import multiprocessing
import os
import random
import signal
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile as sf
import torch
from sounds import RATE, peak_frequency, tone
from tensorboard.summary.writer.record_writer import RecordWriter

from asteroid_tiny import TinySepformer, UserError, training
from asteroid_tiny.checkpointing import RandomStates, WholeCheckpoints
from asteroid_tiny.config import read_conf
from asteroid_tiny.data import MixtureList, SpeechDir, draw_list, write_list
from asteroid_tiny.report import write_curves
from asteroid_tiny.schedule import Schedule
from asteroid_tiny.training import separation_loss, train

SIZES = dict(n_filters=16, kernel_size=32, stride=16, bn_chan=16, ff_hid=16, n_heads=2)
DEPTH = dict(chunk_size=20, n_repeats=1, n_intra_layers=1, n_inter_layers=1)
CONF = read_conf(Path(__file__).resolve().parents[1] / "local" / "conf.yml") | dict(
    n_src=2,
    segment=0.5,
    max_gap=5.0,
    speed_perturb=5,
    colour=3.0,
    seed=3,
    steps=8,
    steps_per_epoch=2,
    batch_size=2,
    lr=1e-3,
    weight_decay=0.0,
    grad_clip=5.0,
    warmup_steps=2,
    patience=1,
    cooldown_steps=2,
    accelerator="cpu",
    precision="auto",
    num_workers=0,
)


@pytest.fixture(scope="module")
def speech(pack):
    return SpeechDir(pack / "train")


@pytest.fixture
def valid(valid_speech, tmp_path):
    write_list(tmp_path / "valid.csv", draw_list(valid_speech, 4, 2, 4000, seed=1), 8000)
    return MixtureList(valid_speech, tmp_path / "valid.csv")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinySepformer(2, **SIZES, **DEPTH)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_in_a_sentence(model, speech, valid, tmp_path, refused):
    with refused("no training with --accelerator gpu --devices 1", "gpu"):
        train(model, speech, valid, tmp_path, CONF | {"accelerator": "gpu"})


@pytest.mark.parametrize(
    "other",
    [
        dict(max_gap=0.0),
        dict(overlap_ratio=0.5),
        dict(least_overlap=0.2),
        dict(turns=1.0),
        dict(silent_sources=1.0),
        dict(reverb=1.0),
        dict(noise=1.0),
        dict(microphone=1.0),
        dict(level_spread=0.0),
        dict(colour=0.0),
        dict(speed_perturb=0),
        dict(segment=1.0),
        dict(seed=4),
    ],
)
def test_settings_of_the_mixtures_reach_them(speech, other):
    mixture, changed = (
        training.training_loader(speech, x).dataset[0][0] for x in (CONF, CONF | other)
    )
    assert mixture.shape != changed.shape or not torch.equal(mixture, changed)


def test_settings_of_the_mixtures_of_a_list_reach_them(valid):
    others = dict.fromkeys(("silent_sources", "reverb", "noise", "microphone"), 1.0)
    for other in (others | dict(seed=4, speed_perturb=0)).items():
        mixture, changed = (
            training.training_loader(valid, x).dataset[0][0] for x in (CONF, CONF | dict([other]))
        )
        assert not torch.equal(mixture, changed)


def test_voices_are_as_often_faster_as_slower(speech):
    speeds = training.training_loader(speech, CONF).dataset.draw["speeds"]
    assert list(speeds) == list(range(95, 106))


def test_recorded_noise_reaches_the_mixtures(speech, tmp_path):
    sf.write(tmp_path / "hum.wav", tone(1000), RATE)
    conf = CONF | dict(noise=1.0, noise_dir=str(tmp_path), colour=0.0)
    mixture, sources = training.training_loader(speech, conf).dataset[0]
    assert peak_frequency(mixture - sources.sum(0)) == pytest.approx(1000, abs=2)


def test_settings_of_the_training_reach_it(model, speech, valid, tmp_path):
    told = dict(lr=0.02, weight_decay=0.03, grad_clip=4.0, warmup_steps=0, patience=7)
    told |= dict(cooldown_steps=6, hold_steps=5)
    system = training.build_system(model, speech, valid, CONF | told)
    (group,), schedule = system.optimizer.param_groups, system.scheduler["scheduler"]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.03)
    found = (schedule.warmup_steps, schedule.cooldown_steps, schedule.patience, schedule.hold_steps)
    assert found == (0, 6, 7, 5) and schedule.total_steps == CONF["steps"]
    trainer = training.build_trainer(tmp_path, CONF | told, [], max_epochs=1)
    assert trainer.gradient_clip_val == 4.0


def test_the_seed_is_that_of_dropout_too(model, speech, valid):
    drawn = []
    for seed in (3, 3, 4):
        training.build_system(model, speech, valid, CONF | {"seed": seed})
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_schedule_hears_of_every_validation(model, speech, valid, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(Schedule, "observe", lambda self, loss: heard.append(float(loss)))
    train(model, speech, valid, tmp_path, CONF)
    rows = csv.DictReader(next((tmp_path / "logs").glob("*/metrics.csv")).open())
    logged = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert heard == pytest.approx(logged, abs=1e-4) and len(heard) == 4


def test_training_goes_on_as_if_it_had_not_been_interrupted(speech, valid, tmp_path):
    depth = {**DEPTH, "dropout": 0.1}
    model = TinySepformer(2, **SIZES, **depth)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = train(model, speech, valid, tmp_path / "whole", CONF)
    assert outcome["steps"] == 8
    again = TinySepformer(2, **SIZES, **depth)
    again.load_state_dict(start)

    class Interrupted(Exception):
        pass

    class Dies:
        """Speech that is gone in the middle of the third epoch."""

        n_reads = 0

        def __getattr__(self, name):
            return getattr(speech, name)

        def read(self, *args):
            self.n_reads += 1
            if self.n_reads > 2.3 * len(drawn) / 4:
                raise Interrupted
            return speech.read(*args)

    drawn = []
    counting = Dies()
    counting.read = lambda *args: drawn.append(1) or speech.read(*args)
    train(TinySepformer(2, **SIZES, **depth), counting, valid, tmp_path / "count", CONF)
    with pytest.raises(Interrupted):
        train(again, Dies(), valid, tmp_path / "broken", CONF)
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 4
    state["callbacks"]["Timer"]["time_elapsed"]["train"] += 3600
    torch.save(state, last)
    other = TinySepformer(2, **SIZES, **depth)
    resumed = train(other, speech, valid, tmp_path / "broken", {**CONF, "num_workers": 1})
    assert 60 <= resumed["minutes"] < 62 > outcome["minutes"] + 60
    assert resumed["val_si_sdr"] == pytest.approx(outcome["val_si_sdr"], abs=1e-4)
    ends = [
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in ("whole", "broken")
    ]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 8
    for key, value in ends[0]["state_dict"].items():
        torch.testing.assert_close(ends[1]["state_dict"][key], value, rtol=1e-4, atol=1e-6)
    assert list((tmp_path / "broken" / "logs").glob("*/metrics.csv"))
    assert list((tmp_path / "broken" / "logs").glob("*/events.*"))


def test_the_states_of_all_random_generators_come_back(tmp_path):
    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.rand(1).item()

    draw()
    WholeCheckpoints().save_checkpoint(RandomStates().state_dict(), tmp_path / "states.ckpt")
    drawn = draw()
    assert not set(draw()) & set(drawn)
    states = WholeCheckpoints().load_checkpoint(tmp_path / "states.ckpt")
    RandomStates().load_state_dict(states)
    assert draw() == drawn


def test_a_training_stopped_by_ctrl_c_says_how_it_goes_on(
    model, speech, valid, tmp_path, monkeypatch, refused
):
    class Hand(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    build_trainer = training.build_trainer
    monkeypatch.setattr(
        training, "build_trainer", lambda f, conf, c, **o: build_trainer(f, conf, [Hand(), *c], **o)
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        with refused("stopped; the same command continues"):
            train(model, speech, valid, tmp_path, CONF)
    finally:
        signal.signal(signal.SIGINT, before)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_a_training_that_moves_keeps_its_best_weights(model, speech, valid, tmp_path):
    best = train(model, speech, valid, tmp_path / "here", {**CONF, "steps": 4})
    (tmp_path / "here").rename(tmp_path / "there")
    other = TinySepformer(2, **SIZES, **DEPTH)
    again = train(other, speech, valid, tmp_path / "there", {**CONF, "steps": 4})
    assert again == best
    spoilt = tmp_path / "there" / "checkpoints" / "last.ckpt"
    state = torch.load(spoilt, weights_only=True)
    state["state_dict"] = {k: torch.zeros_like(v) for k, v in state["state_dict"].items()}
    torch.save(state, spoilt)
    worse = train(other, speech, valid, tmp_path / "there", {**CONF, "steps": 6, "lr": 1e-9})
    assert worse["val_si_sdr"] == best["val_si_sdr"] and worse["steps"] == 6
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_a_short_training_reaches_its_learning_rate_and_says_what_it_changed(
    model, speech, valid, tmp_path, capsys
):
    train(model, speech, valid, tmp_path, {**CONF, "steps": 5, "cooldown_steps": 10})
    told = "for whole epochs and the whole schedule: steps 4, warmup_steps 0, cooldown_steps 3"
    said = capsys.readouterr().out
    assert told in said and "never falls" not in said
    train(
        model,
        speech,
        valid,
        tmp_path / "flat",
        {**CONF, "steps": 2, "hold_steps": 2, "cooldown_steps": 0},
    )
    assert "note: the learning rate never falls: hold_steps 2" in capsys.readouterr().out


class Weights(pl.Callback):
    """All weights after each step, as one vector."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, system, *_):
        self.seen.append(torch.cat([p.detach().flatten() for p in system.model.parameters()]))


def test_averaged_weights_are_kept_and_go_on_after_an_interruption(
    model, speech, valid, tmp_path, monkeypatch
):
    watch, build_trainer = Weights(), training.build_trainer
    monkeypatch.setattr(
        training,
        "build_trainer",
        lambda folder, conf, callbacks, **options: build_trainer(
            folder, conf, [watch, *callbacks], **options
        ),
    )
    conf = {**CONF, "average": 0.7, "cooldown_steps": 0}
    train(model, speech, valid, tmp_path, {**conf, "steps": 4})
    again = TinySepformer(2, **SIZES, **DEPTH)
    train(again, speech, valid, tmp_path, conf)
    assert len(watch.seen) == 8
    average = watch.seen[0]
    for weights in watch.seen[1:]:
        average = 0.7 * average + 0.3 * weights
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    kept = torch.cat([value.flatten() for value in last["state_dict"].values()])
    torch.testing.assert_close(kept, average, rtol=1e-4, atol=1e-6)
    assert (kept - watch.seen[-1]).abs().max() > 1e-4


@pytest.mark.slow
def test_a_compiled_model_trains_and_is_stored_as_any_other(model, speech, valid, tmp_path):
    train(model, speech, valid, tmp_path / "plain", CONF)
    torch.manual_seed(0)
    twin = TinySepformer(2, **SIZES, **DEPTH)
    train(twin, speech, valid, tmp_path / "compiled", {**CONF, "compile": True})
    twin.save(tmp_path / "model.pth")
    stored = TinySepformer.from_pretrained(tmp_path / "model.pth").state_dict()
    assert stored.keys() == model.state_dict().keys()
    mixture = valid[0][0][None]
    with torch.no_grad():
        plain, compiled = (m.eval()(mixture) for m in (model, twin))
    assert separation_loss(compiled, plain) < -25


def test_curves_are_drawn_after_every_validation(model, speech, valid, tmp_path, monkeypatch):
    n_points = []

    def look(exp_dir):
        write_curves(exp_dir)
        root = ElementTree.parse(exp_dir / "training.svg").getroot()
        lines = [line.get("points") for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
        n_points.append([len(line.split()) for line in lines])

    monkeypatch.setattr(training, "write_curves", look)
    train(model, speech, valid, tmp_path, {**CONF, "steps": 20, "steps_per_epoch": 10})
    assert n_points == [[1, 1, 1], [2, 2, 2]]  # every tenth step, validations, rates


def test_the_best_weights_are_given_back(model, speech, valid, tmp_path):
    outcome = train(model, speech, valid, tmp_path, {**CONF, "lr": 0.3, "warmup_steps": 0})
    with torch.no_grad():
        batch = [torch.stack(part) for part in zip(*(valid[i] for i in range(4)))]
        val_si_sdr = -separation_loss(model.eval()(batch[0]), batch[1]).item()
    assert val_si_sdr == pytest.approx(outcome["val_si_sdr"], abs=1e-3)


def test_validation_mixtures_of_unequal_lengths_go_one_at_a_time(valid):
    assert [len(mixtures) for mixtures, _ in training.validation_loader(valid, CONF)] == [2, 2]
    valid.mixtures[0] = valid.mixtures[0]._replace(length=3000)
    sizes = [tuple(mixtures.shape) for mixtures, _ in training.validation_loader(valid, CONF)]
    assert sizes == [(1, 3000)] + 3 * [(1, 4000)]


def test_every_validation_mixture_counts_alike(model, speech, valid, tmp_path):
    del valid.mixtures[3:]  # a batch of two, and one of one
    outcome = train(model, speech, valid, tmp_path, {**CONF, "steps": 2})
    with torch.no_grad():
        losses = [separation_loss(model.eval()(x[None]), s[None]) for x, s in valid]
    assert outcome["val_si_sdr"] == pytest.approx(-float(sum(losses)) / 3, abs=1e-3)


def test_a_broken_checkpoint_is_named(model, speech, valid, tmp_path):
    train(model, speech, valid, tmp_path, {**CONF, "steps": 2})
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"last\.ckpt is broken.*delete it"):
        train(model, speech, valid, tmp_path, CONF)


def test_a_broken_best_checkpoint_is_named_with_a_way_on(
    model, speech, valid, tmp_path, monkeypatch, refused
):
    fit = training.fit

    def break_it(*args):
        fit(*args)
        (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"PK")

    monkeypatch.setattr(training, "fit", break_it)
    with refused("best.ckpt is broken", "to train anew, delete", "checkpoints"):
        train(model, speech, valid, tmp_path, {**CONF, "steps": 2})


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_checkpoint(model, speech, valid, tmp_path, monkeypatch):
    train(model, speech, valid, tmp_path, {**CONF, "steps": 2})
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(model, speech, valid, tmp_path, {**CONF, "steps": 4})
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))


def test_a_full_disk_under_the_logs_is_told_without_a_traceback(
    model, speech, valid, tmp_path, monkeypatch, refused
):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(RecordWriter, "write", full)  # in a thread of TensorBoard's
    with refused(f"{tmp_path} could not be written: the disk is full"):
        train(model, speech, valid, tmp_path, CONF)
    assert told == []


def test_too_little_memory_is_told_in_one_sentence(model, speech, valid, tmp_path, monkeypatch):
    def loss(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training, "separation_loss", loss)
    with pytest.raises(UserError, match="too little memory.*a smaller --batch_size"):
        train(model, speech, valid, tmp_path, CONF)


def test_a_process_that_mixes_and_dies_is_told(
    model, speech, valid, tmp_path, monkeypatch, refused
):
    class Hand(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                    process.join()

    others = set(multiprocessing.active_children())
    build_trainer = training.build_trainer
    monkeypatch.setattr(
        training, "build_trainer", lambda f, conf, c, **o: build_trainer(f, conf, [Hand(), *c], **o)
    )
    with refused("a process that mixes died", "--num_workers"):
        train(model, speech, valid, tmp_path, {**CONF, "num_workers": 1, "steps": 40})
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4


def test_a_model_that_cannot_be_compiled_is_told(model, speech, valid, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise torch._inductor.exc.InductorError(RuntimeError("no compiler"), None)

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=backend))
    with pytest.raises(UserError, match=r"compiled \(RuntimeError: no compiler\); --compile false"):
        train(model, speech, valid, tmp_path, {**CONF, "compile": True})


def test_a_loss_that_is_no_number_ends_the_training(model, speech, valid, tmp_path):
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="loss became nan at step 0"):
        train(model, speech, valid, tmp_path, CONF)
