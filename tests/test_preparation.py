"""Stages 0 and 1 beside the speech itself: where a run lies, what is verified, idle options."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from recipes import ROOT, settings_of
from sounds import level

from asteroid_tiny import evaluation, list_models, preparation
from asteroid_tiny.config import merge
from asteroid_tiny.data import librimix
from asteroid_tiny.data.mixing import render
from asteroid_tiny.preparation import (
    check_options,
    make_lists,
    open_list,
    open_split,
    prepare_speech,
)
from asteroid_tiny.recipe import compare_packaged, recipe_defaults


@pytest.fixture
def recipe(little_speech, tmp_path):
    """The folder of a recipe with speech of its own and its checksums."""
    folder = tmp_path / "egs" / "small" / "TinySepformer"
    shutil.copytree(little_speech, folder / "data")
    return folder


def test_runs_may_lie_on_another_disk(recipe, tmp_path, capsys):
    (tmp_path / "scratch" / "exp").mkdir(parents=True)
    (recipe / "exp").symlink_to(tmp_path / "scratch" / "exp")
    (tmp_path / "local").symlink_to(ROOT / "local")
    settings = settings_of("minispeech", n_valid=2, n_test=2, eval_segment=1.0)
    del settings["noise_dir"]  # which an older run does not have
    for _ in range(2):
        prepare_speech(recipe / "exp" / "run", settings)
        make_lists(recipe / "exp" / "run", settings)
    assert capsys.readouterr().out.count("2 mixtures, made before") == 2
    assert (tmp_path / "scratch" / "exp" / "run" / "lists" / "test.csv").exists()
    assert recipe_defaults(recipe / "exp" / "run")["preset"] == "tiny-sepformer-s"


def test_the_speech_of_the_repository_is_verified_and_nobody_elses(recipe, refused, tmp_path):
    settings = settings_of("minispeech")
    (recipe / "data" / "SHA256SUMS").write_text(f"\n{'0' * 64} *train/wav.scp\n")
    with refused("wav.scp has changed", "git checkout"):
        prepare_speech(recipe / "exp" / "run", settings)
    (recipe / "data" / "SHA256SUMS").write_text(f"{'0' * 64}  gone.flac\n")
    with refused("gone.flac is missing", "git checkout"):
        prepare_speech(recipe / "exp" / "run", settings)
    elsewhere = (recipe / "data").rename(tmp_path / "elsewhere")
    prepare_speech(recipe / "exp" / "run", {**settings, "speech": str(elsewhere)})


def test_recorded_noise_is_looked_at_first(recipe, refused, tmp_path, capsys):
    settings = settings_of("minispeech", noise=0.5, noise_dir=str(tmp_path / "noises"))
    with refused("there is no folder", "noises"):
        prepare_speech(recipe / "exp" / "run", settings)
    (tmp_path / "noises").mkdir()
    sf.write(tmp_path / "noises" / "fan.wav", np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    prepare_speech(recipe / "exp" / "run", settings)
    told = " ".join(capsys.readouterr().out.split())
    assert "noise 1 recordings 0.1 minutes" in told
    sf.write(tmp_path / "noises" / "fan.wav", np.full(48000, np.nan), 16000, subtype="FLOAT")
    with refused("1 fault(s)"):
        make_lists(recipe / "exp" / "run", settings)


def test_speech_that_would_stop_a_training_stops_it_before(recipe, refused):
    settings, exp_dir = settings_of("minispeech"), recipe / "exp" / "run"
    with refused("has 3 speaker(s)", "mixtures of 4"):
        prepare_speech(exp_dir, {**settings, "n_src": 4})
    spoilt = next((recipe / "data" / "train").glob("*.wav"))
    sf.write(spoilt, np.full(8000, np.nan), 8000, subtype="FLOAT")
    with refused("1 fault(s) in the speech", "--check false"):
        make_lists(exp_dir, settings)
    make_lists(exp_dir, {**settings, "check": False})
    assert not (exp_dir / "check.txt").exists()
    table = recipe / "data" / "valid" / "utt2spk"
    whose = table.read_text().split()[1]
    table.write_text(table.read_text().replace(f" {whose}\n", f" {spoilt.stem}\n"))
    with refused(f"speaker {spoilt.stem!r} is in train and in valid"):
        prepare_speech(exp_dir, settings)


def test_fewer_mixtures_than_a_corpus_lists_are_spread_over_all(monkeypatch):
    monkeypatch.setattr(preparation, "open_split", lambda *_: None)
    monkeypatch.setattr(preparation, "open_noise", lambda *_: None)
    monkeypatch.setattr(librimix, "mixtures", lambda *_: list(range(10)))
    settings = {"corpus": "librimix", "n_valid": 20, "n_test": 3}
    taken = [preparation.take_list(None, settings, split) for split in ("valid", "test")]
    assert taken == [list(range(10)), [0, 3, 6]]


def test_lists_are_drawn_as_the_settings_say(recipe):
    changes = dict(n_valid=6, n_test=3, segment=0.5, eval_segment=1.0, overlap_ratio=0.0, max_gap=0)
    exp_dir, drawn = recipe / "exp" / "run", []
    for seeds in ({}, {"test_seed": 1}, {"valid_seed": 1}):
        settings = settings_of("minispeech", check=False, **changes, **seeds)
        make_lists(exp_dir, settings)
        drawn.append([open_list(exp_dir, settings, split).mixtures for split in ("valid", "test")])
        shutil.rmtree(exp_dir / "lists")
    (valid, test), (same, other), (another, same_test) = drawn
    assert valid == same != another and test == same_test != other
    assert (len(valid), len(test)) == (6, 3)
    for mixture in valid:
        first, second = mixture.sources
        assert mixture.length == 8000 and second.offset == 4000 == first.length
        _, sources = render(open_split(exp_dir, settings, "valid"), mixture)
        assert level(sources[0]) == pytest.approx(level(sources[1]), abs=0.01)


@pytest.mark.parametrize(
    "option, words",
    [
        (["--corpus", "librimix"], "take --recipe librimix"),
        (["--speech", ""], "option --speech needs a value"),
    ],
)
def test_options_that_name_nothing_are_refused(option, words):
    command = [sys.executable, ROOT / "local" / "configure.py", "minispeech", "none", *option]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("corpus", "given", "words"),
    [
        ("librimix", {"colour": 6.0}, ("--colour", "its own training", "--dynamic_mixing true")),
        ("librimix", {"overlap_ratio": 0.5}, ("--overlap_ratio", "librimix")),
        ("librimix", {"colour": 6.0, "dynamic_mixing": True}, None),
        ("wsj0-mix", {"least_overlap": 0.2}, None),
        ("librimix", {"turns": 0.5}, ("--turns", "its own training")),
        ("wsj0-mix", {"eval_segment": 2.0}, ("--eval_segment", "its own validation and test")),
        ("wsj0-mix", {"valid_seed": 101}, None),  # as it is
        ("wsj0-mix", {"mode": "Max"}, ("mode must be min or max",)),
        ("wsj0-mix", {"sample_rate": 8}, ("sample_rate must be 8000 or 16000", "WSJ0-mix")),
        ("librimix", {"subset": "train-clean-100"}, ("subset must be train-100",)),
        ("minispeech", {"dynamic_mixing": False}, ("needs dynamic_mixing true",)),
        ("minispeech", {"batch_size": 3, "devices": 2}, ("cannot be shared out",)),
        ("wsj0-mix", {"least_overlap": 0.9, "overlap_ratio": 0.2}, ("--least_overlap 0.9",)),
        ("minispeech", {"least_overlap": 0.2, "overlap_ratio": 0.2}, ("--least_overlap 0.2",)),
        ("librimix", {"silent_sources": 0.1, "reverb": 0.5, "noise": 0.5}, None),
        ("minispeech", {"eval_segment": 2.0, "colour": 3.0}, None),
        ("minispeech", {"noise_dir": "noises"}, ("--noise_dir", "without --noise")),
        ("minispeech", {"noise_dir": "noises", "noise": 0.5}, None),
    ],
)
def test_options_that_change_nothing_or_do_not_fit_are_refused(corpus, given, words, refused):
    defaults = settings_of(corpus)
    settings = merge(defaults, given, "test")
    if words is None:
        check_options(settings, defaults, given)
        return
    with refused(*words):
        check_options(settings, defaults, given)


def test_a_figure_of_the_packaged_weights_is_not_that_of_other_speech(
    recipe, monkeypatch, capsys, summary, refused
):
    settings = settings_of("minispeech", n_valid=2, n_test=2, eval_segment=1.0, eval_workers=3)
    exp_dir, evaluated = recipe / "exp" / "run", []

    def evaluate(model, mixtures, folder, device, n_workers):
        evaluated.append(folder)
        assert (device, n_workers) == ("cpu", 3)
        assert (model.n_src, model.sample_rate) == (2, 8000)
        found = copy.deepcopy(summary)
        found["groups"]["all"]["si_sdr_i"]["mean"] = float(len(evaluated))
        (folder / "summary.json").write_text(json.dumps(found))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    prepare_speech(exp_dir, settings)
    make_lists(exp_dir, settings)
    compare_packaged(exp_dir, settings)
    compare_packaged(exp_dir, settings)
    n_fitting = len(evaluated)
    assert [folder.name.partition("_2spk_8k_")[0] for folder in evaluated] == [
        "tiny-sepformer-xs-stride16",
        "tiny-sepformer-xs",
    ], "once for each model that a CPU has the time for"
    for path in (recipe / "data" / "test").glob("*.wav"):
        samples, rate = sf.read(path)
        sf.write(path, -samples, rate)
    compare_packaged(exp_dir, settings)
    assert len(set(evaluated)) == len(evaluated) == 2 * n_fitting
    others = {name: {**about, "sha256": "0"} for name, about in list_models().items()}
    monkeypatch.setattr("asteroid_tiny.recipe.list_models", lambda: others)
    compare_packaged(exp_dir, settings)
    assert len(set(evaluated)) == len(evaluated) == 3 * n_fitting, "and of other weights"
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"SI-SDRi of {len(evaluated)}.00 dB" in last
    (evaluated[-1] / "summary.json").write_text("[]")
    with refused(evaluated[-1] / "summary.json", "delete it and run stage 3"):
        compare_packaged(exp_dir, settings)


def test_a_gpu_has_the_time_for_more_of_the_packaged_weights(recipe, monkeypatch, summary, capsys):
    settings = settings_of("minispeech", n_valid=2, n_test=2, eval_segment=1.0)
    exp_dir, evaluated = recipe / "exp" / "run", []
    summary = copy.deepcopy(summary)
    summary["groups"]["all"]["si_sdr_i"]["mean"] = None  # nothing could be measured

    def evaluate(model, mixtures, folder, device, *_):
        evaluated.append((folder.name.partition("_2spk_8k_")[0], device))
        (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    prepare_speech(exp_dir, settings)
    make_lists(exp_dir, settings)
    compare_packaged(exp_dir, settings)
    n_on_cpu = len(evaluated)
    compare_packaged(exp_dir, {**settings, "accelerator": "auto"})
    assert evaluated[n_on_cpu:] == [("tiny-sepformer-xs-stride8", "cuda")]
    assert {device for _, device in evaluated[:n_on_cpu]} == {"cpu"}
    assert "dB on the same mixtures" not in capsys.readouterr().out
