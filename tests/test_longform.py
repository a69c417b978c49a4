"""Recordings in memory, of any length: blocks that join without a seam, levels, what is unheard."""

import numpy as np
import pytest
import torch
from conversations import RATE, conversation
from scipy.signal import butter, sosfiltfilt
from small import Shares, small
from sounds import level

from asteroid_tiny import TinySepformer
from asteroid_tiny.longform import blocks, separate_long, separate_stream
from asteroid_tiny.longform.levels import below_speech, make_consistent, shares
from asteroid_tiny.longform.upper_band import share_rest


@pytest.mark.parametrize("n_samples", [300, 4000, 32000])
def test_what_fits_in_one_block_is_separated_as_by_the_model(talk, n_samples):
    model = TinySepformer.from_preset("tiny-sepformer-xs", n_src=3).eval()
    mixture = talk[:n_samples]
    found = separate_long(model, mixture, block=4.0, overlap=2.0, mixture_consistency=False)
    with torch.inference_mode():
        heard = mixture - below_speech(mixture[None], RATE)[0]
        plain = model(torch.from_numpy(heard)[None])[0].numpy()
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
    early = found[RATE + RATE // 4]  # a quarter into the first overlap, by Hann windows
    assert early == pytest.approx(1 + np.sin(np.pi / 8) ** 2, abs=1e-3)


def test_outputs_change_places_within_20_ms_in_the_middle_of_a_block(monkeypatch):
    class OneAndZero(Shares):
        def forward(self, mixtures):
            return torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, mixtures.shape[1])

    change = np.array([[[0, 1], [1, 0]]])
    monkeypatch.setattr(blocks.SpeakerTracker, "reorder", lambda self: change)
    found = separate_long(OneAndZero(), np.zeros(RATE, np.float32), mixture_consistency=False)
    first, second = RATE // 2 - 80, RATE // 2 + 80
    for track, before in zip(found, (1, 0)):
        assert (track[:first] == before).all() and (track[second:] == 1 - before).all()
        assert np.abs(np.diff(track)).max() < 1.01 / 160


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.77, 1.0, 1.9])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_any_hop_gives_the_right_level_everywhere(talk, overlap, batch_size, monkeypatch):
    monkeypatch.setattr(blocks, "below_speech", lambda mixtures, _: np.zeros_like(mixtures))
    model = Shares(0.75, 0.25)
    mixture = talk[: 9 * RATE + 123]
    pieces = np.split(mixture, [1, 7, 9000, 9000, 60001])
    options = dict(batch_size=batch_size, mixture_consistency=False, memory=False)
    found = np.concatenate(list(separate_stream(model, pieces, 2.0, overlap, **options)), axis=1)
    assert found.shape == (2, len(mixture)) and found.dtype == np.float32
    np.testing.assert_allclose(found, [0.75 * mixture, 0.25 * mixture], atol=1e-6)
    assert max(shape[0] for shape in model.batches) == batch_size
    assert {shape[1] for shape in model.batches} == {2 * RATE}


def test_blocks_may_begin_a_few_samples_apart(talk):
    mixture = talk[: 2 * RATE + 120]
    parts = separate_stream(Shares(0.75, 0.25), [mixture], 2 + 50 / RATE, 2 + 40 / RATE)
    found = np.concatenate(list(parts), axis=1)
    np.testing.assert_allclose(found.sum(0), mixture, atol=1e-6)


@pytest.mark.parametrize("block, overlap", [(2.0, 2.0), (2.0, 3.0), (0.0, 0.0), (2.0, -1.0)])
def test_an_overlap_that_does_not_fit_is_refused(talk, refused, block, overlap):
    with refused(f"{overlap:g} s", f"longer than {max(overlap, 0):g} s"):
        separate_long(Shares(0.5, 0.5), talk, block=block, overlap=overlap)


