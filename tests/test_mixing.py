"""Mixtures: levels, lists, speeds, overlaps, and who is in them."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from sounds import NOISE, RATE, RNG, level, peak_frequency, tone

from asteroid_tiny.data import (
    MixtureList,
    SpeechDir,
    draw_list,
    read_list,
    write_list,
)
from asteroid_tiny.data.mixing import (
    LEVEL_DB,
    SILENT,
    draw_mixture,
    draw_turns,
    render,
    render_turns,
    same_colour,
)


@pytest.fixture
def mixture_list(valid_speech, tmp_path):
    """Draws a list, writes it and opens it: a function of the arguments of `draw_list`."""

    def open_list(*args, speech=valid_speech, **kwargs):
        path = tmp_path / "list.csv"
        write_list(path, draw_list(speech, *args, **kwargs), speech.sample_rate)
        return MixtureList(speech, path)

    return open_list


def test_a_mixture_is_the_sum_of_its_sources_exactly(mixture_list):
    for mixture, sources in mixture_list(12, 2, 16000, seed=1):
        assert mixture.dtype == sources.dtype == torch.float32
        assert mixture.shape == (16000,) and sources.shape == (2, 16000)
        assert torch.equal(mixture, sources[0] + sources[1])


def test_sources_are_the_stretches_of_the_list_at_its_gains(mixture_list, valid_speech):
    mixtures = mixture_list(6, 2, 16000, seed=1)
    for (_, sources), mixture in zip(mixtures, mixtures.mixtures):
        for samples, source in zip(sources, mixture.sources):
            whole = valid_speech.read(source.utterance)
            wanted = whole[source.start : source.start + source.length] * 10 ** (source.gain / 20)
            assert len(wanted) == 16000
            np.testing.assert_allclose(samples, wanted, rtol=1e-6)


@pytest.mark.parametrize("n_src", [2, 3])
@pytest.mark.parametrize("max_gap", [5.0, 0.0])
def test_levels_of_the_sources(mixture_list, n_src, max_gap):
    items = mixture_list(40, n_src, 16000, seed=2, max_gap=max_gap)
    levels = np.array([[level(source) for source in sources] for _, sources in items])
    assert levels.max(1) == pytest.approx(LEVEL_DB, abs=0.01)
    gaps = np.ptp(levels, axis=1)
    assert 0 <= gaps.min() and gaps.max() <= max_gap + 0.01
    if max_gap:
        assert gaps.min() < 0.3 * max_gap and gaps.max() > 0.8 * max_gap, "drawn from all of it"
        assert set(levels.argmax(1)) == set(range(n_src)), "each source is the loudest at times"


@pytest.mark.parametrize("n_src", [2, 3])
def test_mixtures_of_speech_do_not_clip(mixture_list, n_src):
    peaks = [mixture.abs().max() for mixture, _ in mixture_list(60, n_src, 32000, seed=3)]
    assert 0.1 < max(peaks) < 1


@pytest.mark.parametrize("n_src, n_groups", [(2, 6), (3, 4)])
def test_all_combinations_of_speakers_are_equally_frequent(valid_speech, n_src, n_groups):
    def groups(n_mixtures):
        mixtures = draw_list(valid_speech, n_mixtures, n_src, 8000, seed=4)
        return Counter(
            frozenset(valid_speech.utterances[s.utterance].speaker for s in mixture.sources)
            for mixture in mixtures
        )

    many = groups(5 * n_groups)
    assert len(many) == n_groups and set(many.values()) == {5}
    assert {len(group) for group in many} == {n_src}, "different speakers"
    assert len(groups(n_groups - 1)) == n_groups - 1, "none twice in a list too short for all"


def test_a_list_depends_on_its_seed_alone(valid_speech):
    args = (valid_speech, 8, 2, 16000)
    first = draw_list(*args, seed=5)
    np.random.default_rng().random(3), np.random.random(3)
    assert draw_list(*args, seed=5) == first
    assert draw_list(*args, seed=6) != first
    assert len({mixture.mixture_id for mixture in first}) == 8
    assert len({mixture.sources for mixture in first}) == 8


@pytest.mark.parametrize("n_src", [2, 3])
def test_lists_come_back_from_their_file(valid_speech, tmp_path, n_src):
    mixtures = draw_list(valid_speech, 9, n_src, 16000, seed=7)
    rng = np.random.default_rng(7)
    speakers = list(valid_speech.by_speaker)[:n_src]
    mixtures.append(
        draw_mixture(valid_speech, rng, speakers, 16000, speeds=(95,), mixture_id='fast, "ö"')
    )
    path = tmp_path / "new" / "list.csv"
    write_list(path, mixtures, RATE)
    assert read_list(path, valid_speech) == mixtures
    assert len(path.read_text(encoding="utf-8").splitlines()) == 11


def edit(**values):
    """A change of a list: other values in its second mixture (line 3)."""

    def change(text):
        lines = text.splitlines()
        row = dict(zip(lines[0].split(","), lines[2].split(",")))
        assert values.keys() <= row.keys()
        lines[2] = ",".join({**row, **values}.values())
        return "\n".join(lines) + "\n"

    return change


REFUSED_LISTS = {
    "empty": (lambda text: "", "holds no mixture"),
    "header alone": (lambda text: text.splitlines()[0], "holds no mixture"),
    "garbage": (lambda text: RNG.bytes(3000), "cannot be read"),
    "another table": (lambda text: "a,b\n1,2\n", "line 2, is broken"),
    "no sources": (lambda text: "mixture_id,sample_rate,length\nm,8000,9\n", "line 2, is broken"),
    "column lost": (lambda text: text.replace("_gain", "_volume"), "line 2, is broken"),
    "row cut off": (lambda text: text[:-20], "line 4, is broken"),
    "row too long": (lambda text: text.rstrip() + ",1,2\n", "line 4, is broken"),
    "length a word": (edit(length="long"), "line 3, is broken"),
    "length 0": (edit(length="0"), "line 3, is broken"),
    "start negative": (edit(source_1_start="-1"), "line 3, is broken"),
    "nothing taken": (edit(source_2_length="0"), "line 3, is broken"),
    "offset negative": (edit(source_2_offset="-5"), "line 3, is broken"),
    "offset at the end": (edit(source_2_offset="16000"), "line 3, is broken"),
    "gain no number": (edit(source_1_gain="nan"), "line 3, is broken"),
    "gain infinite": (edit(source_1_gain="inf"), "line 3, is broken"),
    "speed 0": (edit(source_1_speed="0"), "line 3, is broken"),
    "other rate": (edit(sample_rate="16000"), "is for 16000 Hz"),
    "unknown utterance": (edit(source_1_utterance="nobody-1"), "utterance 'nobody-1'"),
    "beyond the end": (edit(source_1_start="100000000"), "does not have that much of utterance"),
}


@pytest.mark.parametrize("case", REFUSED_LISTS)
def test_refused_lists(valid_speech, tmp_path, refused, case):
    change, words = REFUSED_LISTS[case]
    path = tmp_path / "list.csv"
    write_list(path, draw_list(valid_speech, 3, 2, 16000, seed=8), RATE)
    content = change(path.read_text())
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with refused(path, words):
        read_list(path, valid_speech)


@pytest.mark.parametrize("more", [0, 1])
def test_a_source_may_end_with_its_utterance_and_not_behind_it(
    valid_speech, tmp_path, refused, more
):
    (mixture,) = draw_list(valid_speech, 1, 2, 4000, seed=8)
    first, second = mixture.sources
    start = valid_speech.utterances[first.utterance].length - first.length + more
    moved = mixture._replace(sources=(first._replace(start=start), second))
    write_list(tmp_path / "list.csv", [moved], RATE)
    if not more:
        assert read_list(tmp_path / "list.csv", valid_speech) == [moved]
        return
    with refused("does not have that much of utterance", first.utterance):
        read_list(tmp_path / "list.csv", valid_speech)


def test_a_missing_list_is_refused(valid_speech, tmp_path, refused):
    with refused(tmp_path / "no.csv", "No such file"):
        MixtureList(valid_speech, tmp_path / "no.csv")


def test_short_utterances_lie_at_random_places(make_dir, clips):
    """The whole utterance is heard, silence is around it, and its level is that of the speech."""
    speech = SpeechDir(make_dir({key: samples[:RATE] for key, samples in clips.items()}))
    mixtures = draw_list(speech, 30, 2, 3 * RATE, seed=9, max_gap=0)
    offsets = []
    for mixture in mixtures:
        _, sources = render(speech, mixture)
        for samples, source in zip(sources, mixture.sources):
            assert (source.start, source.length) == (0, RATE)
            inside = samples[source.offset : source.offset + RATE]
            assert level(inside) == pytest.approx(LEVEL_DB, abs=0.01)
            assert samples.count_nonzero() == inside.count_nonzero()
            offsets.append(source.offset)
    assert min(offsets) < 0.2 * RATE and 1.8 * RATE < max(offsets) <= 2 * RATE
    assert len(set(offsets)) > 50


def test_a_speaker_with_long_utterances_never_gives_a_short_one(make_dir):
    tables = {
        "segments": "a-1 a 0 0.5\na-2 a 0.5 2.5\na-3 a 2.5 4\nb-1 b 0 4\n",
        "utt2spk": "a-1 a\na-2 a\na-3 a\nb-1 b\n",
    }
    speech = SpeechDir(make_dir({"a": NOISE, "b": NOISE}, tables=tables))
    for seconds in (1.6, 2):  # of which a-2 has no more
        mixtures = draw_list(speech, 50, 2, round(seconds * RATE), seed=10)
        assert {mixture.sources[0].utterance for mixture in mixtures} == {"a-2"}
    mixtures = draw_list(speech, 300, 2, RATE, seed=10)
    counts = Counter(mixture.sources[0].utterance for mixture in mixtures)
    # places to begin: 1 s in a-2, half a second in a-3
    assert counts.keys() == {"a-2", "a-3"} and 170 < counts["a-2"] < 230


@pytest.mark.parametrize("faint", [0, 1])
def test_silent_stretches_are_not_drawn(make_dir, clips, faint):
    hiss = np.tile(np.array([faint, -faint], np.int16), 16000)
    half_silent = {key: np.append(s, hiss) for key, s in clips.items()}
    speech = SpeechDir(make_dir(half_silent))
    for mixture in draw_list(speech, 40, 2, RATE, seed=11):
        for source in mixture.sources:
            samples = speech.read(source.utterance, source.start, source.length)
            assert np.sqrt(np.mean(samples**2)) > SILENT


def test_stretches_of_a_mere_offset_are_not_drawn(make_dir, clips):
    offset = {key: np.append(s // 2, np.zeros_like(s)) + 300 for key, s in clips.items()}
    speech = SpeechDir(make_dir(offset))
    for mixture in draw_list(speech, 40, 2, RATE, seed=11):
        for source in mixture.sources:
            assert speech.read(source.utterance, source.start, source.length).std() > SILENT


def test_a_silent_recording_gives_silence(make_dir):
    speech = SpeechDir(make_dir({"anna": NOISE, "mute": np.zeros_like(NOISE)}))
    mixture, sources = render(speech, draw_list(speech, 1, 2, RATE, seed=12)[0])
    assert not sources[1].any() and torch.equal(mixture, sources[0]) and mixture.isfinite().all()


@pytest.mark.parametrize("speed", [95, 100, 103, 105])
def test_speed_shifts_the_pitch_and_shortens(make_dir, speed):
    recordings = {"long": tone(1000, 8), "short": tone(500, 1)}
    speech = SpeechDir(make_dir(recordings))
    rng = np.random.default_rng(13)
    length = 4 * RATE
    mixture = draw_mixture(speech, rng, ["long", "short"], length, speeds=(speed,))
    _, (long, short) = render(speech, mixture)
    assert peak_frequency(long) == pytest.approx(1000 * speed / 100, abs=0.5)
    assert mixture.sources[0].length == pytest.approx(length * speed / 100, abs=1)
    begin = mixture.sources[1].offset
    n_heard = round(RATE * 100 / speed)
    heard = short[begin : begin + n_heard]
    assert peak_frequency(heard) == pytest.approx(500 * speed / 100, abs=1)
    assert level(heard[-200:]) > level(heard) - 3, "to its end"
    assert not short[:begin].any() and not short[begin + n_heard + 1 :].any()


def test_speeds_are_drawn_for_each_source(make_dir):
    speech = SpeechDir(make_dir({"a": tone(1000), "b": tone(2000)}))
    rng = np.random.default_rng(14)
    drawn = [draw_mixture(speech, rng, "ab", RATE, speeds=(90, 110)) for _ in range(40)]
    speeds = Counter(tuple(source.speed for source in mixture.sources) for mixture in drawn)
    assert speeds.keys() == set(itertools.product((90, 110), repeat=2))
    assert min(speeds.values()) >= 3


@pytest.mark.parametrize("speed", [90, 95, 99, 101, 105, 110])
@pytest.mark.parametrize("length", [8000, 7993, 4001])
def test_an_utterance_just_long_enough_fills_the_mixture(make_dir, speed, length):
    enough = -(-length * speed // 100)
    loud = np.full(enough, 10000, dtype=np.int16)
    speech = SpeechDir(make_dir({"a": loud, "b": loud}))
    rng = np.random.default_rng(15)
    _, sources = render(speech, draw_mixture(speech, rng, "ab", length, speeds=(speed,)))
    assert sources.shape == (2, length)
    assert sources.all(), "silence at the end"


def test_describe_says_who_speaks(mixture_list, pack):
    mixtures = mixture_list(6, 2, 8000, seed=16)
    genders, productions = (
        dict(line.split() for line in (pack / "valid" / table).read_text().splitlines())
        for table in ("spk2gender", "spk2production")
    )
    for i, mixture in enumerate(mixtures.mixtures):
        speakers = tuple(source.utterance.rsplit("-", 1)[0] for source in mixture.sources)
        assert mixtures.describe(i) == {
            "mixture_id": f"mix{i:05d}",
            "speakers": speakers,
            "genders": tuple(genders[s] for s in speakers),
            "productions": tuple(productions[s] for s in speakers),
        }


def test_describe_without_tables(make_dir, mixture_list):
    speech = SpeechDir(make_dir({"anna": NOISE, "ben": NOISE}))
    assert mixture_list(1, 2, RATE, seed=17, speech=speech).describe(0) == {
        "mixture_id": "mix00000",
        "speakers": ("anna", "ben"),
        "genders": ("unknown", "unknown"),
        "productions": (None, None),
    }


def spectrum(samples):
    """Level in dB of 16 bands, without the overall level."""
    power = np.abs(np.fft.rfft(np.asarray(samples, dtype=np.float64))) ** 2
    bands = 10 * np.log10(np.array([band.mean() for band in np.array_split(power[1:], 16)]))
    return bands - bands.mean()


def test_same_colour_leaves_the_voices_but_not_the_microphones(valid_speech):
    mixture = draw_list(valid_speech, 6, 2, 32000, seed=5)[0]
    _, sources = render(valid_speech, mixture)
    even = same_colour(sources, np.random.default_rng(0), 6.0)
    before = np.abs(spectrum(sources[0]) - spectrum(sources[1])).mean()
    after = np.abs(spectrum(even[0]) - spectrum(even[1])).mean()
    assert after < 0.5 * before
    for old, new in zip(sources, even):
        assert level(new.numpy()) == pytest.approx(level(old.numpy()), abs=0.01)
        assert np.corrcoef(np.abs(old), np.abs(new))[0, 1] > 0.3  # loud where it was loud
    again = same_colour(sources, np.random.default_rng(0), 6.0)
    other = same_colour(sources, np.random.default_rng(1), 6.0)
    assert torch.equal(even, again) and not torch.allclose(even, other)


def test_same_colour_takes_silence_and_short_signals():
    assert not same_colour(torch.zeros(2, 300), np.random.default_rng(0), 6.0).any()
    assert same_colour(torch.randn(3, 256), np.random.default_rng(0), 6.0).isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("n_src", [2, 3])
def test_speakers_overlap_for_the_share_that_is_asked_for(valid_speech, n_src, ratio):
    length = 12000
    for mixture in draw_list(valid_speech, 4, n_src, length, seed=8, overlap_ratio=ratio):
        starts = [source.offset for source in mixture.sources]
        ends = [source.offset + source.length for source in mixture.sources]
        assert starts[0] == 0 and length - ends[-1] < n_src, "from the first sample to the last"
        shared = [end - start for end, start in zip(ends[:-1], starts[1:])]
        if n_src == 2:
            assert shared[0] == pytest.approx(ratio * length, abs=2)
        assert min(shared) == pytest.approx(max(shared), abs=2)
        if ratio == 0:
            assert max(shared) <= 1


def test_what_would_clip_is_made_softer_as_a_whole(valid_speech):
    (drawn,) = draw_list(valid_speech, 1, 2, 16000, seed=9)
    _, soft = render(valid_speech, drawn)
    loud = [source._replace(gain=source.gain + 40) for source in drawn.sources]
    mixture, sources = render(valid_speech, drawn._replace(sources=tuple(loud)))
    assert mixture.abs().max() == pytest.approx(1, abs=1e-6)
    assert torch.equal(mixture, sources.sum(0))
    torch.testing.assert_close(sources / sources.std(), soft / soft.std())


def test_two_mixtures_of_one_id_are_refused(valid_speech, tmp_path, refused):
    first, second = draw_list(valid_speech, 2, 2, 8000, seed=1)
    write_list(tmp_path / "list.csv", [first, second._replace(mixture_id=first.mixture_id)], RATE)
    with refused("list.csv", first.mixture_id, "2 times"):
        read_list(tmp_path / "list.csv", valid_speech)


def test_three_of_a_thousand_speakers_are_drawn_at_once(make_dir):
    folder = make_dir({f"s{i:04d}": NOISE[:800] for i in range(1000)})
    mixtures = draw_list(SpeechDir(folder), 20, 3, 400, seed=1)
    assert len({tuple(s.utterance for s in mixture.sources) for mixture in mixtures}) == 20


@pytest.mark.parametrize("n_src", [1, 2, 3])
def test_in_conversations_speakers_take_turns_and_come_back(valid_speech, n_src):
    rng, orders, rests = np.random.default_rng(0), [], []
    for _ in range(20):
        speakers = list(valid_speech.by_speaker)[:n_src]
        drawn = draw_turns(valid_speech, rng, speakers, 20 * RATE, max_gap=0.0)
        spans = []
        for who, own in enumerate(drawn):
            assert own.length == 20 * RATE
            turns = [(t.offset, t.offset + t.length, who) for t in own.sources]
            assert all(end <= start for (_, end, _), (start, _, _) in zip(turns, turns[1:]))
            names = {valid_speech.utterances[t.utterance].speaker for t in own.sources}
            assert names <= {speakers[who]}
            spans += turns
        spans.sort()
        orders.append("".join(str(who) for *_, who in spans))
        rests += [start - end for (_, end, _), (start, _, _) in zip(spans, spans[1:])]
        mixture, sources = render_turns(valid_speech, drawn)
        assert torch.equal(mixture, sources.sum(0)) and sources.shape == (n_src, 20 * RATE)
        for samples, own in zip(sources, drawn):
            for turn in own.sources:
                place = samples[turn.offset : turn.offset + turn.length]
                assert level(place) == pytest.approx(LEVEL_DB, abs=0.5)
            outside = samples.clone()
            for turn in own.sources:
                outside[turn.offset : turn.offset + turn.length] = 0
            assert not outside.any()
    assert sum(len(set(order)) == n_src for order in orders) >= 18
    assert max(rests) < 4 * RATE  # a pause, and what a short utterance leaves of a turn
    assert (min(rests) < -0.5 * RATE) == (n_src > 1), "with others they overlap"
    if n_src == 2:
        assert all("010" in order or "101" in order for order in orders)
    if n_src == 3:
        nexts = {order[i : i + 2] for order in orders for i in range(len(order) - 1)}
        assert {"01", "02", "10", "12", "20", "21"} <= nexts, "anyone after anyone"


def test_a_conversation_of_an_instant_has_a_turn(valid_speech):
    drawn = draw_turns(valid_speech, RNG, list(valid_speech.by_speaker)[:2], 800)
    _, sources = render_turns(valid_speech, drawn)
    assert sorted(source.any().item() for source in sources) == [False, True]


def test_turns_have_the_speed_level_and_spread_that_are_asked_for(make_dir):
    hums = SpeechDir(make_dir({f"s{i}": tone(500) for i in range(2)}))
    rng, gaps = np.random.default_rng(0), []
    for _ in range(10):
        drawn = draw_turns(hums, rng, ["s0", "s1"], 20 * RATE, 6.0, speeds=(80,), level=-40.0)
        _, sources = render_turns(hums, drawn)
        levels = []
        for samples, own in zip(sources, drawn):
            turn = max(own.sources, key=lambda turn: turn.length)
            heard = samples[turn.offset :][: RATE // 2]
            assert peak_frequency(heard) == pytest.approx(400, abs=3)
            levels.append(level(heard))
        assert max(levels) == pytest.approx(-40, abs=0.5)
        gaps.append(max(levels) - min(levels))
    assert max(gaps) > 2 and max(gaps) < 6.5
