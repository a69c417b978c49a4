"""Kaldi data dirs: exact samples, and one sentence for each thing that may be wrong."""

import pickle
import shutil

import numpy as np
import pytest
import soundfile as sf
from sounds import NOISE, RATE, RNG

from asteroid_tiny.data import (
    DynamicMixtures,
    SpeechDir,
    check_disjoint,
    draw_list,
)
from asteroid_tiny.data.kaldi import RecordingCache


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


def test_times_are_those_of_the_nearest_sample(make_dir):
    """Binary fractions of a second lie a hair below many a whole number of samples."""
    tables = {"segments": "a-1 a 1.001 2.01\n", "utt2spk": "a-1 anna\n"}
    where = SpeechDir(make_dir({"a": NOISE}, tables=tables)).utterances["a-1"]
    assert (where.start, where.length) == (8008, 16080 - 8008)


def test_utterances_do_not_give_what_is_beside_them(make_dir, refused):
    segments = "u1 r 0.1 0.2\nu2 r 0.2 0.4\n"
    tables = {"segments": segments, "utt2spk": "u1 s\nu2 t\n"}
    speech = SpeechDir(make_dir({"r": NOISE}, tables=tables))
    assert len(speech.read("u1", 300, 500)) == 500 and not len(speech.read("u1", 800))
    for start, length in ((0, 801), (-1, 10), (700, 101), (801, None)):
        with refused("u1 has 800 samples"):
            speech.read("u1", start, length)


def test_some_speakers_alone_are_all_there_is(make_dir):
    speech = SpeechDir(make_dir({"a": NOISE, "b": NOISE, "c": NOISE}))
    some = speech.of("[ab]")
    assert sorted(some.utterances) == sorted(some.wavs) == sorted(some.by_speaker) == ["a", "b"]
    assert 3 * some.minutes() == pytest.approx(2 * speech.minutes())
    assert len(speech.utterances) == 3


def test_without_segments_each_recording_is_an_utterance(make_dir):
    speech = SpeechDir(make_dir({"b": NOISE[:12345], "a": NOISE[:777]}))
    lengths = {key: utterance.length for key, utterance in speech.utterances.items()}
    assert lengths == {"a": 777, "b": 12345}
    assert np.array_equal(speech.read("b"), NOISE[:12345] / 32768)
    assert speech.sample_rate == RATE
    assert speech.spk2gender == {} and speech.spk2production == {}


def test_what_is_drawn_does_not_depend_on_the_order_of_the_tables(make_dir):
    keys = ["b-1", "a-2", "c-1", "a-1"]
    lists = []
    for name, order in (("one", keys), ("other", keys[::-1])):
        tables = {"utt2spk": "".join(f"{key} {key[0]}\n" for key in order)}
        recordings = {key: NOISE[1000 * int(key[-1]) :] for key in order}
        speech = SpeechDir(make_dir(recordings, name=name, tables=tables))
        lists.append(draw_list(speech, 9, 2, 4000, seed=0))
    assert lists[0] == lists[1]


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


def forget_length(path):
    """Makes a FLAC file tell no length, as one that was written to a pipe."""
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)


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
    "name too long for a file": (
        put("wav.scp", f"anna {'a' * 300}.wav\nben ben.wav"),
        "is missing",
    ),
    "recording is a folder": (put("wav.scp", "anna .\nben ben.wav"), "is missing"),
    "empty recording": (put("anna.wav", b""), "anna.wav"),
    "garbage recording": (put("anna.wav", GARBAGE), "anna.wav cannot be read as audio"),
    "text recording": (put("anna.wav", "not a sound\n"), "anna.wav cannot be read as audio"),
    "raw recording": (
        lambda folder: (put("anna.raw", GARBAGE)(folder), put("wav.scp", "a anna.raw")(folder)),
        "anna.raw",
    ),
    "half a header": (cut("anna.wav", 30), "anna.wav cannot be read as audio"),
    "told to be empty, and is": (
        lambda folder: (cut("ben.wav", 44)(folder), put("utt2num_samples", "ben 0\n")(folder)),
        "ben.wav holds no samples",
    ),
    "flac of a pipe": (
        lambda folder: (
            sound("ben.flac", NOISE)(folder),
            forget_length(folder / "ben.flac"),
            put("wav.scp", "anna anna.wav\nben ben.flac")(folder),
        ),
        "ben.flac does not tell its length",
    ),
    "header alone": (cut("anna.wav", 44), "anna.wav holds no samples"),
    "stereo": (sound("anna.wav", np.zeros((800, 2))), "anna.wav has 2 channels"),
    "other rate": (sound("anna.wav", np.zeros(800), 16000), "anna.wav has 16000 Hz"),
    "no speaker": (put("utt2spk", "anna a\n"), "no speaker for utterance 'ben'"),
    "speaker of two words": (put("utt2spk", "anna a b\nben b\n"), "'a b' of 'anna' is not one"),
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


