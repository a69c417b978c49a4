"""The stages of a recipe, from speech to results, as functions of a run's folder and settings.

A run lives in one folder::

    conf.yml                 its settings
    speech/                  Kaldi data dirs, where the recipe does not have them
    check.txt                what is odd in its speech
    lists/{valid,test}.csv   its mixtures; train.csv if they are not drawn afresh
    checkpoints/, logs/      its training
    best_model.pth           the model with the best validation loss, as Asteroid stores models
    training.json            how it was trained
    results/                 metrics, summary and examples on the test list
    publish/                 the model with its card, for others

Each stage says what it did; one that is done already says that.
"""

import hashlib
import inspect
import itertools
import json
import shlex
import time
from pathlib import Path

import torch

from .config import OF_THE_MACHINE, PUBLICATION, read_conf
from .cost import training_cost
from .data import (
    MixtureList,
    NoiseDir,
    SpeechDir,
    check_disjoint,
    draw_list,
    librimix,
    own,
    write_list,
    wsj0mix,
)
from .data.check import check_dir, check_speech, format_findings
from .data.mixing import check_speakers
from .errors import UserError
from .files import whole_file
from .hub import list_models
from .models import PRESETS, from_pretrained

CPU_PARAMETERS = 1e6  # of a packaged model that a CPU evaluates beside one's own
SHORTEST = 0.5  # s: utterances below are reported
#: Corpora that have mixture lists of their own, and their modules.
LISTED = {"wsj0-mix": wsj0mix, "librimix": librimix}
CORPORA = ("kaldi", "own", *LISTED)
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
    """The `SpeechDir` of a split."""
    folder = speech_folder(exp_dir, settings) / split
    return SpeechDir(folder, settings["sample_rate"], convert=settings["corpus"] in LISTED)


def open_noise(exp_dir, settings, split):
    """The `NoiseDir` of a split, None if the recipe has no noise."""
    folder = speech_folder(exp_dir, settings) / f"{split}_noise"
    return NoiseDir(folder, settings["sample_rate"], convert=True) if folder.is_dir() else None


def speech_folder(exp_dir, settings):
    """Where the data dirs of a run are: those of the recipe, or made for the run in stage 0."""
    if settings["corpus"] == "kaldi":
        return source_folder(exp_dir, settings)
    return Path(exp_dir) / "speech"


def source_folder(exp_dir, settings):
    """The folder that the settings name; it may be relative to that of the recipe."""
    return Path(exp_dir).resolve().parents[1] / settings["speech"]


def prepare_speech(exp_dir, settings):
    """Stage 0: checks the speech, says what there is, and gives credit where it must be seen."""
    folder = source_folder(exp_dir, settings)
    if settings["corpus"] not in CORPORA:
        raise UserError(f"corpus must be one of {', '.join(CORPORA)}, not {settings['corpus']!r}")
    target = speech_folder(exp_dir, settings)
    if settings["corpus"] == "own":
        own.prepare(folder, target, settings["n_src"], settings["sample_rate"])
    if settings["corpus"] in LISTED:
        LISTED[settings["corpus"]].prepare(folder, target, settings)
    if (folder / "SHA256SUMS").exists():
        verify_checksums(folder)
    splits = {split: open_split(exp_dir, settings, split) for split in SPLITS}
    for group in LISTED[settings["corpus"]].DISJOINT if settings["corpus"] in LISTED else [SPLITS]:
        check_disjoint(**{split: splits[split] for split in group})
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
    """Stage 1: checks the speech; draws validation and test lists, or takes the corpus's own."""
    check_all(exp_dir, settings)
    for split in SPLITS if not settings["dynamic_mixing"] else ("valid", "test"):
        path = list_path(exp_dir, split)
        if path.exists():
            print(f"  {split}: {len(open_list(exp_dir, settings, split))} mixtures, made before")
            continue
        if settings["corpus"] in LISTED:
            mixtures = take_list(exp_dir, settings, split)
        else:
            mixtures = draw_split(exp_dir, settings, split)
        write_list(path, mixtures, settings["sample_rate"])
        hours = sum(mixture.length for mixture in mixtures) / settings["sample_rate"] / 3600
        print(f"  {split}: {len(mixtures)} mixtures, {hours:.2f} h")


