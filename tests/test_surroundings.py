"""Rooms, how sound dies away in them, noise, its level and spectrum, what microphones let through,
and mixtures heard so."""

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.signal import welch
from sounds import level, peak_frequency, tone

from asteroid_tiny.data import (
    DynamicMixtures,
    InSurroundings,
    MixtureList,
    RecordedNoise,
    draw_list,
    write_list,
)
from asteroid_tiny.data.surroundings import (
    DECAY,
    DIRECT,
    FIRST,
    SNR,
    by_a_microphone,
    in_a_room,
    noise_for,
)

RATE = 8000


def responses(seed, n_src=2):
    """What two clicks become in a room, the direct sound at 1."""
    clicks = torch.zeros(n_src, RATE)
    clicks[:, 0] = 1
    heard = in_a_room(clicks, np.random.default_rng(seed), RATE).numpy().astype(np.float64)
    return heard / heard[:, :1]


def decay(response):
    """Reverberation time in s by M. R. Schroeder's backward integration, from -5 to -25 dB."""
    left = 10 * np.log10((response[1:] ** 2)[::-1].cumsum()[::-1] + 1e-20)
    first, last = (np.argmax(left < left[0] - fall) for fall in (5, 25))
    return 3 * (last - first) / RATE


def test_sound_dies_away_as_in_a_room_alike_for_all_who_are_there():
    times, direct = [], []
    for seed in range(40):
        heard = responses(seed)
        assert np.abs(heard[:, 1 : int(FIRST * RATE)]).max() < 1e-6, "nothing comes back at once"
        one, other = (decay(response) for response in heard)
        assert one == pytest.approx(other, rel=0.2)
        assert not np.allclose(*heard), "everyone has a place of his own"
        times.append((one + other) / 2)
        direct += list(-10 * np.log10((heard[:, 1:] ** 2).sum(1)))
    (shortest, longest), (far, close) = DECAY, DIRECT
    assert 0.85 * shortest < min(times) < 0.2 and 0.5 < max(times) < 1.15 * longest
    assert far - 0.01 < min(direct) < far + 2 and close - 2 < max(direct) < close + 0.01


def test_levels_silence_and_length_stay(clips):
    first, second, *_ = (torch.from_numpy(clip[:9000] / 32768).float() for clip in clips.values())
    sources = torch.stack([first, second, torch.zeros(9000)])
    heard = in_a_room(sources, np.random.default_rng(0), RATE)
    assert heard.shape == sources.shape and heard.dtype == torch.float32
    for old, new in zip(sources[:2], heard):
        assert level(new) == pytest.approx(level(old), abs=0.01) and not torch.equal(old, new)
    assert not heard[2].any()
    assert in_a_room(sources[:, :50], np.random.default_rng(0), RATE).shape == (3, 50)
    assert torch.equal(heard, in_a_room(sources, np.random.default_rng(0), RATE))


@pytest.mark.parametrize("way", ["reverb", "microphone"])
def test_a_share_of_the_training_mixtures_is_heard_so(valid_speech, way):
    args = dict(n_src=2, length=8000, seed=0, size=60, silent_sources=0.3)
    plain, heard = (DynamicMixtures(valid_speech, **{way: x}, **args) for x in (0.0, 0.5))
    changed = 0
    for i in range(60):
        mixture, sources = heard[i]
        torch.testing.assert_close(mixture, sources.sum(0), atol=1e-5, rtol=0)
        assert torch.equal(sources.any(-1), plain[i][1].any(-1)), "the same speakers"
        changed += not torch.equal(mixture, plain[i][0])
    assert 18 <= changed <= 42
    assert torch.equal(plain[3][0], DynamicMixtures(valid_speech, **args)[3][0])


