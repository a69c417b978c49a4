"""The stages of a recipe, from speech to results, as functions of a run's folder and settings.

A run lives in one folder::

    conf.yml                 its settings
    lists/{valid,test}.csv   its mixtures
    checkpoints/, logs/      its training
    best_model.pth           the model with the best validation loss, as Asteroid stores models
    training.json            how it was trained
    results/                 metrics, summary and examples on the test list

Each stage says what it did; one that is done already says that.
"""

import hashlib
import inspect
import json
import time
from pathlib import Path

import torch

from .data import MixtureList, SpeechDir, check_disjoint, draw_list, write_list
from .data.mixing import check_speakers
from .errors import UserError
from .files import whole_file
from .models import PRESETS

FULL_HOURS = 2000  # of mixtures: some 65 epochs of WSJ0-2mix's 30 h
GPU_FLOPS = 50e12  # a second, sustained in bf16: what a large GPU may reach with such layers
SPLITS = ("train", "valid", "test")


def build_model(settings):
    """The untrained model that the settings ask for.

    Args:
        settings (dict): Keys of conf.yml; those that are arguments of the model and not None
            override its preset.

    Raises:
        UserError: If there is no such preset or a size does not fit the others.
    """
    if settings["preset"] not in PRESETS:
        raise UserError(
            f"there is no preset {settings['preset']!r}; there are {', '.join(PRESETS)}"
        )
    model_class, _ = PRESETS[settings["preset"]]
    arguments = set(inspect.signature(model_class).parameters)
    sizes = {k: v for k, v in settings.items() if k in arguments and v is not None}
    try:
        return model_class.from_preset(settings["preset"], **sizes)
    except (TypeError, ValueError) as error:
        raise UserError(f"the model cannot be built: {error}") from None


def open_split(exp_dir, settings, split):
    """The `SpeechDir` of a split; its folder may be relative to that of the recipe."""
    recipe_dir = Path(exp_dir).resolve().parents[1]
    return SpeechDir(recipe_dir / settings["speech"] / split, settings["sample_rate"])


def prepare_speech(exp_dir, settings):
    """Stage 0: checks the speech, says what there is, and gives credit where it must be seen."""
    folder = Path(exp_dir).resolve().parents[1] / settings["speech"]
    if (folder / "SHA256SUMS").exists():
        verify_checksums(folder)
    splits = {split: open_split(exp_dir, settings, split) for split in SPLITS}
    check_disjoint(**splits)
    for split, speech in splits.items():
        check_speakers(speech, settings["n_src"])
        print(
            f"  {split:5}  {len(speech.by_speaker):4} speakers {len(speech.utterances):6} "
            f"utterances {speech.minutes():8.1f} minutes"
        )
    if (folder / "CREDITS.txt").exists():
        print((folder / "CREDITS.txt").read_text(encoding="utf-8"))


def verify_checksums(folder):
    """Compares the files of a folder with its SHA256SUMS.

    Raises:
        UserError: That names the first file that is missing or changed.
    """
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split(maxsplit=1)
        path = folder / name.lstrip("*")
        if not path.is_file():
            raise UserError(f"{path} is missing; restore it (git checkout -- {path.name})")
        if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise UserError(f"{path} has changed; restore it (git checkout -- {path.name})")


def make_lists(exp_dir, settings):
    """Stage 1: draws the fixed validation and test lists."""
    length = round(settings["eval_segment"] * settings["sample_rate"])
    for split in ("valid", "test"):
        path = Path(exp_dir) / "lists" / f"{split}.csv"
        speech = open_split(exp_dir, settings, split)
        if path.exists():
            print(f"  {split}: {len(MixtureList(speech, path))} mixtures, drawn before")
            continue
        mixtures = draw_list(
            speech,
            settings[f"n_{split}"],
            settings["n_src"],
            length,
            settings[f"{split}_seed"],
            settings["max_gap"],
        )
        write_list(path, mixtures, settings["sample_rate"])
        print(f"  {split}: {len(mixtures)} mixtures of {settings['eval_segment']:g} s")


def open_list(exp_dir, settings, split):
    """The `MixtureList` of a split."""
    path = Path(exp_dir) / "lists" / f"{split}.csv"
    return MixtureList(open_split(exp_dir, settings, split), path)


def train_model(exp_dir, settings):
    """Stage 2: trains the model, or continues to."""
    from .report import write_curves
    from .training import train  # late: Lightning takes seconds to import

    exp_dir = Path(exp_dir)
    target = exp_dir / "best_model.pth"
    if target.exists():
        print(f"  done before: {target}")
        return
    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    speech, valid = open_split(exp_dir, settings, "train"), open_list(exp_dir, settings, "valid")
    began = time.time()
    outcome = train(model, speech, valid, exp_dir, settings)
    write_curves(exp_dir)
    on_gpu = settings["accelerator"] != "cpu" and torch.cuda.is_available()
    outcome["device"] = torch.cuda.get_device_name() if on_gpu else "CPU"
    outcome["minutes_since_last_start"] = round((time.time() - began) / 60, 1)
    with whole_file(exp_dir / "training.json") as part:
        part.write_text(json.dumps(outcome, indent=2) + "\n")
    model.save(target)  # last: it says that the training is done
    print(f"  {outcome['steps']} steps, best validation SI-SDR {outcome['val_si_sdr']:.2f} dB")
    print(f"  model: {target}")


def evaluate_model(exp_dir, settings):
    """Stage 3: evaluates the model on the test list, writes results and prints the table."""
    from .evaluation import evaluate
    from .report import training_curves, write_report
    from .summary import format_table

    exp_dir = Path(exp_dir)
    results = exp_dir / "results"
    if (results / "summary.json").exists():
        print("  done before")
        summary = json.loads((results / "summary.json").read_text())
    else:
        model_class, _ = PRESETS[settings["preset"]]
        model = model_class.from_pretrained(str(exp_dir / "best_model.pth"))
        on_gpu = settings["accelerator"] != "cpu" and torch.cuda.is_available()
        summary = evaluate(
            model,
            open_list(exp_dir, settings, "test"),
            results,
            device="cuda" if on_gpu else "cpu",
            n_workers=settings["eval_workers"],
        )
    print(f"\n{format_table(summary)}\n")
    print(training_cost(exp_dir, settings))
    credits = exp_dir.resolve().parents[1] / settings["speech"] / "CREDITS.txt"
    credits = credits.read_text(encoding="utf-8") if credits.exists() else ""
    page = write_report(results, exp_dir.name, credits, training_curves(exp_dir))
    print(f"\n  metrics, summary and examples: {results}\n  to see and hear: {page}")


def training_cost(exp_dir, settings):
    """What the training took in floating-point operations, and what a full one would take.

    Arithmetic, exact in the operations: two a multiply-accumulate, and a backward pass of twice
    the forward pass.
    """
    done = json.loads((Path(exp_dir) / "training.json").read_text())
    hours = done["steps"] * settings["batch_size"] * settings["segment"] / 3600
    with torch.device("meta"):  # shapes alone are enough to count
        models = {"this model": build_model(settings)}
        models |= {name: of.from_preset(name) for name, (of, _) in PRESETS.items()}
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
