"""What is wrong with speech or a mixture list, found before hours of training.

All of it is read and decoded once, in threads. Nothing here stops at the first thing found, as
opening a `SpeechDir` does; the two agree about what cannot be used.
"""

import collections
import concurrent.futures
import csv
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .kaldi import SPLITS, NoiseDir, SpeechDir, decode, open_info, read_table
from .mixing import is_silent, read_list, render

FULL_SCALE = 0.999
CLIPPED = 0.001  # share of the samples at full scale above which a recording has clipped


class Finding(NamedTuple):
    """Something wrong: of which kind, where, and what.

    Attributes:
        kind (str): Such as ``"unreadable"`` or ``"silent"``.
        where (str): A file, an utterance, a speaker or a mixture.
        what (str): Details, or an empty string.
        fatal (bool): Whether it would stop a training.
    """

    kind: str
    where: str
    what: str
    fatal: bool = True


def check_speech(folder, sample_rate=None, shortest=0.0):
    """What is wrong with a Kaldi data dir, or with a folder of those of train, valid and test.

    Args:
        folder (str or Path): The folder.
        sample_rate (int, optional): Rate in Hz that is needed; that of most recordings by default.
        shortest (float): Utterances below so many seconds are reported.

    Returns:
        list of Finding: In the order of the tables; empty if all is well.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    splits = [folder / split for split in SPLITS if (folder / split).is_dir()]
    if not splits or (folder / "wav.scp").exists():
        return check_dir(folder, sample_rate, shortest)
    findings, where = [], collections.defaultdict(list)
    for path in splits:
        findings += check_dir(path, sample_rate, shortest)
        for speaker in sorted(set(_table(path / "utt2spk", []).values())):
            where[speaker].append(path.name)
    for speaker, names in where.items():
        if len(names) > 1:
            findings.append(Finding("speaker in two splits", speaker, " and ".join(names)))
    return findings


def check_dir(folder, sample_rate=None, shortest=0.0):
    """`check_speech` for a single Kaldi data dir."""
    findings = []
    wavs, speakers = (_table(folder / name, findings) for name in ("wav.scp", "utt2spk"))
    segments = _table(folder / "segments", findings) if (folder / "segments").exists() else {}
    told = {}
    for name in ("spk2gender", "spk2production", "utt2num_samples"):
        if (folder / name).exists():
            told[name] = _table(folder / name, findings)
    lengths = {} if segments else told.get("utt2num_samples", {})
    inside = collections.defaultdict(dict)  # by recording: utterances with start and end in s
    for key in segments or wavs:
        try:
            recording, *span = segments[key].split() if segments else [key]
            if segments:
                start, end = span = tuple(map(float, span))
                if not math.isfinite(start + end):
                    raise ValueError
            inside[recording][key] = span  # empty: all of it
        except ValueError:
            findings.append(Finding("broken segment", key, segments[key]))
        if key not in speakers:
            findings.append(Finding("no speaker", key, f"in {folder / 'utt2spk'}"))
        elif len(speakers[key].split()) > 1:
            findings.append(Finding("broken speaker", key, f"{speakers[key]!r} is not one word"))
    for recording in inside.keys() - wavs.keys():
        findings.append(Finding("missing", recording, f"in {folder / 'wav.scp'}"))
    looked = _look_at_all({key: folder / value for key, value in wavs.items()}, inside, shortest)
    rates = collections.Counter(rate for rate, *_ in looked.values() if rate)
    wanted = sample_rate or (rates.most_common(1)[0][0] if rates else None)
    for key, (rate, n_samples, found) in looked.items():
        if rate not in (None, wanted):
            findings.append(Finding("rate", str(folder / wavs[key]), f"{rate} Hz, not {wanted}"))
        findings += found
        length = lengths.get(key, "")
        if n_samples and length.isdecimal() and int(length) != n_samples:
            what = f"{n_samples} samples, not {length} as utt2num_samples has it"
            findings.append(Finding("length", str(folder / wavs[key]), what))
    return findings


def check_noise(paths):
    """What is wrong with recordings of noise.

    Args:
        paths (list of str): The recordings.

    Returns:
        list of Finding: Empty if all is well.
    """

    def look(path):
        try:
            decode(path)
        except UserError as error:
            return Finding("unreadable noise", path, str(error))

    return [finding for finding in _in_threads(look, paths) if finding]


def check_list(path, speech_folder, noise=None):
    """What is wrong with a mixture list.

    Args:
        path (str or Path): The list.
        speech_folder (str or Path): The data dir of its utterances.
        noise (str or Path, optional): The data dir of its noises, if it has some.

    Returns:
        list of Finding: Empty if all is well.
    """
    try:
        rate = _rate_of(path)
        speech = SpeechDir(speech_folder, rate, convert=True)
        noises = NoiseDir(noise, rate, convert=True) if noise else None
        mixtures = read_list(path, speech, noises)
    except UserError as error:
        return [Finding("unusable", str(path), str(error))]
    findings = []
    for mixture in mixtures:
        try:
            mixed, sources = render(speech, mixture, noises)
        except UserError as error:
            findings.append(Finding("unreadable", mixture.mixture_id, str(error)))
            continue
        if mixed.abs().max() > 1 - 1e-6:  # which is where `render` leaves a peak above 1
            findings.append(Finding("clipping", mixture.mixture_id, "made softer", False))
        for source, samples in zip(mixture.sources, sources):
            if is_silent(samples.numpy()):
                findings.append(Finding("silent", mixture.mixture_id, source.utterance, False))
    return findings


def format_findings(findings, most=10):
    """The findings as a table: a line for each kind with its count, and its first ones.

    Args:
        findings (list of Finding): What was found.
        most (int): Findings of each kind that are named.
    """
    by_kind = collections.defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    lines = []
    for kind, found in by_kind.items():
        lines.append(f"  {len(found):6}  {kind}")
        lines += [f"          {one.where}  {one.what}".rstrip() for one in found[:most]]
        if len(found) > most:
            lines.append(f"          and {len(found) - most} more")
    return "\n".join(lines)


def _rate_of(path):
    """The sample rate of a mixture list by its first row, None if it has none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return int(next(csv.DictReader(file))["sample_rate"])
    except (OSError, UnicodeDecodeError, csv.Error, StopIteration, KeyError, ValueError, TypeError):
        return None  # `read_list` says what is wrong


