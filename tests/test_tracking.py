"""Who is who in long recordings: speakers keep their places, by overlaps and by voices."""

import itertools

import numpy as np
import pytest
from conversations import RATE, Oracle, conversation, ours, peer, streamed, wrong_share

from asteroid_tiny.longform import separate_long, separate_stream
from asteroid_tiny.longform.blocks import cut
from asteroid_tiny.longform.tracking import OVERLAP_WEIGHT, Part, SpeakerTracker
from asteroid_tiny.longform.voices import FEATURES, SPREAD, Listener, each, pitch


def test_links_are_what_the_overlaps_gain_where_a_stretch_changes_places():
    tracker, same = SpeakerTracker(3, RATE), np.tile(np.arange(3), (6, 1))
    agreements = np.random.default_rng(0).random((5, 3, 3))
    begins, ends = tracker._links(agreements)

    def total(orders):
        pairs = zip(agreements, orders, orders[1:])
        return OVERLAP_WEIGHT * sum(x[before, after].sum() for x, before, after in pairs)

    for start, end in itertools.combinations(range(7), 2):
        for k, permutation in enumerate(tracker.permutations[1:]):
            orders = same.copy()
            orders[start:end] = permutation
            gain = total(orders) - total(same)
            assert begins[start, k] + ends[end, k] == pytest.approx(gain)


@pytest.fixture(scope="module")
def conversations(valid_speech):
    """A minute and a half of two, and of three speakers who are in no training set."""
    speakers = list(valid_speech.by_speaker)
    pairs = [speakers[:2], speakers[2:], speakers[::2]]
    groups = pairs + [[s for s in speakers if s != other] for other in speakers[::-1]]
    return [conversation(valid_speech, group, 90, seed) for seed, group in enumerate(groups)]


def test_voices_keep_speakers_in_one_file_and_a_whole_recording_better_than_a_stream(
    conversations,
):
    shares = np.array(
        [[wrong_share(s, x) for x in (peer(s, 4), ours(s, 4, False), streamed(s, 4), ours(s, 4))]
         for s in conversations]
    )  # fmt: skip
    for of_n_src in (shares[:3], shares[3:]):
        theirs, forgetful, at_once, whole = of_n_src.mean(0)
        assert forgetful > 0.1, "these conversations need no voices"
        assert at_once < 0.5 * theirs
        assert at_once < 0.75 * forgetful
        assert whole < 0.2 * theirs
    assert shares[:3, 2:].max() < 0.01
    assert whole < 0.5 * at_once


def test_of_a_stream_nothing_is_kept_and_the_orders_are_the_same():
    rng = np.random.default_rng(0)
    whole, live = SpeakerTracker(2, RATE), SpeakerTracker(2, RATE, live=True)
    for k in range(4):
        block = rng.normal(size=(2, 4 * RATE)).astype(np.float32)
        assert np.array_equal(whole.order(block, 2 * RATE * k), live.order(block, 2 * RATE * k))
    assert len(whole.orders) == 4 and len(whole.halves) == 8
    assert len(live.orders) == 1 and not live.halves


@pytest.mark.parametrize("times", [1, 5])
def test_an_offset_does_not_make_speakers_change_places(conversations, times):
    for sources in conversations[:3]:
        mixture = sources.sum(0)
        offset = np.float32(times * mixture.std())
        starts = [start for start, _ in cut([mixture], 4 * RATE, 2 * RATE)]
        still, moved = (
            separate_long(Oracle(sources, starts), mixture + x, block=4.0, overlap=2.0)
            for x in (0, offset)
        )
        np.testing.assert_allclose(moved - offset / 2, still, atol=0.01)


@pytest.mark.parametrize("n_src", [1, 2, 3])
def test_places_are_changed_where_the_voices_tell_and_the_overlaps_allow_it(n_src):
    rng = np.random.default_rng(0)
    tracker = SpeakerTracker(n_src, RATE)
    voices = 1.5 * rng.normal(size=(n_src, sum(FEATURES)))
    precisions = np.full((n_src, len(FEATURES)), 1.0)
    places = np.array([rng.permutation(n_src) for _ in range(200)])
    for place in places:  # the output of each speaker; nothing is said in the overlaps
        heard = np.zeros_like(voices)
        heard[place] = voices + 0.5 * rng.normal(size=voices.shape)
        tracker.halves.append(Part(precisions, each(precisions) * heard, np.zeros((n_src,) * 2)))
    tracker.orders = [np.arange(n_src)] * 100  # as if nothing had been known of the voices
    found = tracker.reorder().reshape(-1, n_src)
    # speakers may come in any order, but in one
    np.testing.assert_array_equal(found[:, found[0].argsort()], places[:, places[0].argsort()])


