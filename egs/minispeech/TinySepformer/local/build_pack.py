"""Rebuilds the embedded speech pack of this recipe from twelve Debian packages of free speech.

    packages.tsv (what to fetch) -> .deb files -> clips of one speaker (speakers.tsv) ->
    8 kHz mono, trimmed, evened, joined to utterances -> one Ogg Opus file a speaker
    and Kaldi data dirs: wav.scp, segments, utt2spk, spk2gender, spk2production

The committed pack stays the authoritative one, because Debian drops old versions in time. A rebuilt
pack has the same audio, but not the same bytes: every Ogg stream bears a random serial number.
It needs apt-get and dpkg-deb with package lists of Debian 12, and 1.5 GB of disk.
"""

import argparse
import collections
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import librosa
import numpy as np
import soundfile as sf
import soxr
from scipy.signal import butter, sosfiltfilt
from tqdm import tqdm

from asteroid_tiny.errors import UserError, exit_on_user_error
from asteroid_tiny.files import whole_file

HERE = Path(__file__).resolve().parent
RATE = 8000
FRAME = 160  # 20 ms: the grain of every energy measure below

# About 20 kbit/s: measured on four speakers, the mel spectrum moves by 1.3 dB (0.9 dB at 24 kbit/s,
# 1.8 dB at 16 kbit/s, where the encoder leaves waveform coding), for a quarter more speech.
COMPRESSION = 0.95

# What is not plain speech of the main speaker. Letters, digits and sums of Tux Paint (symbols/)
# are single syllables, in part spoken by other people than the rest.
NOT_SPEECH = (
    "/silence/", "/beep", "-2tone.", "/tt-monkeys.", "/confbridge-join.", "/confbridge-leave.",
    "/confbridge-begin-glorious", "/stamps/symbols/",
)  # fmt: skip

EDGE = 0.05  # s of quiet kept before and after a clip
GAP = 0.2  # s between joined clips
PAUSE = 0.25  # s between utterances
SHORTEST_CLIP, LONGEST_CLIP = 0.6, 12.0  # s; longer clips are split at pauses
SHORTEST, FULL, LONGEST = 2.5, 7.5, 12.0  # s; utterances
LEVEL, PEAK = 0.1, 0.8  # RMS of the active frames of a clip, and the peak that bounds it


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE.parent / "data", help="where to write (default: ../data)")
    add("--cache", type=Path, default=HERE.parent / "exp/debs", help="folder of the .deb files")
    other = "warn instead of stopping where a package is not the one that packages.tsv lists"
    add("--allow-other-versions", action="store_true", help=other)
    args = parser.parse_args()
    with exit_on_user_error():
        build(args.out, args.cache, args.allow_other_versions)


def build(out, cache, allow_other_versions):
    """Fetches, builds every speaker in memory, and only then replaces the pack in `out`."""
    speakers = read_table(HERE / "speakers.tsv")
    packages = read_table(HERE / "packages.tsv")
    cache.mkdir(parents=True, exist_ok=True)
    with tqdm(packages, "packages") as bar:  # so that an error begins on a line of its own
        debs = [fetch(package, cache, allow_other_versions) for package in bar]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        for package, deb in zip(packages, tqdm(debs, "unpacking")):
            unpack(deb, Path(folder) / package["package"])
        packed = [pack_speaker(speaker, Path(folder)) for speaker in tqdm(speakers, "speakers")]
    for split in sorted({speaker["split"] for speaker in speakers}):
        of_split = [(s, p) for s, p in zip(speakers, packed) if s["split"] == split]
        write_data_dir(out / split, of_split)
    write_checksums(out)


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# Debian packages


def fetch(package, cache, allow_other_versions):
    """The path of a package's .deb in the cache, downloaded if need be, its checksum checked."""
    name, version = package["package"], package["version"]
    deb = cache / f"{name}_{version.replace(':', '%3a')}_all.deb"
    if deb.exists() or apt_download(f"{name}={version}", cache):
        if hashlib.sha256(deb.read_bytes()).hexdigest() == package["sha256"]:
            return deb
        fault = f"{deb} is not the {name} {version} of packages.tsv (its sha256 differs); delete it"
    else:
        fault = f"{name} {version} is not in the Debian archive set up here; run apt-get update"
    if not allow_other_versions:
        raise UserError(f"{fault} and try again, or add --allow-other-versions.")
    tqdm.write(f"warning: {fault}.", file=sys.stderr)
    if not deb.exists() and not apt_download(name, cache):
        raise UserError(f"{name} cannot be downloaded in any version; keep the committed pack.")
    return deb if deb.exists() else sorted(cache.glob(f"{name}_*.deb"))[-1]