def test_nothing_and_broken_samples_are_refused(talk, refused):
    with refused("no samples"):
        separate_long(Shares(0.5, 0.5), talk[:0])
    broken = talk.copy()
    broken[150000] = np.nan
    with refused("the recording holds samples that are NaN"):
        separate_long(Shares(0.5, 0.5), broken)
    with refused("the model gives"):
        separate_long(Shares(0.5, float("inf")), talk)


@pytest.mark.parametrize(
    "options", [dict(batch_size=0), dict(batch_size=1.5), dict(block=np.nan), dict(overlap=np.inf)]
)
def test_options_that_make_no_sense_are_refused(talk, refused, options):
    with refused("must be finite"):
        separate_long(Shares(0.5, 0.5), talk, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8])
def test_pieces_may_be_of_any_type(talk, dtype):
    piece = (100 + 50 * talk[: 3 * RATE]).astype(dtype)
    pieces = list(separate_stream(Shares(0.75, 0.25), [piece], 2.0, 1.0))
    assert {found.dtype for found in pieces} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.concatenate(pieces, axis=1).sum(0), piece, atol=1e-3)


def test_blocks_that_begin_amid_speech_keep_it(valid_speech):
    speech = np.concatenate([valid_speech.read(u) for u in list(valid_speech.utterances)[:5]])
    sos = butter(8, 100, "high", fs=RATE, output="sos")
    starts = np.random.default_rng(0).integers(0, len(speech) - 4000, 60)
    cuts = np.stack([sosfiltfilt(sos, speech)[start : start + 4000] for start in starts])
    ends = [level(rest[:80]) for rest in below_speech(cuts, RATE)]
    assert np.percentile(ends - np.array([level(samples) for samples in cuts]), 90) < -12


def test_offsets_and_rumble_change_nothing_that_is_heard(valid_speech):
    model = TinySepformer.from_preset("tiny-sepformer-xs").eval()
    names = [next(iter(names)) for names in valid_speech.by_speaker.values()][:2]
    length = min(len(valid_speech.read(name)) for name in names)
    mixture = sum(valid_speech.read(name)[:length] for name in names)
    seconds = np.arange(length) / RATE
    found = separate_long(model, mixture)
    for added in (3 * mixture.std(), 5 * mixture.std() * np.sin(2 * np.pi * 4 * seconds)):
        disturbed = (mixture + added).astype(np.float32)
        tracks = separate_long(model, disturbed)
        np.testing.assert_allclose(tracks.sum(0), disturbed, atol=1e-4)
        change = (tracks - added / 2 - found)[:, 800:-800]
        assert level(change) < level(found) - 30, "half of it in each"


def test_outputs_of_any_scale_are_brought_to_sum_to_the_mixture(valid_speech):
    speakers = list(valid_speech.by_speaker)[:2]
    sources = conversation(valid_speech, speakers, 16)
    assert sources.std(1).min() > 0.1 * sources.std(1).max()
    for scale in (5, -1):
        estimates = scale * (sources + 0.04 * sources[::-1])
        found = make_consistent(estimates, sources.sum(0), RATE)
        np.testing.assert_allclose(found.sum(0), sources.sum(0), atol=1e-6)
        assert ((found - sources) ** 2).sum() < 0.01 * (sources**2).sum()
    alone = np.stack([sources[0], 0.001 * sources[0]])  # and another file 60 dB below
    found = make_consistent(np.float32(0.9) * alone, sources[0] + 0.01 * sources[1], RATE)
    assert found[1].std() < 0.004 * found[0].std(), "of what is left it gets half in pauses alone"
    silence = np.zeros((2, 100), np.float32)
    np.testing.assert_array_equal(make_consistent(silence, silence[0], RATE), silence)
    tracks = separate_long(Shares(0.1, 0.2, 0.1), sources.sum(0), block=2.0, overlap=1.0)
    np.testing.assert_allclose(tracks.sum(0), sources.sum(0), atol=1e-6)


