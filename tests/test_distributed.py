"""Training in two processes: as one, or ended with a sentence when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from asteroid_tiny.data import SharedOut
from asteroid_tiny.training import per_process, strategy

ROOT = Path(__file__).resolve().parents[1]
SHORT = """--n_filters 16 --kernel_size 64 --stride 32 --bn_chan 16 --ff_hid 16 --n_heads 2
    --n_repeats 1 --n_intra_layers 1 --n_inter_layers 1 --batch_size 4 --segment 1 --warmup_steps 2
    --cooldown_steps 5 --n_valid 5 --n_test 6 --eval_segment 1 --accelerator cpu --check false
    --num_workers 0""".split()


def start(tag, *options):
    command = [str(ROOT / "run.sh"), "--python_path", sys.executable, "--tag", tag]
    return subprocess.Popen(
        [*command, "--stage", "1", "--stop_stage", "2", *SHORT, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("size, world_size", [(7, 2), (8, 2), (2, 3)])
def test_items_are_shared_out_once_each(size, world_size):
    shares = [list(SharedOut(size, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(size))
    assert [len(SharedOut(size, rank, world_size)) for rank in range(world_size)] == list(
        map(len, shares)
    )


def test_a_batch_that_cannot_be_shared_out_is_refused(refused):
    assert per_process(dict(batch_size=4, devices=2, num_nodes=2)) == 1
    with refused("batch_size of 4", "3 processes"):
        per_process(dict(batch_size=4, devices=3, num_nodes=1))


def test_another_number_of_processes_is_refused(refused, monkeypatch):
    alone = dict(devices=1, num_nodes=1)
    assert strategy(alone) == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")  # by somebody else
    assert strategy(alone) == "auto"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with refused("torchrun started 2", "the run is for 1"):
        strategy(alone)
    assert strategy(dict(devices=1, num_nodes=2)) != "auto"


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(run_folder):
    found = []
    for devices in ("1", "2"):
        exp = run_folder("minispeech")
        options = ("--steps", "10", "--steps_per_epoch", "5", "--devices", devices)
        process = start(exp.name, *options)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        weights = torch.load(exp / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        log = pd.read_csv(next(exp.glob("logs/*/metrics.csv")))
        found.append((weights, log["val_loss"].dropna().to_numpy()))
        assert (exp / "best_model.pth").exists()
        assert len(list(exp.glob("logs/*"))) == 1, "one process writes"
    (weights, losses), (weights_of_two, losses_of_two) = found
    for key, value in weights.items():
        if key.endswith("key.bias"):  # softmax cancels it: its gradient is rounding alone
            continue
        torch.testing.assert_close(weights_of_two[key], value, rtol=0, atol=1e-5)
    assert len(losses) == 2 and abs(losses - losses_of_two).max() < 1e-4


@pytest.mark.slow
def test_a_killed_process_ends_the_training(run_folder):
    exp = run_folder("minispeech")
    options = ("--steps", "100000", "--steps_per_epoch", "20", "--devices", "2")
    process = start(exp.name, *options)
    deadline = time.monotonic() + 400
    while not (exp / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(1)
    trainers = subprocess.run(
        ["pgrep", "-f", f"train.py.*{exp.name}"], capture_output=True, text=True
    )
    first, second = sorted(map(int, trainers.stdout.split()))
    os.kill(second, signal.SIGKILL)
    text, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: another process of the training ended" in text, text[-2000:]