def test_noise_has_its_level_and_falls_from_low_to_high_frequencies():
    mixture = torch.from_numpy(tone(440, 4.0) / 32768).float()
    slopes, swells, rumbles = [], [], []
    for seed in range(40):
        noise = noise_for(mixture, np.random.default_rng(seed), RATE, 12.0).numpy()
        assert noise.shape == mixture.shape and noise.dtype == np.float32
        assert level(mixture) - level(noise) == pytest.approx(12.0, abs=0.01)
        frequencies, power = welch(noise, RATE, nperseg=1024)
        used = (frequencies > 60) & (frequencies < 3900)
        octaves, decibels = np.log2(frequencies[used]), 10 * np.log10(power[used])
        low, less_low = (welch(noise, RATE, nperseg=4000)[1][k : k + 4].mean() for k in (3, 20))
        rumbles.append(10 * np.log10(low / less_low))  # 6 to 12 Hz, 40 to 46 Hz
        slopes.append(np.polyfit(octaves, decibels, 1)[0])
        swells.append(np.std([level(part) for part in noise.reshape(8, -1)]))
    assert -10 < min(slopes) < -5 and 0 < max(slopes) < 4 and -4.5 < np.mean(slopes) < -1.5
    assert min(swells) < 1 and 2 < max(swells) < 6
    assert abs(np.mean(rumbles)) < 2, "flat below 50 Hz"


def test_silence_and_single_samples_take_noise():
    rng = np.random.default_rng(0)
    assert not noise_for(torch.zeros(8000), rng, RATE, 0.0).any()
    for length in (1, 2, 7919):
        assert torch.isfinite(noise_for(torch.ones(length), rng, RATE, 0.0)).all()


def test_noise_is_added_to_a_share_of_the_training_mixtures(valid_speech):
    args = dict(n_src=2, length=8000, seed=0, size=60, silent_sources=0.3)
    clean, noisy = (DynamicMixtures(valid_speech, noise=share, **args) for share in (0.0, 0.5))
    ratios = []
    for i in range(60):
        (mixture, sources), (noisy_mixture, same_sources) = clean[i], noisy[i]
        assert torch.equal(sources, same_sources), "what is to be estimated has no noise"
        noise = noisy_mixture - mixture
        if noise.any():
            ratios.append(level(mixture) - level(noise))
    assert 18 <= len(ratios) <= 42
    assert SNR[0] - 0.01 < min(ratios) and max(ratios) < SNR[1] + 0.01


