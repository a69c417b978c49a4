"""Speech of the user's own as Kaldi data dirs train, valid and test, whatever its rate and layout.

Taken are

- a Kaldi data dir (see `kaldi`),
- a folder with one folder of recordings a speaker, at any depth below it, or
- a folder with ``train``, ``valid`` and ``test``, each one of these; ``valid`` may be missing, or
  be called ``dev``.

Where the speakers are not split already, a file ``spk2split`` (lines ``speaker train|valid|test``)
says who goes where; without it a hash of their names does, so that few move when speakers are
added.
"""

import hashlib
import io
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly
from tqdm import tqdm

from ..errors import UserError, printable
from ..files import files_below, whole_file
from .kaldi import FFMPEG_SUFFIXES, SPLITS, decode, open_info, read_table

TABLES = ("wav.scp", "utt2spk", "segments", "spk2gender", "spk2production")
SHARE = 0.1  # of the speakers for validation, and as many for test
SUFFIXES = {f".{name.lower()}" for name in sf.available_formats()}
SUFFIXES |= set(".aif .aifc .oga .opus .snd .sph .wave".split())


def prepare(source, target, n_src, sample_rate):
    """Makes the data dirs train, valid and test of a folder of speech.

    Recordings of another rate are converted once, to FLAC files in the target; others stay where
    they are. What was converted before, and has not changed since, is not converted again.

    Args:
        source (str or Path): The folder of speech.
        target (str or Path): Where the three data dirs go.
        n_src (int): Speakers needed in each split.
        sample_rate (int): Rate in Hz that is needed.

    Raises:
        UserError: If there is no speech, a file is broken, or speakers are too few.
    """
    for part_of, folder in find_parts(Path(source)).items():
        tables = read_part(folder)
        sides = split_speakers(tables["utt2spk"].values(), part_of, folder, n_src)
        for split in sorted(set(sides.values())):
            speakers = {speaker for speaker, side in sides.items() if side == split}
            write_split(Path(target) / split, select(tables, speakers), sample_rate)


def find_parts(source):
    """The folders to read, by the split that they are for; ``None`` for all splits."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; give the one with your speech as --speech")
    splits = {split: source / split for split in SPLITS if (source / split).is_dir()}
    if "valid" not in splits and (source / "dev").is_dir():
        splits["valid"] = source / "dev"
    if splits.keys() == {"train", "valid"}:
        raise UserError(f"{source} has train and {splits['valid'].name}, but no test")
    if not {"train", "test"} <= splits.keys():
        return {None: source}
    if "valid" not in splits:  # taken out of train
        splits["train and valid"] = splits.pop("train")
    return splits


def read_part(folder):
    """Tables by name, with absolute paths, of a Kaldi data dir or a folder of speakers' folders."""
    if not (folder / "wav.scp").exists():
        return read_folders(folder)
    tables = {}
    for name in TABLES:
        if name in ("wav.scp", "utt2spk") or (folder / name).exists():
            tables[name] = read_table(folder / name)
    speakers, tables["utt2spk"] = tables["utt2spk"], {}
    for key in tables.get("segments", tables["wav.scp"]):
        if key not in speakers:
            raise UserError(f"{folder / 'utt2spk'} names no speaker for utterance {key!r}")
        tables["utt2spk"][key] = speakers[key]  # who has no recording is no speaker to be split
    for key, value in tables["wav.scp"].items():
        tables["wav.scp"][key] = find_recording(folder, key, value)
    return tables


def find_recording(folder, key, value):
    """The absolute path of a recording; relative paths may start at the data dir or above it."""
    if value.endswith("|"):
        raise UserError(f"{folder / 'wav.scp'}: {key!r} is a command; name a file instead")
    for start in (folder, *folder.absolute().parents[:2]):
        if os.path.isfile(start / value):
            return str((start / value).absolute())
    raise UserError(f"{folder / 'wav.scp'} names {value} for {key!r}, which is missing")


def read_folders(folder):
    """Tables of a folder with one folder of recordings a speaker."""
    tables, folders, speakers = {"wav.scp": {}, "utt2spk": {}}, {}, {}
    unread, of_nobody = [], []
    for path in sorted(files_below(folder)):
        inside = path.relative_to(folder)
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            if suffix.lstrip(".") in FFMPEG_SUFFIXES:
                unread.append(path)
            continue
        if len(inside.parts) < 2:
            of_nobody.append(path)
            continue
        if os.fsencode(path) != str(path).encode(errors="replace"):
            raise UserError(f"the name {os.fsencode(path)!r} is not UTF-8; rename it")
        if set("\n\r") & set(str(path)):
            raise UserError(f"the name {str(path)!r} has a line break; rename it")
        speaker = re.sub(r"\s", "_", inside.parts[0])
        other = folders.setdefault(speaker, folder / inside.parts[0])
        if other != folder / inside.parts[0]:
            raise UserError(
                f"{other} and {folder / inside.parts[0]} would both be speaker {speaker!r}, as "
                "blanks become _; rename one, or put them into one"
            )
        utterance = re.sub(r"[\s/]", "_", inside.as_posix())
        if utterance in tables["utt2spk"]:
            other = tables["wav.scp"][utterance]
            raise UserError(
                f"{path} and {other} would both be utterance {utterance!r}, as blanks and slashes "
                "become _; rename one"
            )
        whose = speakers.setdefault(os.path.realpath(path), speaker)
        if whose != speaker:
            raise UserError(
                f"{path} is a recording of speaker {whose!r}, too, by a link; remove one of them"
            )
        tables["wav.scp"][utterance] = str(path.absolute())
        tables["utt2spk"][utterance] = speaker
    if not tables["utt2spk"]:
        raise UserError(
            f"{folder} is no speech: it has neither wav.scp nor a folder with recordings for "
            "each speaker, of a format that libsndfile opens (not M4A)"
        )
    for left, why in (
        (unread, "libsndfile does not open it; convert it to FLAC"),
        (of_nobody, "it is in no speaker's folder"),
    ):
        if left:
            first = printable(str(left[0]))
            print(f"  left out: {len(left)} recording(s), such as {first}: {why}")
    return tables


