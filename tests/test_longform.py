"""Recordings of any length: blocks that join without a seam, files, levels, the upper band."""

import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from conversations import RATE, Oracle, conversation
from small import small

from asteroid_tiny import TinySepformer
from asteroid_tiny.longform import audio, separate_file, separate_long, separate_stream
from asteroid_tiny.longform.blocks import cut
from asteroid_tiny.longform.levels import make_consistent
from asteroid_tiny.longform.upper_band import share_rest


class Shares(torch.nn.Module):
    """Gives every source a fixed share of the mixture."""

    def __init__(self, *shares, sample_rate=RATE):
        super().__init__()
        self.shares, self.sample_rate = torch.tensor(shares)[:, None], sample_rate
        self.batches = []

    def forward(self, mixtures):
        self.batches.append(tuple(mixtures.shape))
        return mixtures[:, None] * self.shares


@pytest.fixture(scope="module")
def talk(valid_speech):
    """Half a minute of real speech."""
    utterances = itertools.islice(valid_speech.utterances, 15)
    return np.concatenate([valid_speech.read(u) for u in utterances])[: 30 * RATE]


@pytest.mark.parametrize("n_samples", [300, 4000, 32000])
def test_what_fits_in_one_block_is_separated_as_by_the_model(talk, n_samples):
    model = TinySepformer.from_preset("tiny-sepformer-xs", n_src=3).eval()
    mixture = talk[:n_samples]
    found = separate_long(model, mixture, block=4.0, overlap=2.0, mixture_consistency=False)
    with torch.inference_mode():
        plain = model(torch.from_numpy(mixture)[None])[0].numpy()
    order = [np.abs(plain - track).max(1).argmin() for track in found]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(found, plain[order], atol=1e-5)


def test_a_short_recording_is_one_block_unless_it_is_a_stream(talk):
    def lengths(separate, n_samples, **options):
        model = Shares(0.75, 0.25)
        mixture = talk[:n_samples]
        tracks = separate(model, mixture, block=2.0, overlap=1.0, **options)
        np.testing.assert_allclose(tracks.sum(0), mixture, atol=1e-6)
        return [n for _, n in model.batches]

    def streamed(model, mixture, **options):
        pieces = np.split(mixture, range(1000, len(mixture), 1000))
        return np.concatenate(list(separate_stream(model, pieces, **options)), axis=1)

    assert lengths(separate_long, 6 * RATE) == [6 * RATE]
    assert lengths(separate_long, 6 * RATE + 1) == [2 * RATE] * 6
    assert lengths(streamed, 6 * RATE) == [2 * RATE] * 5


def test_blocks_that_differ_join_without_a_step(talk):
    class Constant(Shares):
        def forward(self, mixtures):
            self.batches += [0] * len(mixtures)
            return torch.full((len(mixtures), 1, mixtures.shape[1]), float(len(self.batches)))

    options = dict(block=2.0, overlap=1.0, mixture_consistency=False)
    found = np.concatenate(list(separate_stream(Constant(1.0), [talk], **options)), axis=1)[0]
    assert len(found) == len(talk) and found[0] == 1 and found[-1] > 20
    assert np.abs(np.diff(found)).max() < 1e-3


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.77, 1.0, 1.9])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_hop_gives_the_right_level_everywhere(talk, overlap, batch_size):
    model = Shares(0.75, 0.25)
    mixture = talk[: 9 * RATE + 123]
    pieces = np.split(mixture, [1, 7, 9000, 9000, 60001])
    options = dict(batch_size=batch_size, mixture_consistency=False, memory=False)
    found = np.concatenate(list(separate_stream(model, pieces, 2.0, overlap, **options)), axis=1)
    assert found.shape == (2, len(mixture)) and found.dtype == np.float32
    np.testing.assert_allclose(found, [0.75 * mixture, 0.25 * mixture], atol=1e-6)
    assert max(shape[0] for shape in model.batches) == batch_size
    assert {shape[1] for shape in model.batches} == {2 * RATE}


@pytest.mark.parametrize("block, overlap", [(2.0, 2.0), (2.0, 3.0), (0.0, 0.0), (2.0, -1.0)])
def test_an_overlap_that_does_not_fit_is_refused(talk, refused, block, overlap):
    with refused(f"{overlap:g} s"):
        separate_long(Shares(0.5, 0.5), talk, block=block, overlap=overlap)


def test_nothing_and_broken_samples_are_refused(talk, refused):
    with refused("no samples"):
        separate_long(Shares(0.5, 0.5), talk[:0])
    broken = talk.copy()
    broken[150000] = np.nan
    with refused("NaN"):
        separate_long(Shares(0.5, 0.5), broken)
    with refused("the model gives"):
        separate_long(Shares(0.5, float("inf")), talk)


