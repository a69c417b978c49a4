"""Publishing a model: a folder with its weights, what it was trained on, and how well it does.

The folder serves three readers: `from_pretrained` of this package (``model.safetensors`` with
``config.json``), plain Asteroid, which fetches ``pytorch_model.bin`` from the hub, and
``asteroid-upload``, which takes ``model.pth`` to Zenodo. ``README.md`` is the model card, with the
hub's metadata on top. All files hold the same weights.
"""

import re
import shutil
import textwrap
from pathlib import Path

import torch
import yaml

from . import __version__, hub
from .errors import UserError
from .files import LEFT, make_folder, reason, whole_folder
from .summary import GROUP, METRICS, SPARE, UNITS, format_table, is_summary
from .weights import CONFIG, WEIGHTS, read_config, save_whole

CARD, PACKAGE = "README.md", "model.pth"  # the latter is Asteroid's name
ONNX = "model.onnx"
PUBLIC = (CARD, CONFIG, WEIGHTS, hub.PICKLED, ONNX)
HALF_DB = 40.0  # SI-SDR of the estimates of rounded weights against those of the exact ones
#: What a publication cannot do without, and the option that gives it.
NEEDED = {
    "data_name": "name of the data it was trained on",
    "data_licence": "licence of the data",
    "summary": "metrics, as stage 3 writes them to results/summary.json",
    "licence": "licence of the weights",
}
LIMITS = """It gives {n_src} estimates at {sample_rate:g} Hz, however many speakers there are; audio
    of another rate must be resampled. What was not in its training data, be it noise, rooms,
    languages or microphones, it has not learned; how it does on the test set says little about
    them. It keeps no speaker in one place from one call to the next. Separated speech may hold
    residues of the other speakers, and is no proof of who said what."""
USE = """```python
import asteroid_tiny

# or "user/repo" on the hub, or a folder
model = asteroid_tiny.from_pretrained("{name}")
model.separate("mixture.wav", resample=True)  # writes mixture_est1.wav and so on
```"""
PLAIN = f"Plain Asteroid loads `{hub.PICKLED}` once `asteroid_tiny` is imported."


def publish(model, folder, about, half=False, signals=None):
    """Writes a publish folder, whole or not at all.

    Args:
        model (Sepformer or TinySepformer): The model.
        folder (str or Path): Where to; a publish folder that is there is replaced.
        about (dict): `name`; `data_name`, `data_licence` and, if known, `data_url` and
            `data_author` of the training data; `licence` of the weights; `summary`, what
            `evaluate` returns; and what else is known of `training` (dict), `command` (str),
            `test_name` of the data that `summary` is of (str), `credits` (str), `recipe` (str) and
            `settings` (dict).
        half (bool): Whether weights are stored in 16 bits, if their estimates stay within 40 dB
            SI-SDR of the exact ones; else they are stored in 32, which is said.
        signals (iterable of torch.Tensor, optional): Mixtures (time,) to compare estimates on;
            noise by default.

    Returns:
        Path: The folder.

    Raises:
        UserError: If something is lacking or contradicts the model, or cannot be written.
    """
    folder = Path(folder).absolute()
    _check(about, model)
    try:
        if folder.exists() and any(folder.iterdir()) and not is_published(folder):
            raise UserError(f"{folder} holds other files; choose another folder")
    except OSError as error:
        raise UserError(f"{folder} is no folder to publish to: {reason(error)}") from None
    if half:
        db = rounding_db(model, signals)
        half = db >= HALF_DB
        bits = 16 if half else 32
        reached = f"SI-SDR {db:.1f} dB" if db < 200 else "the same"  # of weights of 16 bits already
        print(f"  estimates of 16-bit weights: {reached}, so {bits} bits are stored")
    conf = model.serialize()
    if half:
        conf["state_dict"] = {key: tensor.half() for key, tensor in conf["state_dict"].items()}
        model = type(model).from_pretrained(conf)
    metrics = {name: about["summary"]["groups"]["all"][name]["mean"] for name in METRICS}
    make_folder(folder.parent)
    with whole_folder(folder) as part:
        data = {key: about.get(f"data_{key}") for key in ("name", "licence", "url", "author")}
        config = model.save_pretrained(
            part,
            half=half,
            name=about["name"],
            licence=about["licence"],
            training={"data": data, "recipe": about.get("recipe"), **about.get("training", {})},
            metrics={**metrics, "n_mixtures": about["summary"]["n_mixtures"]},
            made_with=f"asteroid_tiny {__version__}",
        )
        (part / CARD).write_text(model_card(config, about), encoding="utf-8")
        save_whole(asteroid_package(conf, metrics, about), part / PACKAGE)
        shutil.copyfile(part / PACKAGE, part / hub.PICKLED)
    return folder