def apt_download(name, cache):
    return run(["apt-get", "download", name], cwd=cache).returncode == 0


def unpack(deb, folder):
    if run(["dpkg-deb", "-x", deb, folder]).returncode:
        raise UserError(f"{deb} cannot be unpacked; delete it and run the same command again.")


def run(command, cwd=None):
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} was not found: rebuilding the pack needs Debian.") from error


# From clips to one file a speaker


def pack_speaker(speaker, folder):
    """The coded audio of a speaker and the (start, end) samples of the utterances in it."""
    clips = read_clips(speaker["clips"].split(), folder)
    if not clips:
        raise UserError(f"The packages hold no clips of {speaker['speaker']}; see speakers.tsv.")
    clips = longest_whole(without_strangers(clips), float(speaker["minutes"]))
    pause, position, pieces, spans = np.zeros(int(PAUSE * RATE)), 0, [], []
    for utterance in join(clips):
        position += len(pause)
        spans.append((position, position + len(utterance)))
        pieces += [pause, utterance]
        position += len(utterance)
    audio = np.concatenate([*pieces, pause]).astype(np.float32)
    return encode(audio), spans


def read_clips(patterns, folder):
    """All clips of a speaker in the order of their names; each recording once."""
    clips, seen = [], set()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        content = path.read_bytes()
        if content in seen or any(part in str(path.relative_to(folder)) for part in NOT_SPEECH):
            continue
        seen.add(content)
        try:
            audio, rate = sf.read(path, always_2d=True)
        except sf.LibsndfileError:
            continue  # a few clips are broken in the packages
        if len(audio) >= SHORTEST_CLIP * rate:
            audio = soxr.resample(audio.mean(1), rate, RATE, quality="VHQ")
            clips += [even(piece) for piece in split(trim(without_rumble(audio))) if len(piece)]
    return [clip for clip in clips if len(clip) >= SHORTEST_CLIP * RATE]


def without_rumble(audio):
    """Takes away the DC offset and the mains hum that some of the home recordings have."""
    return sosfiltfilt(butter(2, 60, "highpass", fs=RATE, output="sos"), audio)


def levels(audio):
    """The level of each frame in dB."""
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME)
    return 10 * np.log10((frames**2).mean(1) + 1e-10)


def active(audio):
    """Which frames hold speech: well above the noise floor, not far below the loud ones."""
    level = levels(audio)
    floor, loud = np.percentile(level, [5, 95])
    return level > np.clip(floor + 8, loud - 40, loud - 25)