def test_outputs_of_any_scale_are_brought_to_sum_to_the_mixture(valid_speech):
    speakers = list(valid_speech.by_speaker)[:2]
    sources = conversation(valid_speech, speakers, 8)
    estimates = 5 * sources + 0.2 * sources[::-1]
    found = make_consistent(estimates, sources.sum(0), RATE)
    np.testing.assert_allclose(found.sum(0), sources.sum(0), atol=1e-6)
    assert ((found - sources) ** 2).sum() < 0.01 * (sources**2).sum()
    alone = np.stack([sources[0], 0.001 * sources[0]])  # and another file 60 dB below
    found = make_consistent(np.float32(0.9) * alone, sources[0] + 0.01 * sources[1], RATE)
    assert found[1].std() < 0.002 * found[0].std()
    silence = np.zeros((2, 100), np.float32)
    np.testing.assert_array_equal(make_consistent(silence, silence[0], RATE), silence)
    tracks = separate_long(Shares(0.1, 0.2, 0.1), sources.sum(0), block=2.0, overlap=1.0)
    np.testing.assert_allclose(tracks.sum(0), sources.sum(0), atol=1e-6)


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


def test_a_recording_in_memory_has_one_channel(talk, refused):
    with refused("(2, 8000)", "(time,)"):
        separate_long(Shares(0.5, 0.5), np.stack([talk[:8000]] * 2))


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


def test_samples_of_absurd_levels_are_refused(talk, refused):
    loud = talk.copy()
    loud[1000] = 1e25
    with refused("samples beyond 1e+06"):
        separate_long(Shares(0.5, 0.5), loud)
    with refused("absurdly loud"):
        separate_long(Shares(1e20, 0.5), talk)


def test_memory_that_pieces_come_in_may_be_used_again(talk):
    buffer = np.zeros(2000, np.float32)

    def pieces():
        for start in range(0, 16000, 2000):
            buffer[:] = talk[start : start + 2000]
            yield buffer

    parts = separate_stream(Shares(0.3, 0.7), pieces(), block=1.0, overlap=0.5)
    found = np.concatenate(list(parts), axis=1)
    np.testing.assert_allclose(found.sum(0), talk[:16000], atol=1e-6)


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


def test_a_model_of_bfloat16_takes_recordings_in_memory(valid_speech):
    voice = valid_speech.read(valid_speech.by_speaker[next(iter(valid_speech.by_speaker))][0])
    voice = voice[: 2 * RATE]
    exact, rounded = small(), small().bfloat16()
    rounded.load_state_dict(exact.state_dict())
    found = separate_long(rounded, voice, block=1.0, overlap=0.5)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(0), voice, atol=1e-4)


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


def test_what_lies_above_the_model_goes_to_who_makes_it(tmp_path, valid_speech):
    sources = wideband(valid_speech)
    path = write(tmp_path / "in.wav", sources.sum(0), 2 * RATE, subtype="FLOAT")
    heard = np.array([soxr.resample(source, 2 * RATE, RATE) for source in sources])
    targets = [tmp_path / f"{k}.flac" for k in (1, 2)]
    below, given = [], []
    for wants_sum, into in (False, below), (True, given):
        separate_file(Knows(heard), path, targets, block=60.0, mixture_consistency=wants_sum)
        into.extend(read_tracks(targets)[0])
    np.testing.assert_allclose(sum(given), sources.sum(0), atol=2e-4)
    half = [track + (sources.sum(0) - sum(below)) / 2 for track in below]
    error, before, equally = (np.var(np.array(e) - sources) for e in (given, below, half))
    assert error < before / 3 and error < equally / 2


@pytest.mark.parametrize("size, other", [(1, 7), (500, 333), (3000, 10000)])
def test_a_share_does_not_depend_on_the_pieces(talk, size, other):
    mixture = talk[: 2 * RATE].astype(np.float64)
    tracks = np.stack([0.3 * mixture, 0.5 * np.roll(mixture, 900)], axis=1)
    whole = np.concatenate(list(share_rest([tracks], [mixture], RATE)))
    pieces = np.split(tracks, range(size, len(tracks), size))
    mixtures = np.split(mixture, range(other, len(mixture), other))
    parts = np.concatenate(list(share_rest(pieces, mixtures, RATE)))
    np.testing.assert_allclose(parts, whole, atol=1e-9)
    np.testing.assert_allclose(parts.sum(1), mixture, atol=1e-9)


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


def test_a_file_that_is_named_twice_is_refused(tmp_path, talk, refused):
    path = write(tmp_path / "talk.wav", talk, RATE)
    with refused("1.wav", "is there twice"):
        separate_file(Shares(0.5, 0.5), path, [tmp_path / "1.wav", f"{tmp_path}/./1.wav"])
    assert not (tmp_path / "1.wav").exists()


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
        path = write(tmp_path / f"{minutes}.wav", np.tile(talk, 2 * minutes), RATE)
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
