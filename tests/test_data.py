"""From recordings to mixtures: exact samples, refused input, levels, speeds, and the same draws."""

import itertools
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
import torch
from torch.utils.data import DataLoader

from asteroid_tiny.data import (
    DynamicMixtures,
    EpochSampler,
    MixtureList,
    SpeechDir,
    check_disjoint,
    draw_list,
    read_list,
    write_list,
)
from asteroid_tiny.data.kaldi import RecordingCache
from asteroid_tiny.data.mixing import LEVEL_DB, SILENT, draw_mixture, render

RATE = 8000
RNG = np.random.default_rng(0)
NOISE = RNG.integers(-3000, 3000, 4 * RATE).astype(np.int16)


def tone(frequency, seconds=4.0, amplitude=8000):
    time = np.arange(round(seconds * RATE)) / RATE
    return np.round(amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.int16)


def peak_frequency(samples):
    spectrum = np.abs(np.fft.rfft(np.asarray(samples) * np.hanning(len(samples))))
    return spectrum.argmax() * RATE / len(samples)


def level(samples):
    return 10 * np.log10(np.mean(np.asarray(samples, dtype=np.float64) ** 2))


# ---- Kaldi data dirs


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_int16_samples_come_back_exactly(make_dir, suffix):
    values = np.arange(-32768, 32768).astype(np.int16)
    speech = SpeechDir(make_dir({"all": values}, suffix=suffix, subtype="PCM_16"))
    samples = speech.read("all")
    assert samples.dtype == np.float32
    assert np.array_equal(samples, values / 32768)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE", "PCM_24", "PCM_32"])
def test_wide_samples_keep_their_precision(make_dir, subtype):
    values = RNG.integers(-(2**23), 2**23, RATE) / 2**23  # 24 bits, as many as float32 has
    speech = SpeechDir(make_dir({"wide": values}, subtype=subtype))
    assert np.array_equal(speech.read("wide"), values)


def test_float_samples_beyond_full_scale_are_kept(make_dir):
    values = np.array([-3.5, 0.0, 1.5, 1e-7], dtype=np.float32)
    speech = SpeechDir(make_dir({"loud": values}, subtype="FLOAT"))
    assert np.array_equal(speech.read("loud"), values)


def test_segments_are_cut_at_the_right_samples(make_dir):
    ramp = np.arange(32000).astype(np.int16)
    tables = {
        "segments": "a-1 a 0.25 1.0\na-2 a 0.000125 0.00025\na-3 a 3.5 4.0001\n",
        "utt2spk": "a-1 anna\na-2 anna\na-3 zoe\nnever-used anna\n",
    }
    speech = SpeechDir(make_dir({"a": ramp}, tables=tables), RATE)

    def cut(*args):
        return np.round(speech.read(*args) * 32768).astype(int).tolist()

    assert cut("a-1") == list(range(2000, 8000))
    assert cut("a-2") == [1]
    assert cut("a-3") == list(range(28000, 32000)), "0.8 samples too long by rounding of the table"
    assert cut("a-1", 10) == list(range(2010, 8000))
    assert cut("a-1", 10, 5) == list(range(2010, 2015))
    assert speech.by_speaker == {"anna": ["a-1", "a-2"], "zoe": ["a-3"]}
    assert speech.minutes() == pytest.approx((6000 + 1 + 4000) / RATE / 60)


def test_without_segments_each_recording_is_an_utterance(make_dir):
    speech = SpeechDir(make_dir({"b": NOISE[:12345], "a": NOISE[:777]}))
    lengths = {key: utterance.length for key, utterance in speech.utterances.items()}
    assert lengths == {"a": 777, "b": 12345}
    assert np.array_equal(speech.read("b"), NOISE[:12345] / 32768)
    assert speech.sample_rate == RATE
    assert speech.spk2gender == {} and speech.spk2production == {}


