"""The first two stages of a recipe: its speech as Kaldi data dirs, and its mixture lists.

Both are functions of a run's folder and settings, as the stages in `recipe` are.
"""

import hashlib
import itertools
from pathlib import Path

from .config import DRAWN, per_process, recipe_folder
from .data import (
    MixtureList,
    NoiseDir,
    RecordedNoise,
    SpeechDir,
    check_disjoint,
    draw_list,
    librimix,
    own,
    write_list,
    wsj0mix,
)
from .data.check import check_dir, check_noise, check_speech, format_findings
from .data.kaldi import SPLITS, read_table
from .data.mixing import check_speakers
from .errors import UserError
from .files import whole_file

SHORTEST = 0.5  # s: utterances below are reported
#: Corpora that have mixture lists of their own, and their modules.
LISTED = {"wsj0-mix": wsj0mix, "librimix": librimix}
CORPORA = ("kaldi", "own", *LISTED)
#: Settings by which lists are drawn: not those of a corpus.
LISTS_BY = ("eval_segment", "valid_seed", "test_seed")


def check_options(settings, defaults, given):
    """Refuses what cannot be done, and options that change nothing.

    Args:
        settings (dict): The recipe's defaults merged with the options.
        defaults (dict): Of the recipe.
        given (dict): The options.

    Raises:
        UserError: If there is such an option.
    """
    per_process(settings)
    if settings["corpus"] in LISTED:
        LISTED[settings["corpus"]].check_options(settings)
    elif not settings["dynamic_mixing"]:
        raise UserError(f"corpus {settings['corpus']} has no list; it needs dynamic_mixing true")
    least, ratio = settings["least_overlap"], settings["overlap_ratio"]
    if "least_overlap" in given and ratio <= least < defaults["least_overlap"]:
        raise UserError(f"--least_overlap {least:g} has no effect: overlap_ratio is {ratio:g}")
    if settings["noise_dir"] and not settings["noise"]:
        raise UserError("--noise_dir has no effect without --noise, the share of the mixtures")
    if settings["corpus"] not in LISTED:
        return
    idle = LISTS_BY if settings["dynamic_mixing"] else LISTS_BY + DRAWN
    for key in idle:
        if key in given and settings[key] != defaults[key]:
            what = "its own training" if key in DRAWN else "its own validation and test"
            hint = "; --dynamic_mixing true draws others" if key in DRAWN else ""
            raise UserError(
                f"--{key} has no effect: {settings['corpus']} has {what} mixtures{hint}"
            )


def open_split(exp_dir, settings, split):
    """The `SpeechDir` of a split.

    Raises:
        UserError: If the speech is no longer where stage 0 found it.
    """
    folder = speech_folder(exp_dir, settings) / split
    if settings["corpus"] != "kaldi" and (folder / "wav.scp").exists():
        first = next(iter(read_table(folder / "wav.scp").values()), None)
        if first and not (folder / first).is_file():
            raise UserError(
                f"{first} is missing; if the corpus was moved, run again from --stage 0 with the "
                "place where it is now"
            )
    return SpeechDir(folder, settings["sample_rate"], convert=_is_mixed_here(settings))


def open_noise(exp_dir, settings, split):
    """The `NoiseDir` of a split, None if the recipe has no noise."""
    folder = speech_folder(exp_dir, settings) / f"{split}_noise"
    convert = _is_mixed_here(settings)
    return NoiseDir(folder, settings["sample_rate"], convert) if folder.is_dir() else None


def _is_mixed_here(settings):
    """Whether mixtures are made of LibriSpeech, at any rate; others have that of their folder."""
    return settings["corpus"] == "librimix" and not settings["librimix_dir"]


def speech_folder(exp_dir, settings):
    """Where the data dirs of a run are: those of the recipe, or made for the run in stage 0."""
    if settings["corpus"] == "kaldi":
        return source_folder(exp_dir, settings)
    return Path(exp_dir) / "speech"


def source_folder(exp_dir, settings):
    """The folder that the settings name; it may be relative to that of the recipe."""
    return recipe_folder(exp_dir) / settings["speech"]


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
    own_pack = settings["corpus"] == "kaldi" and folder.parent == recipe_folder(exp_dir)
    if own_pack and (folder / "SHA256SUMS").exists():
        verify_checksums(folder)
    splits = {split: open_split(exp_dir, settings, split) for split in SPLITS}
    for group in LISTED[settings["corpus"]].DISJOINT if settings["corpus"] in LISTED else [SPLITS]:
        check_disjoint(**{split: splits[split] for split in group})
    for split, speech in splits.items():
        if settings["corpus"] in LISTED:
            LISTED[settings["corpus"]].check(speech, settings)
        check_speakers(speech, settings["n_src"])
        print(
            f"  {split:5}  {len(speech.by_speaker):4} speakers {len(speech.utterances):6} "
            f"utterances {speech.minutes():8.1f} minutes"
        )
    if settings.get("noise_dir"):  # which an older run does not have
        noise = RecordedNoise(settings["noise_dir"])
        minutes = noise.seconds.sum() / 60
        print(f"  noise  {len(noise.recordings):31} recordings {minutes:8.1f} minutes")
    if (folder / "CREDITS.txt").exists():
        print((folder / "CREDITS.txt").read_text(encoding="utf-8"))


def verify_checksums(folder):
    """Compares the files of the speech in this repository with its SHA256SUMS.

    Raises:
        UserError: That names the first file that is missing or changed.
    """
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    for wanted, name in (line.split(maxsplit=1) for line in lines if line.strip()):
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
    noises = (open_noise(exp_dir, settings, split) for split in SPLITS)
    paths = [path for noise in noises if noise for path in noise.wavs.values()]
    if settings.get("noise_dir"):  # which an older run does not have
        paths += [path for path, *_ in RecordedNoise(settings["noise_dir"]).recordings]
    findings += check_noise(paths)
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


def open_training(exp_dir, settings):
    """What `train` draws or takes its mixtures from: a `SpeechDir` or a `MixtureList`."""
    open_it = open_split if settings["dynamic_mixing"] else open_list
    return open_it(exp_dir, settings, "train")