def draw_split(exp_dir, settings, split):
    """The validation or test mixtures of a corpus that has no lists (list of Mixture)."""
    if split == "train":
        raise UserError(f"corpus {settings['corpus']} has no list; it needs dynamic_mixing true")
    return draw_list(
        open_split(exp_dir, settings, split),
        settings[f"n_{split}"],
        settings["n_src"],
        round(settings["eval_segment"] * settings["sample_rate"]),
        settings[f"{split}_seed"],
        settings["max_gap"],
        settings["overlap_ratio"],
    )


def take_list(exp_dir, settings, split):
    """The mixtures of a corpus's own list; for validation and test so many, evenly spread."""
    speech, noise = (open_it(exp_dir, settings, split) for open_it in (open_split, open_noise))
    mixtures = LISTED[settings["corpus"]].mixtures(split, speech, noise, settings)
    count = settings.get(f"n_{split}", len(mixtures))
    if count >= len(mixtures):
        return mixtures
    return [mixtures[i * len(mixtures) // count] for i in range(count)]


def list_path(exp_dir, split):
    """Where the mixture list of a split is."""
    return Path(exp_dir) / "lists" / f"{split}.csv"


def check_all(exp_dir, settings):
    """Checks all speech of a run, once; what is found goes to the screen and to check.txt.

    Raises:
        UserError: If something was found that would stop a training.
    """
    target = Path(exp_dir) / "check.txt"
    if target.exists() or not settings["check"]:
        return
    folder = speech_folder(exp_dir, settings)
    if settings["corpus"] in LISTED:  # some share speakers between splits, stage 0 says which
        dirs = [check_dir(folder / split, shortest=SHORTEST) for split in SPLITS]
        findings = list(itertools.chain.from_iterable(dirs))
    else:
        findings = check_speech(folder, settings["sample_rate"], SHORTEST)
    if findings:
        print(format_findings(findings, most=3))
    fatal = sum(finding.fatal for finding in findings)
    if fatal:
        raise UserError(
            f"{fatal} fault(s) in the speech would stop a training; mend them or leave them out, "
            "or go on with --check false"
        )
    with whole_file(target) as part:
        part.write_text(format_findings(findings, most=len(findings)) + "\n", encoding="utf-8")


def open_list(exp_dir, settings, split):
    """The `MixtureList` of a split."""
    speech, noise = (open_it(exp_dir, settings, split) for open_it in (open_split, open_noise))
    return MixtureList(speech, list_path(exp_dir, split), noise)


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
    if settings["init_from"]:
        copy_weights(model, settings["init_from"])
    open_training = open_split if settings["dynamic_mixing"] else open_list
    speech = open_training(exp_dir, settings, "train")
    valid = open_list(exp_dir, settings, "valid")
    began = time.time()
    outcome = train(model, speech, valid, exp_dir, settings)
    if outcome is None:  # the first process does the rest
        return
    write_curves(exp_dir)
    outcome["device"] = torch.cuda.get_device_name() if on_gpu(settings) else "CPU"
    outcome["minutes_since_last_start"] = round((time.time() - began) / 60, 1)
    with whole_file(exp_dir / "training.json") as part:
        part.write_text(json.dumps(outcome, indent=2) + "\n")
    model.save(target)  # last: it says that the training is done
    print(f"  {outcome['steps']} steps, best validation SI-SDR {outcome['val_si_sdr']:.2f} dB")
    print(f"  model: {target}")


def copy_weights(model, name_or_path):
    """Gives a model the weights of another of the same sizes, to go on from there.

    Raises:
        UserError: If there is no such model or it has other sizes.
    """
    other = type(model).from_pretrained(name_or_path)
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError:
        raise UserError(
            f"--init_from {name_or_path} has other sizes than this run's model; give its preset "
            "and number of sources as options"
        ) from None


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
        summary = evaluate(
            model,
            open_list(exp_dir, settings, "test"),
            results,
            device="cuda" if on_gpu(settings) else "cpu",
            n_workers=settings["eval_workers"],
        )
    print(f"\n{format_table(summary)}\n")
    compare_packaged(exp_dir, settings)
    print(training_cost(exp_dir, settings, build_model(settings)))
    credits = exp_dir.resolve().parents[1] / settings["speech"] / "CREDITS.txt"
    credits = credits.read_text(encoding="utf-8") if credits.exists() else ""
    page = write_report(results, exp_dir.name, credits, training_curves(exp_dir))
    print(f"\n  metrics, summary and examples: {results}\n  to see and hear: {page}")


def compare_packaged(exp_dir, settings):
    """Evaluates the packaged models that fit on the test list, once for a list; prints the means.

    On a CPU only the small ones, which take a minute.
    """
    from .evaluation import evaluate

    exp_dir, device = Path(exp_dir), "cuda" if on_gpu(settings) else "cpu"
    test_list = (exp_dir / "lists" / "test.csv").read_bytes()
    for name, about in list_models().items():
        fits = all(about[key] == settings[key] for key in ("n_src", "sample_rate"))
        if not fits or (device == "cpu" and about["n_parameters"] > CPU_PARAMETERS):
            continue
        which = hashlib.sha256(test_list + about["sha256"].encode()).hexdigest()[:16]
        folder = exp_dir.parent / ".packaged" / f"{name}_{which}"
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            mixtures = open_list(exp_dir, settings, "test")
            evaluate(from_pretrained(name), mixtures, folder, device, settings["eval_workers"])
        summary = json.loads((folder / "summary.json").read_text())
        mean = summary["groups"]["all"]["si_sdr_i"]["mean"]
        print(f"The packaged {name} has an SI-SDRi of {mean:.2f} dB on the same mixtures.\n")


def on_gpu(settings):
    """Whether the run computes on a GPU."""
    return settings["accelerator"] != "cpu" and torch.cuda.is_available()


def publish_model(exp_dir, settings, folder=None, given=(), **about):
    """Stage 4: writes the publish folder of an evaluated model.

    Args:
        exp_dir (str or Path): Folder of the run.
        settings (dict): Of the run.
        folder (str or Path, optional): Where to; ``publish`` in the run's folder by default.
        given (dict): Settings of the publication that differ now.
        **about: What differs from what the run tells, such as `name`.

    Returns:
        Path: The folder.
    """
    from .publish import publish, read_summary

    exp_dir = Path(exp_dir)
    defaults = recipe_defaults(exp_dir)
    settings = {**{key: defaults.get(key) for key in PUBLICATION}, **settings, **dict(given)}
    for key in ("data_name", "data_licence"):
        if settings["speech"] != defaults.get("speech") and settings[key] == defaults.get(key):
            raise UserError(
                f"the speech in {settings['speech']} is not that of the recipe, whose name and "
                f"licence it cannot bear; give --{key}"
            )
    summary = read_summary(exp_dir / "results" / "summary.json")
    model_class, _ = PRESETS[settings["preset"]]
    model = model_class.from_pretrained(exp_dir / "best_model.pth")
    try:
        training = json.loads((exp_dir / "training.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{exp_dir}/training.json is missing or broken; run stage 2") from None
    training["hours"] = training["steps"] * settings["batch_size"] * settings["segment"] / 3600
    recipe_dir = exp_dir.resolve().parents[1]
    credits_file = recipe_dir / settings["speech"] / "CREDITS.txt"
    rate = f"{settings['sample_rate'] / 1000:g}k"
    about = {
        **{key: settings[key] for key in PUBLICATION},
        "name": f"{settings['preset']}_{settings['n_src']}spk_{rate}",
        "recipe": f"{recipe_dir.parent.name}/{recipe_dir.name}",
        "training": training,
        "summary": summary,
        "settings": settings,
        "command": run_command(exp_dir, settings),
        "credits": credits_file.read_text(encoding="utf-8") if credits_file.exists() else None,
        **about,
    }
    signals = None
    if settings["half"]:
        test = open_list(exp_dir, settings, "test")
        signals = [test[i][0] for i in range(min(len(test), 5))]
    folder = publish(model, folder or exp_dir / "publish", about, settings["half"], signals)
    print(f"  publish folder: {folder}")
    return folder


def run_command(exp_dir, settings):
    """The command line that makes a run like this one (str)."""
    defaults = recipe_defaults(exp_dir)
    given = {
        key: value
        for key, value in settings.items()
        if key not in (*OF_THE_MACHINE, *PUBLICATION) and value != defaults.get(key)
    }
    options = {"stage": 0, "recipe": Path(exp_dir).resolve().parents[2].name, **given}
    told = (f"--{key} {shlex.quote(str(value))}" for key, value in options.items())
    return f"./run.sh {' '.join(told)}"


def recipe_defaults(exp_dir):
    """The settings of a run's recipe without any option (dict)."""
    recipe_dir = Path(exp_dir).resolve().parents[1]
    paths = (recipe_dir.parents[2] / "local" / "conf.yml", recipe_dir / "conf.yml")
    return {key: v for path in paths if path.exists() for key, v in read_conf(path).items()}