def _table(path, findings):
    try:
        return read_table(path)
    except UserError as error:
        findings.append(Finding("table", str(path), str(error)))
        return {}


def _look_at_all(paths, inside, shortest):
    """Rate, samples and findings of each recording."""

    def look(key):
        return key, _look(paths[key], inside.get(key, {}), shortest)

    return dict(_in_threads(look, paths))


def _in_threads(look, paths):
    """What `look` gives for each path (list)."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = pool.map(look, paths)
        return list(tqdm(looks, "  checking", len(paths), leave=False, disable=None))


def _look(path, utterances, shortest):
    """Rate and samples of a recording, None if it cannot be read, and what is wrong with it."""
    try:
        info = open_info(path)
        if info.channels != 1:
            return info.samplerate, None, [Finding("channels", str(path), str(info.channels))]
        samples = decode(path)
    except UserError as error:
        kind = "NaN" if "NaN" in str(error) else "unreadable" if os.path.exists(path) else "missing"
        return None, None, [Finding(kind, str(path), str(error))]
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    found = list(_listen(samples, info.samplerate, path, utterances, shortest))
    return info.samplerate, len(samples), found


def _listen(samples, rate, path, utterances, shortest):
    """What can be heard to be wrong."""
    if not len(samples):
        yield Finding("empty", str(path), "")
        return
    full = np.mean(np.abs(samples) >= FULL_SCALE)
    if full > CLIPPED:
        yield Finding("clipping", str(path), f"{100 * full:.1f} % of its samples", False)
    for key, span in utterances.items():
        first, last = (round(time * rate) for time in span or (0, len(samples) / rate))
        if not 0 <= first < last <= len(samples) + 1:
            yield Finding("outside its recording", key, f"{span[0]:g} to {span[1]:g} s of {path}")
            continue
        part = samples[first:last]
        if is_silent(part):
            yield Finding("silent", key, "", False)
        if len(part) < shortest * rate:
            yield Finding("short", key, f"{len(part) / rate:.2f} s", False)
