"""Settings of a run: conf.yml files, overridden by options, kept with the run.

A conf.yml is a mapping of sections, each a mapping of keys; the sections are for the reader alone,
since every key is there once. The first file says which keys there are and, by its values, of
which type; a recipe's file overrides some, and in its section `corpus` adds some of its own.
"""

import argparse
import itertools
import math
import os
import re
from pathlib import Path

import yaml

from .errors import UserError
from .files import whole_file

#: Numbers that YAML takes for octal (010 is 8), hexadecimal or of base 60 (1:30 is 90).
OF_ANOTHER_BASE = re.compile(r"[-+]?(0[0-9bx_]|[0-9_]+:)")
#: Folders of corpora.
FOLDERS = ("librispeech_dir", "wham_dir", "metadata_dir", "librimix_dir")
#: Folders that are relative to where the user is.
PATHS = (*FOLDERS, "noise_dir")
#: Settings that name places and numbers of one machine.
OF_THE_MACHINE = (
    "accelerator",
    "devices",
    "num_nodes",
    "num_workers",
    "compile",
    "eval_workers",
    "speech",
    "check",
    *FOLDERS,
)
#: Settings of the publication, which change nothing of a run.
PUBLICATION = ("data_name", "data_licence", "data_url", "data_author", "licence", "half")
#: Settings of the benchmark, which change nothing of a run.
BENCHMARK = ("bench_models", "bench_lengths", "bench_limit")
#: Settings of the comparison, which change nothing of a run.
COMPARISON = ("contenders", "budget_steps", "budget_minutes", "budget_points")
#: Settings that may differ between two starts of one run.
MAY_CHANGE = (*OF_THE_MACHINE, *PUBLICATION, *BENCHMARK, *COMPARISON)
MAY_BE_ZERO = (
    "seed valid_seed test_seed max_gap dropout speed_perturb weight_decay warmup_steps patience "
    "cooldown_steps hold_steps colour overlap_ratio least_overlap turns silent_sources "
    "level_spread reverb noise microphone num_workers eval_workers budget_minutes average"
).split()
#: Settings by which mixtures are drawn, where no list has them.
DRAWN = ("max_gap", "overlap_ratio", "least_overlap", "turns", "level_spread", "colour")
#: Settings with an upper limit, which they may not reach.
BELOW = {"dropout": 1, "speed_perturb": 100, "average": 1, "seed": 2**32}
#: Settings with an upper limit, which they may reach.
AT_MOST = dict.fromkeys(
    "overlap_ratio least_overlap turns silent_sources reverb noise microphone".split(), 1
)
#: Settings with a lower limit, in seconds.
AT_LEAST = {"segment": 0.01, "eval_segment": 0.01}
#: Settings that are one of a few words.
ONE_OF = {
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
}
#: Types of the settings that are null by default, where not a whole number.
OF_NULL = {
    "dropout": float,
    "share_layers": bool,
    "path_norm": bool,
    "fb_init": str,
    "init_from": str,
    **dict.fromkeys(PATHS, str),
    **dict.fromkeys(("data_name", "data_licence", "data_url", "data_author"), str),
}
#: Settings that every run has, with values of their types.
OF_A_RUN = {
    **dict.fromkeys(("preset", "speech", "corpus", "accelerator"), "auto"),
    **dict.fromkeys(("n_src", "sample_rate", "batch_size", "steps", "seed"), 1),
    **dict.fromkeys(("segment", "lr"), 1.0),
}


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is there twice")
        return super().construct_mapping(node, deep)


def read_conf(path, section=None):
    """All keys of a conf.yml, or those of one section, in one flat dict.

    Raises:
        UserError: If the file is missing or not a mapping of mappings, or a key is there twice.
    """
    try:
        sections = yaml.load(Path(path).read_text(encoding="utf-8"), Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 40th of May
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise UserError(f"{path} must consist of sections with 'key: value' lines")
    if section:
        return sections.get(section, {})
    flat = {}
    for keys in sections.values():
        for key, value in keys.items():
            if key in flat:
                raise UserError(f"{path} has {key!r} twice")
            flat[key] = value
    return flat


def read_recipe(base, recipe):
    """The settings of a recipe with their defaults.

    Args:
        base (str or Path): The conf.yml of all recipes.
        recipe (str or Path): That of the recipe. Its section `corpus` adds keys, the others
            override some.

    Returns:
        dict: All settings.
    """
    known = read_conf(base) | read_conf(recipe, section="corpus")
    return merge(known, read_conf(recipe), str(recipe))


def merge(base, overrides, where):
    """`base` with the values of `overrides`, which must be known and of the same type.

    Args:
        base (dict): All keys with their defaults.
        overrides (dict): Some keys with other values.
        where (str): What to call the overrides in an error.

    Examples:
        >>> merge({"lr": 0.001, "steps": 100}, {"steps": 200}, "conf.yml")
        {'lr': 0.001, 'steps': 200}
        >>> merge({"lr": 0.001}, {"lr": "fast"}, "--lr")
        Traceback (most recent call last):
        asteroid_tiny.errors.UserError: --lr: lr must be a number, not 'fast'
    """
    merged = dict(base)
    for key, value in overrides.items():
        if key not in base:
            raise UserError(f"{where}: there is no setting {key!r}; ./run.sh --help lists them")
        merged[key] = _checked(key, value, base[key], where)
    return merged


def _checked(key, value, default, where):
    if value is None and (default is None or key in OF_NULL):
        return None
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    kind = OF_NULL.get(key, int) if default is None else type(default)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # a word too: YAML takes 1e-3 for one
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where}: {key} must be {kinds[kind]}, not {value!r}")
    if key in ONE_OF and value not in ONE_OF[key]:
        raise UserError(f"{where}: {key} must be one of {', '.join(ONE_OF[key])}, not {value!r}")
    if kind in (int, float) and (value < 0 or (value == 0 and key not in MAY_BE_ZERO)):
        bound = "at least" if key in MAY_BE_ZERO else "above"
        raise UserError(f"{where}: {key} must be {bound} 0, not {value}")
    if key in BELOW and value >= BELOW[key]:
        raise UserError(f"{where}: {key} must be below {BELOW[key]}, not {value}")
    if key in AT_MOST and value > AT_MOST[key]:
        raise UserError(f"{where}: {key} must be at most {AT_MOST[key]}, not {value}")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise UserError(f"{where}: {key} must be at least {AT_LEAST[key]} s, not {value}")
    return value


