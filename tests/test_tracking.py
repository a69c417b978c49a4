"""Who is who in long recordings: speakers keep their places, by overlaps and by voices."""

import numpy as np
import pytest
from conversations import RATE, Oracle, conversation, ours, peer, streamed, wrong_share

from asteroid_tiny.longform import separate_long, separate_stream
from asteroid_tiny.longform.blocks import cut
from asteroid_tiny.longform.tracking import Part, SpeakerTracker
from asteroid_tiny.longform.voices import FEATURES, SPREAD, Listener, each


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
