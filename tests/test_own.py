"""Speech of the user's own: layouts, splits and rates, on voices of the embedded pack."""

import os
import resource
import shutil
import signal

import numpy as np
import pytest
import soundfile as sf

from asteroid_tiny.data import SpeechDir, check_disjoint, own

SPLITS = ("train", "valid", "test")


@pytest.fixture
def voices(tmp_path, clips):
    """A folder of one folder a speaker: eight speakers, two clips each, of two rates."""
    folder = tmp_path / "voices"
    samples = list(clips.values())
    for i in range(8):
        speaker = folder / f"speaker {i}" / "day one"
        speaker.mkdir(parents=True)
        sf.write(speaker / "a.wav", samples[i % 4][:16000], 8000)
        sf.write(speaker / "b c.flac", samples[i % 4][16000:], (8000, 16000)[i % 2])
    (folder / "notes.txt").write_text("no recording")
    return folder


@pytest.fixture
def make(tmp_path):
    def make(source, n_src=2, name="made"):
        own.prepare(source, tmp_path / name, n_src, 8000)
        return {split: SpeechDir(tmp_path / name / split, 8000) for split in SPLITS}

    return make


def test_folders_of_speakers_are_split_and_brought_to_one_rate(voices, make):
    made = make(voices)
    check_disjoint(**made)
    assert [len(made[split].by_speaker) for split in SPLITS] == [4, 2, 2]
    speech = next(s for s in made.values() if "speaker_1" in s.by_speaker)
    first, second = speech.by_speaker["speaker_1"]
    assert speech.utterances[first].length == 16000
    assert speech.utterances[second].length == 8000  # 16000 samples at 16 kHz


def test_converted_speech_is_the_speech_at_the_other_rate(voices, make):
    speech = next(s for s in make(voices).values() if "speaker_1" in s.by_speaker)
    converted = speech.read(speech.by_speaker["speaker_1"][1])
    original, _ = sf.read(voices / "speaker 1" / "day one" / "b c.flac")
    kept, found = np.abs(np.fft.rfft(original))[:3000], np.abs(np.fft.rfft(converted))[:3000]
    assert np.linalg.norm(2 * found - kept) < 0.05 * np.linalg.norm(kept)


def test_converted_speech_beyond_full_scale_does_not_clip(tmp_path, clips):
    source, loud = tmp_path / "a.wav", next(iter(clips.values())) / 2**12
    assert np.abs(loud).max() > 2
    sf.write(source, loud, 8000, subtype="FLOAT")
    own.convert(source, tmp_path / "made.flac", 16000)
    converted, _ = sf.read(tmp_path / "made.flac")
    assert np.corrcoef(converted[::2], loud)[0, 1] > 0.999 and np.abs(converted).max() > 0.9


def test_names_may_have_what_unicode_takes_for_the_end_of_a_line(voices, make):
    (voices / "speaker 0" / "day one" / "a.wav").rename(voices / "speaker 0" / "a\u2028b.wav")
    assert sum(len(speech.utterances) for speech in make(voices).values()) == 16


def test_recordings_are_found_by_any_suffix_that_libsndfile_knows(voices, make):
    for path in list(voices.rglob("a.wav")):
        sf.write(path.with_suffix(".sph"), sf.read(path)[0], 8000, format="NIST")
        path.rename(path.with_suffix(".WAV"))
    assert sum(len(speech.utterances) for speech in make(voices).values()) == 24


def test_recordings_that_are_left_out_are_told(voices, make, capsys):
    make(voices)
    assert "left out" not in capsys.readouterr().out
    for name in ("speaker 0/c.m4a", "speaker 1/d.M4A", "speaker 1/d.txt", "alone.wav"):
        (voices / name).write_bytes(b"whatever it holds")
    assert sum(len(speech.utterances) for speech in make(voices).values()) == 16
    unread, alone = (x for x in capsys.readouterr().out.splitlines() if "left out" in x)
    assert ": 2 rec" in unread and str(voices / "speaker 0/c.m4a") in unread and "FLAC" in unread
    assert ": 1 rec" in alone and str(voices / "alone.wav") in alone and "no speaker's" in alone


