"""Speech as a Kaldi data dir: its tables, checked on opening, and its audio, decoded once.

The tables, one entry a line (https://kaldi-asr.org/doc/data_prep.html)::

    wav.scp         recording  path            (relative paths are relative to the data dir)
    segments        utterance  recording  start  end        (seconds; optional)
    utt2spk         utterance  speaker
    spk2gender      speaker    m|f             (optional)
    spk2production  speaker    production      (optional, ours: who was recorded in one production)
    utt2num_samples utterance  samples         (optional, ESPnet's: spares opening every file)

Without `segments` each recording is one utterance. Commands in wav.scp (``... |``) are not run.
"""

import collections
import copy
import fnmatch
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
from tqdm import tqdm

from ..errors import UserError
from ..files import whole_folder

SPLITS = ("train", "valid", "test")
CACHE_BYTES = 1 << 30
BAR = dict(desc="  opening files", delay=3, leave=False, disable=None)  # if it takes long
NO_LENGTH = 2**62  # samples, from which on libsndfile does not know how many there are
WIDE_SUBTYPES = ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
#: Endings of recordings that a folder may have beside those of libsndfile: what ffmpeg often reads.
FFMPEG_SUFFIXES = "aac ac3 amr m4a m4b mka mkv mov mp4 oga opus webm wma".split()


class Utterance(NamedTuple):
    """Where an utterance lies: its recording, first sample, length in samples, and speaker."""

    recording: str
    start: int
    length: int
    speaker: str