def _check(about, model):
    lacking = [key for key in NEEDED if not about.get(key)]
    if lacking:
        what = ", and the ".join(NEEDED[key] for key in lacking)
        options = ", ".join(f"--{key}" for key in lacking)
        raise UserError(f"nothing is published without the {what}; give {options}")
    _checked_name(about["name"])
    summary = about["summary"]
    if not is_summary(summary):
        raise UserError("the metrics are no summary of an evaluation (results/summary.json)")
    values = [summary["groups"]["all"][name]["mean"] for name in METRICS]
    rate = summary["sample_rate"]
    if None in values[: METRICS.index("input_sdr")]:
        raise UserError("nothing is published without metrics, and the SI-SDR is missing")
    if SPARE in summary["groups"]["all"]:
        raise UserError(f"the metrics are of mixtures of fewer speakers than {model.n_src}")
    if summary["bootstrap"]["unit"] != UNITS.get(model.n_src, GROUP):
        raise UserError(f"the metrics are of mixtures of other than {model.n_src} speakers")
    if rate != model.sample_rate:
        raise UserError(
            f"the metrics are of {rate:g} Hz, the model is of {model.sample_rate} Hz: evaluate it "
            "at its own sample rate"
        )


def _checked_name(name):
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"a model is named by letters, digits and _ . -, not {name!r}")
    return name


def is_published(folder):
    """Whether a folder was written by `publish`, and holds nothing else but what a kill left."""
    names = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
    there = {name for name in names if not LEFT.fullmatch(name)}
    if not {CARD, CONFIG, WEIGHTS} <= there <= {*PUBLIC, PACKAGE}:
        return False
    try:
        return bool(read_config(Path(folder) / CONFIG))
    except UserError:
        return False


def rounding_db(model, signals=None):
    """How far rounding the weights to 16 bits moves the estimates: the lowest SI-SDR in dB.

    Args:
        model: The model, with exact weights.
        signals (iterable of torch.Tensor, optional): Mixtures (time,); four seconds of noise
            whose level rises and falls by default.
    """
    if signals is None:
        time = torch.arange(int(4 * model.sample_rate)) / model.sample_rate
        noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
        signals = [0.1 * noise * torch.sin(2 * torch.pi * time).abs()]
    conf = model.serialize()
    conf["state_dict"] = {key: tensor.half() for key, tensor in conf["state_dict"].items()}
    try:
        rounded = type(model).from_pretrained(conf)
    except UserError:  # a weight above 65504
        return -float("inf")
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        ratios = [_si_sdr(rounded(s[None]), model(s[None])) for s in signals]
    model.train(was_training)
    return float(torch.stack(ratios).min())


def _si_sdr(estimates, targets):
    """The lowest SI-SDR in dB of the signals along the last dimension, but for what is silent
    (80 dB below the loudest) in both."""
    powers = torch.stack([estimates, targets]).square().sum(-1)
    silent = (powers <= 1e-8 * powers.amax()).all(0)
    estimates, targets = estimates[~silent], targets[~silent]
    scale = (estimates * targets).sum(-1, keepdim=True) / targets.square().sum(-1, keepdim=True)
    errors = (estimates - scale * targets).square().sum(-1)
    ratios = 10 * torch.log10((scale * targets).square().sum(-1) / errors)
    return ratios.nan_to_num(nan=-torch.inf).min() if len(ratios) else torch.tensor(torch.inf)


def asteroid_package(conf, metrics, about):
    """What Asteroid's `save_publishable` stores for ``asteroid-upload``, in plain data (dict)."""
    licence = about["data_licence"]
    restricted = re.search(r"\bNC\b|non-?commercial|research|LDC", licence, re.IGNORECASE)
    url = about.get("data_url") or ""
    return {
        **conf,
        "dataset": about["data_name"],
        "task": "sep_clean",
        "licenses": [
            {
                "title": about["data_name"],
                "title_link": url,
                "author": about.get("data_author") or "its authors",
                "author_link": url,
                "license": licence,
                "license_link": url,
                "non_commercial": bool(restricted),
            }
        ],
        "infos": {
            **conf["infos"],
            "recipe_name": about.get("recipe") or "Unknown",
            "training_config": {"settings": about.get("settings") or {}},
            "final_metrics": {name.replace("_i", "_imp"): v for name, v in metrics.items()},
        },
    }