def test_outputs_that_change_places_in_the_middle_of_a_block_are_put_right(conversations):
    class Changing(Oracle):
        def _separate(self, n):
            found = super()._separate(n)
            if self.rng.random() < 0.2:
                found[:, n // 2 :] = found[:, n // 2 :].flip(0)
            return found

    for sources in conversations[:3]:
        starts = [start for start, _ in cut([sources[0]], 4 * RATE, 2 * RATE)]
        model = Changing(sources, starts)
        tracks = separate_long(model, sources.sum(0))
        assert wrong_share(sources, tracks) < 0.03
        np.testing.assert_allclose(tracks.sum(0), sources.sum(0), atol=1e-5)


def test_high_and_low_voices_are_told_apart_by_their_pitch(valid_speech):
    listener, found = Listener(RATE), {}
    for speaker, utterances in valid_speech.by_speaker.items():
        voice = np.concatenate([valid_speech.read(u) for u in utterances[:3]])[None, : 6 * RATE]
        precisions, voices = listener.voices(listener.hear(voice))
        found[speaker] = np.exp((voices / each(precisions))[0, -1] * SPREAD[-1])
    by_gender = {g: [found[s] for s in found if valid_speech.spk2gender[s] == g] for g in "mf"}
    assert 80 < min(by_gender["m"]) and max(by_gender["f"]) < 300
    assert max(by_gender["m"]) < min(by_gender["f"]), found


def test_where_speech_overlaps_no_memory_is_needed(conversations):
    for sources in conversations[:3]:
        assert wrong_share(sources, ours(sources, 12, memory=False)) < 0.01


def test_the_overlap_counts_where_it_is_more_than_half_a_block(conversations):
    sources = conversations[0][:, : 60 * RATE]
    starts = [start for start, _ in cut([sources[0]], 12 * RATE, 3 * RATE)]
    options = dict(block=12.0, overlap=9.0, memory=False)
    found = separate_long(Oracle(sources, starts), sources.sum(0), **options)
    assert wrong_share(sources, found) < 0.01


def test_a_stream_without_memory_takes_no_notice_of_voices(conversations):
    shares = []
    for sources in conversations[:3]:
        starts = [start for start, _ in cut([sources[0]], 4 * RATE, 2 * RATE)]
        for memory in (True, False):
            parts = separate_stream(Oracle(sources, starts), [sources.sum(0)], memory=memory)
            shares.append(wrong_share(sources, np.concatenate(list(parts), axis=1)))
    assert max(shares[::2]) < 0.02 and np.mean(shares[1::2]) > 0.1, shares


@pytest.mark.parametrize("level", [1e-3, 20.0])
def test_the_choice_does_not_depend_on_the_level(conversations, level):
    sources = conversations[0]
    starts = [start for start, _ in cut([sources[0]], 4 * RATE, 2 * RATE)]

    def separated(gain):
        oracle = Oracle(sources, starts)

        class Louder:
            sample_rate = RATE

            def __call__(self, mixtures):
                return gain * oracle(mixtures)

        options = dict(block=4.0, overlap=2.0, mixture_consistency=False)
        return separate_long(Louder(), gain * sources.sum(0), **options)

    np.testing.assert_allclose(separated(level) / level, separated(1.0), atol=1e-4)


def test_what_comes_later_changes_nothing_that_was_given_out(conversations):
    sources = conversations[0]
    starts = range(0, sources.shape[1], 2 * RATE)

    def parts(n):
        pieces = np.split(sources.sum(0)[:n], range(1000, n, 1000))
        return separate_stream(Oracle(sources, starts), pieces, block=4.0, overlap=2.0)

    short = np.concatenate(list(parts(40 * RATE)), axis=1)[:, : 36 * RATE]
    whole = np.concatenate(list(parts(60 * RATE)), axis=1)
    np.testing.assert_array_equal(short, whole[:, : short.shape[1]])


@pytest.fixture(scope="module")
def voice(valid_speech):
    """Six seconds of one speaker, as one output."""
    utterances = next(iter(valid_speech.by_speaker.values()))
    joined = np.concatenate([valid_speech.read(u) for u in utterances[:5]])
    return joined[None, : 6 * RATE]


def test_a_voice_is_the_same_at_any_level_and_surer_the_longer_it_is_heard(voice):
    (sure, found), (_, soft) = (
        listener.voices(listener.hear(gain * voice))
        for gain, listener in ((1, Listener(RATE)), (0.1, Listener(RATE)))
    )
    np.testing.assert_allclose(soft, found, atol=0.01)
    listener = Listener(RATE)
    heard = listener.hear(voice)
    frames = np.flatnonzero(heard.alone[0])
    short, shorter = (listener.voices(heard, slice(frames[0], frames[n]))[0] for n in (60, 15))
    assert (sure > 1.5 * short).all() and (short > 0).all()
    assert not shorter.any(), "a quarter of a second says nothing"


def test_a_voice_is_heard_where_one_output_is_the_loudest_by_far(voice):
    for gain, share in ((0.3, 1), (0.7, 0)):
        heard = Listener(RATE).hear(np.concatenate([voice, gain * voice]))
        assert not heard.alone[1].any() and heard.speech.mean() > 0.3
        assert heard.alone[0].sum() == share * heard.speech.sum()


def test_noise_is_no_speech_beside_digital_silence_nor_in_a_block_of_its_own(voice):
    noise = 0.003 * voice.std() * np.random.default_rng(0).normal(size=(1, 2 * RATE))
    listener = Listener(RATE)
    speech = listener.hear(np.concatenate([0 * noise, noise, voice], axis=1)).speech
    assert not speech[: len(speech) * 39 // 100].any() and speech[len(speech) * 4 // 10 :].any()
    assert not listener.hear(noise).speech.any()


@pytest.mark.parametrize("frequency", [75, 120, 210, 330])
def test_pitch_is_that_of_low_and_of_high_voices_also_in_noise(frequency):
    time = np.arange(512) / RATE
    harmonics = np.arange(1, 3000 // frequency)
    hum = (np.cos(2 * np.pi * frequency * np.outer(time, harmonics)) / harmonics).sum(1)
    noise = np.random.default_rng(0).normal(0, 0.6 * hum.std(), len(hum))
    for frame in (hum, hum + noise):
        assert pitch(frame[None], RATE)[0] == pytest.approx(frequency, rel=0.03)


def _halves(tracker, agreements):
    """Halves of blocks of which no voice is heard, but the overlaps."""
    change, rounds = tracker._change, []

    def counted(*args):
        rounds.append(args)
        assert len(rounds) < 9, "it would never end"
        return change(*args)

    tracker._change = counted
    n_src = len(agreements[0])
    nothing = np.zeros((n_src, len(FEATURES))), np.zeros((n_src, sum(FEATURES)))
    tracker.halves = [Part(*nothing, agreement) for agreement in agreements]
    tracker.orders = [np.arange(n_src)] * (len(agreements) // 2)
    return tracker.reorder().reshape(-1, n_src)


def test_three_speakers_who_change_places_in_a_ring_are_put_back_by_the_overlaps():
    same, ring = np.eye(3), np.eye(3)[[1, 2, 0]]
    agreements = [same] * 6 + [ring] + [same] * 5 + [ring.T] + [same] * 5
    found = _halves(SpeakerTracker(3, RATE), agreements)
    for before, after, agreement in zip(found, found[1:], agreements[1:]):
        np.testing.assert_array_equal(agreement[before][:, after], same)


def test_of_two_halves_that_disagree_one_changes_places_and_not_both_at_once():
    nothing = np.zeros((2, 2))
    found = _halves(SpeakerTracker(2, RATE), [nothing, nothing, np.eye(2)[::-1], nothing])
    np.testing.assert_array_equal(found[1], found[2, ::-1])


def test_the_start_of_a_long_recording_is_put_right():
    agreements = [np.eye(2)] * 400
    agreements[3] = np.eye(2)[::-1]
    found = _halves(SpeakerTracker(2, RATE), agreements)
    assert (found[:3] == found[0]).all() and (found[3:] == found[0, ::-1]).all()