def test_a_recording_in_memory_has_one_channel(talk, refused):
    with refused("(2, 8000)", "(time,)"):
        separate_long(Shares(0.5, 0.5), np.stack([talk[:8000]] * 2))


def test_samples_of_absurd_levels_are_refused(talk, refused):
    loud = talk.copy()
    for sign in (1, -1):
        loud[1000] = sign * 1e25
        with refused("samples beyond 1e+06"):
            separate_long(Shares(0.5, 0.5), loud)
    for share in (1e20, np.nan):
        with refused("absurdly loud"):
            separate_long(Shares(share, 0.5), talk)


def test_memory_that_pieces_come_in_may_be_used_again(talk):
    buffer = np.zeros(2000, np.float32)

    def pieces():
        for start in range(0, 16000, 2000):
            buffer[:] = talk[start : start + 2000]
            yield buffer

    parts = separate_stream(Shares(0.3, 0.7), pieces(), block=1.0, overlap=0.5)
    found = np.concatenate(list(parts), axis=1)
    np.testing.assert_allclose(found.sum(0), talk[:16000], atol=1e-6)


def test_a_model_of_bfloat16_takes_recordings_in_memory(valid_speech):
    voice = valid_speech.read(valid_speech.by_speaker[next(iter(valid_speech.by_speaker))][0])
    voice = voice[: 2 * RATE]
    exact, rounded = small(), small().bfloat16()
    rounded.load_state_dict(exact.state_dict())
    found = separate_long(rounded, voice, block=1.0, overlap=0.5)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(0), voice, atol=1e-4)


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


@pytest.mark.parametrize("piece", [np.zeros((1, 9000)), np.zeros((9000, 2)), np.float32(0)])
def test_pieces_of_several_channels_are_refused(refused, piece):
    with refused("a piece has the shape", "it should be (time,)"):
        list(separate_stream(Shares(0.5, 0.5), [piece]))


def test_a_share_is_one_of_the_amplitude():
    noise = np.random.default_rng(0).normal(size=RATE)
    found = shares(np.outer(noise, [0.3, 0.1]), RATE)
    np.testing.assert_allclose(found, np.tile([0.75, 0.25], (RATE, 1)))


def test_what_estimates_leave_goes_to_who_speaks_at_the_time(valid_speech):
    voices = [valid_speech.read(names[0])[:16000] for names in valid_speech.by_speaker.values()]
    first, second, silence = *voices[:2], np.zeros(16000)
    sources = np.array([[first, silence], [silence, second]]).reshape(2, -1)
    noise = np.random.default_rng(0).normal(0, 0.01, 32000)
    rest = make_consistent(sources, sources.sum(0) + noise, RATE) - sources
    heard = np.array([rest[0, :15000], rest[1, 17000:]])
    others = np.array([rest[1, :15000], rest[0, 17000:]])
    assert level(heard) > level(noise) - 1 and level(others) < level(noise) - 25


def test_below_a_tenth_of_a_second_an_offset_is_all_that_is_taken_off():
    time = np.arange(480) / RATE  # as long as three periods of a low voice and a half
    voice = np.float32(0.1 * np.sin(2 * np.pi * 60 * time) + 0.3)[None]
    np.testing.assert_allclose(below_speech(voice, RATE), voice.mean(), atol=1e-6)


@pytest.mark.parametrize("n_samples", [1, 100, 800])
def test_a_recording_of_a_few_samples_comes_back(talk, n_samples):
    mixture = talk[8000 : 8000 + n_samples]
    found = separate_long(Shares(0.75, 0.25), mixture)
    np.testing.assert_allclose(found.sum(0), mixture, atol=1e-6)


def test_the_estimate_of_a_single_source_has_no_offset(talk):
    found = separate_long(Shares(1.0), talk[:8000] + np.float32(0.5))
    np.testing.assert_allclose(found[0], talk[:8000] - talk[:8000].mean(), atol=0.05)
    assert abs(found.mean()) < 1e-3
