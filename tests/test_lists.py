"""Lists as corpora bring them: mixtures with noise, of any length, at another rate, to train on."""

import numpy as np
import pytest
import soundfile as sf
import torch
from sounds import NOISE, RATE, level, peak_frequency, tone
from torch.utils.data import DataLoader

from asteroid_tiny.data import (
    MixtureList,
    NoiseDir,
    RepeatedMixtures,
    SpeechDir,
    draw_list,
    read_list,
    write_list,
)
from asteroid_tiny.data.kaldi import write_dir
from asteroid_tiny.data.mixing import SILENT, Mixture, Source


@pytest.fixture
def noise(tmp_path):
    """A data dir of noise: two channels, 1000 Hz for a second in the first of them."""
    hum = tone(1000, 1)
    sf.write(tmp_path / "hum.wav", np.stack([hum, NOISE[:RATE]], 1), RATE)
    tables = {"wav.scp": {"hum": str(tmp_path / "hum.wav")}, "utt2spk": {"hum": "noise"}}
    write_dir(tmp_path / "noise", tables, NoiseDir)
    return NoiseDir(tmp_path / "noise")


@pytest.fixture
def listed(make_dir, clips, noise, tmp_path):
    """A list of six mixtures of 1 to 2 s with noise."""
    speech = SpeechDir(make_dir(clips))
    names = list(clips)
    mixtures = []
    for i in range(6):
        length = 8000 + 1600 * i
        sources = [Source(names[k], 0, length, 0, -20.0 - k) for k in (i % 2, 2)]
        mixtures.append(
            Mixture(f"m{i}", length, tuple(sources), Source("hum", 0, length, 0, -23.25))
        )
    write_list(tmp_path / "list.csv", mixtures, RATE)
    found = MixtureList(speech, tmp_path / "list.csv", noise)
    assert found.mixtures == mixtures
    return found


def test_noise_is_in_the_mixture_and_in_no_source(listed):
    for mixture, sources in listed:
        rest = (mixture - sources.sum(0)).numpy()
        assert peak_frequency(rest) == pytest.approx(1000, abs=1)
        wanted = tone(1000, 1)[:4000] / 32768 * 10 ** (-23.25 / 20)
        np.testing.assert_allclose(rest[:4000], wanted, atol=1e-5)