def test_lower_and_mixed_rates_are_not_converted(make_dir, refused):
    folder = make_dir({"anna": NOISE, "ben": NOISE})
    with refused("has 8000 Hz where"):
        SpeechDir(folder, 16000, convert=True)
    sf.write(next(folder.rglob("ben.wav")), NOISE, 2 * RATE)
    with refused("ben.wav has 16000 Hz", "or the others, which have 8000 Hz as anna has"):
        SpeechDir(folder, RATE, convert=True)


def test_minutes_are_those_of_the_recordings_at_any_rate(make_dir):
    folder = make_dir({"a": np.ones(960000, np.int16)}, rate=16000)
    assert SpeechDir(folder).minutes() == 1
    assert SpeechDir(folder, 8000, convert=True).minutes() == 1


@pytest.mark.parametrize(
    "rate, channels, words", [(16000, 1, "has 16000 Hz where 8000 Hz"), (RATE, 2, "2 channels")]
)
def test_recordings_whose_lengths_are_told_are_checked_when_they_are_read(
    rate, channels, words, make_dir, refused
):
    folder = make_dir({"anna": NOISE, "ben": NOISE})
    samples = np.stack([NOISE] * channels, axis=-1)
    other = next(folder.rglob("ben.wav"))
    sf.write(other, samples, rate)
    (folder / "utt2num_samples").write_text(f"anna {len(NOISE)}\nben {len(NOISE)}\n")
    speech = SpeechDir(folder, RATE)
    speech.read("anna")
    with refused(f"{other}", words):
        speech.read("ben")


def test_told_lengths_are_of_utterances_and_not_of_recordings_that_are_cut(make_dir):
    tables = {
        "segments": "anna anna 0 1\nben ben 0 1\nben-2 ben 1 3\n",
        "utt2spk": "anna anna\nben ben\nben-2 ben\n",
        "utt2num_samples": "anna 8000\nben 8000\nben-2 16000\n",
    }
    speech = SpeechDir(make_dir({"anna": NOISE, "ben": NOISE}, tables=tables))
    assert np.array_equal(speech.read("ben-2"), NOISE[8000:24000] / 32768)


def test_what_a_codec_makes_louder_than_full_scale_is_clipped(make_dir):
    square = np.where(np.arange(RATE) // 40 % 2, 1.0, -1.0)
    folder = make_dir({"loud": square}, suffix="ogg")
    decoded, _ = sf.read(folder / "loud.ogg")
    assert np.abs(decoded).max() > 1.05
    samples = SpeechDir(folder).read("loud")
    np.testing.assert_allclose(samples, decoded.clip(-1, 1 - 2**-15), atol=0.51 / 32768)


def test_a_byte_order_mark_and_ends_of_lines_are_no_part_of_a_table(make_dir):
    folder = make_dir({"anna": NOISE})
    (folder / "spk2gender").write_bytes("\ufeffanna f \r\n".encode())
    assert SpeechDir(folder).spk2gender == {"anna": "f"}


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


@pytest.mark.parametrize("suffix, options", [("sph", {"format": "NIST"}), ("flac", {})])
def test_sphere_and_flac_are_read_sample_for_sample(make_dir, clips, suffix, options):
    speech = SpeechDir(make_dir(clips, suffix=suffix, **options))
    for speaker, samples in clips.items():
        np.testing.assert_array_equal(np.round(speech.read(speaker) * 32768), samples)
