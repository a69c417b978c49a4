"""Audio files of any kind and length, read and written a second at a time.

`soundfile` reads what it can; the rest goes through `ffmpeg`, if that is installed. Sample rates
are converted by soxr as a stream.
"""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from scipy.signal import butter, sosfilt, sosfilt_zi

from ..data.kaldi import NO_LENGTH, check_finite, check_whole
from ..errors import UserError, printable
from ..files import flush, reason, whole_file
from .levels import RUMBLE

#: Subtype of what is written, by format; Vorbis, unlike Opus, takes any rate.
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}
SUFFIXES = ", ".join(f".{name}" for name in FORMATS)
MOST_OF_WAV = 2**32 - 2**12  # bytes, header aside; a longer WAV file is one of RF64
FULL_SCALE = 0.9999  # of 16 bits, rounding included
LOWEST_PEAK = -90.0  # dB re full scale: one step of 16 bits
FASTEST_OF_VORBIS = 200_000  # Hz, above which libsndfile crashes
AT_ONCE = 2**16  # samples given to libsndfile, whose Vorbis crashes with millions
SILENCE = 1e-9  # energy; less is not told apart
AU_HEADER = 24  # bytes
#: Formats that ffmpeg may take a file for; playlists are none, which would have it read others.
FFMPEG_FORMATS = (
    "aac ac3 aiff amr amrnb amrwb ape asf au avi caf dsf dts eac3 flac flv gsm loas matroska mov "
    "mp3 mpc mpc8 mpeg mpegts nistsphere ogg pcm qcp rm shn sox tak tta voc w64 wav wsd wv xwma"
).split()
LONG_HEADER = 4096  # bytes: a file that is longer holds something
CANCELLED = 100  # times less power in the mean of channels than in them
LEAST_MISSING = 0.1  # s, of which it is told that they are missing at the end
#: In one of the first frames of an MP3 whose length is no estimate, with the bit that says so.
LENGTH_OF_MP3 = re.compile(rb"(?:Xing|Info)\0\0\0[\x01\x03\x05\x07\x09\x0b\x0d\x0f]")
UNKNOWN_OF_WAV = 0x7FFFF000  # bytes of data, or more: what a pipe tells


class Recording:
    """A recording that is open for reading.

    Attributes:
        sample_rate (int): In Hz.
        n_channels (int): Channels, which are averaged.
        n_samples (int or None): Samples, if known before they are read.
        n_read (int): Samples that were read so far.
        warning (str): What is wrong with it, as is found once it is read, or nothing.
        has_more (bool): Whether it has more sound tracks, as is found once it is read.
    """

    warning, has_more = "", False

    def __init__(self, sample_rate, n_channels, n_samples, blocks, n_told=0):
        self.sample_rate = sample_rate
        self.n_channels = n_channels
        self.n_samples = n_samples
        self.n_read = 0
        self._blocks = blocks
        self._n_told = n_told

    def pieces(self):
        """Yields the mean of the channels, a second or less at a time (numpy.ndarray)."""
        power, loudest = np.zeros(2), 0.0  # of all channels, and of their mean
        for block in self._blocks:
            self.n_read += len(block)
            mean, still = block.mean(axis=1), block - block.mean(axis=0)  # offsets do not cancel
            power += np.square(still).mean(axis=1).sum(), np.square(still.mean(axis=1)).sum()
            loudest = max(loudest, float(np.abs(block).max(initial=0)))
            yield mean
        missing = (self._n_told - self.n_read) / self.sample_rate
        if missing > LEAST_MISSING:
            self.warning = (
                f"it may be incomplete; it ends {missing:.1f} s before the length that it tells"
            )
        elif not self.warning and power[1] * CANCELLED < power[0]:
            self.warning = (
                "its channels cancel each other in their mean; separate one of them alone"
            )
        elif not self.warning and self.n_read and not loudest:
            self.warning = "it is silent"
        if self.has_more:
            self.warn("it has several sound tracks; the first of them was separated")

    def warn(self, text):
        """Adds to `warning`."""
        self.warning = "; ".join(filter(None, (self.warning, text)))


@contextlib.contextmanager
def open_recording(path):
    """Opens an audio file.

    Args:
        path (str or Path): Anything that soundfile or, where installed, ffmpeg reads. MP3 is read
            by ffmpeg: soundfile ends at a length that may be an estimate, whatever follows.

    Yields:
        Recording: The recording.

    Raises:
        UserError: If the file is missing, or holds nothing that can be read.
    """
    try:
        if not Path(path).is_file():
            raise UserError(f"{path} is no file")
        open(path, "rb").close()  # of what forbids that, soundfile tells less
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    file, told = None, 0
    try:
        file = soundfile.SoundFile(path)
        empty = file.frames == 0 and Path(path).stat().st_size > LONG_HEADER
        no_length = empty or file.frames >= NO_LENGTH  # of a recorder that died, of a pipe
        why = "it tells no length" if no_length else None
        if not no_length:
            told = _length_told(path, file)
        if file.format == "MP3" and not no_length:
            why = "its length is an estimate" if shutil.which("ffmpeg") else None
    except soundfile.LibsndfileError as error:
        why = error.error_string.strip(" .")
    except TypeError:  # of soundfile, for the suffix .raw
        why = "it is raw, which tells neither rate nor format"
    if why:
        if file is not None:
            file.close()
        with _through_ffmpeg(path, why, told) as recording:
            yield recording
        return
    with file:
        yield Recording(file.samplerate, file.channels, file.frames, _blocks(file, path), told)


