"""What `check` finds in data dirs and lists into which one fault each was put."""

import numpy as np
import pytest
import soundfile as sf

from asteroid_tiny.data import SpeechDir, draw_list, write_list
from asteroid_tiny.data.check import check_list, check_noise, check_speech, format_findings


@pytest.fixture
def voices(clips):
    return {f"s{i}": samples for i, samples in enumerate(clips.values())}


def kinds(findings):
    return [finding.kind for finding in findings]


def test_the_pack_has_nothing_fatal(pack):
    assert not [f for f in check_speech(pack / "valid", 8000) if f.fatal]


def test_good_speech_has_no_findings(make_dir, voices):
    assert check_speech(make_dir(voices), shortest=4.0) == []


def test_a_few_samples_at_full_scale_have_not_clipped(make_dir, voices):
    loud = voices["s1"].copy()
    loud[[100, 200, 300]] = 32767
    assert check_speech(make_dir({**voices, "s1": loud})) == []


def test_peaks_cut_off_on_one_side_of_a_percent_of_the_samples_have_clipped(make_dir, voices):
    loud = voices["s1"].copy()
    loud[::100] = 32767
    (found,) = check_speech(make_dir({**voices, "s1": loud}))
    assert (found.kind, "s1.wav" in found.where, found.what) == (
        "clipping",
        True,
        "1.0 % of its samples",
    )


def nan(path):
    sf.write(path, np.full(8000, np.nan, np.float32), 8000, subtype="FLOAT")


