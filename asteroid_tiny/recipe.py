"""The stages of a recipe from training on, as functions of a run's folder and settings.

The stages before are in `preparation`.

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

import contextlib
import hashlib
import inspect
import json
import shlex
from pathlib import Path

import torch

from .config import FOLDERS, MAY_CHANGE, PUBLICATION, read_conf, recipe_folder
from .cost import read_training, training_cost
from .errors import UserError
from .files import alone, sweep, whole_file
from .hub import list_models
from .models import PRESETS, from_pretrained
from .preparation import list_path, open_list, open_training
from .transfer import copy_weights
from .weights import told

#: Parameters times frames a second of a packaged model that a CPU evaluates beside one's own.
CPU_COST = 3e8
#: Arguments of a model that its weights need not share with those that they begin with.
NO_SIZES = ("n_src", "fb_init", "dropout", "checkpoint_activations")


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


def without_foreign_start(settings, defaults, given):
    """Settings that begin with random weights where those of the recipe are of another model.

    Args:
        settings (dict): The recipe's defaults merged with the options.
        defaults (dict): Of the recipe.
        given (dict): The options.

    Returns:
        dict: The settings, without an `init_from` that the options do not name if the model is of
        another class, size or sample rate than that of the recipe.
    """
    if "init_from" in given or not settings["init_from"]:
        return settings
    with torch.device("meta"):
        model, other = build_model(settings), build_model(defaults)
    args, other_args = model.get_model_args(), other.get_model_args()
    sizes = [key for key in args if key not in NO_SIZES]
    fits = type(model) is type(other) and all(args[key] == other_args[key] for key in sizes)
    return settings if fits else {**settings, "init_from": None}


def train_model(exp_dir, settings):
    """Stage 2: trains the model, or continues to."""
    from pytorch_lightning.utilities import rank_zero_only  # late: it takes seconds to import

    exp_dir = Path(exp_dir)
    target = exp_dir / "best_model.pth"
    if target.exists():
        print(f"  done before: {target}")
        return
    with alone(exp_dir, "trains") if rank_zero_only.rank == 0 else contextlib.nullcontext():
        sweep(exp_dir)
        sweep(exp_dir / "checkpoints")
        _train_model(exp_dir, settings, target)


def _train_model(exp_dir, settings, target):
    from .training import say, train

    torch.manual_seed(settings["seed"])
    model = build_model(settings)
    if (exp_dir / "checkpoints" / "last.ckpt").exists():
        say("  continues from the last epoch")
    else:
        if settings["init_from"]:
            copy_weights(model, settings["init_from"])
        say(f"  begins with {settings['init_from'] or 'random'} weights")
    speech = open_training(exp_dir, settings)
    valid = open_list(exp_dir, settings, "valid")
    outcome = train(model, speech, valid, exp_dir, settings)
    if outcome is None:  # the first process does the rest
        return
    outcome["device"] = torch.cuda.get_device_name() if on_gpu(settings) else "CPU"
    with whole_file(exp_dir / "training.json") as part:
        part.write_text(json.dumps(outcome, indent=2) + "\n")
    model.save(target)  # last: it says that the training is done
    print(f"  {outcome['steps']} steps, best validation SI-SDR {outcome['val_si_sdr']:.2f} dB")
    print(f"  model: {target}")


def trained_model(exp_dir):
    """The model that stage 2 left, in eval mode.

    Raises:
        UserError: If there is none yet.
    """
    path = exp_dir / "best_model.pth"
    if not path.exists():
        raise UserError(f"{path} is missing; run stage 2 (to its end) first")
    try:
        return from_pretrained(path)
    except UserError as error:
        raise UserError(f"{error}. Delete it and run stage 2, which makes it again") from None


def evaluate_model(exp_dir, settings):
    """Stage 3: evaluates the model on the test list, writes results and prints the table."""
    from .evaluation import evaluate
    from .report import training_curves, write_report
    from .summary import format_table, read_summary

    exp_dir = Path(exp_dir)
    results = exp_dir / "results"
    if (results / "summary.json").exists():
        print("  done before")
        summary = read_summary(results / "summary.json")
    else:
        model = trained_model(exp_dir)
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
    credits = recipe_folder(exp_dir) / settings["speech"] / "CREDITS.txt"
    credits = credits.read_text(encoding="utf-8") if credits.exists() else ""
    page = write_report(results, exp_dir.name, credits, training_curves(exp_dir))
    print(f"\n  metrics, summary and examples: {results}\n  to see and hear: {page}")


def compare_packaged(exp_dir, settings):
    """Evaluates the packaged models that fit on the test list, once for a list and its speech.

    On a CPU only those that are small and quick, which take a minute.
    """
    from .evaluation import evaluate
    from .summary import read_summary

    exp_dir, device = Path(exp_dir), "cuda" if on_gpu(settings) else "cpu"
    mixtures = open_list(exp_dir, settings, "test")
    some = (mixtures[i][0].numpy().tobytes() for i in (0, len(mixtures) // 2, -1))
    test_list = b"".join([list_path(exp_dir, "test").read_bytes(), *some])
    for name, about in list_models().items():
        fits = all(about[key] == settings[key] for key in ("n_src", "sample_rate"))
        frames = about["sample_rate"] / about["model_args"]["stride"]  # a second
        if not fits or (device == "cpu" and about["n_parameters"] * frames > CPU_COST):
            continue
        which = hashlib.sha256(test_list + about["sha256"].encode()).hexdigest()[:16]
        folder = exp_dir.parent / ".packaged" / f"{name}_{which}"
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            evaluate(from_pretrained(name), mixtures, folder, device, settings["eval_workers"])
        mean = read_summary(folder / "summary.json")["groups"]["all"]["si_sdr_i"]["mean"]
        if mean is not None:
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
    from .publish import publish
    from .summary import read_summary

    exp_dir = Path(exp_dir)
    defaults = recipe_defaults(exp_dir)
    settings = {**{key: defaults.get(key) for key in PUBLICATION}, **settings, **dict(given)}
    ours = [key for key in ("data_name", "data_licence") if settings[key] == defaults.get(key)]
    if ours and settings["speech"] != defaults.get("speech"):
        raise UserError(
            f"the speech in {settings['speech']} is not that of the recipe, whose name and "
            f"licence it cannot bear; give {' and '.join(f'--{key}' for key in ours)}"
        )
    if settings["speech"] != defaults.get("speech"):  # nor who made it, nor where
        for key in ("data_author", "data_url"):
            settings[key] = None if settings[key] == defaults.get(key) else settings[key]
    summary = read_summary(exp_dir / "results" / "summary.json")
    model = trained_model(exp_dir)
    training = told({"training": read_training(exp_dir)})["training"]
    training["hours"] = training["steps"] * settings["batch_size"] * settings["segment"] / 3600
    if settings["init_from"]:
        training["init_from"] = about_start(settings["init_from"])
    recipe_dir = recipe_folder(exp_dir)
    credits_file = recipe_dir / settings["speech"] / "CREDITS.txt"
    name = f"{settings['preset']}_{settings['n_src']}spk_{settings['sample_rate'] / 1000:g}k"
    if name in list_models():  # which would be loaded instead
        name = f"{name}_{recipe_dir.parent.name}"
    about = {
        **{key: settings[key] for key in PUBLICATION},
        "name": name,
        "recipe": f"{recipe_dir.parent.name}/{recipe_dir.name}",
        "training": training,
        "summary": summary,
        "settings": without_paths(settings),
        "command": run_command(exp_dir, without_paths(settings)),
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


def about_start(name_or_path):
    """What is known of the weights that a training began with: name and, if packaged, data."""
    packaged = list_models().get(name_or_path)
    known = {"data": packaged["training"]["data"]} if packaged else {}
    return {"name": Path(name_or_path).name, **known}


def without_paths(settings):
    """The settings without the folders of this machine, which are nobody else's business."""
    public = {key: value for key, value in settings.items() if key not in (*FOLDERS, "speech")}
    for key in ("init_from", "noise_dir"):
        if settings.get(key):
            public[key] = Path(settings[key]).name
    return public


def run_command(exp_dir, settings):
    """The command line that makes a run like this one (str)."""
    defaults = recipe_defaults(exp_dir)
    given = {
        key: value
        for key, value in settings.items()
        if key not in MAY_CHANGE and value != defaults.get(key)
    }
    options = {"stage": 0, "recipe": recipe_folder(exp_dir).parent.name, **given}
    texts = {key: "null" if value is None else str(value) for key, value in options.items()}
    words = (f"--{key} {shlex.quote(text)}" for key, text in texts.items())
    return f"./run.sh {' '.join(words)}"


def recipe_defaults(exp_dir):
    """The settings of a run's recipe without any option (dict)."""
    recipe_dir = recipe_folder(exp_dir)
    paths = (recipe_dir.parents[2] / "local" / "conf.yml", recipe_dir / "conf.yml")
    return {key: v for path in paths if path.exists() for key, v in read_conf(path).items()}