def split_speakers(speakers, split, folder, n_src):
    """The split of each speaker.

    Args:
        speakers (iterable of str): All speakers of a folder.
        split (str, optional): The split or splits that the folder is for; all without.
        folder (Path): Where `spk2split` may lie.
        n_src (int): Speakers needed in each split.

    Returns:
        dict: Split by speaker.

    Raises:
        UserError: If speakers are too few.
    """
    speakers = sorted(set(speakers), key=lambda name: hashlib.sha256(name.encode()).digest())
    if split in SPLITS:
        return dict.fromkeys(speakers, split)
    if (folder / "spk2split").exists():
        wanted = SPLITS if split is None else ("train", "valid")
        return listed_split(folder / "spk2split", speakers, wanted)
    wanted = ("valid", "test") if split is None else ("valid",)
    needed = n_src * (len(wanted) + 1)
    if len(speakers) < needed:
        raise UserError(
            f"{folder} has {len(speakers)} speaker(s); {needed} are needed: {n_src} each for "
            f"train and {' and '.join(wanted)}, so that nobody is in two"
        )
    count = max(n_src, round(SHARE * len(speakers)))
    sides = dict.fromkeys(speakers, "train")
    for i, side in enumerate(wanted):
        sides.update(dict.fromkeys(speakers[i * count : (i + 1) * count], side))
    return sides


def listed_split(path, speakers, splits):
    """The split of each speaker as the table `path` has it; who is not in it is left out."""
    sides = read_table(path)
    for speaker, side in sides.items():
        if side not in splits:
            raise UserError(f"{path}: {speaker!r}: must be {' or '.join(splits)}, not {side!r}")
        if speaker not in speakers:
            raise UserError(f"{path}: {speaker!r}: there is no such speaker")
    for split in splits:
        if split not in sides.values():
            raise UserError(f"{path} gives no speaker to {split}")
    return sides


def select(tables, speakers):
    """The lines of the tables that are about some of the speakers."""
    utt2spk = {key: who for key, who in tables["utt2spk"].items() if who in speakers}
    chosen = {"utt2spk": utt2spk}
    recordings = utt2spk
    if "segments" in tables:
        chosen["segments"] = {k: v for k, v in tables["segments"].items() if k in utt2spk}
        recordings = {line.split()[0] for line in chosen["segments"].values()}
    chosen["wav.scp"] = {k: v for k, v in tables["wav.scp"].items() if k in recordings}
    for name in ("spk2gender", "spk2production"):
        if name in tables:
            chosen[name] = {k: v for k, v in tables[name].items() if k in speakers}
    return chosen


def write_split(folder, tables, sample_rate):
    """Writes a data dir, its recordings converted where they have another rate."""
    converted = 0
    recordings = tqdm(tables["wav.scp"].items(), f"  {folder.name}", leave=False, disable=None)
    for key, path in recordings:
        rate = open_info(path).samplerate
        if rate == sample_rate:
            continue
        there = os.stat(path)
        version = f"{path} {there.st_size} {there.st_mtime_ns}".encode()
        name = f"{re.sub('[^A-Za-z0-9_.-]', '_', key)[-100:]}_{zlib.crc32(version):08x}.flac"
        if not (folder / "audio" / name).exists():
            convert(path, folder / "audio" / name, sample_rate)
        tables["wav.scp"][key] = f"audio/{name}"
        converted += 1
    for name in TABLES:
        if tables.get(name):
            lines = "".join(f"{k} {v}\n" for k, v in tables[name].items())
            with whole_file(folder / name) as part:
                part.write_text(lines, "utf-8")
        else:  # the source may have had it before
            (folder / name).unlink(missing_ok=True)
    if converted:
        print(f"  {folder.name}: {converted} recordings converted to {sample_rate} Hz")


def convert(path, target, sample_rate):
    """Writes a recording at another rate as FLAC, 16 bits."""
    rate = open_info(path).samplerate
    samples = decode(path)
    if samples.ndim > 1:
        raise UserError(f"{path} has {samples.shape[1]} channels; speech must be mono")
    if not len(samples):
        raise UserError(f"{path} holds no samples")
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    common = math.gcd(rate, sample_rate)
    samples = resample_poly(samples, sample_rate // common, rate // common)
    samples = samples / max(1.0, np.abs(samples).max())  # mixtures set the level anew
    flac = io.BytesIO()  # written from here, a full disk is an OSError that says so
    sf.write(flac, samples, sample_rate, format="FLAC", subtype="PCM_16")
    with whole_file(target) as part:
        part.write_bytes(flac.getvalue())