def model_card(config, about):
    """The model card: the hub's metadata, then what a reader must know (str of Markdown)."""
    name, data, n_src = config["name"], config["training"]["data"], config["n_src"]
    source = f"[{data['name']}]({data['url']})" if data["url"] else data["name"]
    author = f" by {data['author']}" if data["author"] else ""
    facts = config["training"]
    trained = f" It was trained for {facts['steps']} steps" if "steps" in facts else ""
    trained += f" on {facts['hours']:.3g} h of mixtures" if trained and "hours" in facts else ""
    if trained and "device" in facts:
        took = f" in {facts['minutes'] / 60:.2g} h" if "minutes" in facts else ""
        trained += f",{took} on {'a CPU' if facts['device'] == 'CPU' else facts['device']}"
    start = facts.get("init_from")
    began = f" It began with the weights of {start['name']}" if start else ""
    if began and start.get("data"):
        began += f", which were trained on {start['data']['name']} ({start['data']['licence']})"
    table = format_table(about["summary"])
    limits = LIMITS.format(**config)
    parts = [
        f"---\n{yaml.safe_dump(_metadata(config, about), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"{config['model_name']}, an Asteroid model with {config['n_parameters']:,} parameters "
        f"({config['dtype']}) that separates {n_src} speakers in audio of "
        f"{config['sample_rate']:g} Hz.",
        "## Use",
        "With asteroid-tiny installed (`pip install .` in its repository):",
        USE.format(name=name),
        PLAIN,
        "## Training data",
        f"{source}{author}; licence: {data['licence']}."
        f"{began + '.' if began else ''}{trained + '.' if trained else ''}",
        about.get("credits") and f"```\n{about['credits'].strip()}\n```",
        "## Results",
        f"```\n{table}\n```",
        about.get("command") and f"Made with `{about['command']}`.",
        "## Limits",
        " ".join(limits.split()),
        "## Licence",
        f"The weights: {config['licence']}. They were learned from data under the licence above.",
    ]
    return "\n\n".join(_wrap(part) for part in parts if part) + "\n"


def _wrap(part):
    if part.startswith(("---", "    ", "```", "#")):
        return part
    return textwrap.fill(part, 99, break_on_hyphens=False, break_long_words=False)


def _metadata(config, about):
    """The block on top of a model card, in the hub's terms."""
    licence, data, metrics = (
        config["licence"],
        config["training"]["data"]["name"],
        config["metrics"],
    )
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence)
    tested = about.get("test_name")
    shown = {"si_sdr_i": "SI-SDR improvement (dB)", "sdr_i": "SDR improvement (dB)", "stoi": "STOI"}
    results = {
        "task": {"type": "audio-to-audio", "name": f"Separation of {config['n_src']} speakers"},
        "dataset": {"type": _slug(tested or data), "name": tested or f"{data}, test"},
        "metrics": [
            {"type": key, "name": title, "value": round(metrics[key], 3)}
            for key, title in shown.items()
            if metrics[key] is not None
        ],
    }
    return {
        "license": licence if known else "other",
        **({} if known else {"license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower())}),
        "library_name": "asteroid",
        "pipeline_tag": "audio-to-audio",
        "tags": ["asteroid", "audio", "speech-separation", "asteroid-tiny", config["model_name"]],
        "datasets": [_slug(data)],
        "model-index": [{"name": config["name"], "results": [results]}],
    }


def _slug(name):
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def add_to_zoo(folder):
    """Puts a published model among those that come with the package.

    Returns:
        Path: Its folder in the zoo.

    Raises:
        UserError: If there is one of its name, or it cannot be written, as where the package is
            installed for all users.
    """
    target = hub.ZOO / _checked_name(read_config(Path(folder) / CONFIG).get("name"))
    if target.exists():
        raise UserError(f"{target} is there already; publish with another --name, or delete it")
    try:
        hub.ZOO.mkdir(exist_ok=True)
        with whole_folder(target) as part:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(Path(folder) / name, part / name)
            card = (Path(folder) / CARD).read_text(encoding="utf-8")
            (part / CARD).write_text(card.replace(f"{PLAIN}\n\n", ""), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} could not be written: {reason(error)}") from None
    return target


def push(folder, repo, private=False):
    """Uploads a publish folder to the Hugging Face hub, as one commit.

    Args:
        folder (str or Path): What `publish` wrote.
        repo (str): ``user/repo``; it is made if there is none.
        private (bool): Whether a new one is private.

    Returns:
        str: Address of the commit.

    Raises:
        UserError: If the token is refused or lacks, the connection drops, or a file cannot be
            read. The commit is then not made, while the repository may have been.
    """
    import huggingface_hub

    if not hub.HUB_ID.fullmatch(repo):
        raise UserError(f"{repo!r} is no name on the hub; it must be user/repo")
    if not is_published(folder):
        raise UserError(
            f"{folder} is no publish folder; it lacks {CARD}, {CONFIG} or {WEIGHTS}, "
            "or holds something else"
        )
    api = huggingface_hub.HfApi(library_name="asteroid_tiny", library_version=__version__)
    with hub.hub_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(PUBLIC),
            delete_patterns=[ONNX],  # of the weights before, if the folder has none
            commit_message=f"Model made with asteroid_tiny {__version__}",
        )
    return commit.commit_url