class SpeechDir:
    """A Kaldi data dir of mono recordings of one sample rate.

    Args:
        path (str or Path): The data dir.
        sample_rate (int, optional): The rate in Hz that is asked for; any if not given.
        convert (bool): Whether recordings may have a higher rate, from which mixing converts.

    Attributes:
        sample_rate (int): Rate in Hz of the mixtures that are made of it.
        recorded_rate (int): Rate in Hz of all recordings, in which utterances are counted.
        utterances (dict): `Utterance` by id.
        by_speaker (dict): Sorted ids of the utterances of each speaker.
        spk2gender, spk2production (dict): As in the tables; empty without them.

    Raises:
        UserError: If a table or recording is missing, empty or broken, a recording is not mono or
            of another rate, or an utterance has no speaker or lies outside its recording.
    """

    first_channel = False  # whether of recordings with several channels the first is taken

    def __init__(self, path, sample_rate=None, convert=False):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder; a Kaldi data dir is needed there")
        self.wavs = {
            key: self._wav_path(key, value) for key, value in self._table("wav.scp").items()
        }
        lengths = self._lengths(sample_rate, convert)
        self.utterances = self._utterances(lengths)
        self.by_speaker = collections.defaultdict(list)
        for key in sorted(self.utterances):
            self.by_speaker[self.utterances[key].speaker].append(key)
        self.by_speaker = dict(sorted(self.by_speaker.items()))
        self.spk2gender = self._table("spk2gender", optional=True)
        self.spk2production = self._table("spk2production", optional=True)
        self._cache = RecordingCache()

    def read(self, utterance, start=0, length=None):
        """Samples of an utterance.

        Args:
            utterance (str): Its id.
            start (int): First sample, counted from the start of the utterance.
            length (int, optional): Number of samples; to the end if not given.

        Returns:
            np.ndarray: (length,), float32 in [-1, 1].

        Raises:
            UserError: If it has not so many, or the recording is broken, not mono or changed.
        """
        where = self.utterances[utterance]
        length = where.length - start if length is None else length
        if not 0 <= start <= start + length <= where.length:
            asked = f"those from {start} to {start + length}"
            raise UserError(f"{utterance} has {where.length} samples, not {asked}")
        first = where.start + start
        wav = self.wavs[where.recording]
        samples = self._cache.read(wav, first, first + length, self.recorded_rate)
        if samples.ndim > 1 and not self.first_channel:
            raise UserError(f"{wav} has {samples.shape[1]} channels; speech must be mono")
        if len(samples) != length:
            raise UserError(f"{wav} is shorter than it was when {self.path} was made; make it anew")
        return samples

    def of(self, pattern):
        """The same with those speakers alone whose names match a pattern, such as ``"a*"``.

        Raises:
            UserError: If there is none.
        """
        some = copy.copy(self)
        matching = set(fnmatch.filter(self.by_speaker, pattern))
        if not matching:
            raise UserError(f"{self.path} has no speaker {pattern!r}")
        some.by_speaker = {k: v for k, v in self.by_speaker.items() if k in matching}
        some.utterances = {k: u for k, u in self.utterances.items() if u.speaker in matching}
        recordings = {utterance.recording for utterance in some.utterances.values()}
        some.wavs = {key: path for key, path in self.wavs.items() if key in recordings}
        return some

    def minutes(self):
        """Speech in minutes, by the lengths of the utterances (float)."""
        return sum(utt.length for utt in self.utterances.values()) / self.recorded_rate / 60

    def _table(self, name, optional=False):
        if optional and not (self.path / name).exists():
            return {}
        return read_table(self.path / name)

    def _wav_path(self, recording, value):
        if value.endswith("|"):
            raise UserError(
                f"{self.path / 'wav.scp'}: {recording!r} is a command; write its output to a file "
                "and name that, commands are not run"
            )
        return str(self.path / value)

    def _lengths(self, sample_rate, convert):
        """Lengths of all recordings in samples; sets the rates."""
        known = {}
        if not (self.path / "segments").exists():
            known = self._table("utt2num_samples", optional=True)
        lengths = {}
        self.recorded_rate = None
        for recording, wav in tqdm(self.wavs.items(), **BAR):
            told = known.get(recording, "")
            if self.recorded_rate and told.isdecimal() and int(told):
                lengths[recording] = int(told)
                continue
            info = open_info(wav)
            if info.channels != 1 and not self.first_channel:
                raise UserError(f"{wav} has {info.channels} channels; speech must be mono")
            if info.frames == 0:
                raise UserError(f"{wav} holds no samples")
            wanted = self.recorded_rate or sample_rate or info.samplerate
            may_be_higher = convert and not self.recorded_rate
            if info.samplerate != wanted and not (may_be_higher and info.samplerate > wanted):
                mend = f"take a model of {info.samplerate} Hz" if convert else "set sample_rate"
                if convert and self.recorded_rate:
                    mend = f"the others, which have {wanted} Hz as {next(iter(lengths))} has"
                raise UserError(
                    f"{wav} has {info.samplerate} Hz where {wanted} Hz are needed; resample it or "
                    f"{mend}"
                )
            self.recorded_rate = info.samplerate
            lengths[recording] = info.frames
        self.sample_rate = sample_rate or self.recorded_rate
        return lengths

    def _utterances(self, lengths):
        segments = self._table("segments", optional=True)
        if not (self.path / "segments").exists():
            segments = {key: f"{key} 0 {n / self.recorded_rate}" for key, n in lengths.items()}
        speakers = self._table("utt2spk")
        utterances = {}
        for key, value in segments.items():
            if key not in speakers:
                raise UserError(f"{self.path / 'utt2spk'} names no speaker for utterance {key!r}")
            if len(speakers[key].split()) > 1:
                raise UserError(
                    f"{self.path / 'utt2spk'}: {speakers[key]!r} of {key!r} is not one word"
                )
            try:
                recording, *times = value.split()
                start, end = (round(float(time) * self.recorded_rate) for time in times)
            except (ValueError, OverflowError):
                raise UserError(
                    f"{self.path / 'segments'}: {key!r} is not followed by recording, start and end"
                ) from None
            if recording not in lengths:
                raise UserError(
                    f"{self.path / 'wav.scp'} lacks recording {recording!r} of utterance {key!r}"
                )
            if not 0 <= start < end <= lengths[recording] + 1:
                raise UserError(
                    f"{self.path / 'segments'}: {key!r} does not lie inside its recording, which "
                    f"has {lengths[recording] / self.recorded_rate:.2f} s"
                )
            end = min(end, lengths[recording])
            utterances[key] = Utterance(recording, start, end - start, speakers[key])
        return utterances


def read_table(path):
    """A table of a Kaldi data dir: the rest of each line by its first word.

    Raises:
        UserError: If the file is missing, empty or no text, or a line is short or repeated.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a Kaldi data dir needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    if "\0" in text:
        raise UserError(f"{path} cannot be read as text: it is binary")
    table = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split(maxsplit=1)
        if len(fields) < 2 or fields[0] in table:
            what = "the second line for" if fields[0] in table else "no value for"
            raise UserError(f"{path}, line {number}, has {what} {fields[0]!r}")
        table[fields[0]] = fields[1].strip()
    if not table:
        raise UserError(f"{path} is empty")
    return table


def write_dir(folder, tables, kind=SpeechDir):
    """Writes a Kaldi data dir, whole or not at all.

    Args:
        folder (Path): The data dir; one that is there is replaced.
        tables (dict): Lines by key of each table; empty ones are left out. Paths are absolute.
        kind (type): `SpeechDir` or `NoiseDir`, by which it is checked.

    Raises:
        UserError: If a recording is none or does not go with the others, see `SpeechDir`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as part:
        for name, lines in tables.items():
            if lines:
                text = "".join(f"{key} {value}\n" for key, value in lines.items())
                (part / name).write_text(text, encoding="utf-8")
        utterances = kind(part).utterances.items()  # opens every file, for the last time
        text = "".join(f"{key} {utterance.length}\n" for key, utterance in utterances)
        (part / "utt2num_samples").write_text(text, encoding="utf-8")


