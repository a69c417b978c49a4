"""Training mixtures: the same draws wherever and whenever they are drawn; broken recordings."""

import itertools
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
import torch
from sounds import level, peak_frequency, tone
from torch.utils.data import DataLoader

from asteroid_tiny.data import (
    DynamicMixtures,
    EpochSampler,
    RecordedNoise,
    SpeechDir,
)
from asteroid_tiny.data.mixing import LEVEL_DB, MOST_GAIN, draw_mixture, draw_turns, same_colour
from asteroid_tiny.errors import UserError, exit_on_user_error


@pytest.fixture
def tones(make_dir):
    """Five speakers who hum: speaker i at 300 + 100 i Hz, for 4 s."""
    return SpeechDir(make_dir({f"s{i}": tone(300 + 100 * i) for i in range(5)}))


def test_training_mixtures_are_of_different_speakers_and_of_all(tones):
    pairs = Counter()
    for _, sources in itertools.islice(iter_items(DynamicMixtures(tones, 2, 4000, seed=0)), 150):
        pairs[frozenset(round(peak_frequency(source), -2) for source in sources)] += 1
    assert {len(pair) for pair in pairs} == {2}
    assert len(pairs) == 10 and min(pairs.values()) >= 4


@pytest.fixture
def training_mixtures(make_dir, clips):
    """A function that opens the same data afresh, with nothing decoded: `DynamicMixtures`."""
    folder = make_dir(clips)

    def open_mixtures(seed=0):
        return DynamicMixtures(SpeechDir(folder), 2, 8000, seed, speeds=(95, 100, 105), size=8)

    return open_mixtures