def _length_told(path, file):
    """Samples that a file says it has, if it is one of those that may have fewer (int), else 0."""
    with open(path, "rb") as raw:
        if file.format == "MP3":
            return file.frames if LENGTH_OF_MP3.search(raw.read(2**18)) else 0
        if file.format not in ("WAV", "WAVEX"):
            return 0
        place, size = 12, Path(path).stat().st_size
        while place < size:
            raw.seek(place)
            name, length = struct.unpack("<4sI", raw.read(8).ljust(8, b"\0"))
            if name == b"data":
                held = size - place - 8
                return file.frames * length // held if 0 < held < length < UNKNOWN_OF_WAV else 0
            place += 8 + length + length % 2
    return 0


def _blocks(file, path):
    n_read = 0
    try:
        while len(block := file.read(file.samplerate, dtype="float32", always_2d=True)):
            check_finite(path, block)
            n_read += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} is damaged: {error.error_string}") from None
    if file.format != "MP3":  # of which the length may be an estimate
        check_whole(path, n_read, file.frames)


@contextlib.contextmanager
def _through_ffmpeg(path, why, told):
    """As `open_recording`, by ffmpeg, which sends an AU file: raw floats after a short header."""
    if shutil.which("ffmpeg") is None:
        raise UserError(
            f"{path} cannot be read ({why}); install ffmpeg for what soundfile does not know"
        )
    command = _ffmpeg(path, "au", "pcm_f32be")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            header = process.stdout.read(AU_HEADER)
            if len(header) < AU_HEADER:
                process.wait()
                said = _last_line(errors) or "it holds no sound"
                raise UserError(f"{path} cannot be read: {said} (ffmpeg)")
            _, start, _, _, rate, n_channels = struct.unpack(">4s5I", header)
            process.stdout.read(start - AU_HEADER)
            recording = Recording(rate, n_channels, told or None, None, told)
            recording._blocks = _floats(path, recording, process, errors)
            yield recording
        finally:  # maybe nobody wants the rest
            process.kill()
            process.wait()
            process.stdout.close()


def _floats(path, recording, process, errors):
    n_channels = recording.n_channels
    while data := process.stdout.read(4 * recording.sample_rate * n_channels):
        whole = len(data) // (4 * n_channels) * n_channels
        yield np.frombuffer(data, ">f4", whole).astype(np.float32).reshape(-1, n_channels)
    status, found = process.wait(), _last_line(errors)
    how = "is damaged" if recording.n_read else "cannot be read"
    if status != 0 or (found and _ends_before(path, recording)):
        raise UserError(f"{path} {how}: {found or 'it ends too early'} (ffmpeg)")
    recording.warning = f"it may be incomplete; ffmpeg says: {found}" if found else ""
    more = _ffmpeg(path, "null", "pcm_f32be", "-t", "0", track=1)
    recording.has_more = subprocess.run(more, capture_output=True).returncode == 0


def _ffmpeg(path, form, codec, *options, track=0):
    command = ["ffmpeg", "-v", "error", *options, "-nostdin"]
    command += ["-format_whitelist", ",".join(FFMPEG_FORMATS), "-i", f"file:{path}"]
    return [*command, "-map", f"0:a:{track}", "-f", form, "-c:a", codec, "-"]


def _ends_before(path, recording):
    """Whether ffmpeg finds an error more than a second before the end of what it has read (bool).

    Behind a hole all would be shifted; what merely ends early is worth having.
    """
    command = _ffmpeg(path, "f32be", "pcm_f32be", "-xerror")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        n_bytes = sum(map(len, iter(lambda: process.stdout.read(2**20), b"")))
    return n_bytes / (4 * recording.n_channels) < recording.n_read - recording.sample_rate


def _last_line(errors):
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines() or [""]
    if any("not on whitelist" in line for line in lines):
        return "its format is none that is read here"
    if any("matches no streams" in line for line in lines):
        return "it holds no sound"
    return printable(lines[-1].rpartition("] ")[2].rpartition(": ")[2])


def resample(pieces, rate, new_rate):
    """Converts the sample rate of a stream.

    Args:
        pieces (iterable of numpy.ndarray): (time,) or (time, n_channels) each.
        rate (float): Their sample rate.
        new_rate (float): That of what is yielded.

    Yields:
        numpy.ndarray: (time,) or (time, n_channels).
    """
    if rate == new_rate:
        yield from pieces
        return
    stream = None
    for piece in pieces:
        if stream is None:
            n_channels = 1 if piece.ndim == 1 else piece.shape[1]
            stream = soxr.ResampleStream(rate, new_rate, n_channels)
            rest = piece[:0]
        yield stream.resample_chunk(np.ascontiguousarray(piece))
    if stream is not None:
        yield stream.resample_chunk(rest, last=True)


