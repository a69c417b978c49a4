"""Files of the speakers: rate, length, level, format, the upper band, and what may go wrong."""

import resource
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from conversations import RATE, Oracle, conversation
from small import Shares

from asteroid_tiny.longform import audio, separate_file, separate_long
from asteroid_tiny.longform.blocks import cut


def test_a_level_is_one_of_what_is_heard(tmp_path, talk):
    path = write(tmp_path / "talk.wav", 0.05 * talk[: 8 * RATE] + 0.5, RATE)
    done = separate_file(Shares(0.9, 0.1), path, [tmp_path / "1.wav", tmp_path / "2.wav"])
    assert done["levels"] == pytest.approx([0, 19], abs=0.5), "an offset is not heard"


def write(path, samples, rate, **options):
    sf.write(path, samples, rate, **options)
    return path


def read_tracks(targets):
    tracks, rates = zip(*(sf.read(target) for target in targets))
    assert len(set(rates)) == 1
    return np.array(tracks), rates[0]


@pytest.mark.parametrize("rate", [8000, 11025, 48000])
@pytest.mark.parametrize("suffix", ["flac", "ogg"])
def test_files_come_back_at_their_rate_length_and_place(tmp_path, rate, suffix):
    time = np.arange(int(5.3 * rate)) / rate
    left, right = 0.4 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 1000 * time)
    path = write(tmp_path / "in.wav", np.stack([left, right], 1), rate, subtype="FLOAT")
    targets = [tmp_path / "out" / f"{k}.{suffix}" for k in (1, 2)]
    done = separate_file(Shares(0.75, 0.25), path, targets, block=2.0, overlap=1.0)
    tracks, found_rate = read_tracks(targets)
    assert (found_rate, tracks.shape[1]) == (rate, len(time))
    inner = slice(rate // 2, -rate // 2)
    error = tracks.sum(0)[inner] - (left + right)[inner] / 2
    assert np.abs(error).max() < (0.03 if suffix == "ogg" else 1e-3)
    seconds = len(time) / rate
    levels = done.pop("levels")
    assert levels == pytest.approx([0, 20 * np.log10(3)], abs=0.3)
    told = {"n_channels": 2, "sample_rate": rate, "warning": ""}
    assert done == {"seconds": seconds, "gain": 1, **told}
    assert sorted(p.name for p in targets[0].parent.iterdir()) == [p.name for p in targets]


@pytest.mark.parametrize("rate", [6000, 8000, 16000])
def test_files_sum_to_the_recording_up_to_half_its_rate(tmp_path, rate):
    samples = np.random.default_rng(0).normal(0, 0.05, 3 * rate)  # as loud at any frequency
    path = write(tmp_path / "in.wav", samples, rate)
    targets = [tmp_path / "1.wav", tmp_path / "2.wav"]
    separate_file(Shares(0.75, 0.25), path, targets, block=2.0, overlap=1.0)
    np.testing.assert_allclose(read_tracks(targets)[0].sum(0), sf.read(path)[0], atol=1e-4)


def test_targets_may_be_strings_of_a_format_that_there_is(talk, tmp_path, refused):
    path = write(tmp_path / "in.wav", talk[:8000], RATE)
    targets = [str(tmp_path / "out" / f"{k}.flac") for k in (1, 2)]
    separate_file(Shares(0.5, 0.5), path, targets)
    assert read_tracks(targets)[0].shape == (2, 8000)
    for wrong in ([tmp_path / "1.wav", tmp_path / "2.mp3"], [tmp_path / "1", tmp_path / "2"]):
        with refused(f"{wrong[1]} cannot be written", ".wav, .flac, .ogg"):
            separate_file(Shares(0.5, 0.5), path, [targets[0], wrong[1]])
    with refused("there are no files"):
        separate_file(Shares(0.5, 0.5), path, [])


def test_the_single_estimate_of_an_enhancement_model_stays_what_it_is(tmp_path, talk):
    class Enhances(Shares):
        def forward(self, mixtures):
            return 3 * torch.nn.functional.avg_pool1d(mixtures[:, None], 5, 1, 2)

    wanted = np.convolve(talk, np.ones(5) / 5, "same")
    for rate in (RATE, 16000):
        path = write(tmp_path / f"{rate}.wav", np.repeat(talk, rate // RATE), rate)
        separate_file(Enhances(1.0), path, [tmp_path / "1.wav"])
        (track,), _ = read_tracks([tmp_path / "1.wav"])
        found = track[:: rate // RATE]
        assert np.corrcoef(found, wanted)[0, 1] > np.corrcoef(found, talk)[0, 1] + 0.02
        fit = found @ talk / (found @ found)
        assert fit == pytest.approx(1, abs=0.05), "its gain is that of the recording"


def test_long_pieces_are_written_as_vorbis(tmp_path, talk):
    voice = np.resize(talk, 3_000_000)
    path = write(tmp_path / "long.wav", voice, 48000)
    targets = [tmp_path / "1.ogg", tmp_path / "2.ogg"]
    separate_file(Shares(0.5, 0.5), path, targets, block=62.5, overlap=1.0)
    assert sf.info(targets[0]).frames == len(voice)


def test_rates_that_crash_vorbis_are_refused(tmp_path, refused):
    path = write(tmp_path / "bats.wav", np.full(25000, 0.1), 250_000)
    with refused("1.ogg", "Vorbis ends at 200000 Hz"):
        separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.ogg", tmp_path / "2.ogg"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bats.wav"]


def test_so_few_samples_that_none_are_left_are_no_recording(tmp_path, refused):
    path = write(tmp_path / "one.wav", np.array([0.1]), 44100)
    with refused("one.wav holds no samples to speak of"):
        separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.wav", tmp_path / "2.wav"])


def test_a_wav_file_beyond_4_gigabytes_is_one_of_rf64(tmp_path, talk, monkeypatch):
    path = write(tmp_path / "talk.wav", talk, RATE)
    targets = [tmp_path / "1.wav", tmp_path / "2.wav"]
    for most, kind in ((2 * len(talk), "WAV"), (2 * len(talk) - 1, "RF64")):
        monkeypatch.setattr(audio, "MOST_OF_WAV", most)
        separate_file(Shares(0.5, 0.5), path, targets)
        assert sf.info(targets[0]).format == kind
        assert len(read_tracks(targets)[0][0]) == len(talk)


class Knows(Shares):
    """Gives the sources that it was told, whatever it hears."""

    def __init__(self, sources):
        super().__init__(1.0)
        self.sources = torch.from_numpy(sources).float()

    def forward(self, mixtures):
        return self.sources[None, :, : mixtures.shape[1]]


def wideband(speech):
    """Two sources of real speech played twice as fast, which has what speech has up to 8000 Hz."""
    chosen = list(speech.by_speaker.values())[:2]
    joined = [np.concatenate([speech.read(u) for u in utterances[:4]]) for utterances in chosen]
    n_samples = min(map(len, joined))
    return np.array([samples[:n_samples] / samples[:n_samples].std() for samples in joined]) / 20


@pytest.mark.parametrize("rate, gain", [(16000, 1), (48000, 1), (96000, 0.1), (192000, 0.1)])
def test_what_lies_above_the_model_goes_to_who_makes_it(tmp_path, valid_speech, rate, gain):
    sources = gain * wideband(valid_speech)[:, : 8 * RATE]
    heard = np.array([soxr.resample(source, 2 * RATE, RATE) for source in sources])
    sources = np.array([soxr.resample(source, 2 * RATE, rate) for source in sources])
    path = write(tmp_path / "in.wav", sources.sum(0), rate, subtype="FLOAT")
    targets = [tmp_path / f"{k}.flac" for k in (1, 2)]
    below, given = [], []
    for wants_sum, into in (False, below), (True, given):
        separate_file(Knows(heard), path, targets, block=60.0, mixture_consistency=wants_sum)
        into.extend(read_tracks(targets)[0])
    np.testing.assert_allclose(sum(given), sources.sum(0), atol=2e-4)
    half = [track + (sources.sum(0) - sum(below)) / 2 for track in below]
    error, before, equally = (np.var(np.array(e) - sources) for e in (given, below, half))
    assert error < before / 3 and error < equally / 2


def test_loud_recordings_do_not_clip_and_peak_sets_the_level(tmp_path, talk):
    loud = 3 * talk / np.abs(talk).max()
    path = write(tmp_path / "loud.wav", loud, RATE, subtype="FLOAT")
    targets = [tmp_path / "1.wav", tmp_path / "2.wav"]
    options = dict(block=4.0, overlap=2.0)
    done = separate_file(Shares(0.75, 0.25), path, targets, **options)
    tracks, _ = read_tracks(targets)
    assert done["gain"] < 0.5 and np.abs(tracks).max() < 1
    np.testing.assert_allclose(tracks.sum(0), done["gain"] * loud, atol=1e-3)
    separate_file(Shares(0.75, 0.25), path, targets, peak=-6.0, **options)
    assert np.abs(read_tracks(targets)[0]).max() == pytest.approx(10 ** (-6 / 20), abs=1e-3)


@pytest.mark.parametrize("block", [1.0, 4.0])
def test_a_file_and_a_recording_in_memory_are_separated_alike(tmp_path, valid_speech, block):
    sources = conversation(valid_speech, list(valid_speech.by_speaker)[:2], 20, seed=0)
    starts = [start for start, _ in cut([sources[0]], round(block * RATE), round(block * RATE / 2))]
    options = dict(block=block, overlap=block / 2)
    in_memory = separate_long(Oracle(sources, starts), sources.sum(0), **options)
    path = write(tmp_path / "talk.wav", sources.sum(0), RATE, subtype="FLOAT")
    targets = [tmp_path / "1.wav", tmp_path / "2.wav"]
    separate_file(Oracle(sources, starts), path, targets, **options)
    np.testing.assert_allclose(read_tracks(targets)[0], in_memory, atol=1e-4)


def test_a_recording_is_not_written_over_nor_are_files_with_a_peak_beyond_full_scale(
    tmp_path, talk, refused
):
    path = write(tmp_path / "1.wav", talk[:8000], RATE)
    before, targets = path.read_bytes(), [tmp_path / "1.wav", tmp_path / "2.wav"]
    with refused("1.wav would be written over by its own output"):
        separate_file(Shares(0.5, 0.5), path, targets)
    for peak in (np.nan, 10.0):
        with refused("must be from -90 dB to 0"):
            separate_file(Shares(0.5, 0.5), path, [tmp_path / "3.wav", targets[1]], peak=peak)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_progress_adds_up_to_the_length_of_the_recording(tmp_path, talk):
    path = write(tmp_path / "talk.wav", np.repeat(talk, 2), 2 * RATE)
    told, targets = [], [tmp_path / "1.wav", tmp_path / "2.wav"]
    options = dict(progress=lambda *seconds: told.append(seconds), block=4.0, overlap=2.0)
    separate_file(Shares(0.5, 0.5), path, targets, **options)
    seconds, totals = zip(*told)
    assert sum(seconds) == pytest.approx(30, abs=0.1) and set(totals) == {30.0}
    assert seconds[1:-1] == (2.0,) * (len(seconds) - 2)


def test_a_suffix_may_be_in_capitals_and_targets_as_many_as_sources(tmp_path, talk, refused):
    path = write(tmp_path / "in.wav", talk[:8000], RATE)
    separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.WAV", tmp_path / "2.FLAC"])
    assert [sf.info(tmp_path / name).format for name in ("1.WAV", "2.FLAC")] == ["WAV", "FLAC"]
    with refused("the model gives 2 sources, not 3"):
        separate_file(Shares(0.5, 0.5), path, [tmp_path / f"{k}.ogg" for k in range(3)])
    assert not list(tmp_path.glob("*.ogg"))


def test_what_is_held_back_lies_beside_the_files_and_not_where_memory_may_be(
    tmp_path, talk, monkeypatch
):
    folders, make = [], audio.tempfile.TemporaryFile
    monkeypatch.setattr(
        audio.tempfile, "TemporaryFile", lambda dir=None: folders.append(dir) or make(dir=dir)
    )
    path = write(tmp_path / "in.wav", talk[:8000], RATE)
    separate_file(Shares(0.5, 0.5), path, [tmp_path / "out" / f"{k}.wav" for k in (1, 2)])
    assert folders == [tmp_path / "out"]


def test_a_file_that_is_named_twice_is_refused(tmp_path, talk, refused):
    path = write(tmp_path / "talk.wav", talk, RATE)
    with refused("1.wav", "is there twice"):
        separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.wav", f"{tmp_path}/./1.wav"])
    with refused("1.wav is one file", "one a speaker"):
        separate_file(Shares(0.5, 0.5), path, f"{tmp_path}/1.wav")
    assert not (tmp_path / "1.wav").exists()


def test_a_recording_that_grows_meanwhile_is_told(tmp_path, talk):
    class Recorder(Shares):
        def forward(self, mixtures):
            with open(path, "ab") as file:
                file.write(b"more")
            return super().forward(mixtures)

    path = write(tmp_path / "in.wav", talk, RATE)

    class Thief(Shares):
        def forward(self, mixtures):
            path.unlink(missing_ok=True)
            return super().forward(mixtures)

    grown = "it has grown meanwhile; what came late may be missing"
    for kind, told in ((Shares, ""), (Recorder, grown), (Thief, "")):
        done = separate_file(kind(0.5, 0.5), path, [tmp_path / "1.wav", tmp_path / "2.wav"])
        assert done["warning"] == told


def test_an_interrupt_leaves_nothing(tmp_path, talk):
    class Interrupted(Shares):
        def forward(self, mixtures):
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().forward(mixtures)

    path = write(tmp_path / "talk.wav", talk, RATE)
    targets = [tmp_path / "out" / f"{k}.wav" for k in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        separate_file(Interrupted(0.5, 0.5), path, targets, block=4.0, overlap=2.0)
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_does_not_grow_with_the_length(tmp_path, talk):
    peaks = []
    for minutes in (1, 5):
        path = write(tmp_path / f"talk{minutes}.wav", np.tile(talk, 2 * minutes), RATE)
        tracemalloc.start()
        separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.wav", tmp_path / "2.wav"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6


HOUR = """
import resource, sys, time
from asteroid_tiny import TinySepformer
from pathlib import Path
from asteroid_tiny.longform import separate_file
sizes = dict(n_filters=64, kernel_size=128, stride=64, bn_chan=32, ff_hid=32, n_heads=2,
             chunk_size=50, n_repeats=1, n_intra_layers=1, n_inter_layers=1)
path, began = Path(sys.argv[1]), time.monotonic()
targets = [path.with_name("1.ogg"), path.with_name("2.ogg")]
separate_file(TinySepformer(2, **sizes).eval(), path, targets)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.monotonic() - began)
"""


@pytest.mark.parametrize("suffix", audio.FORMATS)
def test_a_disk_that_is_full_at_the_very_end_leaves_no_file(tmp_path, talk, refused, suffix):
    targets = [tmp_path / f"{k}.{suffix}" for k in (1, 2)]
    tracks = np.stack([talk[: 6 * RATE], talk[: 6 * RATE]], 1)
    audio.write_tracks(targets, lambda: [tracks], RATE)
    size = targets[0].stat().st_size
    for target in targets:
        target.unlink()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, most[1]))
    try:
        with refused("could not be written"):
            audio.write_tracks(targets, lambda: [tracks], RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_meanwhile_is_told(tmp_path, talk, refused):
    path = write(tmp_path / "in.wav", talk, RATE)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, most[1]))
    try:
        with refused(tmp_path / "1.wav", "could not be written"):
            separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.wav", tmp_path / "2.wav"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_that_cannot_be_written_is_named(tmp_path, talk, refused, monkeypatch):
    def write(self, samples):
        raise sf.LibsndfileError(0)

    monkeypatch.setattr(sf.SoundFile, "write", write)
    tracks = np.stack([talk[:RATE], talk[:RATE]], 1)
    with refused(tmp_path / "1.wav", "could not be written"):
        audio.write_tracks([tmp_path / f"{k}.wav" for k in (1, 2)], lambda: [tracks], RATE)


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_a_minute_nor_more_time_a_minute(tmp_path, talk):
    found = []
    for minutes in (1, 60):
        path = tmp_path / f"{minutes}.flac"
        with sf.SoundFile(path, "w", 44100, 1) as file:
            for _ in range(2 * minutes):
                file.write(np.repeat(talk, 6)[: 30 * 44100])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", HOUR, path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        megabytes, seconds = map(float, done.stdout.split())
        found.append((megabytes, seconds / minutes))
        print(f"{minutes} min: {megabytes:.0f} MB at most, {seconds / minutes:.2f} s a minute")
    assert found[1][0] < found[0][0] + 300
    assert found[1][1] < 1.3 * found[0][1]