def test_wav_paths_are_relative_to_the_data_dir_or_absolute(make_dir, tmp_path, monkeypatch):
    far = make_dir({"x": NOISE[:800], "y": NOISE[800:2400]}, name="far away")
    table = f"x ../far away/x.wav\ny {far / 'y.wav'}\n"
    near = make_dir({"x": NOISE[:9], "y": NOISE[:9]}, name="near", tables={"wav.scp": table})
    monkeypatch.chdir(tmp_path)
    for path in (near, "near"):
        speech = SpeechDir(path)
        assert np.array_equal(speech.read("x"), NOISE[:800] / 32768)
        assert np.array_equal(speech.read("y"), NOISE[800:2400] / 32768)


def test_the_pack_reads_as_decoded_from_the_middle_of_its_files(valid_speech, pack):
    """Against libsndfile's own seeking: the segments of Opus files begin at the right sample."""
    assert valid_speech.minutes() == pytest.approx(14.77, abs=0.01)
    for speaker, utterances in valid_speech.by_speaker.items():
        utterance = utterances[len(utterances) // 2]
        where = valid_speech.utterances[utterance]
        path = pack / "valid" / f"{speaker}.ogg"
        wanted, _ = sf.read(path, start=where.start, frames=where.length, dtype="float32")
        samples = valid_speech.read(utterance)
        assert len(samples) == where.length
        assert np.abs(samples - wanted).max() < 1e-4 < np.abs(wanted).max()


def test_samples_may_be_changed_without_changing_what_is_read_next(make_dir):
    tables = {"wav.scp": "i i.wav\nf ../i/f.wav\n", "utt2spk": "i i\nf f\n"}
    folder = make_dir({"i": NOISE}, name="i", tables=tables)
    sf.write(folder / "f.wav", NOISE / 32768, RATE, subtype="FLOAT")
    speech = SpeechDir(folder)
    for key in ("i", "f"):
        speech.read(key)[:] = 0
        assert np.array_equal(speech.read(key), NOISE / 32768)


def test_cache_gives_up_the_least_recently_used(make_dir, monkeypatch):
    recordings = {key: NOISE[i * 1000 : (i + 1) * 1000] for i, key in enumerate("abc")}
    folder = make_dir(recordings)
    decoded = []
    read = sf.read

    def counting_read(path, **options):
        decoded.append(path[-5])
        return read(path, **options)

    monkeypatch.setattr(sf, "read", counting_read)
    cache = RecordingCache(max_bytes=4000)  # two recordings of 1000 int16 samples
    for key in "abacaba":
        samples = cache.read(str(folder / f"{key}.wav"), 10, 20)
        assert np.array_equal(samples, recordings[key][10:20] / 32768)
    # at c, b is given up, for a was used since; at the second b, c
    assert "".join(decoded) == "abcb"


def test_a_recording_larger_than_the_cache_is_read(make_dir):
    folder = make_dir({"a": NOISE, "b": NOISE[::-1].copy()})
    cache = RecordingCache(max_bytes=1)
    for key, wanted in (("a", NOISE), ("b", NOISE[::-1]), ("a", NOISE)):
        assert np.array_equal(cache.read(str(folder / f"{key}.wav"), 0, 100), wanted[:100] / 32768)


def test_pickles_without_the_decoded_recordings(make_dir):
    speech = SpeechDir(make_dir({"a": NOISE}))
    before = len(pickle.dumps(speech))
    wanted = speech.read("a")
    pickled = pickle.dumps(speech)
    assert len(pickled) == before < NOISE.nbytes
    assert np.array_equal(pickle.loads(pickled).read("a"), wanted)


# ---- Kaldi data dirs that are refused


def put(name, content):
    """A change of a data dir: another content of one of its files."""
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut(name, n_bytes):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def sound(name, samples, rate=RATE):
    return lambda folder: sf.write(folder / name, samples, rate)


GARBAGE = RNG.bytes(3000)
REFUSED_DIRS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no wav.scp": (drop("wav.scp"), "wav.scp is missing"),
    "no utt2spk": (drop("utt2spk"), "utt2spk is missing"),
    "empty wav.scp": (put("wav.scp", ""), "wav.scp is empty"),
    "blank utt2spk": (put("utt2spk", " \n\n"), "utt2spk is empty"),
    "empty segments": (put("segments", ""), "segments is empty"),
    "empty spk2gender": (put("spk2gender", ""), "spk2gender is empty"),
    "recording twice": (put("wav.scp", "anna anna.wav\nben ben.wav\nanna x.wav"), "'anna'"),
    "utterance twice": (put("utt2spk", "anna a\nben b\nben c"), "utt2spk, line 3"),
    "segment twice": (put("segments", "u anna 0 1\nu anna 1 2\n"), "segments, line 2"),
    "no value": (put("utt2spk", "anna a\nben\n"), "utt2spk, line 2, has no value for 'ben'"),
    "garbage table": (put("utt2spk", GARBAGE), "utt2spk"),
    "binary table": (put("wav.scp", b"\x00\x01 \x02\n"), "wav.scp cannot be read as text"),
    "table is a folder": (
        lambda folder: (drop("utt2spk")(folder), (folder / "utt2spk").mkdir()),
        "utt2spk cannot be read",
    ),
    "no recording file": (drop("anna.wav"), "anna.wav is missing"),
    "recording is a folder": (put("wav.scp", "anna .\nben ben.wav"), "is missing"),
    "empty recording": (put("anna.wav", b""), "anna.wav"),
    "garbage recording": (put("anna.wav", GARBAGE), "anna.wav cannot be read as audio"),
    "text recording": (put("anna.wav", "not a sound\n"), "anna.wav cannot be read as audio"),
    "raw recording": (
        lambda folder: (put("anna.raw", GARBAGE)(folder), put("wav.scp", "a anna.raw")(folder)),
        "anna.raw",
    ),
    "half a header": (cut("anna.wav", 30), "anna.wav cannot be read as audio"),
    "header alone": (cut("anna.wav", 44), "anna.wav holds no samples"),
    "stereo": (sound("anna.wav", np.zeros((800, 2))), "anna.wav has 2 channels"),
    "other rate": (sound("anna.wav", np.zeros(800), 16000), "anna.wav has 16000 Hz"),
    "no speaker": (put("utt2spk", "anna a\n"), "no speaker for utterance 'ben'"),
    "unknown recording": (put("segments", "anna carl 0 1"), "lacks recording 'carl'"),
    "segment beyond the end": (put("segments", "anna anna 0 4.01"), "'anna'"),
    "segment before the start": (put("segments", "anna anna -0.1 1"), "'anna'"),
    "segment of nothing": (put("segments", "anna anna 1 1"), "'anna'"),
    "segment backwards": (put("segments", "anna anna 2 1"), "'anna'"),
    "segment without end": (put("segments", "anna anna 0"), "'anna'"),
    "segment with a channel": (put("segments", "anna anna 0 1 1"), "'anna'"),
    "time that is a word": (put("segments", "anna anna start end"), "'anna'"),
    "time that is no number": (put("segments", "anna anna 0 nan"), "'anna'"),
    "time without end": (put("segments", "anna anna 0 inf"), "'anna'"),
}


