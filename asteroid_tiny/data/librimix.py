"""Libri2Mix and Libri3Mix (Cosentino et al., 2020), mixed on the fly from LibriSpeech.

LibriMix's metadata, one row a mixture, name the files of LibriSpeech, the noise of WHAM! and the
gains. Its generator reads each file at 16 kHz, multiplies it by its gain, converts it to the rate
asked for (`scipy.signal.resample_poly`), cuts all sources to the shortest (``min``) or pads them to
the longest (``max``), adds them and writes 16-bit wav files. Noise is read up to the length of the
longest source, and extended where it is shorter (see `NoiseDir`). The mixtures here are the same
but for that last rounding. https://github.com/JorisCos/LibriMix

A generated LibriMix serves as well, see `prepare`.
"""

import csv
import math
import re
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from ..download import fetch
from ..errors import UserError
from ..files import alone, files_below, make_folder, reason, whole_file
from . import mixed
from .kaldi import NoiseDir, write_dir
from .mixing import Mixture, Source

DISJOINT = (("train", "valid"), ("train", "test"), ("valid", "test"))
#: Parts of LibriSpeech by split, and the folders of a generated LibriMix.
PARTS = {"train": "train-clean-{}", "valid": "dev-clean", "test": "test-clean"}
FOLDERS = {"train": "train-{}", "valid": "dev", "test": "test"}
MIXES = {"sep_clean": "mix_clean", "sep_noisy": "mix_both"}
#: Mixtures of each file of metadata, by number of sources.
OFFICIAL = {
    2: {"train-clean-100": 13900, "train-clean-360": 50800},
    3: {"train-clean-100": 9300, "train-clean-360": 33900},
}
OFFICIAL_EVAL = 3000
METADATA_URL = "https://raw.githubusercontent.com/JorisCos/LibriMix/master/metadata"
WHAM_URL = "https://my-bucket-a8b4b49c25c811ee9a7e8bba05fa24c7.s3.amazonaws.com/wham_noise.zip"
#: LibriMix adds these noises of WHAM! played at 80 and at 120 % to those for training.
SPEEDS = {"sp08": 80, "sp12": 120}


class Archive(NamedTuple):
    """An archive to fetch: address, MD5 or None, size, and that of its content, both in GB."""

    url: str
    md5: str
    size: float
    unpacked: float


#: By the folder that it brings; checksums of https://www.openslr.org/resources/12/md5sum.txt,
#: addresses relative to --librispeech_url.
ARCHIVES = {
    "dev-clean": Archive("dev-clean.tar.gz", "42e2234ba48799c1f50f24a7926300a1", 0.34, 0.4),
    "test-clean": Archive("test-clean.tar.gz", "32fa31d27d2e1cad72775fee3f4849a9", 0.35, 0.4),
    "train-clean-100": Archive(
        "train-clean-100.tar.gz", "2a93770f6d5c6c964bc36631d331a522", 6.4, 6.6
    ),
    "train-clean-360": Archive(
        "train-clean-360.tar.gz", "c0e676e450a7ff2f54aeade5171606fa", 23.1, 23.7
    ),
    "wham_noise": Archive(WHAM_URL, None, 17.7, 35),
}


def prepare(source, target, settings):
    """Writes the data dirs train, valid and test, and those of their noise where the task has it.

    With `librimix_dir` they are made of a generated LibriMix, else of LibriSpeech, which is fetched
    if `librispeech_dir` is not given.

    Args:
        source (Path): Where what is fetched goes.
        target (Path): Where the data dirs go.
        settings (dict): The keys of the recipe's conf.yml.

    Raises:
        UserError: If something is missing or broken, or an option is.
    """
    check_options(settings)
    if settings["librimix_dir"]:
        for split in PARTS:
            _prepare_generated(split, target, settings)
        return
    speech_dir, noise_dir, metadata_dir = _obtain(source, settings)
    for split in PARTS:
        metadata = metadata_file(metadata_dir, split, settings)
        rows = read_metadata(metadata)
        _check_sources(metadata, (len(row.sources) for row in rows), settings["n_src"])
        _prepare_speech(speech_dir, part_of(split, settings), target / split)
        if settings["task"] == "sep_noisy":
            _prepare_noise(rows, noise_dir, target / f"{split}_noise")
        with whole_file(target / f"{split}.csv") as part:
            shutil.copyfile(metadata, part)
        mixed.report_count(split, len(rows), official_count(split, settings))


