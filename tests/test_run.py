"""run.sh as a user runs it: options, the stages on real speech, a kill and a continuation."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile as sf
import torch
import yaml

from asteroid_tiny import TinySepformer

ROOT = Path(__file__).resolve().parents[1]
EXP = ROOT / "egs" / "minispeech" / "TinySepformer" / "exp"
SHORT = """--n_filters 64 --bn_chan 32 --ff_hid 32 --n_heads 2 --n_repeats 1 --n_intra_layers 1
    --n_inter_layers 1 --steps 30 --steps_per_epoch 10 --batch_size 2 --segment 1 --warmup_steps 5
    --cooldown_steps 10 --n_valid 6 --n_test 6 --eval_segment 2 --accelerator cpu""".split()


def command(*options):
    return [str(ROOT / "run.sh"), "--python_path", sys.executable, *options]


def run(*options):
    return subprocess.run(command(*options), capture_output=True, text=True, timeout=900)


def refusal(*options):
    """The sentence with which run.sh refuses options."""
    done = run(*options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.fixture
def tag():
    """A name for a run, whose folder goes in the end."""
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    shutil.rmtree(EXP / name, ignore_errors=True)


def test_stages_in_the_wrong_order_are_refused():
    done = run("--stage", "3", "--stop_stage", "2")
    assert done.returncode != 0 and "--stop_stage 2 comes before --stage 3" in done.stderr


def test_help_lists_every_setting_with_the_default_of_the_recipe():
    text = run("--help").stdout
    for section in yaml.safe_load((ROOT / "local" / "conf.yml").read_text()).values():
        for key in section:
            assert f"--{key} " in text
    recipe = yaml.safe_load(
        (ROOT / "egs" / "minispeech" / "TinySepformer" / "conf.yml").read_text()
    )
    (line,) = [line for line in text.splitlines() if "--steps " in line]
    assert line.endswith(f"({recipe['training']['steps']})")
    assert "--stop_stage" in text and "--python_path" in text


@pytest.mark.parametrize(
    "options, words",
    [
        (["--speed", "3"], "no option --speed"),
        (["stage", "0"], "stage is no option"),
        (["--stage"], "--stage needs a value"),
        (["--stage", "four"], "must be a stage from 0 to 6, not 'four'"),
        (["--stage", "-1"], "must be a stage"),
        (["--recipe", "none"], "no recipe 'none'; there are: librimix minispeech"),
        (["--tag", "../x"], "must be a plain name"),
        (["--tag", "a::b"], "must be a plain name"),  # which is two addresses to Lightning
        (["--tag", 61 * "x"], "at most 60 characters"),
        (["--python_path", ""], "--python_path needs a value"),
        (["--python_path", "/no/python"], "/no/python is no program"),
        (["--steps", "many"], "steps must be a whole number, not 'many'"),
        (["--lr=-1"], "lr must be above 0"),
        (["--preset", "huge"], "no preset 'huge'"),
        (["--n_heads", "7"], "n_heads (7) must divide"),
        (["--sample_rate", "16000", "--tag", "TAG"], "has 8000 Hz where 16000 Hz are needed"),
        (["--n_src", "5", "--tag", "TAG"], "has 4 speaker(s); mixtures of 5 need at least 5"),
    ],
)
def test_bad_options_get_one_sentence(options, words, tag):
    assert words in refusal(*(tag if option == "TAG" else option for option in options))


def test_a_python_without_the_packages_is_told_what_to_install(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = tmp_path / "bare" / "bin" / "python"
    line = refusal("--python_path", str(bare))
    assert f"{bare} lacks packages (No module named 'numpy'); run: {bare} -m pip" in line


def test_stages_from_speech_to_results(tag):
    done = run("--stage", "0", "--stop_stage", "4", "--tag", tag, *SHORT)
    assert done.returncode == 0, done.stderr
    exp = EXP / tag
    for words in ("Stage 0", "Stage 4", "SI-SDRi", "ammdomus.it", "10 speakers"):
        assert words in done.stdout
    with open(exp / "results" / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 6
    summary = json.loads((exp / "results" / "summary.json").read_text())
    assert summary["n_mixtures"] == 6 and summary["n_speakers"] == 4
    wav, rate = sf.read(next(exp.glob("results/examples/best_*/estimate_1.wav")))
    assert rate == 8000 and len(wav) == 16000 and wav.any()
    assert "ammdomus.it" in (exp / "results" / "report.html").read_text()
    assert "polyline" in (exp / "training.svg").read_text()
    model = TinySepformer.from_pretrained(exp / "best_model.pth")
    assert model.separate(torch.randn(1, 8000)).shape == (1, 2, 8000)
    assert json.loads((exp / "training.json").read_text())["steps"] == 30
    published = TinySepformer.from_pretrained(exp / "publish").state_dict()
    assert all(torch.equal(published[key], value) for key, value in model.state_dict().items())
    card = (exp / "publish" / "README.md").read_text()
    for words in (
        "GPL-2",
        "ammdomus.it",
        "30 steps",
        "on a CPU",
        "SI-SDRi",
        "--n_filters 64",
        "minispeech",
    ):
        assert words in " ".join(card.split())

    kept = {path: path.stat().st_mtime_ns for path in exp.rglob("*.pth")}
    again = run("--stage", "2", "--tag", tag)  # each says that it is done, and does nothing
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") >= 2
    assert kept == {path: path.stat().st_mtime_ns for path in exp.rglob("*.pth")}
    assert "was begun with steps 30, not 31" in refusal("--tag", tag, "--steps", "31")

    (exp / "best_model.pth").write_bytes(b"no model")
    shutil.rmtree(exp / "results")
    assert "best_model.pth is broken" in refusal("--stage", "3", "--tag", tag)


def test_a_killed_run_continues_and_ends_alike(tag, little_speech):
    options = [*SHORT, "--speech", str(little_speech)]
    whole, killed = f"{tag}-whole", f"{tag}-killed"
    try:
        assert run("--stop_stage", "2", "--tag", whole, *options).returncode == 0
        process = subprocess.Popen(
            command("--stop_stage", "2", "--tag", killed, *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        last = EXP / killed / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 200
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (EXP / killed / "best_model.pth").exists()
        assert torch.load(last, weights_only=True)["global_step"] < 30
        done = run("--stage", "2", "--stop_stage", "2", "--tag", killed, *options)
        assert done.returncode == 0, done.stderr
        ends = [
            torch.load(EXP / name / "checkpoints" / "last.ckpt", weights_only=True)
            for name in (whole, killed)
        ]
        assert ends[0]["global_step"] == ends[1]["global_step"] == 30
        for key, value in ends[0]["state_dict"].items():
            torch.testing.assert_close(ends[1]["state_dict"][key], value, rtol=1e-3, atol=1e-5)
        scores = [json.loads((EXP / n / "training.json").read_text()) for n in (whole, killed)]
        assert abs(scores[0]["val_si_sdr"] - scores[1]["val_si_sdr"]) < 0.3
    finally:
        for name in (whole, killed):
            shutil.rmtree(EXP / name, ignore_errors=True)


@pytest.mark.slow
def test_the_default_run_separates_speakers_it_never_heard(tag):
    began = time.monotonic()
    done = subprocess.run(
        command("--stage", "0", "--tag", tag, "--accelerator", "cpu"),
        capture_output=True,
        text=True,
    )
    print(done.stdout[-3000:], f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    assert done.returncode == 0, done.stderr
    summary = json.loads((EXP / tag / "results" / "summary.json").read_text())
    improvement = summary["groups"]["all"]["si_sdr_i"]
    assert summary["n_mixtures"] >= 300
    assert improvement["mean"] > 1.5 and improvement["low"] > 0.5