def test_a_tenth_of_the_speakers_is_for_each_of_valid_and_test_by_their_names_alone(tmp_path):
    sides = own.split_speakers([f"s{i}" for i in range(60)], None, tmp_path, 2)
    assert [list(sides.values()).count(split) for split in SPLITS] == [48, 6, 6]
    test = {speaker for speaker, side in sides.items() if side == "test"}
    assert test == set("s8 s13 s27 s5 s15 s3".split()), "in any process and version"


def test_silence_stays_silence_when_it_is_converted(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(800), 8000)
    own.convert(tmp_path / "a.wav", tmp_path / "made.flac", 16000)
    assert not sf.read(tmp_path / "made.flac")[0].any()


def test_names_may_be_as_long_as_a_file_system_has_them(voices, make):
    path = voices / "speaker 1" / "day one" / "b c.flac"
    path.rename(path.with_name("b" * 250 + ".flac"))
    assert sum(len(speech.utterances) for speech in make(voices).values()) == 16


def test_conversion_is_done_once(voices, make, tmp_path, monkeypatch):
    make(voices)
    monkeypatch.setattr(own, "convert", None)
    assert make(voices)["train"].utterances


def test_a_recording_that_was_mended_is_converted_anew(voices, make):
    make(voices)
    mended = voices / "speaker 1" / "day one" / "b c.flac"
    samples, rate = sf.read(mended)
    sf.write(mended, samples[: len(samples) // 2], rate)
    speech = next(s for s in make(voices).values() if "speaker_1" in s.by_speaker)
    assert speech.utterances[speech.by_speaker["speaker_1"][1]].length == 4000


def test_a_recording_that_became_another_of_the_same_size_is_converted_anew(voices, make, clips):
    first, second, *_ = clips.values()
    path = voices / "speaker 1" / "c.wav"
    heard = []
    for samples in (first, second):
        sf.write(path, samples[:16000], 16000)
        speech = next(s for s in make(voices).values() if "speaker_1" in s.by_speaker)
        heard.append(speech.read("speaker_1_c.wav"))
    assert np.corrcoef(heard[1], second[:16000:2])[0, 1] > 0.9 > np.corrcoef(*heard)[0, 1]


def test_speakers_may_be_links_and_links_may_go_in_circles(voices, make, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    for i, folder in enumerate(sorted(voices.glob("speaker*"))):
        if i < 4:
            (pool / folder.name).symlink_to(folder)
        else:
            folder.rename(pool / folder.name)
    (pool / "speaker 5" / "up").symlink_to(pool)
    (pool / "speaker 5" / ".hidden").symlink_to(voices)
    made = make(pool)
    assert sum(len(speech.by_speaker) for speech in made.values()) == 8
    assert sum(len(speech.utterances) for speech in made.values()) == 16


def test_hardly_anyone_moves_when_a_speaker_is_added(voices, make):
    before = {s: split for split, speech in make(voices).items() for s in speech.by_speaker}
    (voices / "speaker 0").rename(voices / "somebody else")
    after = {
        s: split for split, speech in make(voices, name="b").items() for s in speech.by_speaker
    }
    moved = {s for s in before if s in after and after[s] != before[s]}
    assert len(moved) <= 1  # at most one gives place to the new speaker


def test_kaldi_dir_keeps_its_utterances_and_genders(make, pack):
    made = make(pack / "valid", n_src=1)
    check_disjoint(**made)
    original = SpeechDir(pack / "valid")
    for speech in made.values():
        for key, utterance in speech.utterances.items():
            assert utterance == original.utterances[key]
        for speaker in speech.by_speaker:
            assert speech.spk2gender[speaker] == original.spk2gender[speaker]
            assert speech.spk2production[speaker] == original.spk2production[speaker]
    assert sum(len(speech.utterances) for speech in made.values()) == len(original.utterances)


def test_splits_that_there_are_stay_and_valid_comes_out_of_train(make, voices):
    for i, name in enumerate(sorted(path.name for path in voices.glob("speaker*"))):
        part = voices / ("test" if i < 2 else "train")
        part.mkdir(exist_ok=True)
        (voices / name).rename(part / name)
    made = make(voices)
    assert list(made["test"].by_speaker) == ["speaker_0", "speaker_1"]
    assert len(made["train"].by_speaker) == 4 and len(made["valid"].by_speaker) == 2


def test_speech_for_validation_may_be_called_dev(make, voices, refused):
    for i, path in enumerate(sorted(voices.glob("speaker*"))):
        part = voices / ("train" if i < 4 else "dev" if i < 6 else "test")
        part.mkdir(exist_ok=True)
        path.rename(part / path.name)
    made = make(voices)
    assert [len(made[split].by_speaker) for split in SPLITS] == [4, 2, 2]
    assert list(made["valid"].by_speaker) == ["speaker_4", "speaker_5"]
    (voices / "test").rename(voices / "eval")
    with refused("has train and dev, but no test"):
        make(voices)


def test_paths_of_a_corpus_may_start_above_its_data_dir(make, voices):
    lines = {"wav.scp": "", "utt2spk": ""}
    for i, path in enumerate(sorted(voices.rglob("a.wav"))):
        path.rename(voices / f"{i}.wav")
        lines["wav.scp"] += f"u{i} {i}.wav\n"
        lines["utt2spk"] += f"u{i} s{i}\n"
    (voices / "data" / "train").mkdir(parents=True)
    for table, text in lines.items():
        (voices / "data" / "train" / table).write_text(text)
    made = make(voices / "data" / "train")
    assert sum(len(speech.utterances) for speech in made.values()) == 8


def test_a_table_says_who_goes_where(make, voices):
    names = [f"speaker_{i}" for i in range(7)]
    sides = ["train", "train", "train", "valid", "valid", "test", "test"]
    (voices / "spk2split").write_text("".join(f"{n} {s}\n" for n, s in zip(names, sides)))
    made = make(voices)
    assert [len(made[split].by_speaker) for split in SPLITS] == [3, 2, 2]
    assert "speaker_5" in made["test"].by_speaker


def test_a_table_beside_train_says_nothing_of_test(make, voices, refused):
    names = sorted(path.name for path in voices.glob("speaker*"))
    for i, name in enumerate(names):
        part = voices / ("test" if i < 2 else "train")
        part.mkdir(exist_ok=True)
        (voices / name).rename(part / name)
    table = voices / "train" / "spk2split"
    lines = [f"speaker_{i} {'train' if i < 5 else 'valid'}\n" for i in range(2, 8)]
    table.write_text("".join(lines))
    made = make(voices)
    assert [len(made[split].by_speaker) for split in SPLITS] == [3, 3, 2]
    table.write_text("".join(lines[:-1]) + "speaker_7 test\n")
    with refused("'speaker_7': must be train or valid, not 'test'"):
        make(voices)


def test_tables_that_the_source_has_no_more_go(make, pack, tmp_path):
    source = shutil.copytree(pack / "valid", tmp_path / "source")
    who = {u.recording: u.speaker for s in make(source, n_src=1).values()
           for u in s.utterances.values()}  # fmt: skip
    for table in ("segments", "spk2gender"):
        (source / table).unlink()
    (source / "utt2spk").write_text("".join(f"{key} {speaker}\n" for key, speaker in who.items()))
    for speech in make(source, n_src=1).values():
        assert set(speech.utterances) <= set(who) and not speech.spk2gender


def test_a_recording_without_speaker_is_refused(make, pack, tmp_path, refused):
    source = shutil.copytree(pack / "valid", tmp_path / "source")
    kept = (source / "utt2spk").read_text().splitlines(keepends=True)[:-1]
    (source / "utt2spk").write_text("".join(kept))
    with refused("utt2spk names no speaker for utterance"):
        make(source, n_src=1)


def test_who_has_no_recording_is_no_speaker_to_be_split(make, pack, tmp_path):
    source = shutil.copytree(pack / "valid", tmp_path / "source")
    with open(source / "utt2spk", "a") as table:
        table.writelines(f"gone{i}-1 gone{i}\n" for i in range(40))
    assert sum(len(speech.by_speaker) for speech in make(source, n_src=1).values()) == 4


def test_two_folders_do_not_become_one_speaker(make, voices, refused):
    (voices / "speaker_0").mkdir()
    (voices / "speaker 1" / "day one" / "a.wav").rename(voices / "speaker_0" / "new.wav")
    with refused("speaker 0 and", "speaker_0 would both be speaker 'speaker_0'"):
        make(voices)


def test_a_recording_is_not_of_two_speakers_by_a_link(voices, make, refused):
    (voices / "speaker 9").symlink_to(voices / "speaker 1")
    with refused("speaker 9/day one/a.wav is a recording of speaker 'speaker_1', too"):
        make(voices)


def test_a_full_disk_leaves_no_half_of_a_conversion(tmp_path, clips, refused):
    source = tmp_path / "a.wav"
    sf.write(source, np.tile(next(iter(clips.values())), 4), 16000)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, most[1]))
    try:
        with refused("a.flac could not be written"):
            own.convert(source, tmp_path / "made" / "a.flac", 8000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "made").iterdir())


