"""Separates many recordings: finds them, skips what is done, and says what became of each."""

import glob
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from ..data.kaldi import FFMPEG_SUFFIXES
from ..errors import UserError, without_codes
from ..files import reason, sweep
from ..inspection import DEFAULT, default_for, find_device, made_for, open_model
from .audio import check_peak, open_recording
from .blocks import BLOCK, separate_file

SHORTEST = 0.5  # s: block in which a voice can be heard
FAINT = 25.0  # dB below the loudest file, of one that may hold nobody
LOOKED_AT = 20  # s of a recording, at most, that tell whether files are its
LEAST_ALIKE = 0.1  # correlation of a recording and the sum of its files
STEP = 2.0**-15  # of 16 bits re full scale, below which files are silent


def separate_all(
    files,
    model=None,
    out="separated",
    format="wav",
    device="auto",
    block=BLOCK,
    batch=None,
    force=False,
    no_mixture_consistency=False,
    peak=None,
):
    """Separates recordings into files of a folder, and prints what became of each.

    Args:
        files (list of str): Recordings, folders of them, or globs.
        model (str, optional): As `inspection.open_model` takes it; by default the packaged one for
            the rate of each recording, see `inspection.default_for`.
        out (str): The folder.
        format (str): One of `audio.FORMATS`.
        device (str): Where the model runs; "auto" is a GPU, if there is one.
        block (float): Length of a block in seconds; a recording of up to three is one block.
        batch (int, optional): Blocks at a time.
        force (bool): Whether files that are there are written anew.
        no_mixture_consistency (bool): See `blocks.separate_stream`.
        peak (float, optional): See `audio.write_tracks`.

    Returns:
        int: How many recordings could not be separated.

    Raises:
        UserError: If there is no such model or device, or an option makes no sense.
    """
    device = find_device(device)
    if not SHORTEST <= block < math.inf or (batch is not None and batch < 1):
        raise UserError(f"--block must be at least {SHORTEST:g} seconds, and --batch at least 1")
    check_peak(peak)
    models = _Models(model, device)
    options = {
        "block": block,
        "overlap": block / 2,
        "batch_size": batch or (1 if device.type == "cpu" else 8),
        "mixture_consistency": not no_mixture_consistency,
        "peak": peak,
    }
    began, seconds, n_before, failed, owners = time.monotonic(), 0.0, 0, [], {}
    recordings = _recordings(files, out)
    sweep(out)
    for path in recordings:
        try:
            network = models.of(path)
            targets = _targets(path, network.n_src, out, format, owners)
            before = is_done(targets, path, force, sums=not no_mixture_consistency)
            done = None if before else _separate_one(network, path, targets, options)
        except (UserError, OSError, MemoryError, RuntimeError, UnicodeError) as error:
            print(without_codes(f"error: {_what_failed(path, error)}"), file=sys.stderr)
            failed.append(path)
            continue
        owners[targets[0]] = path
        if before:
            n_before += 1
            told = f": done before, {targets[0]} is there (--force writes anew)"
        else:
            seconds += done["seconds"]
            told = f": {targets[0]} .. {targets[-1].name}{notes_on(done)}"
        print(without_codes(f"  {path}{told}"))
    n_done = len(recordings) - n_before - len(failed)
    took = time.monotonic() - began
    names = without_codes(f": {', '.join(map(str, failed))}") if failed else ""
    print(f"{n_done} separated ({seconds:.0f} s of audio in {took:.0f} s), {n_before} done before, "
          f"{len(failed)} failed{names}")  # fmt: skip
    return len(failed)


def _recordings(names, out):
    """The files that names stand for, but what an earlier run wrote for others of them."""
    try:
        found = find_recordings(names)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {reason(error)}") from None
    if not found:
        raise UserError(f"there are no recordings in {', '.join(names)}")
    outputs = [path for path in found if _is_output(path, out, found)]
    for path in outputs:
        print(without_codes(f"  {path}: left out, an output of an earlier run"))
    return [path for path in found if path not in outputs]


def _targets(path, n_src, out, format, owners):
    """The files of a recording (list of Path), if they are not another's by `owners`."""
    targets = [Path(out) / f"{path.stem}_est{k}.{format}" for k in range(1, n_src + 1)]
    if targets[0] in owners:
        raise UserError(
            f"{path} and {owners[targets[0]]} would both be written to {targets[0]}; "
            "separate one of them into another folder (-o)"
        )
    return targets