def fit(pieces, n_samples):
    """Cuts a stream, or fills it with zeros, to a number of samples.

    Examples:
        >>> np.concatenate(list(fit([np.ones(3), np.ones(2)], 4))).tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> np.concatenate(list(fit([np.ones((1, 2))], 2))).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    piece = np.zeros(0, np.float32)
    for piece in pieces:
        yield piece[:n_samples]
        n_samples -= len(piece[:n_samples])
    if n_samples > 0:
        yield np.zeros((n_samples, *piece.shape[1:]), piece.dtype)


def write_tracks(targets, make_pieces, sample_rate, peak=None):
    """Writes files of one length with one gain: all of them whole, or none.

    Args:
        targets (list of Path): Files; their suffixes are in `FORMATS`.
        make_pieces (callable): Gives the samples as an iterable of (time, n_files), twice alike.
        sample_rate (int): In Hz.
        peak (float, optional): Level in dB re full scale to which the highest sample is brought;
            by default the gain is 1, or what avoids clipping.

    Returns:
        tuple: The gain, and how many dB each file is below the loudest (list of float).

    Raises:
        UserError: If a file cannot be written.
    """
    highest, energy, n_samples, state = 0.0, np.zeros(len(targets)), 0, None
    sos = butter(4, min(RUMBLE, sample_rate / 8), "highpass", fs=sample_rate, output="sos")
    for piece in make_pieces():
        n_samples += len(piece)
        highest = max(highest, float(np.abs(piece).max(initial=0)))
        if len(piece):  # offsets and rumble are not heard
            if state is None:
                state = sosfilt_zi(sos)[..., None] * piece[0]
            heard, state = sosfilt(sos, piece, axis=0, zi=state)
            energy += np.square(heard).sum(0)
    gain = min(1.0, FULL_SCALE / max(highest, 1e-9))
    if peak is not None and highest > 0:
        gain = min(10 ** (peak / 20), FULL_SCALE) / highest
    with contextlib.ExitStack() as stack:
        parts, files = [], []
        for target in targets:
            part = stack.enter_context(whole_file(target))
            parts.append(part)
            files.append(stack.enter_context(_create(part, target, sample_rate, n_samples)))
        for piece in make_pieces():
            for file, target, track in zip(files, targets, (gain * piece).T):
                try:
                    for start in range(0, len(track), AT_ONCE):
                        file.write(track[start : start + AT_ONCE])
                except soundfile.LibsndfileError as error:
                    raise UserError(f"{target} could not be written: {error}") from None
        for file in files:
            file.close()  # before the first of them takes its place
        for part, target in zip(parts, targets):
            _check_written(part, target, n_samples)
            flush(part)  # now, as the files take their places one after the other
    return gain, (10 * np.log10((energy.max() + SILENCE) / (energy + SILENCE))).tolist()


def check_formats(targets):
    """Raises a `UserError` if there are no files to write, one twice, or one not of `FORMATS`."""
    if not targets:
        raise UserError("there are no files to write to")
    if len({os.path.abspath(target) for target in targets}) < len(targets):
        raise UserError(f"{', '.join(map(str, targets))}: one of the files is there twice")
    for target in targets:
        if _format(target) not in FORMATS:
            raise UserError(f"{target} cannot be written: its suffix must be one of {SUFFIXES}")


def check_peak(peak):
    """Raises a `UserError` if a peak in dB re full scale, if any, is none that 16 bits can have."""
    if peak is not None and not LOWEST_PEAK <= peak <= 0:
        raise UserError(
            f"the peak (--peak) must be from {LOWEST_PEAK:g} dB to 0, full scale, not {peak:g}"
        )


def _format(target):
    return target.suffix.lstrip(".").lower()


def _create(part, target, sample_rate, n_samples):
    name = _format(target)
    if name == "ogg" and sample_rate > FASTEST_OF_VORBIS:
        raise UserError(f"{target} cannot be written: Vorbis ends at {FASTEST_OF_VORBIS} Hz")
    container = "RF64" if name == "wav" and 2 * n_samples > MOST_OF_WAV else name.upper()
    try:
        return soundfile.SoundFile(part, "w", sample_rate, 1, FORMATS[name], format=container)
    except soundfile.LibsndfileError as error:
        part.touch()  # raises what the system has to say, where libsndfile says "System error."
        raise UserError(f"{target} could not be written: {error.error_string}") from None


def _check_written(part, target, n_samples):
    """libsndfile does not tell that the last samples of FLAC and Vorbis found no room."""
    try:
        whole = soundfile.info(part).frames == n_samples
    except soundfile.LibsndfileError:
        whole = False
    if not whole:
        raise UserError(f"{target} could not be written to its end; the disk may be full")


@contextlib.contextmanager
def scratch(folder):
    """A nameless file in a folder, which leaves nothing behind however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {reason(error)}") from None
    with file:
        yield file
