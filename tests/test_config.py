"""Settings: types and limits, broken files, options, and runs that keep what they began with."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from asteroid_tiny import PRESETS, TinySepformer
from asteroid_tiny.config import (
    BELOW,
    MAY_BE_ZERO,
    OF_A_RUN,
    OF_NULL,
    OF_THE_MACHINE,
    begin_run,
    merge,
    parse_options,
    read_conf,
    read_recipe,
    read_run,
)

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "local" / "conf.yml"
DEFAULTS = {
    "speech": "data",
    "n_src": 2,
    "lr": 0.001,
    "checkpoint_activations": False,
    "seed": 0,
    "segment": 4.0,
    "batch_size": 4,
    "weight_decay": 0.01,
    "speed_perturb": 5,
    "n_filters": None,
    "dropout": None,
    "share_layers": None,
    "num_workers": 4,
    "noise_dir": None,
    "librimix_dir": None,
    "accelerator": "auto",
    "precision": "auto",
}


def settle(*options):
    """What the options make of the defaults."""
    return merge(DEFAULTS, parse_options(list(options), DEFAULTS), "options")


# ---- Values


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("lr", "0.01", 0.01),
        ("lr", "1e-3", 1e-3),
        ("lr", "2.5E-4", 2.5e-4),
        ("lr", "1", 1.0),
        ("weight_decay", "0", 0.0),
        ("n_src", "3", 3),
        ("seed", "0", 0),
        ("speed_perturb", "99", 99),
        ("checkpoint_activations", "true", True),
        ("checkpoint_activations", "no", False),
        ("speech", "8000", "8000"),
        ("speech", "no", "no"),
        ("speech", "a folder: [1]", "a folder: [1]"),
        ("n_filters", "64", 64),
        ("n_filters", "null", None),
        ("dropout", "0", 0.0),
        ("dropout", "0.1", 0.1),
        ("share_layers", "false", False),
        ("share_layers", "null", None),
    ],
)
def test_options_get_the_type_of_their_setting(key, text, value):
    settings = settle(f"--{key}", text)
    assert settings[key] == value and type(settings[key]) is type(value)
    assert {**settings, key: None} == {**DEFAULTS, key: None}, "the others stay"


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("seed", "4294967296", "must be below 4294967296"),
        ("segment", "0.001", "must be at least 0.01 s, not 0.001"),
        ("precision", "fp4", "must be one of auto, 32-true, bf16-mixed"),
        ("accelerator", "tpu", "must be one of auto, cpu, gpu, not 'tpu'"),
        ("lr", "fast", "must be a number, not 'fast'"),
        ("lr", "true", "must be a number, not True"),
        ("lr", "null", "must be a number, not None"),
        ("lr", "nan", "must be a number"),
        ("lr", ".nan", "must be a number"),
        ("lr", "inf", "must be a number"),
        ("lr", "-.inf", "must be a number"),
        pytest.param("lr", "1" + 400 * "0", "must be a number", id="400 digits"),
        pytest.param("lr", "1" + 5000 * "0", "must be a number", id="5000 digits"),
        ("lr", "[0.1]", "must be a number"),
        ("lr", "0", "must be above 0, not 0"),
        ("lr", "-1e-3", "must be above 0, not -0.001"),
        ("lr", "2026-13-45", "must be a number"),
        ("weight_decay", "-0.1", "must be at least 0"),
        ("n_src", "2.0", "must be a whole number, not 2.0"),
        ("n_src", "true", "must be a whole number, not True"),
        ("n_src", "two", "must be a whole number, not 'two'"),
        ("n_src", "[2", "must be a whole number"),
        ("n_filters", "010", "must be a whole number, not '010'"),
        ("n_filters", "1:30", "must be a whole number, not '1:30'"),
        ("n_src", "0", "must be above 0"),
        ("n_src", "-1", "must be above 0"),
        ("seed", "-1", "must be at least 0, not -1"),
        ("speed_perturb", "100", "must be below 100"),
        ("checkpoint_activations", "1", "must be true or false, not 1"),
        ("checkpoint_activations", "maybe", "must be true or false"),
        ("n_filters", "many", "must be a whole number, not 'many'"),
        ("n_filters", "64.5", "must be a whole number"),
        ("n_filters", "true", "must be a whole number"),
        ("n_filters", "0", "must be above 0"),
        ("dropout", "1", "must be below 1"),
        ("dropout", "nan", "must be a number"),
        ("dropout", "-0.1", "must be at least 0"),
        ("share_layers", "flase", "must be true or false, not 'flase'"),
        ("share_layers", "1", "must be true or false"),
    ],
)
def test_refused_values(refused, key, text, words):
    with refused("options", key, words):
        settle(f"--{key}", text)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--learning_rate", "1"], "no option --learning_rate"),
        (["lr", "1"], "no option lr"),
        (["-lr", "1"], "no option -lr"),
        (["--lr"], "option --lr needs a value"),
        (["--n_src", "2", "--lr"], "option --lr needs a value"),
        (["--lr", "--n_src", "2"], "option --lr needs a value"),
        (["--speech", "--n_src"], "option --speech needs a value"),
    ],
)
def test_refused_options(refused, options, words):
    with refused(words):
        parse_options(options, DEFAULTS)


def test_merge_leaves_its_arguments_alone():
    base, overrides = dict(DEFAULTS), {"n_src": 3, "lr": 1}
    assert merge(base, overrides, "here") == {**DEFAULTS, "n_src": 3, "lr": 1.0}
    assert base == DEFAULTS and overrides == {"n_src": 3, "lr": 1}


def test_merge_refuses_unknown_settings(refused):
    with refused("egs/mine/conf.yml", "'n_sources'"):
        merge(DEFAULTS, {"n_sources": 2}, "egs/mine/conf.yml")


# ---- Files


@pytest.fixture
def conf(tmp_path):
    """Writes a conf.yml and gives its path."""

    def write(content):
        path = tmp_path / "conf.yml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_sections_are_for_the_reader_alone(conf):
    path = conf("# words\na:\n  lr: 0.1  # learning rate\n  speech: données\nb:\n  n_src: 3\n")
    assert read_conf(path) == {"lr": 0.1, "speech": "données", "n_src": 3}
    assert read_conf(conf("# nothing but a comment\n")) == {}


def test_numbers_that_yaml_takes_for_words_are_numbers_in_files_too(conf):
    assert merge(DEFAULTS, read_conf(conf("a:\n  lr: 1e-4\n")), "conf.yml")["lr"] == 1e-4


@pytest.mark.parametrize(
    "content, words",
    [
        ("a:\n  lr: 0.1\nb:\n  lr: 0.2\n", "'lr' twice"),
        ("a:\n  lr: 0.1\n  lr: 0.2\n", "'lr' is there twice"),
        ("a:\n  lr: 0.1\na:\n  n_src: 2\n", "'a' is there twice"),
        ("lr: 0.1\n", "must consist of sections"),
        ("- lr\n- n_src\n", "must consist of sections"),
        ("training:\n", "must consist of sections"),
        ("words\n", "must consist of sections"),
        ("a:\n  lr: [0.1\n", "is not YAML"),
        ("a:\n\tlr: 0.1\n", "is not YAML"),
        ("a:\n  lr: 2026-13-45\n", "is not YAML"),
        ("a:\n  lr: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"a:\n  lr: \xff\xfe\n", "cannot be read"),
        (b"a:\n  lr: \x00\x01\n", "is not YAML"),
    ],
)
def test_refused_files(conf, refused, content, words):
    path = conf(content)
    with refused(path, words):
        read_conf(path)


def test_a_missing_file_is_refused(tmp_path, refused):
    with refused(tmp_path / "conf.yml", "No such file"):
        read_conf(tmp_path / "conf.yml")


# ---- Runs


def begin(exp_dir, *options):
    given = parse_options(list(options), DEFAULTS)
    return begin_run(exp_dir, merge(DEFAULTS, given, "options"), given)


def test_a_run_keeps_its_settings(tmp_path):
    exp_dir = tmp_path / "exp" / "mine"
    begun = begin(exp_dir, "--lr", "1e-5", "--n_filters", "64", "--speech", "no")
    assert begun == {**DEFAULTS, "lr": 1e-5, "n_filters": 64, "speech": "no"}
    assert read_conf(exp_dir / "conf.yml") == begun
    assert begin(exp_dir) == begun, "without options"
    assert begin(exp_dir, "--lr", "0.00001", "--n_src", "2") == begun, "with options that agree"
    other_defaults = {**DEFAULTS, "n_src": 5, "new": 1}
    assert begin_run(exp_dir, other_defaults, {}) == {**begun, "new": 1}, "defaults that changed"
    assert sorted(path.name for path in exp_dir.iterdir()) == ["conf.yml"]


@pytest.mark.parametrize(
    "key, text, was",
    [
        ("lr", "0.1", "1e-05"),
        ("n_src", "3", "2"),
        ("n_filters", "8", "None"),
        ("batch_size", "8", "4"),
        ("seed", "1", "0"),
        ("precision", "32-true", "auto"),
    ],
)
def test_a_run_refuses_options_that_contradict_it(tmp_path, refused, key, text, was):
    begun = begin(tmp_path, "--lr", "1e-5")
    with refused(tmp_path, f"begun with {key} {was}, not {text}", "--tag"):
        begin(tmp_path, f"--{key}", text)
    assert read_conf(tmp_path / "conf.yml") == begun


def test_a_run_may_move_to_another_machine(tmp_path):
    begun = begin(tmp_path, "--lr", "1e-5", "--num_workers", "2")
    moved = begin(tmp_path, "--num_workers", "0", "--speech", "/elsewhere")
    assert moved == {**begun, "num_workers": 0, "speech": "/elsewhere"}
    assert begin(tmp_path) == moved


@pytest.mark.parametrize(
    "key, what",
    [("speech", "speech"), ("noise_dir", "noise"), ("librimix_dir", "librimix")],
)
def test_a_run_keeps_its_speech_and_noise_while_they_are_there(tmp_path, refused, key, what):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    exp_dir = tmp_path / "exp" / "run"
    begin(exp_dir, f"--{key}", str(first))
    with refused(exp_dir, f"was begun with the {what} in", first, "--tag"):
        begin(exp_dir, f"--{key}", str(second))
    same = f"{tmp_path}/exp/../first"
    assert begin(exp_dir, f"--{key}", same)[key] == same
    first.rename(second)
    assert begin(exp_dir, f"--{key}", str(second))[key] == str(second)


def test_a_run_without_recorded_noise_gets_none_later(tmp_path, refused):
    begin(tmp_path / "exp" / "run")
    with refused("begun with noise_dir None"):
        begin(tmp_path / "exp" / "run", "--noise_dir", str(tmp_path))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"preset": None}, "lacks 'preset'"),
        ({"batch_size": "many"}, "batch_size must be a whole number, not 'many'"),
        ({"speech": ["a"]}, "speech must be a word"),
        ({"fit": [1]}, None),  # of another version
    ],
    ids=str,
)
def test_a_run_whose_settings_were_spoilt_is_named(tmp_path, refused, change, words):
    settings = {**OF_A_RUN, **change}
    (tmp_path / "conf.yml").write_text(yaml.safe_dump({"settings": settings}))
    if words is None:
        assert read_run(tmp_path) == settings
        return
    with refused(tmp_path / "conf.yml", words):
        read_run(tmp_path)


def test_the_settings_of_a_run_are_written_whole(tmp_path, monkeypatch):
    begun = begin(tmp_path, "--lr", "1e-5")

    def half(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(yaml, "safe_dump", half)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, "--num_workers", "0")
    assert read_conf(tmp_path / "conf.yml") == begun
    assert [path.name for path in tmp_path.iterdir()] == ["conf.yml"]


# ---- local/conf.yml and the recipes' own

RECIPES = sorted(ROOT.glob("egs/*/*/conf.yml"))
recipe_files = pytest.mark.skipif(not CONF.exists(), reason="an installed package has no recipes")


@recipe_files
def test_every_setting_is_explained_on_its_line():
    lines = [line for line in CONF.read_text().splitlines() if line.startswith("  ")]
    keys = [re.fullmatch(r"  (\w+): \S+ +# \S.*", line) for line in lines]
    unexplained = [line for line, match in zip(lines, keys) if not match]
    assert not unexplained
    assert [match[1] for match in keys] == list(read_conf(CONF)), "each key once"


@recipe_files
def test_defaults_are_values_that_would_be_accepted():
    defaults = read_conf(CONF)
    assert merge(defaults, defaults, CONF) == defaults
    there = defaults.keys() | set().union(*(read_conf(path, "corpus") for path in RECIPES))
    known = {*OF_THE_MACHINE, *MAY_BE_ZERO, *BELOW, *OF_NULL}
    assert known <= there, "rules for settings that are no more"


@recipe_files
def test_sizes_are_arguments_of_the_model_and_of_their_type():
    sizes = yaml.safe_load(CONF.read_text())["model"]
    assert sizes.pop("preset") in PRESETS
    arguments = inspect.signature(TinySepformer).parameters
    assert not sizes.keys() - arguments.keys()
    for key, value in sizes.items():
        default = arguments[key].default
        if value is None and default is not None:
            assert OF_NULL.get(key, int) is type(default), key


@recipe_files
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parts[-3])
def test_recipes_override_what_there_is_or_add_to_the_corpus(path):
    defaults, settings = read_conf(CONF), read_recipe(CONF, path)
    assert not defaults.keys() & read_conf(path, "corpus").keys()
    sections = yaml.safe_load(CONF.read_text()) | {"corpus": settings}
    for section, keys in yaml.safe_load(path.read_text()).items():
        assert keys.keys() <= sections[section].keys(), "a key in another section than its default"
    assert settings != defaults
    assert settings["preset"] in PRESETS


SHARES = "overlap_ratio least_overlap turns silent_sources reverb noise microphone".split()


@recipe_files
@pytest.mark.parametrize("key", SHARES)
def test_a_share_of_the_mixtures_is_at_most_all(key, refused):
    defaults = read_conf(CONF)
    assert merge(defaults, {key: 1}, "options")[key] == 1
    with refused(key, "must be at most 1, not 1.5"):
        merge(defaults, {key: 1.5}, "options")