def _prepare_speech(folder, part, target):
    files = (path for path in sorted(files_below(folder / part)) if path.suffix == ".flac")
    wavs = {path.stem: str(path.absolute()) for path in files}
    if not wavs:
        raise UserError(f"{folder / part} holds no FLAC file")
    speakers = {key: key.split("-")[0] for key in wavs}
    genders = read_genders(folder)
    spk2gender = {s: genders[s] for s in sorted(set(speakers.values())) if s in genders}
    write_dir(target, {"wav.scp": wavs, "utt2spk": speakers, "spk2gender": spk2gender})


def part_of(split, settings):
    """The part of LibriSpeech that is for a split, such as train-clean-100."""
    return PARTS[split].format(settings["subset"].removeprefix("train-"))


def official_count(split, settings):
    """How many mixtures the official corpus has."""
    return OFFICIAL[settings["n_src"]].get(part_of(split, settings), OFFICIAL_EVAL)


def read_genders(folder):
    """Gender, m or f, by speaker, of LibriSpeech's SPEAKERS.TXT; empty without that."""
    path = folder / "SPEAKERS.TXT"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = [line.split("|") for line in lines if not line.startswith(";")]
    genders = {f[0].strip(): f[1].strip().lower() for f in fields if len(f) > 2}
    return {speaker: gender for speaker, gender in genders.items() if gender}


def check(speech, settings):
    """Refuses sources of a generated LibriMix that are cut short, see `mixed.mixtures`."""
    if settings["librimix_dir"]:
        mixed.mixtures(speech)


def mixtures(split, speech, noise, settings):
    """The mixtures of a split, in the order of the metadata.

    Args:
        split (str): train, valid or test.
        speech (SpeechDir): As `prepare` wrote it.
        noise (NoiseDir): The same for noise; None if the task has none.
        settings (dict): The keys of the recipe's conf.yml.

    Returns:
        list of Mixture: With gains in dB, and whole utterances as sources.
    """
    if settings["librimix_dir"]:
        return mixed.mixtures(speech, noise)
    rows = read_metadata(speech.path.parent / f"{split}.csv")
    rows = {row.mixture_id: row for row in rows}  # its file would be written twice, the last stays
    return [make_mixture(row, speech, noise, settings["mode"]) for row in rows.values()]


class Row(NamedTuple):
    """A row of metadata: id, and file and gain, a factor, of each source and of the noise."""

    mixture_id: str
    sources: tuple
    noise: tuple