def test_what_is_wrong_gets_one_sentence(make, voices, refused, tmp_path):
    with refused("8 speaker(s)", "9 are needed"):
        make(voices, n_src=3)
    with refused("there is no folder", "--speech"):
        make(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with refused("neither wav.scp nor a folder", "not M4A"):
        make(tmp_path / "empty")
    for value, words in (("cat a.wav |", "'a' is a command"), ("a.wav", "names a.wav for 'a'")):
        (tmp_path / "empty" / "wav.scp").write_text(f"a {value}\n")
        (tmp_path / "empty" / "utt2spk").write_text("a a\n")
        with refused(words):
            make(tmp_path / "empty")
    (voices / "spk2split").write_text("speaker_0 dev\n")
    with refused("'speaker_0': must be train or valid or test, not 'dev'"):
        make(voices)
    (voices / "spk2split").write_text("".join(f"speaker_{i} train\n" for i in range(8)))
    with refused("spk2split gives no speaker to valid"):
        make(voices)
    (voices / "spk2split").write_text("speaker_0 train\nspeaker_l valid\nspeaker_2 test\n")
    with refused("'speaker_l': there is no such speaker"):
        make(voices)
    (voices / "spk2split").unlink()
    twin = voices / "speaker 0" / "day one_a.wav"
    sf.write(twin, np.zeros(800), 8000)
    with refused("day one_a.wav and", "day one/a.wav would both be utterance"):
        make(voices)
    os.rename(twin, os.path.join(os.fsencode(voices), b"speaker 0", b"M\xfcller.wav"))
    with refused("M\\xfcller.wav' is not UTF-8; rename it"):
        make(voices)
    os.remove(os.path.join(os.fsencode(voices), b"speaker 0", b"M\xfcller.wav"))
    sf.write(voices / "speaker 0" / "c\nd.wav", np.zeros(800), 8000)
    with refused("c\\nd.wav' has a line break; rename it"):
        make(voices)
    os.remove(voices / "speaker 0" / "c\nd.wav")
    sf.write(voices / "speaker 0" / "c.wav", np.zeros(0), 44100)
    with refused("speaker 0/c.wav holds no samples"):
        make(voices)
    sf.write(voices / "speaker 0" / "c.wav", np.zeros((800, 2)), 44100)
    with refused("c.wav has 2 channels"):
        make(voices)