@pytest.mark.parametrize("case", REFUSED_DIRS)
def test_refused_dirs(make_dir, refused, case):
    spoil, words = REFUSED_DIRS[case]
    folder = make_dir({"anna": NOISE, "ben": NOISE})
    SpeechDir(folder, RATE)
    spoil(folder)
    with refused(words, folder):
        SpeechDir(folder, RATE)


def test_the_asked_rate_is_checked(make_dir, refused):
    folder = make_dir({"anna": NOISE})
    with refused("anna.wav has 8000 Hz where 16000 Hz are needed"):
        SpeechDir(folder, 16000)


def test_commands_in_wav_scp_are_refused_and_not_run(make_dir, refused, tmp_path):
    folder = make_dir({"anna": NOISE})
    ran = tmp_path / "ran"
    (folder / "wav.scp").write_text(f"anna touch {ran}; cat {folder / 'anna.wav'} |\n")
    with refused("wav.scp", "'anna' is a command"):
        SpeechDir(folder).read("anna")
    assert not ran.exists()


@pytest.mark.parametrize("suffix, options", [("wav", {}), ("ogg", {"subtype": "OPUS"})])
def test_truncated_recordings_are_refused(make_dir, clips, refused, suffix, options):
    tables = {"segments": "u-1 anna 0 3\nu-2 anna 15 16\n", "utt2spk": "u-1 anna\nu-2 anna\n"}
    joined = np.concatenate(list(clips.values()))
    folder = make_dir({"anna": joined}, suffix=suffix, tables=tables, **options)
    assert len(SpeechDir(folder).read("u-2")) == RATE
    path = folder / f"anna.{suffix}"
    cut(path.name, path.stat().st_size // 2)(folder)
    with refused(folder, "'u-2' does not lie inside its recording"):
        SpeechDir(folder)


def test_an_ogg_file_with_a_hole_is_refused(make_dir, clips, refused):
    """The decoder skips what is broken; all that follows would come from the wrong place."""
    joined = np.concatenate(list(clips.values()))
    folder = make_dir({"anna": joined}, suffix="ogg", subtype="OPUS")
    path = folder / "anna.ogg"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 5] = bytes(len(content) // 5)
    path.write_bytes(content)
    speech = SpeechDir(folder)
    with refused("anna.ogg is damaged"):
        speech.read("anna")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(make_dir, refused, value):
    samples = np.zeros(RATE, dtype=np.float32)
    samples[4321] = value
    speech = SpeechDir(make_dir({"anna": samples}, subtype="FLOAT"))
    with refused("anna.wav holds samples that are NaN or infinite"):
        speech.read("anna", 0, 10)


@pytest.mark.parametrize("spoil", [drop("anna.wav"), put("anna.wav", GARBAGE)])
def test_a_recording_that_went_after_opening_is_named(make_dir, refused, spoil):
    folder = make_dir({"anna": NOISE})
    speech = SpeechDir(folder)
    spoil(folder)
    with refused("anna.wav"):
        speech.read("anna")


def test_a_speaker_in_two_splits_is_refused(make_dir, refused):
    names = {"train": ("a", "b"), "valid": ("c", "d"), "test": ("e", "b")}
    splits = {
        split: SpeechDir(make_dir(dict.fromkeys(speakers, NOISE), name=split))
        for split, speakers in names.items()
    }
    check_disjoint(train=splits["train"], valid=splits["valid"])
    with refused("'b'", "train", "test"):
        check_disjoint(**splits)


def test_fewer_speakers_than_sources_are_refused(make_dir, refused):
    folder = make_dir({"anna": NOISE, "ben": NOISE})
    speech = SpeechDir(folder)
    for draw in (draw_list, lambda *args: DynamicMixtures(args[0], *args[2:])):
        with refused(folder, "2 speaker", "3"):
            draw(speech, 10, 3, RATE, 0)


# ---- Mixtures


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
    "garbage": (lambda text: GARBAGE, "cannot be read"),
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
    mixtures = draw_list(speech, 50, 2, round(1.6 * RATE), seed=10)
    assert {mixture.sources[0].utterance for mixture in mixtures} == {"a-2"}
    mixtures = draw_list(speech, 300, 2, RATE, seed=10)
    counts = Counter(mixture.sources[0].utterance for mixture in mixtures)
    # places to begin: 1 s in a-2, half a second in a-3
    assert counts.keys() == {"a-2", "a-3"} and 170 < counts["a-2"] < 230


def test_silent_stretches_are_not_drawn(make_dir, clips):
    half_silent = {key: np.append(s, np.zeros_like(s)) for key, s in clips.items()}
    speech = SpeechDir(make_dir(half_silent))
    for mixture in draw_list(speech, 40, 2, RATE, seed=11):
        for source in mixture.sources:
            samples = speech.read(source.utterance, source.start, source.length)
            assert np.sqrt(np.mean(samples**2)) > SILENT


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


# ---- Mixtures drawn in training


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


def iter_items(dataset):
    return (dataset[i] for i in itertools.count())


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


# ---- Who speaks


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