def read_metadata(path):
    """The rows of a file of LibriMix's metadata (list of `Row`).

    Raises:
        UserError: If the file is missing or something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [_parse(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path} is not a file of LibriMix's metadata") from None
    if not rows:
        raise UserError(f"{path} names no mixtures")
    return rows


def _parse(row):
    n_src = sum(name.startswith("source_") and name.endswith("_path") for name in row)
    names = [f"source_{i}" for i in range(1, n_src + 1)] + ["noise"]
    files = [(row[f"{name}_path"], float(row[f"{name}_gain"])) for name in names]
    if n_src < 1 or not all(path and 0 < gain < math.inf for path, gain in files):
        raise ValueError
    return Row(row["mixture_ID"], tuple(files[:-1]), files[-1])


def make_mixture(row, speech, noise, mode):
    """The `Mixture` of a row of metadata; `mode` is min or max, the others are as in `mixtures`."""
    sources = []
    for path, gain in row.sources:
        key = Path(path).stem
        if key not in speech.utterances:
            raise UserError(f"{speech.path} lacks {path}, which LibriMix's metadata name")
        sources.append(mixed.whole(speech, key)._replace(gain=20 * math.log10(gain)))
    lengths = [source.length for source in sources]
    chosen = min(lengths) if mode == "min" else max(lengths)
    length = -(-chosen * speech.sample_rate // speech.recorded_rate)
    if noise is None:
        return Mixture(row.mixture_id, length, tuple(sources))
    path, gain = row.noise
    key, speed = Path(path).stem, 100
    if key not in noise.utterances:
        key, speed = split_speed(key)
    taken = -(-max(lengths) * speed // 100)
    return Mixture(
        row.mixture_id,
        length,
        tuple(sources),
        Source(key, 0, taken, 0, 20 * math.log10(gain), speed),
    )


def split_speed(name):
    """The noise that a noise of another speed was made of, and that speed in percent.

    Examples:
        >>> split_speed("421c0206_0.01983_440o0307_-0.01983sp08")
        ('421c0206_0.01983_440o0307_-0.01983', 80)
    """
    found = re.fullmatch("(.*)(sp08|sp12)", name)
    return (found[1], SPEEDS[found[2]]) if found else (name, 100)


def _prepare_noise(rows, folder, target):
    wavs, played = {}, 0
    for path, _ in (row.noise for row in rows):
        wav = folder / path
        if not wav.exists():
            name, speed = split_speed(wav.stem)
            wav = wav.with_stem(name)
            played += speed != 100
        wavs[wav.stem] = mixed.find(wav)
    write_dir(target, {"wav.scp": wavs, "utt2spk": dict.fromkeys(wavs, "noise")}, NoiseDir)
    if played:
        print(
            f"  note: {played} noises, which LibriMix makes with SoX, are played at 80 or 120 % "
            "here; they differ a little from its"
        )


def _prepare_generated(split, target, settings):
    n_src, mix = settings["n_src"], MIXES[settings["task"]]
    tree = Path(settings["librimix_dir"])
    if (tree / f"Libri{n_src}Mix").is_dir():
        tree = tree / f"Libri{n_src}Mix"
    tree = tree / f"wav{settings['sample_rate'] // 1000}k" / settings["mode"]
    folder = FOLDERS[split].format(settings["subset"].removeprefix("train-"))
    table = tree / "metadata" / f"mixture_{folder}_{mix}.csv"
    names = read_names(table)
    _check_sources(table, (len(speakers_of(name)) for name in names), n_src)
    parts = [f"s{k}" for k in range(1, n_src + 1)]
    mixed.write_split(tree / folder, target / split, names, speakers_of)
    if settings["task"] == "sep_noisy":
        mixed.write_noise(tree / folder, target / f"{split}_noise", names)
        parts.append("noise")
    mixed.report_sums(tree / folder, mix, names, parts)
    mixed.report_count(split, len(names), official_count(split, settings))


def _check_sources(path, counts, n_src):
    for count in counts:
        if count != n_src:
            raise UserError(f"{path} has mixtures of {count} sources, not of {n_src} (--n_src)")


def read_names(path):
    """The ids of the mixtures in a table of a generated LibriMix."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names = [row["mixture_ID"] for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{path} is not a table of a generated LibriMix") from None
    if not names:
        raise UserError(f"{path} names no mixture")
    return names


def speakers_of(name):
    """Speakers of a mixture by its name.

    Examples:
        >>> speakers_of("1580-141083-0046_7127-75947-0026")
        ['1580', '7127']
    """
    return [utterance.split("-")[0] for utterance in name.split("_")]


def check_options(settings):
    """Refuses options that LibriMix does not have, or that contradict each other.

    Raises:
        UserError: If there is one.
    """
    values = dict(task=tuple(MIXES), subset=("train-100", "train-360"), mode=("min", "max"))
    mixed.check_values(settings, "LibriMix", **values, **mixed.BOTH)
    for key in ("librispeech_dir", "metadata_dir", "wham_dir"):
        if settings["librimix_dir"] and settings[key]:
            raise UserError(f"{key} has no effect with librimix_dir, which is made of them")
    if settings["task"] == "sep_noisy" and settings["dynamic_mixing"]:
        raise UserError("task sep_noisy needs dynamic_mixing false: what is drawn has no noise")
    if settings["task"] != "sep_noisy" and settings["wham_dir"]:
        raise UserError(f"wham_dir has no effect with task {settings['task']}")