FAULTS = {
    "missing": lambda path: path.unlink(),
    "unreadable": lambda path: path.write_bytes(b"no audio"),
    "empty": lambda path: sf.write(path, np.zeros(0), 8000),
    "NaN": nan,
    "rate": lambda path: sf.write(path, sf.read(path)[0], 16000),
    "channels": lambda path: sf.write(path, np.stack([sf.read(path)[0]] * 2, 1), 8000),
    "silent": lambda path: sf.write(path, np.zeros(32000), 8000),
    "clipping": lambda path: sf.write(path, np.clip(30 * sf.read(path)[0], -1, 1), 8000),
    "short": lambda path: sf.write(path, sf.read(path)[0][:9000], 8000),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_a_recording_is_found_and_named(make_dir, voices, kind):
    folder = make_dir(voices)
    FAULTS[kind](folder / "s1.wav")
    (found,) = check_speech(folder, shortest=2.0)
    assert found.kind == kind
    assert "s1" in found.where
    assert found.fatal == (kind not in ("silent", "clipping", "short"))


def test_the_rate_of_most_recordings_is_right_though_another_be_lower(make_dir, voices):
    folder = make_dir(voices, rate=16000)
    sf.write(folder / "s1.wav", voices["s1"], 8000)
    (found,) = check_speech(folder)
    assert found.kind == "rate" and "s1.wav" in found.where and found.what == "8000 Hz, not 16000"


def test_utterances_are_short_in_seconds_whatever_their_rate(make_dir, voices):
    found = check_speech(make_dir(voices, rate=16000), shortest=2.5)  # they have 2 s
    assert kinds(found) == ["short"] * 4 and found[0].what == "2.00 s"


def test_a_mere_offset_is_silent(make_dir, voices):
    (found,) = check_speech(make_dir({**voices, "s1": np.full(32000, 3000, np.int16)}))
    assert (found.kind, found.where, found.fatal) == ("silent", "s1", False)


def test_the_rate_that_is_asked_for_is_checked(make_dir, voices):
    folder = make_dir(voices)
    assert check_speech(folder, 8000) == []
    assert kinds(check_speech(folder, 16000)) == 4 * ["rate"]


TABLES = {
    "table": {"utt2spk": "s0 a\ns0 b\ns1 a\ns2 b\ns3 c\n"},
    "table ": {"spk2gender": "a f\na m\n"},
    "table  ": {"spk2production": "a\n"},
    "broken speaker": {"utt2spk": "s0 a\ns1 a b\ns2 b\ns3 c\n"},
    "length": {"utt2num_samples": "s0 32000\ns1 32000\ns2 2000000\ns3 32000\n"},
    "missing": {"segments": "s0 s0 0 1\ns1 s1 0 1\ns2 s2 0 1\ns3 s4 0 1\n"},
    "missing ": {"wav.scp": f"s0 s0.wav\ns1 s1.wav\ns2 s2.wav\ns3 {'a' * 300}.wav\n"},
    "length ": {"utt2num_samples": "s0 32000\ns1 32000\ns2 31999\ns3 32000\n"},
    "no speaker": {"utt2spk": "s0 a\ns1 a\ns2 b\n"},
    "broken segment": {"segments": "s0 s0 0 1\ns1 s1 0 1\ns2 s2 0 1\ns3 s3 zero 1\n"},
    "broken segment ": {"segments": "s0 s0 0 1\ns1 s1 0 1\ns2 s2 0 inf\ns3 s3 0 1\n"},
    "outside its recording ": {"segments": "s0 s0 0 1\ns1 s1 0 1\ns2 s2 0 0.00001\ns3 s3 0 1\n"},
    "outside its recording": {"segments": "s0 s0 0 1\ns1 s1 0 1\ns2 s2 0 1\ns3 s3 3 5\n"},
}


def test_check_and_use_agree_on_the_last_sample(make_dir, voices):
    end = (32000 + 1.4) / 8000  # which a rounded table may say of 32000 samples
    folder = make_dir({"s0": voices["s0"]}, tables={"segments": f"s0 s0 0 {end}\n"})
    assert check_speech(folder) == []
    assert SpeechDir(folder).utterances["s0"].length == 32000


@pytest.mark.parametrize("kind", TABLES)
def test_a_fault_of_a_table_is_found(make_dir, voices, kind):
    found = check_speech(make_dir(voices, tables=TABLES[kind]))
    assert kind.strip() in kinds(found) and all(finding.fatal for finding in found)


def test_told_lengths_are_of_utterances_where_recordings_are_cut(make_dir, voices):
    tables = {"segments": "s0 s0 0 1\n", "utt2num_samples": "s0 8000\n"}
    assert check_speech(make_dir({"s0": voices["s0"]}, tables=tables)) == []


def test_a_list_is_checked_with_speech_of_a_higher_rate(make_dir, voices, tmp_path):
    folder = make_dir(voices, rate=16000)
    speech = SpeechDir(folder, 8000, convert=True)
    write_list(tmp_path / "list.csv", draw_list(speech, 4, 2, 4000, seed=1), 8000)
    assert check_list(tmp_path / "list.csv", folder) == []


def test_broken_noise_is_found(voices, tmp_path):
    for name, samples in voices.items():
        sf.write(tmp_path / f"{name}.flac", samples, 8000)
    paths = [str(path) for path in sorted(tmp_path.glob("*.flac"))]
    assert check_noise(paths) == []
    (tmp_path / "s2.flac").write_bytes((tmp_path / "s2.flac").read_bytes()[:9000])
    (found,) = check_noise(paths)
    assert found.kind == "unreadable noise" and "s2.flac" in found.where and found.fatal


def test_splits_are_checked_one_by_one_and_speakers_may_have_many_utterances(
    make_dir, voices, tmp_path
):
    for split in ("train", "valid", "test"):
        names = "".join(f"{key} {split}-{i // 2}\n" for i, key in enumerate(voices))
        make_dir(voices, name=split, tables={"utt2spk": names})
    assert check_speech(tmp_path) == []
    assert kinds(check_speech(tmp_path, shortest=4.5)) == ["short"] * 12


def test_a_data_dir_is_checked_itself_whatever_folders_it_has(make_dir, voices):
    folder = make_dir(voices)
    (folder / "test").mkdir()
    (folder / "s1.wav").unlink()
    assert kinds(check_speech(folder)) == ["missing"]


def test_a_speaker_in_two_splits_is_found(make_dir, voices, tmp_path):
    for split in ("train", "valid", "test"):
        make_dir(voices, name=split, tables={"utt2spk": f"s0 {split}\ns1 b\ns2 c\ns3 d{split}\n"})
    findings = check_speech(tmp_path)
    assert set(kinds(findings)) == {"speaker in two splits"}
    assert [finding.where for finding in findings] == ["b", "c"]


def test_faults_of_a_list_are_found(make_dir, voices, tmp_path):
    folder = make_dir({**voices, "s4": np.zeros(32000)})
    mixtures = draw_list(SpeechDir(folder), 10, 2, 16000, seed=1)
    write_list(tmp_path / "list.csv", mixtures, 8000)
    findings = check_list(tmp_path / "list.csv", folder)
    assert kinds(findings) == ["silent"] * 4 and {f.what for f in findings} == {"s4"}
    write_list(tmp_path / "list.csv", mixtures[:2] + mixtures[:1], 8000)
    (found,) = check_list(tmp_path / "list.csv", folder)
    assert "2 times" in found.what


def test_mixtures_of_a_list_whose_recording_is_damaged_are_named_and_the_others_checked(
    make_dir, voices, tmp_path
):
    folder = make_dir(voices, suffix="flac")
    mixtures = draw_list(SpeechDir(folder), 6, 2, 8000, seed=1)  # each pair of four speakers
    write_list(tmp_path / "list.csv", mixtures, 8000)
    content = (folder / "s1.flac").read_bytes()
    (folder / "s1.flac").write_bytes(content[:9000] + bytes(len(content) - 9000))
    found = check_list(tmp_path / "list.csv", folder)
    assert kinds(found) == ["unreadable"] * 3 and all(one.fatal for one in found)
    concerned = [m.mixture_id for m in mixtures if "s1" in [s.utterance for s in m.sources]]
    assert [one.where for one in found] == concerned and "s1.flac" in found[0].what


def test_every_mixture_that_was_made_softer_is_told(make_dir, voices, tmp_path):
    folder = make_dir(voices)
    mixtures = draw_list(SpeechDir(folder), 60, 2, 16000, seed=1)
    louder = [
        m._replace(sources=tuple(s._replace(gain=s.gain + 30) for s in m.sources)) for m in mixtures
    ]
    write_list(tmp_path / "list.csv", louder, 8000)
    assert kinds(check_list(tmp_path / "list.csv", folder)) == 60 * ["clipping"]


def test_the_table_counts_and_names(make_dir, voices):
    folder = make_dir(voices)
    for key in voices:
        (folder / f"{key}.wav").unlink()
    text = format_findings(check_speech(folder), most=3)
    assert "4  missing" in text and "s0.wav" in text and "and 1 more" in text


def test_utterances_are_listened_to_by_themselves(make_dir, voices):
    half = np.append(voices["s0"][:16000], np.zeros(16000, np.int16))
    segments = "a s0 0 1.9\nb s0 2.1 4\nc s0 1.2 1.7\n"
    speakers = {"segments": segments, "utt2spk": "a s0\nb s0\nc s0\n"}
    folder = make_dir({"s0": half}, tables=speakers)
    found = check_speech(folder, shortest=1.0)
    assert [(one.kind, one.where) for one in found] == [("silent", "b"), ("short", "c")]