def test_noise_goes_on_behind_its_end_without_a_step(noise):
    longer = noise.read("hum", 0, 5 * RATE)
    assert len(longer) == 5 * RATE
    steps = np.abs(np.diff(longer))
    assert steps.max() <= 1.5 * np.abs(np.diff(longer[: RATE // 4])).max()
    assert np.abs(longer[-RATE // 8 :]).max() > 0.05
    assert np.array_equal(longer[100:300], noise.read("hum", 100, 200))


def test_a_list_with_noise_needs_its_folder(listed, tmp_path, refused, make_dir):
    with refused("line 2", "does not have noise 'hum'"):
        read_list(tmp_path / "list.csv", listed.speech)
    other = make_dir({"rain": NOISE}, name="other")
    with refused(str(other), "does not have noise 'hum'"):
        read_list(tmp_path / "list.csv", listed.speech, NoiseDir(other))


def test_speech_has_one_channel(tmp_path, refused):
    sf.write(tmp_path / "two.wav", np.stack([NOISE, NOISE], 1), RATE)
    tables = {"wav.scp": {"two": str(tmp_path / "two.wav")}, "utt2spk": {"two": "anna"}}
    with refused("two.wav has 2 channels"):
        write_dir(tmp_path / "speech", tables)
    assert not (tmp_path / "speech").exists()


def which(item):
    """The number of a mixture of `listed`, by where it ends in a longer item."""
    return round((np.flatnonzero(item[0])[-1] + 1 - 8000) / 1600)


def test_a_pass_takes_each_mixture_once_and_each_pass_in_another_order(listed):
    repeated = RepeatedMixtures(listed, 20000, seed=0)
    drawn = [which(repeated[i]) for i in range(18)]
    passes = {tuple(drawn[i : i + 6]) for i in (0, 6, 12)}
    assert {tuple(sorted(one)) for one in passes} == {(0, 1, 2, 3, 4, 5)}
    assert len(passes) == 3


def test_an_item_is_the_same_in_any_order_and_process(listed):
    def repeated():
        return RepeatedMixtures(listed, 4000, seed=3, speeds=(95, 100, 105), size=8)

    wanted = [repeated()[i] for i in range(8)]
    assert all(map(torch.equal, repeated()[5], wanted[5]))
    loader = DataLoader(repeated(), batch_size=2, num_workers=2)
    sources = torch.cat([sources for _, sources in loader])
    assert torch.equal(sources, torch.stack([sources for _, sources in wanted]))
    assert not torch.equal(RepeatedMixtures(listed, 4000, seed=4)[0][0], wanted[0][0])
    orders = {tuple(which(RepeatedMixtures(listed, 20000, s)[i]) for i in range(6)) for s in (0, 1)}
    assert len(orders) == 2


def test_lists_that_could_not_be_read_again_are_not_written(valid_speech, tmp_path, refused):
    two, three = (draw_list(valid_speech, 2, n_src, 8000, 0) for n_src in (2, 3))
    noisy = two[0]._replace(noise=two[0].sources[0])
    for mixtures in (two + three, [noisy, two[1]], []):
        with refused("all of as many sources"):
            write_list(tmp_path / "list.csv", mixtures, RATE)
    for ratio in (-0.5, 1.5, float("nan")):
        with refused("overlap_ratio must be from 0 to 1"):
            draw_list(valid_speech, 2, 2, 8000, 0, overlap_ratio=ratio)
    assert not list(tmp_path.iterdir())


def test_the_order_of_a_pass_is_drawn_by_a_stream_of_its_own(listed, monkeypatch):
    make, states = np.random.default_rng, []

    def noted(seed):
        rng = make(seed)
        states.append(rng.bit_generator.state["state"]["state"])
        return rng

    monkeypatch.setattr("asteroid_tiny.data.datasets.np.random.default_rng", noted)
    RepeatedMixtures(listed, 4000, seed=3)[0]
    assert len(set(states)) == len(states) == 2


def test_speeds_are_drawn_for_each_source_of_a_list(listed):
    hums = RepeatedMixtures(listed, 8000, seed=0, speeds=(50, 100))
    plain = RepeatedMixtures(listed, 8000, seed=0)
    n_changed = [sum(map(torch.equal, hums[i][1], plain[i][1])) for i in range(24)]
    assert set(n_changed) == {0, 1, 2}


def test_in_a_share_of_the_mixtures_some_sources_are_silent(listed):
    plain = RepeatedMixtures(listed, 8000, seed=0)
    fewer = RepeatedMixtures(listed, 8000, seed=0, silent_sources=0.5)
    counts, silent = [], set()
    for i in range(60):
        mixture, sources = fewer[i]
        heard = sources.any(-1)
        silent |= set(torch.nonzero(~heard).flatten().tolist())
        counts.append(int(heard.sum()))
        assert torch.equal(sources[heard], plain[i][1][heard])
        before, noise = plain[i][0], plain[i][0] - plain[i][1].sum(0)
        torch.testing.assert_close(mixture - sources.sum(0), noise, rtol=0, atol=1e-6)
        assert heard.all() == torch.equal(mixture, before)
    assert set(counts) == {1, 2} and 18 <= counts.count(1) <= 42
    assert silent == {0, 1}, "either of them"


def test_a_share_of_the_mixtures_is_heard_in_rooms_and_the_noise_stays_as_it_was(listed):
    plain = RepeatedMixtures(listed, 8000, seed=0)
    rooms = RepeatedMixtures(listed, 8000, seed=0, reverb=0.5)
    changed = 0
    for i in range(60):
        noises = [mixture - sources.sum(0) for mixture, sources in (plain[i], rooms[i])]
        torch.testing.assert_close(*noises, rtol=0, atol=1e-6)
        changed += not torch.equal(plain[i][1], rooms[i][1])
    assert 18 <= changed <= 42


def test_to_a_share_of_the_mixtures_more_noise_is_added(listed):
    plain = RepeatedMixtures(listed, 8000, seed=0)
    noisy = RepeatedMixtures(listed, 8000, seed=0, noise=0.5)
    assert all(torch.equal(plain[i][1], noisy[i][1]) for i in range(10))
    assert 18 <= sum(not torch.equal(plain[i][0], noisy[i][0]) for i in range(60)) <= 42


def test_noise_that_is_added_has_its_level_below_the_speech_alone(listed, monkeypatch):
    monkeypatch.setattr("asteroid_tiny.data.datasets.SNR", (5.0, 5.0))
    plain = RepeatedMixtures(listed, 8000, seed=0)
    noisy = RepeatedMixtures(listed, 8000, seed=0, noise=1.0)
    for i in range(6):
        added = noisy[i][0] - plain[i][0]
        assert level(plain[i][1].sum(0)) - level(added) == pytest.approx(5, abs=0.01)


def test_short_mixtures_are_followed_by_silence(listed):
    mixture, sources = RepeatedMixtures(listed, 40000, seed=0)[0]
    assert mixture.shape == (40000,) and sources.shape == (2, 40000)
    assert not mixture[16000:].any() and sources[:, :8000].any()


def test_stretches_are_taken_where_both_speak(make_dir, clips, tmp_path):
    name, other = list(clips)[:2]
    speech = SpeechDir(make_dir(clips))
    sources = (Source(name, 0, 32000, 0, 0.0), Source(other, 0, 3000, 16000, 0.0))
    write_list(tmp_path / "list.csv", [Mixture("m", 32000, sources)], RATE)
    repeated = RepeatedMixtures(MixtureList(speech, tmp_path / "list.csv"), 8000, seed=0)
    heard = [bool((repeated[i][1].square().mean(1).sqrt() > SILENT).all()) for i in range(40)]
    assert sum(heard) >= 38  # by chance one in two or three


def test_broken_recordings_of_a_list_are_passed_over(listed, monkeypatch, caplog):
    monkeypatch.setattr("asteroid_tiny.data.datasets.MOST_BROKEN", 0.3)
    broken = listed.mixtures[0].sources[0].utterance
    with open(listed.speech.wavs[broken], "wb") as file:
        file.write(b"nothing")
    repeated = RepeatedMixtures(listed, 20000, seed=0)
    assert {which(repeated[i]) for i in range(6)} == {1, 3, 5}
    assert caplog.text.count("training goes on without it") == 1