def _obtain(source, settings):
    """The folders of LibriSpeech, WHAM! and the metadata; what is not given is fetched."""
    speech_dir = Path(settings["librispeech_dir"] or source / "LibriSpeech")
    noise_dir = Path(settings["wham_dir"] or source / "wham_noise")
    needed = {speech_dir / part_of(split, settings): "librispeech_dir" for split in PARTS}
    if settings["task"] == "sep_noisy":
        needed[noise_dir] = "wham_dir"
    missing = {folder: key for folder, key in needed.items() if not folder.is_dir()}
    for folder, key in missing.items():
        if settings[key]:
            raise UserError(f"{folder} is missing; --{key} must lead to it")
    fetch_archives({f: ARCHIVES[f.name] for f in missing}, settings["librispeech_url"])
    return speech_dir, noise_dir, _obtain_metadata(source, settings)


def _obtain_metadata(source, settings):
    name = f"Libri{settings['n_src']}Mix"
    if settings["metadata_dir"]:
        folder = Path(settings["metadata_dir"])
        return folder / name if (folder / name).is_dir() else folder
    folder = source / "metadata" / name
    for split in PARTS:
        path = metadata_file(folder, split, settings)
        if not path.exists():
            fetch(f"{METADATA_URL}/{name}/{path.name}", path)
    return folder


def metadata_file(folder, split, settings):
    """The file of metadata of a split, such as libri2mix_dev-clean.csv."""
    return folder / f"libri{settings['n_src']}mix_{part_of(split, settings)}.csv"


def fetch_archives(wanted, librispeech_url):
    """Fetches and unpacks archives, having said how much there is to fetch and to hold.

    Args:
        wanted (dict): `Archive` by the folder (Path) that it is to become.
        librispeech_url (str): What relative addresses are relative to.

    Raises:
        UserError: If there is too little space, or of `fetch`.
    """
    if not wanted:
        return
    place = next(iter(wanted)).parent
    make_folder(place)
    with alone(place, "fetches speech"):
        _fetch_archives(place, wanted, librispeech_url)


def _fetch_archives(place, wanted, librispeech_url):
    for folder in wanted:  # of an unpacking that was killed
        shutil.rmtree(_unpacking(folder), ignore_errors=True)
    size = sum(archive.size for archive in wanted.values())
    space = sum(archive.unpacked for archive in wanted.values()) + max(
        archive.size for archive in wanted.values()
    )
    there = [_arrived(folder, archive) for folder, archive in wanted.items()]
    size, space = size - sum(there), space - sum(there)
    free = shutil.disk_usage(place).free / 1e9
    print(f"  to fetch: {', '.join(folder.name for folder in wanted)}, {size:.1f} GB in all")
    print(f"  space needed in {place}: {space:.1f} GB while unpacking; {free:.1f} GB are free")
    if free < space:
        raise UserError(f"{place} has {free:.1f} GB free where {space:.1f} GB are needed")
    for folder, archive in wanted.items():
        url = archive.url if "://" in archive.url else f"{librispeech_url}/{archive.url}"
        path = fetch(url, _place(folder, archive), md5=archive.md5)
        print(f"  unpacking {path.name}", flush=True)
        unpack(path, folder)
        path.unlink()


def _place(folder, archive):
    """Where the archive lies until it is unpacked."""
    return folder.parent / archive.url.rpartition("/")[2]


def _arrived(folder, archive):
    """GB of the archive that are there from before."""
    path = _place(folder, archive)
    files = (path, path.with_name(f".{path.name}.part"))
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def _unpacking(folder):
    """Where the archive is unpacked."""
    return folder.with_name(f".unpacking-{folder.name}")


def unpack(path, folder):
    """Unpacks an archive and moves the folder `folder.name` in it to `folder`, whole or not.

    Text files beside it, such as SPEAKERS.TXT, are kept as well.
    """
    part = _unpacking(folder)
    try:
        shutil.unpack_archive(path, part)
        found = next((f for f in part.rglob(folder.name) if f.is_dir()), None)
        if found is None:
            raise UserError(f"{path} holds no folder {folder.name}; delete it to fetch it again")
        for text in found.parent.glob("*.TXT"):
            shutil.copy(text, folder.parent)
        found.rename(folder)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        if getattr(error, "errno", None):  # of the disk, not of the archive
            raise UserError(f"{path} could not be unpacked: {reason(error)}") from None
        raise UserError(
            f"{path} could not be unpacked ({error}); delete it to fetch it again"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