def test_an_item_is_the_same_in_any_order(training_mixtures):
    forwards, backwards = training_mixtures(), training_mixtures()
    wanted = [forwards[i] for i in range(8)]
    for i in (7, 3, 3, 0):
        np.random.seed(i), torch.manual_seed(i)
        assert all(map(torch.equal, backwards[i], wanted[i]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_item_is_the_same_in_any_process(training_mixtures, num_workers):
    wanted = [training_mixtures()[i] for i in range(8)]
    loader = DataLoader(training_mixtures(), batch_size=2, num_workers=num_workers)
    batches = list(loader)
    assert len(batches) == 4
    mixtures, sources = map(torch.cat, zip(*batches))
    assert torch.equal(mixtures, torch.stack([mixture for mixture, _ in wanted]))
    assert torch.equal(sources, torch.stack([sources for _, sources in wanted]))
    assert torch.equal(mixtures, sources.sum(1))


def test_items_and_seeds_differ(training_mixtures):
    mixtures = [training_mixtures(seed)[i][0] for seed in (0, 1) for i in (0, 1, 2, 10**9)]
    for one, other in itertools.combinations(mixtures, 2):
        assert not torch.equal(one, other)


def test_epochs_follow_each_other():
    sampler = EpochSampler(10)
    numbers = list(sampler)
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        assert len(sampler) == 10
        numbers += sampler
    assert numbers == list(range(30))
    resumed = EpochSampler(10)
    resumed.set_epoch(2)
    assert list(resumed) == numbers[20:]


@pytest.mark.parametrize("size, world_size", [(12, 3), (10, 4)])
def test_ranks_share_an_epoch_out(size, world_size):
    numbers = []
    for rank in range(world_size):
        sampler = EpochSampler(size, rank, world_size)
        sampler.set_epoch(5)
        assert len(list(sampler)) == len(sampler)
        numbers += sampler
    assert sorted(numbers) == list(range(5 * size, 6 * size))


def test_training_mixtures_of_one_colour_are_still_sums(valid_speech):
    mixed, sources = DynamicMixtures(valid_speech, 2, 8000, seed=0, colour=6.0)[3]
    plain, _ = DynamicMixtures(valid_speech, 2, 8000, seed=0)[3]
    assert torch.equal(mixed, sources.sum(0)) and not torch.allclose(mixed, plain)


def bands(samples):
    """Level in dB of each of the 16 bands of `same_colour`, re their mean."""
    power = np.abs(np.fft.rfft(samples.numpy().astype(np.float64))) ** 2
    levels = 10 * np.log10([band.mean() for band in np.array_split(power[1:], 16)])
    return levels - levels.mean()


def test_the_colour_falls_by_12_db_and_lies_about_that_as_far_as_asked():
    white = torch.randn(1, 80000)
    plain = bands(same_colour(white, np.random.default_rng(0), 0.0)[0])
    np.testing.assert_allclose(plain, np.linspace(6, -6, 16), atol=1)
    colours = [bands(same_colour(white, np.random.default_rng(i), 3.0)[0]) for i in range(20)]
    assert 2 < np.std(np.array(colours) - plain) < 3.5  # less than 3, as bands are smoothed


def test_no_band_is_raised_by_more_than_the_most_gain():
    """Silence above 2 kHz, as of telephones, would else become noise as loud as the voice."""
    narrow = torch.fft.rfft(torch.randn(1, 80000, dtype=torch.float64))
    narrow[:, narrow.shape[1] // 2 :] *= 1e-4  # -80 dB
    narrow = torch.fft.irfft(narrow).float()
    new = same_colour(narrow, np.random.default_rng(0), 0.0)[0]
    heard = bands(new[500:-500])  # the edges are steps, which have all frequencies
    assert heard[2:6].mean() - heard[10:14].mean() > 80 - 2 * MOST_GAIN - 3


def test_levels_of_training_mixtures_are_spread(valid_speech):
    args = dict(n_src=2, length=8000, seed=0, size=40)
    spread = DynamicMixtures(valid_speech, level_spread=6, **args)
    levels = np.array([max(level(one) for one in spread[i][1]) for i in range(40)])
    assert LEVEL_DB - 6.01 < levels.min() < LEVEL_DB - 4
    assert LEVEL_DB + 4 < levels.max() < LEVEL_DB + 6.01


def test_training_mixtures_overlap_by_ratios_of_a_range(valid_speech):
    args = dict(n_src=2, length=16000, seed=0, size=40)
    mixtures = DynamicMixtures(valid_speech, overlap_ratio=0.9, least_overlap=0.3, **args)
    shares = [both_speak(mixtures[i][1]) for i in range(40)]
    assert 0.25 < min(shares) < 0.45 and 0.75 < max(shares) < 0.91
    plain, again = (DynamicMixtures(valid_speech, least_overlap=x, **args) for x in (0.3, 1.0))
    assert both_speak(again[0][1]) > 0.97
    assert torch.equal(again[0][0], DynamicMixtures(valid_speech, **args)[0][0])
    assert not torch.equal(again[0][0], plain[0][0])


def test_a_share_of_the_training_mixtures_are_conversations(tones):
    args = dict(n_src=2, length=32000, seed=0, size=60)
    mixtures = DynamicMixtures(tones, turns=0.5, **args)
    one_alone = 0
    for mixed, sources in (mixtures[i] for i in range(60)):
        assert sources.shape == (2, 32000) and torch.equal(mixed, sources.sum(0))
        heard = sources.reshape(2, -1, 400).abs().amax(-1) > 0
        one_alone += bool((heard.sum(0) == 1).any())
    assert 20 <= one_alone <= 40
    plain, none = (DynamicMixtures(tones, **args, **x) for x in ({}, dict(turns=0)))
    assert torch.equal(plain[3][0], none[3][0])


def test_in_conversations_each_speaker_has_a_speed_and_at_times_goes_on(tones):
    rng, pairs, same = np.random.default_rng(0), set(), []
    for _ in range(20):
        drawn = draw_turns(tones, rng, ["s0", "s1"], 160000, speeds=(90, 110))
        speeds = [{turn.speed for turn in own.sources} for own in drawn]
        assert max(map(len, speeds)) == 1
        pairs.add(tuple(min(own, default=None) for own in speeds))
        turns = sorted((turn.offset, who) for who, own in enumerate(drawn) for turn in own.sources)
        same += [one == other for (_, one), (_, other) in itertools.pairwise(turns)]
    assert {(90, 110), (110, 90), (90, 90), (110, 110)} <= pairs
    assert 0.15 < np.mean(same) < 0.35, "one of four"


def test_of_utterances_that_are_all_too_short_the_longer_are_drawn_more_often(make_dir):
    tables = {"segments": "a-1 a 0 0.5\na-2 a 0.5 3.5\n", "utt2spk": "a-1 a\na-2 a\n"}
    speech = SpeechDir(make_dir({"a": tone(500)}, tables=tables))
    drawn = (draw_mixture(speech, np.random.default_rng(i), ["a"], 40000) for i in range(140))
    counts = Counter(mixture.sources[0].utterance for mixture in drawn)
    assert counts.keys() == {"a-1", "a-2"} and 105 < counts["a-2"] < 135  # 6 of 7


@pytest.mark.parametrize(("n_src", "heard"), [(2, {1, 2}), (3, {1, 2, 3})])
def test_in_a_share_of_the_training_mixtures_some_sources_are_silent(valid_speech, n_src, heard):
    args = dict(n_src=n_src, length=8000, seed=0, size=80, colour=3.0, overlap_ratio=0.5)
    mixtures = DynamicMixtures(valid_speech, silent_sources=0.5, **args)
    counts = []
    for mixed, sources in (mixtures[i] for i in range(80)):
        assert sources.shape == (n_src, 8000) and torch.equal(mixed, sources.sum(0))
        counts.append(int(sources.any(-1).sum()))
    assert set(counts) == heard
    assert 25 <= counts.count(n_src) <= 55
    plain, none = (DynamicMixtures(valid_speech, **args, **x) for x in ({}, dict(silent_sources=0)))
    assert torch.equal(plain[3][0], none[3][0])


def both_speak(sources):
    """Share of a mixture from the last source's first sample to the first source's last."""
    first, last = (torch.nonzero(source).flatten() for source in sources)
    return float(first[-1] - last[0] + 1) / sources.shape[1]


def break_in_the_middle(path):
    """Makes a file break where its header does not tell."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_recording_is_named_and_passed_over(make_dir, clips, num_workers):
    first, *_ = clips.values()
    folder = make_dir({f"s{i}": first for i in range(100)}, suffix="flac")  # 1 % may be broken
    break_in_the_middle(folder / "s7.flac")
    mixtures = DynamicMixtures(SpeechDir(folder), 2, 4000, seed=0, size=300)
    loader = DataLoader(mixtures, batch_size=20, num_workers=num_workers)
    assert all(torch.isfinite(mixed).all() for mixed, _ in loader)
    assert sum(len(mixed) for mixed, _ in loader) == 300
    if num_workers == 0:
        (named,) = mixtures.broken
        assert "s7.flac" in named


def test_too_many_broken_recordings_end_the_epoch(make_dir, clips, refused):
    first, *_ = clips.values()
    folder = make_dir({f"s{i}": first for i in range(6)}, suffix="flac")
    break_in_the_middle(folder / "s3.flac")
    mixtures = DynamicMixtures(SpeechDir(folder), 2, 4000, seed=0, size=50)
    with refused("1 of 6 recordings are broken", "s3.flac"):
        for i in range(50):
            mixtures[i]


def test_recordings_of_noise_count_where_noise_is_taken_from_them(make_dir, clips, tmp_path):
    first, *_ = clips.values()
    folder = make_dir({f"s{i}": first for i in range(6)}, suffix="flac")
    break_in_the_middle(folder / "s3.flac")
    (tmp_path / "noises").mkdir()
    for i in range(94):
        sf.write(tmp_path / "noises" / f"{i}.wav", first[:800], 8000)
    recorded = RecordedNoise(tmp_path / "noises")
    args = dict(n_src=2, length=4000, seed=0, recorded=recorded)
    mixtures = DynamicMixtures(SpeechDir(folder), noise=0.5, **args)
    assert all(mixtures[i][0].isfinite().all() for i in range(30)) and len(mixtures.broken) == 1
    unheard = DynamicMixtures(SpeechDir(folder), **args)
    with pytest.raises(UserError, match="1 of 6 recordings"):
        [unheard[i] for i in range(30)]


def test_what_ends_a_worker_process_is_still_one_sentence(make_dir, clips, capsys):
    first, *_ = clips.values()
    folder = make_dir({f"s{i}": first for i in range(6)}, suffix="flac")
    break_in_the_middle(folder / "s3.flac")
    mixtures = DynamicMixtures(SpeechDir(folder), 2, 4000, seed=0, size=50)
    with pytest.raises(SystemExit), exit_on_user_error():
        list(DataLoader(mixtures, num_workers=1))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: 1 of 6 recordings are broken") and not line.endswith("?")


def iter_items(dataset):
    return (dataset[i] for i in itertools.count())


def test_gaps_and_speeds_of_training_mixtures_are_those_asked_for(tones):
    even = DynamicMixtures(tones, 2, 8000, seed=0, max_gap=0.0, speeds=(50,))
    spread = DynamicMixtures(tones, 2, 8000, seed=0, max_gap=20.0)
    gaps = []
    for i in range(20):
        one, other = even[i][1]
        assert level(one) == pytest.approx(level(other), abs=0.01)
        assert max(peak_frequency(one), peak_frequency(other)) <= 350  # half of 300 to 700 Hz
        gaps.append(abs(level(spread[i][1][0]) - level(spread[i][1][1])))
    assert max(gaps) > 10