def parse_options(options, known):
    """``["--lr", "0.01"]`` as ``{"lr": 0.01}``; values are read as YAML.

    Args:
        options (list of str): Names and values in turn.
        known (dict): The settings there are.
    """
    given = {}
    for name, text in itertools.zip_longest(options[::2], options[1::2]):
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in known:
            raise UserError(f"there is no option {name}; ./run.sh --help lists them")
        if not text or text.startswith("--"):
            raise UserError(f"option {name} needs a value")
        if isinstance(known[key], str) or OF_NULL.get(key) is str:
            given[key] = None if key in OF_NULL and text == "null" else text
            continue
        try:
            given[key] = text if OF_ANOTHER_BASE.match(text) else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            given[key] = text
    return given


def recipe_folder(exp_dir):
    """The folder of a run's recipe, `exp` in which may be a link to a larger disk (Path)."""
    return Path(os.path.abspath(exp_dir)).parents[1]


def begin_run(exp_dir, settings, given, may_change=MAY_CHANGE):
    """Settles the settings of a run and keeps them in `exp_dir`/conf.yml.

    A run that was begun before keeps its settings; options that say otherwise are refused, but
    for those that may change.

    Args:
        exp_dir (str or Path): Folder of the run.
        settings (dict): Defaults merged with the options given now.
        given (dict): The options given now.
        may_change (tuple of str): Settings that may differ between two starts.

    Returns:
        dict: The settings of the run.
    """
    path = Path(exp_dir) / "conf.yml"
    if path.exists():
        begun = read_conf(path)
        recipe_dir = recipe_folder(exp_dir)
        corpora = [(key, key.removesuffix("_dir")) for key in ("speech", "noise_dir", *FOLDERS)]
        for key, what in corpora:
            if not (begun.get(key) and given.get(key)):
                continue
            before, now = recipe_dir / begun[key], recipe_dir / given[key]
            if before.exists() and not (now.exists() and now.samefile(before)):
                raise UserError(
                    f"{exp_dir} was begun with the {what} in {before}, which is still there; "
                    f"choose another --tag for other {what}"
                )
            may_change = (*may_change, key)
        for key, value in given.items():
            if key not in may_change and begun.get(key) != settings[key]:
                raise UserError(
                    f"{exp_dir} was begun with {key} {begun.get(key)}, not {value}; "
                    "choose another --tag, or delete that folder"
                )
        changed = {key: settings[key] for key in given if key in may_change}
        settings = {**settings, **begun, **changed}
    with whole_file(path) as part:
        part.write_text(yaml.safe_dump({"settings": settings}, sort_keys=False))
    return settings


def per_process(conf):
    """Mixtures of a batch that each process takes.

    Raises:
        UserError: If the batch cannot be shared out evenly.
    """
    processes = conf["devices"] * conf["num_nodes"]
    if conf["batch_size"] % processes:
        raise UserError(
            f"a batch_size of {conf['batch_size']} cannot be shared out to {processes} processes; "
            "take a multiple"
        )
    return conf["batch_size"] // processes


def read_run(exp_dir, known=OF_A_RUN):
    """The settings of a run that was begun, in which somebody may have written since (dict).

    Args:
        exp_dir (str or Path): Folder of the run.
        known (dict): Settings with values of their types; an older run may lack those beyond
            `OF_A_RUN`.

    Raises:
        UserError: If its conf.yml is missing or broken.
    """
    path = Path(exp_dir) / "conf.yml"
    settings = read_conf(path)
    for key in OF_A_RUN:
        if settings.get(key) is None:
            raise UserError(f"{path} lacks {key!r}; restore that line, or delete that folder")
    given = {key: settings[key] for key in known if settings.get(key) is not None}
    checked = merge(known, given, path)
    return settings | {key: checked[key] for key in given}


def open_run(description):
    """For stage scripts: the run folder that the command line names, and its settings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("exp_dir", type=Path, help="folder of the run, as configure.py makes it")
    exp_dir = parser.parse_args().exp_dir
    return exp_dir, read_run(exp_dir)