def _what_failed(path, error):
    """What to tell of a recording that was not separated (str); raises errors of other kinds."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeError):
        return f"{os.fsencode(path)!r}: the name is not UTF-8; rename it"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # which is of stdout
        return f"{path}: {reason(error)}"  # a name too long, a folder closed to us
    if "memory" in f"{type(error).__name__} {error}".lower():  # PyTorch's is a RuntimeError
        return f"{path}: memory is too little; try a smaller --block or --batch"
    raise error


class _Models:
    """The model that was asked for, or that for each recording; says what each is made for."""

    def __init__(self, name, device):
        self.name, self.device, self.opened = name, device, {}
        if name is not None:
            self._open(name)

    def of(self, path):
        name = self.name
        if name is None:
            name = DEFAULT
            if path.exists():
                with open_recording(path) as recording:
                    name = default_for(recording.sample_rate)
        return self.opened.get(name) or self._open(name)

    def _open(self, name):
        model, about = open_model(name)
        print(made_for(name, model, about))
        self.opened[name] = model.to(self.device)
        return self.opened[name]


def find_recordings(names):
    """The files that names stand for, each once.

    Args:
        names (list of str): Files, folders (whose audio files are taken, not those of folders
            inside), and globs. A name that is none of them stands for itself.

    Returns:
        list of Path: In the order of the names, those of one name sorted.
    """
    suffixes = {f".{name.lower()}" for name in (*soundfile.available_formats(), *FFMPEG_SUFFIXES)}
    suffixes = (suffixes | {".aif", ".mp3"}) - {".raw"}
    found = []
    for name in names:
        if os.path.isdir(name):
            files = (p for p in Path(name).iterdir() if not p.name.startswith("."))
            found += sorted(p for p in files if p.suffix.lower() in suffixes)
        elif os.path.exists(name):
            found.append(Path(name))
        else:
            found += sorted(map(Path, glob.glob(name, recursive=True))) or [Path(name)]
    once = {}
    for path in found:
        once.setdefault(os.path.abspath(path), path)
    return list(once.values())


def _is_output(path, out, recordings):
    """Whether a recording is what an earlier run wrote for another (bool)."""
    found = re.fullmatch(r"(.+)_est\d+", path.stem)
    there = path.resolve().parent == Path(out).resolve()
    return bool(found) and there and any(found[1] == other.stem for other in recordings)


def is_done(targets, path, force=False, sums=True):
    """Whether all files of a recording are there.

    Args:
        targets (list of Path): The files.
        path (Path): The recording.
        force (bool): Whether they are to be written anew.
        sums (bool): Whether they sum to the recording.

    Raises:
        UserError: If a file is in the way: the recording itself, some of them without others, or
            those of another recording, as length, rate and, if they sum, the first seconds tell.
    """
    there = [target for target in targets if target.exists()]
    if any(target.samefile(path) for target in there if path.exists()):
        raise UserError(f"{path} would be written over by its own output; give another folder (-o)")
    if not there:
        return False
    more = targets[-1].with_name(f"{path.stem}_est{len(targets) + 1}{targets[-1].suffix}")
    if more.exists():  # beside which others would look like its fellows
        raise UserError(f"{more} is of a model of more speakers; give another folder (-o)")
    if force:
        return False
    if len(there) < len(targets):
        raise UserError(f"{there[0]} is in the way; move it, or write over it with --force")
    if path.exists() and not _is_of(path, targets, sums):
        raise UserError(
            f"{targets[0]} is of another recording than {path}; give another folder (-o), or write "
            "over it with --force"
        )
    return True


def _is_of(path, targets, sums):
    """Whether files have the length and rate of a recording, and sum to it (bool)."""
    with open_recording(path) as ours:
        length, rate = ours.n_samples, ours.sample_rate
        for target in targets:
            with open_recording(target) as theirs:
                if length != theirs.n_samples:  # it may be unknown, or an estimate
                    length = sum(map(len, ours.pieces())) or length
                if (length, rate) != (theirs.n_samples, theirs.sample_rate):
                    return False
    if not sums:
        return True
    mixture, *tracks = map(_start, (path, *targets))
    if any(len(track) != len(mixture) for track in tracks):  # than it tells, it may have less
        return False
    total = sum(tracks)
    likeness = np.sqrt((mixture @ mixture) * (total @ total)) * LEAST_ALIKE
    return np.abs(mixture).max(initial=0) < STEP or mixture @ total > likeness


def _start(path):
    """The first seconds of a recording, without an offset (numpy.ndarray)."""
    samples = [np.zeros(0)]
    with open_recording(path) as recording:
        for piece in recording.pieces():
            samples.append(piece)
            if sum(map(len, samples)) >= LOOKED_AT * recording.sample_rate:
                break
    start = np.concatenate(samples)
    return start - start.mean() if len(start) else start


def _separate_one(network, path, targets, options):
    pace = 0.1 if sys.stderr.isatty() else 15  # seconds between two looks of the bar
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(desc=path.name, unit="s", mininterval=pace, delay=1, leave=False) as bar:

        def progress(done, total):
            if total is not None and bar.total is None:
                bar.total, bar.bar_format = total, bar_format
            bar.update(done)

        return separate_file(network, path, targets, progress=progress, **options)


def notes_on(done):
    """What is worth knowing of what `separate_file` did, in brackets, or nothing (str)."""
    notes = []
    if done["n_channels"] > 1:
        notes.append(f"the mean of its {done['n_channels']} channels was separated")
    if done["warning"]:
        notes.append(done["warning"])
    if f"{done['gain']:.3g}" != "1":
        notes.append(f"gain {done['gain']:.3g}")
    for k, level in enumerate(done["levels"], start=1):
        if level > FAINT:
            notes.append(f"speaker {k} is {level:.0f} dB softer and may be nobody")
    return f" ({'; '.join(notes)})" if notes else ""
