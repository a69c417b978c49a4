"""Checks the options, settles the settings of a run, and prints the folder that holds them."""

import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
try:
    from asteroid_tiny.config import PATHS, begin_run, merge, parse_options, read_recipe, read_run
    from asteroid_tiny.errors import UserError, exit_on_user_error
    from asteroid_tiny.preparation import check_options
    from asteroid_tiny.recipe import build_model, without_foreign_start

    for package in ("pytorch-lightning", "pb_bss_eval"):  # of later stages; they take a while
        version(package)
except (ImportError, OSError) as error:  # the latter of libraries that do not fit together
    sys.stderr.write(
        f"error: {sys.executable} lacks packages ({str(error).partition(chr(10))[0]}); "
        f"run: {sys.executable} -m pip install -e '{ROOT}'\n"
    )
    sys.exit(2)


def main(recipe, tag, *options):
    recipe_dir = ROOT / "egs" / recipe / "TinySepformer"
    if not recipe_dir.is_dir():
        there = ", ".join(sorted(path.parent.name for path in ROOT.glob("egs/*/TinySepformer")))
        raise UserError(f"there is no recipe {recipe!r}; there are: {there}")
    base = ROOT / "local" / "conf.yml"
    defaults = read_recipe(base, recipe_dir / "conf.yml")
    given = parse_options(list(options), defaults)
    corpus = given.get("corpus", defaults["corpus"])
    if corpus != defaults["corpus"] and corpus not in ("kaldi", "own"):
        raise UserError(f"--corpus {corpus} needs settings of its own: take --recipe {corpus}")
    for key in ("speech", "init_from", *PATHS):  # relative to where the user is
        if given.get(key) is None:
            continue
        here, in_recipe = Path(given[key]).absolute(), recipe_dir / given[key]
        if here.exists() or (key != "init_from" and not in_recipe.exists()):
            given[key] = str(here)
    settings = merge(defaults, given, "options")
    rate = f"{settings['sample_rate'] / 1000:g}k"
    tag = tag or f"{settings['preset']}_{settings['n_src']}spk_{rate}"
    exp_dir = recipe_dir / "exp" / tag
    begun = read_run(exp_dir, defaults) if (exp_dir / "conf.yml").exists() else {}
    of_run = {**settings, **begun, **{key: settings[key] for key in given}}
    check_options(of_run, defaults, given)
    build_model(settings)
    settings = without_foreign_start(settings, defaults, given)
    begin_run(exp_dir, settings, given)
    print(exp_dir)


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