class NoiseDir(SpeechDir):
    """A Kaldi data dir of noise, which has no end: behind it, it begins again.

    Of recordings with several channels the first is taken. The seam is a cross-fade of half a
    second with a Hann window, as LibriMix's generator extends WHAM!'s noises.
    """

    first_channel = True

    def read(self, utterance, start=0, length=None):
        samples = super().read(utterance)
        if samples.ndim > 1:
            samples = samples[:, 0]
        end = len(samples) if length is None else start + length
        return _repeat(samples, end, fade=self.recorded_rate // 2 + 1)[start:end]


def _repeat(samples, length, fade):
    """`length` samples, or more: `samples` again and again, cross-faded over `fade` samples."""
    if length <= len(samples):
        return samples
    fade = min(fade, len(samples) // 2)
    end = len(samples) - fade
    rise = np.hanning(2 * fade - 1)[:fade].astype(samples.dtype)
    seam = samples[end:] * rise[::-1] + samples[:fade] * rise
    n_again = -(-(length - len(samples)) // end)
    again = np.tile(np.concatenate([seam, samples[fade:end]]), n_again)
    return np.concatenate([samples[:end], again, samples[end:]])


class RecordingCache:
    """Decoded recordings, the least recently used given up beyond `max_bytes`."""

    def __init__(self, max_bytes=CACHE_BYTES):
        self.max_bytes = max_bytes
        self._held = collections.OrderedDict()
        self._n_bytes = 0

    def read(self, path, start, end, sample_rate=None):
        """Samples `start` to `end` of a file of that rate, as float32: (end - start,), or with
        several channels (end - start, n_channels)."""
        if path not in self._held:
            self._held[path] = decode(path, sample_rate)
            self._n_bytes += self._held[path].nbytes
            while len(self._held) > 1 and self._n_bytes > self.max_bytes:
                _, given_up = self._held.popitem(last=False)
                self._n_bytes -= given_up.nbytes
        self._held.move_to_end(path)
        part = self._held[path][start:end]
        if part.dtype == np.int16:
            return part.astype(np.float32) / 32768
        return part.copy()

    def __getstate__(self):
        return RecordingCache(self.max_bytes).__dict__


def open_info(path):
    """`soundfile.info` of a file, with a `UserError` if it is missing or no audio."""
    if not os.path.isfile(path):  # also where one may not look
        raise UserError(f"{path} is missing")
    try:
        info = sf.info(path)
    except sf.LibsndfileError as error:
        raise UserError(f"{path} cannot be read as audio: {error.error_string}") from None
    except TypeError:  # of soundfile, for the suffix .raw
        raise UserError(
            f"{path} is raw, which tells neither rate nor format; convert it to WAV"
        ) from None
    if info.frames >= NO_LENGTH:  # made by a pipe
        raise UserError(f"{path} does not tell its length; convert it to WAV")
    return info


def check_whole(path, n_decoded, n_samples):
    """Raises a `UserError` for a hole, as in an Ogg file: all behind it would be shifted."""
    if n_decoded != n_samples:
        raise UserError(
            f"{path} is damaged: only {n_decoded} of its {n_samples} samples can be decoded"
        )


def check_finite(path, samples):
    """Raises a `UserError` if some samples of a file are no numbers."""
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds samples that are NaN or infinite")


def decode(path, sample_rate=None):
    """All samples of a file: int16 where that loses nothing that was heard, else float32.

    Returns:
        np.ndarray: (time,), of a file of several channels (time, n_channels).

    Raises:
        UserError: If the file is broken, of another rate than that which is given, or holds NaN or
            infinite samples.
    """
    info = open_info(path)
    if info.samplerate != (sample_rate or info.samplerate):
        raise UserError(f"{path} has {info.samplerate} Hz where {sample_rate} Hz are needed")
    try:
        samples, _ = sf.read(path, dtype="float32")
    except (sf.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {error}") from None
    check_finite(path, samples)
    check_whole(path, len(samples), info.frames)
    if info.subtype in WIDE_SUBTYPES:
        return samples
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def check_disjoint(**splits):
    """Makes sure that no speaker is in two splits.

    Args:
        **splits (SpeechDir): The splits by name.

    Raises:
        UserError: That names a speaker and the two splits.
    """
    seen = {}
    for name, speech in splits.items():
        for speaker in speech.by_speaker:
            if speaker in seen:
                raise UserError(
                    f"speaker {speaker!r} is in {seen[speaker]} and in {name}; "
                    "every speaker may be in one split only"
                )
            seen[speaker] = name