@pytest.mark.parametrize("rate", [8000, 16000])
def test_microphones_are_those_of_studios_laptops_and_telephones(rate):
    click = torch.zeros(2 * rate)
    click[rate] = 1
    heard = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        response = by_a_microphone(click, click[None], rng, rate)[0]
        assert response[: rate // 2].abs().max() < 1e-3 * response.abs().max(), "no echo"
        decibels = 20 * np.log10(np.abs(np.fft.rfft(response.numpy())) + 1e-9)
        heard.append([decibels[2 * hertz] for hertz in (100, 500, 1000, 2000, 3600)])
    low, first, middle, last, high = np.array(heard).T
    assert (low < first - 25).sum() >= 6, "some hear no low frequencies, as telephones"
    assert (high < last - 6).sum() >= 6, "some hear no high ones"
    assert ((low > first - 10) & (high > last - 6)).sum() >= 6, "some hear both"
    assert (last > first + 6).sum() >= 6 and (last < first).sum() >= 6, "some bright, some dull"
    assert np.abs(middle - first).max() < 20, "all hear what makes speech"


def test_a_microphone_hears_all_that_is_there_alike(clips):
    first, second, *_ = (torch.from_numpy(clip[:9000] / 32768).float() for clip in clips.values())
    sources = torch.stack([first, second, torch.zeros(9000)])
    noise = noise_for(first, np.random.default_rng(1), RATE, 10.0)
    mixture, heard = by_a_microphone(
        sources.sum(0) + noise, sources, np.random.default_rng(0), RATE
    )
    assert mixture.shape == (9000,) and heard.shape == sources.shape
    assert mixture.dtype == heard.dtype == torch.float32
    assert level(mixture) == pytest.approx(level(sources.sum(0) + noise), abs=0.01)
    assert not heard[2].any() and not torch.allclose(heard[0], first, atol=1e-2)
    again, (heard_noise,) = by_a_microphone(
        sources.sum(0) + noise, noise[None], np.random.default_rng(0), RATE
    )
    assert torch.equal(again, mixture)
    torch.testing.assert_close(mixture, heard.sum(0) + heard_noise, atol=1e-5, rtol=0)
    silent = by_a_microphone(torch.zeros(50), torch.zeros(2, 50), np.random.default_rng(0), RATE)
    assert not any(signals.any() for signals in silent)


class Repeated:
    """The first mixture of a list at every place."""

    def __init__(self, listed):
        self.listed, self.sample_rate = listed, listed.sample_rate

    def __getitem__(self, index):
        return self.listed[0]


@pytest.mark.parametrize("reverb", [False, True])
@pytest.mark.parametrize("snr", [None, 5.0])
@pytest.mark.parametrize("microphone", [False, True])
def test_each_mixture_of_a_list_has_surroundings_of_its_own(
    valid_speech, tmp_path, reverb, snr, microphone
):
    changed = reverb or microphone
    write_list(tmp_path / "list.csv", draw_list(valid_speech, 3, 2, 8000, seed=1), RATE)
    listed = MixtureList(valid_speech, tmp_path / "list.csv")
    way = dict(reverb=reverb, snr=snr, microphone=microphone)
    here, there = (InSurroundings(listed, seed, **way) for seed in (1, 2))
    assert len(here) == 3 and here.sample_rate == RATE
    assert here.describe(1) == listed.describe(1)
    twice = Repeated(listed)
    pair = [InSurroundings(twice, 1, **way)[i][0] for i in (0, 1)]
    assert torch.equal(*pair) == (not changed and snr is None), "each a place of its own"
    for i in range(3):
        mixture, sources = here[i]
        assert torch.equal(mixture, here[i][0])
        assert torch.equal(mixture, there[i][0]) == (not changed and snr is None)
        assert torch.equal(sources, listed[i][1]) != changed
        noise = mixture - sources.sum(0)
        if snr is None:
            torch.testing.assert_close(noise, torch.zeros(8000), atol=1e-5, rtol=0)
        elif not microphone:  # which hears more of the one or of the other
            assert level(sources.sum(0)) - level(noise) == pytest.approx(snr, abs=0.01)


@pytest.fixture
def recordings(tmp_path):
    """Two tones, of other rates, depths, channels and lengths, and silence: all recorded noise."""
    folder = tmp_path / "noises"
    (folder / "street").mkdir(parents=True)
    low, high = tone(500, 0.7), tone(1000, 2.1)
    sf.write(folder / "low.FLAC", np.stack([low, 0 * low], axis=-1), RATE)
    sf.write(folder / "street" / "high.wav", high, 2 * RATE)  # there it is of 2000 Hz
    sf.write(folder / "street" / "silence.wav", np.zeros(RATE), RATE)
    (folder / "notes.txt").write_text("no noise")
    return folder


def test_recorded_noise_has_its_rate_level_and_share(recordings):
    mixture = torch.from_numpy(tone(440, 1.5) / 32768).float()
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        noise = noise_for(mixture, rng, RATE, 5.0, RecordedNoise(recordings)).numpy()
        assert noise.shape == mixture.shape and noise.dtype == np.float32
        assert level(mixture) - level(noise) == pytest.approx(5.0, abs=0.01)
        found.append(round(peak_frequency(noise), -1))
    assert set(found) == {500, 2000}
    assert 20 < found.count(2000) < 50, "by length, 0.7 s and 1.05 s, what is silent left out"
    assert not noise_for(torch.zeros(50), rng, RATE, 5.0, RecordedNoise(recordings)).any()


def test_training_mixtures_take_recorded_noise(valid_speech, recordings):
    args = dict(n_src=2, length=8000, seed=0, size=20)
    noisy = DynamicMixtures(valid_speech, noise=1.0, recorded=RecordedNoise(recordings), **args)
    for i in range(20):
        mixture, sources = noisy[i]
        assert round(peak_frequency(mixture - sources.sum(0)), -1) in (500, 2000)


def test_folders_without_noise_and_broken_recordings_are_refused(tmp_path, recordings, refused):
    with refused("there is no folder", "nowhere"):
        RecordedNoise(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused("empty holds no recordings of noise"):
        RecordedNoise(tmp_path / "empty")
    noise = RecordedNoise(recordings)
    for path in recordings.rglob("*.wav"):
        path.write_bytes(path.read_bytes()[:2000])
    with refused(recordings, "is damaged"):
        for seed in range(9):
            noise.draw(8000, np.random.default_rng(seed), RATE)
    (recordings / "no.wav").write_bytes(b"RIFF no sound at all")
    with refused("no.wav cannot be read as audio"):
        RecordedNoise(recordings)


def test_noise_is_of_any_place_in_a_recording_and_what_is_empty_is_left_out(tmp_path):
    sf.write(tmp_path / "two.wav", np.concatenate([tone(500), tone(1000)]), RATE)
    sf.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    noise, rng = RecordedNoise(tmp_path), np.random.default_rng(0)
    drawn = [round(peak_frequency(noise.draw(4000, rng, RATE)), -1) for _ in range(30)]
    assert {500, 1000} <= set(drawn)


def test_short_recordings_are_drawn_as_rarely_as_they_are_short(tmp_path):
    sf.write(tmp_path / "long.wav", tone(500, 9.0), RATE)
    sf.write(tmp_path / "short.wav", tone(1000, 0.5), RATE)
    noise, rng = RecordedNoise(tmp_path), np.random.default_rng(0)
    drawn = [round(peak_frequency(noise.draw(4000, rng, RATE)), -1) for _ in range(40)]
    assert drawn.count(1000) < 8


@pytest.mark.parametrize("length", [1, 3, 4001])
def test_noise_of_half_the_rate_is_as_long_as_asked(tmp_path, length):
    sf.write(tmp_path / "noise.wav", tone(500), RATE)
    noise = RecordedNoise(tmp_path).draw(length, np.random.default_rng(0), 2 * RATE)
    assert noise.shape == (length,)


def test_all_channels_of_a_recording_are_heard(tmp_path):
    low, high = tone(500), tone(1000)
    sf.write(tmp_path / "two.wav", np.stack([low, high], axis=-1), RATE)
    noise = RecordedNoise(tmp_path).draw(8000, np.random.default_rng(0), RATE)
    spectrum = np.abs(np.fft.rfft(noise))
    assert spectrum[500] == pytest.approx(spectrum[1000], rel=0.1) and spectrum[500] > 100


def test_noise_that_is_no_number_is_refused(tmp_path, refused):
    sf.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    with refused("nan.wav", "NaN"):
        RecordedNoise(tmp_path).draw(4000, np.random.default_rng(0), RATE)


def test_mixtures_of_a_list_take_recorded_noise_at_any_level(valid_speech, tmp_path, recordings):
    write_list(tmp_path / "list.csv", draw_list(valid_speech, 3, 2, 8000, seed=1), RATE)
    listed, recorded = MixtureList(valid_speech, tmp_path / "list.csv"), RecordedNoise(recordings)
    for mixture, sources in InSurroundings(listed, 1, snr=0.0, recorded=recorded):
        noise = mixture - sources.sum(0)
        assert round(peak_frequency(noise), -1) in (500, 2000)
        assert level(sources.sum(0)) == pytest.approx(level(noise), abs=0.01)
