"""Recipes with the smallest of models, run through their stages in this process."""

from pathlib import Path

import numpy as np
import soundfile as sf

from asteroid_tiny.config import merge, read_recipe
from asteroid_tiny.data import SpeechDir
from asteroid_tiny.preparation import make_lists, prepare_speech
from asteroid_tiny.recipe import evaluate_model, train_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    n_filters=32,
    bn_chan=32,
    ff_hid=32,
    n_heads=2,
    n_repeats=1,
    n_intra_layers=1,
    n_inter_layers=1,
    chunk_size=50,
    steps=4,
    steps_per_epoch=2,
    batch_size=2,
    segment=0.5,
    accelerator="cpu",
    num_workers=0,
    eval_workers=0,
)


def settings_of(recipe, **changes):
    """The settings of a recipe, small and with some changes, as options are given."""
    settings = read_recipe(
        ROOT / "local" / "conf.yml", ROOT / "egs" / recipe / "TinySepformer" / "conf.yml"
    )
    return merge(settings, {**SMALL, **changes}, "test")


def run_stages(exp_dir, settings):
    """Stages 0 to 3."""
    for stage in (prepare_speech, make_lists, train_model, evaluate_model):
        stage(exp_dir, settings)


def prepare(tmp_path, recipe, **changes):
    """Runs stages 0 and 1: the folder of the run, and its settings."""
    settings = settings_of(recipe, **changes)
    exp_dir = tmp_path / "recipe" / "exp" / "run"
    prepare_speech(exp_dir, settings)
    make_lists(exp_dir, settings)
    return exp_dir, settings


def few_minutes(pack, folder):
    """Writes a part of the embedded speech: 20 s of three speakers a split, as wav files."""
    for split in ("train", "valid", "test"):
        speech = SpeechDir(pack / split)
        (folder / split).mkdir(parents=True)
        speakers = list(speech.by_speaker)[:3]
        for speaker in speakers:
            samples = [speech.read(utterance) for utterance in speech.by_speaker[speaker][:5]]
            sf.write(folder / split / f"{speaker}.wav", np.concatenate(samples)[:160000], 8000)
        (folder / split / "wav.scp").write_text("".join(f"{s} {s}.wav\n" for s in speakers))
        (folder / split / "utt2spk").write_text("".join(f"{s} {s}\n" for s in speakers))
    return folder