def trim(audio):
    """Cuts the quiet at both ends, but for `EDGE`, and fades what is left of it."""
    (speech,) = np.nonzero(active(audio))
    edge = int(EDGE * RATE)
    start = max(0, speech[0] * FRAME - edge)
    audio = audio[start : (speech[-1] + 1) * FRAME + edge].copy()
    ramp = np.linspace(0, 1, edge // 4)
    audio[: len(ramp)] *= ramp
    audio[-len(ramp) :] *= ramp[::-1]
    return audio


def split(audio):
    """Halves a clip that is too long at the quietest place of its middle, again and again."""
    if len(audio) <= LONGEST_CLIP * RATE:
        return [audio]
    level = np.convolve(10 ** (levels(audio) / 10), np.ones(9), "same")
    quarter = len(level) // 4
    middle = (quarter + level[quarter:-quarter].argmin()) * FRAME + FRAME // 2
    return [piece for half in (audio[:middle], audio[middle:]) for piece in split(trim(half))]


def even(audio):
    """Brings the active frames to a common RMS, as far as the peak allows."""
    power = (10 ** (levels(audio)[active(audio)] / 10)).mean()
    return audio * min(LEVEL / power**0.5, PEAK / max(np.abs(audio).max(), 1e-5))


def without_strangers(clips):
    """Drops noises, tones and other voices: unvoiced clips, and those far from the speaker's mean.

    Far is more than 3 robust standard deviations, in root mean square over 19 mel cepstra.
    """
    voices = np.array([cepstrum(clip) for clip in clips])
    middle = np.median(voices, 0)
    spread = 1.4826 * np.median(np.abs(voices - middle), 0)
    far = np.sqrt((((voices - middle) / spread) ** 2).mean(1))
    return [clip for clip, z in zip(clips, far) if z < 3 and voicing(clip) > 0.1]


def cepstrum(audio):
    """The mean mel cepstrum (without its first coefficient, the level)."""
    frames = {"n_fft": 2 * FRAME, "hop_length": FRAME, "n_mels": 26, "fmin": 100, "fmax": 3800}
    return librosa.feature.mfcc(y=audio, sr=RATE, n_mfcc=20, **frames)[1:].mean(1)


def voicing(audio):
    """The share of active 40-ms frames that repeat themselves at a pitch of 65 to 400 Hz."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, 2 * FRAME)[::FRAME]
    frames = frames[active(audio)[: len(frames)]]
    windowed = np.vstack([frames * np.hanning(2 * FRAME), np.hanning(2 * FRAME)])
    repeats = np.fft.irfft(np.abs(np.fft.rfft(windowed, 4 * FRAME)) ** 2)[:, : RATE // 65]
    repeats /= repeats[:, :1] + 1e-10
    return ((repeats[:-1] / repeats[-1])[:, RATE // 400 :].max(1) > 0.6).mean()


def longest_whole(clips, minutes):
    """The longest clips that fill `minutes`, in their old order: sentences rather than words."""
    total, kept = 0, []
    for index in sorted(range(len(clips)), key=lambda index: -len(clips[index])):
        total += len(clips[index])
        kept.append(index)
        if total >= minutes * 60 * RATE:
            break
    return [clips[index] for index in sorted(kept)]


def join(clips):
    """Utterances of consecutive clips, `GAP` apart; a rest that is too short is left out."""
    gap, utterances, current = np.zeros(int(GAP * RATE)), [], np.zeros(0)
    for clip in clips:
        joined = np.concatenate([current, gap, clip]) if len(current) else clip
        full = len(current) >= FULL * RATE / 2 and len(joined) > FULL * RATE
        if full or len(joined) > LONGEST * RATE:
            utterances.append(current)
            joined = clip
        current = joined
    return [u for u in [*utterances, current] if len(u) >= SHORTEST * RATE]


def encode(audio):
    coded = io.BytesIO()
    sf.write(coded, audio, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION)
    decoded, _ = sf.read(io.BytesIO(coded.getvalue()))
    if len(decoded) != len(audio) or np.corrcoef(decoded, audio)[0, 1] < 0.9:
        raise UserError("Ogg Opus does not come back as written; install soundfile 0.14 or newer.")
    return coded.getvalue()


# Kaldi data dirs


def write_data_dir(folder, packed):
    """Writes one split: the audio files and the five tables."""
    shutil.rmtree(folder, ignore_errors=True)
    tables = collections.defaultdict(list)
    for speaker, (coded, spans) in packed:
        name = speaker["speaker"]
        with whole_file(folder / f"{name}.ogg") as part:
            part.write_bytes(coded)
        tables["wav.scp"].append(f"{name} {name}.ogg")
        tables["spk2gender"].append(f"{name} {speaker['gender']}")
        tables["spk2production"].append(f"{name} {speaker['production']}")
        for number, (start, end) in enumerate(spans, 1):
            utterance = f"{name}-{number:04d}"
            tables["segments"].append(f"{utterance} {name} {start / RATE:.6f} {end / RATE:.6f}")
            tables["utt2spk"].append(f"{utterance} {name}")
    for table, lines in tables.items():
        with whole_file(folder / table) as part:
            part.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def write_checksums(out):
    """SHA256SUMS, as sha256sum writes and checks it, over the three data dirs."""
    files = sorted(f"{path.parent.name}/{path.name}" for path in out.glob("*/*") if in_split(path))
    lines = [f"{hashlib.sha256((out / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    with whole_file(out / "SHA256SUMS") as part:
        part.write_text("".join(lines), encoding="utf-8")


def in_split(path):
    return path.parent.name in ("train", "valid", "test") and not path.name.startswith(".")


if __name__ == "__main__":
    main()
