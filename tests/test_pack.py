"""The embedded speech pack: tables that agree with the audio, speech in every segment, credits."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

RECIPE = Path(__file__).resolve().parents[1] / "egs" / "minispeech" / "TinySepformer"
DATA = RECIPE / "data"
RATE = 8000
SPLITS = ("train", "valid", "test")
TABLES = ("segments", "spk2gender", "spk2production", "utt2spk", "wav.scp")

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="an installed package has no speech pack")


def rows(split, table):
    text = (DATA / split / table).read_text(encoding="utf-8")
    return [line.split(" ") for line in text.splitlines()]


def segments(split):
    """{recording: [(utterance, first sample, last sample + 1), ...]} in the order of the table."""
    found = {}
    for utterance, recording, start, end in rows(split, "segments"):
        span = utterance, round(float(start) * RATE), round(float(end) * RATE)
        found.setdefault(recording, []).append(span)
    return found


def recordings():
    return [(split, *row) for split in SPLITS for row in rows(split, "wav.scp")]


def frame_levels(audio, length=160):
    frames = audio[: len(audio) // length * length].reshape(-1, length)
    return 10 * np.log10((frames**2).mean(1) + 1e-10)


@pytest.fixture(
    scope="module", params=recordings() if DATA.exists() else [], ids=lambda row: row[1]
)
def recording(request):
    """(audio, segments in it, all segments, length) of one speaker, decoded once for all tests.

    Of the long train recordings the first three minutes, because decoding takes the time.
    """
    split, name, file = request.param
    frames = 3 * 60 * RATE if split == "train" else -1
    audio, rate = sf.read(DATA / split / file, frames=frames, dtype="float32")
    assert rate == RATE and audio.ndim == 1, f"{file} is not 8 kHz mono"
    spans = segments(split)[name]
    heard = [span for span in spans if span[2] + RATE // 5 <= len(audio)]
    return audio, heard, spans, sf.info(DATA / split / file).frames


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("table", TABLES)
def test_tables_are_sorted_unique_and_end_in_newline(split, table):
    content = (DATA / split / table).read_bytes()
    lines = content.splitlines()
    assert content.endswith(b"\n") and all(lines)
    assert lines == sorted(lines)
    keys = [line.split(b" ")[0] for line in lines]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("split", SPLITS)
def test_tables_tell_the_same(split):
    utt2spk = dict(rows(split, "utt2spk"))
    assert list(utt2spk) == [row[0] for row in rows(split, "segments")]
    assert all(utterance.startswith(f"{speaker}-") for utterance, speaker in utt2spk.items())
    speakers = sorted(set(utt2spk.values()))
    for table in ("spk2gender", "spk2production"):
        assert [row[0] for row in rows(split, table)] == speakers
    for utterance, name, _, _ in rows(split, "segments"):
        assert utt2spk[utterance] == name
    assert [row[0] for row in rows(split, "wav.scp")] == speakers
    assert {gender for _, gender in rows(split, "spk2gender")} <= {"m", "f", "unknown"}


def test_tables_are_those_of_the_build_script():
    with open(RECIPE / "local" / "speakers.tsv", encoding="utf-8", newline="") as file:
        wanted = {
            (row["split"], row["speaker"], row["gender"], row["production"])
            for row in csv.DictReader(file, delimiter="\t")
        }
    genders = {(split, *row) for split in SPLITS for row in rows(split, "spk2gender")}
    productions = {(split, *row) for split in SPLITS for row in rows(split, "spk2production")}
    assert genders == {row[:3] for row in wanted}
    assert productions == {(row[0], row[1], row[3]) for row in wanted}


@pytest.mark.parametrize("table, column", [("wav.scp", 0), ("spk2production", 1)])
def test_no_speaker_and_no_production_is_in_two_splits(table, column):
    sets = [{row[column] for row in rows(split, table)} for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets))


def test_amount_of_speech():
    minutes = {
        split: {
            name: sum(end - start for _, start, end in spans) / RATE / 60
            for name, spans in segments(split).items()
        }
        for split in SPLITS
    }
    assert sum(map(len, minutes.values())) >= 16
    assert sum(sum(of_split.values()) for of_split in minutes.values()) >= 100
    assert min(minutes["valid"].values()) >= 3
    assert min(minutes["test"].values()) >= 5


def test_size_and_checksums():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 20e6
    listed = {}
    for line in (DATA / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split("  ")
        listed[name] = checksum
    present = [path for split in SPLITS for path in DATA.glob(f"{split}/*")]
    assert set(listed) == {f"{path.parent.name}/{path.name}" for path in present}
    for name, checksum in listed.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == checksum, name


def test_segments_lie_inside_their_recording_and_apart(recording):
    _, _, spans, length = recording
    position = 0
    for utterance, start, end in spans:
        assert start - position >= 0.2 * RATE, f"{utterance} touches the utterance before"
        assert 2.5 * RATE <= end - start <= 12.5 * RATE, utterance
        position = end
    # the codec's delay is taken into account: exactly one pause follows
    assert length - position == 0.25 * RATE


def test_every_segment_is_speech(recording):
    audio, spans, _, _ = recording
    assert np.abs(audio).max() < 0.99
    for utterance, start, end in spans:
        speech = audio[start:end]
        assert np.sqrt((speech**2).mean()) > 0.03, f"{utterance} is too quiet"
        quiet, loud = np.percentile(frame_levels(speech), [10, 95])
        assert loud - quiet > 12, f"{utterance} has no syllables: steady noise or a tone"
        frames = speech[: len(speech) // 256 * 256].reshape(-1, 256)
        power = np.sort((np.abs(np.fft.rfft(frames)) ** 2).mean(0))
        assert power[-3:].sum() < 0.85 * power.sum(), f"{utterance} is a tone"


def test_segments_begin_and_end_with_the_speech(recording):
    """Speech within the first and last 0.2 s of a segment, quiet around it: nothing is cut."""
    audio, spans, _, _ = recording
    fifth, margin = RATE // 5, RATE // 100
    for utterance, start, end in spans:
        level = 10 * np.log10((audio[start:end] ** 2).mean())
        inside = (audio[start : start + fifth], audio[end - fifth : end])
        around = (audio[start - fifth : start - margin], audio[end + margin : end + fifth])
        assert min(frame_levels(part).max() for part in inside) > level - 40, utterance
        assert max(frame_levels(part).max() for part in around) < level - 25, utterance


def test_everybody_is_credited():
    attribution = (DATA / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for _, name, _ in recordings():
        assert f"`{name}`" in attribution
    with open(RECIPE / "local" / "packages.tsv", encoding="utf-8", newline="") as file:
        for package in csv.DictReader(file, delimiter="\t"):
            assert f"{package['package']} {package['version']}" in attribution
    for word in attribution.split("`"):
        if word.startswith("licences/"):
            assert (DATA / word).stat().st_size > 500, word
    assert "GNU GENERAL PUBLIC LICENSE" in (DATA / "licences" / "GPL-2.txt").read_text()


def test_credits_fit_the_screen_and_name_the_site_that_must_be_seen():
    lines = (DATA / "CREDITS.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 100
    assert any("http://www.voip.ammdomus.it" in line for line in lines)
