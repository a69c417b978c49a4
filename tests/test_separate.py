"""`asteroid-tiny separate`, as from the command line: what becomes of each of many files."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from scipy.signal import resample_poly

from asteroid_tiny import TinySepformer, cli, example_mixture
from asteroid_tiny.inspection import DEFAULT, WIDE
from asteroid_tiny.longform import blocks
from asteroid_tiny.longform.folder import FAINT, find_recordings


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_separated_once_and_again_only_by_force(separate, talks, tmp_path):
    status, text, _ = separate(talks)
    assert status == 0
    assert "made for 2 speakers at 8000 Hz" in text and "4 separated" in text
    out = tmp_path / "out"
    names = sorted(f"{path.stem}_est{k}.wav" for path in talks.iterdir() for k in (1, 2))
    assert sorted(path.name for path in out.iterdir()) == names
    for path in talks.iterdir():
        mixture, _ = sf.read(path)
        tracks = [sf.read(out / f"{path.stem}_est{k}.wav")[0] for k in (1, 2)]
        np.testing.assert_allclose(sum(tracks), mixture, atol=1e-3)

    before = contents(out)
    for path in out.iterdir():
        sf.write(path, sf.read(path)[0] / 2, 8000)  # as somebody may who edits them
    mine = contents(out)
    status, text, _ = separate(talks)
    assert status == 0 and "4 done before" in text
    assert contents(out) == mine
    status, text, _ = separate(talks, "--force")
    assert status == 0 and contents(out) == before


def test_without_mixture_consistency_files_are_the_models(separate, talks, tmp_path):
    path = sorted(talks.iterdir())[0]
    errors = []
    for options in ((), ("--no-mixture-consistency", "--force")):
        status, *_ = separate(path, *options)
        assert status == 0
        tracks = [sf.read(tmp_path / "out" / f"{path.stem}_est{k}.wav")[0] for k in (1, 2)]
        errors.append(np.abs(sum(tracks) - sf.read(path)[0]).max())
    assert errors[0] < 1e-3 < errors[1]


def test_one_bad_file_is_named_and_the_others_are_done(separate, talks, tmp_path):
    (talks / "broken.wav").write_bytes(b"RIFF no sound at all")
    sf.write(talks / "empty.wav", np.zeros(0), 8000)
    (talks / "notes.txt").write_text("no audio, and nobody asked for it")
    status, text, errors = separate(talks, tmp_path / "none.wav")
    assert status == 1
    for words in ("broken.wav cannot be read", "empty.wav holds no samples", "none.wav is no file"):
        assert words in errors
    assert "4 separated" in text and "3 failed" in text and "notes" not in text + errors
    assert len(list((tmp_path / "out").iterdir())) == 8


def test_estimates_of_more_speakers_are_not_taken_for_those_of_fewer(separate, talks, tmp_path):
    first = sorted(talks.glob("*.wav"))[0]
    assert separate(first)[0] == 0
    (tmp_path / "out" / f"{first.stem}_est3.wav").write_bytes(b"of a third speaker")
    for options in ([], ["--force"]):
        status, _, errors = separate(first, *options)
        assert status == 1 and "a model of more speakers" in errors


def test_names_are_told_in_one_line(separate, talks, tmp_path):
    first = sorted(talks.glob("*.wav"))[0]
    odd = first.rename(tmp_path / "two\nlines.wav")
    assert "/two?lines.wav: " in separate(odd)[1] and "/two?lines.wav: done" in separate(odd)[1]
    odd.write_bytes(b"noise")
    status, text, errors = separate(odd)
    assert (
        "/two?lines.wav cannot be read" in errors and "failed: " in text and "\nlines" not in text
    )


def test_outputs_beside_the_recordings_are_not_separated_again(separate, talks):
    n_files = len(contents(talks))
    for done in ("4 separated", "4 done before"):
        status, text, _ = separate(talks, out="talks")
        assert status == 0 and done in text and len(contents(talks)) == 3 * n_files
    assert text.count("left out") == 8


def test_a_namesake_of_another_folder_is_not_taken_for_done(separate, clips, tmp_path):
    voice, *_ = clips.values()
    for folder, n_samples in (("a", 9000), ("b", 9001)):
        (tmp_path / folder).mkdir()
        sf.write(tmp_path / folder / "talk.wav", voice[:n_samples], 8000)
    assert separate(tmp_path / "a" / "talk.wav")[0] == 0
    status, _, errors = separate(tmp_path / "b" / "talk.wav")
    assert status == 1 and "talk_est1.wav is of another recording" in errors
    assert sf.info(tmp_path / "out" / "talk_est1.wav").frames == 9000


@pytest.mark.parametrize("options", [(), ("--format", "ogg")])
def test_a_namesake_of_the_same_length_is_not_taken_for_done(separate, clips, tmp_path, options):
    for folder, voice in zip("ab", clips.values()):
        (tmp_path / folder).mkdir()
        sf.write(tmp_path / folder / "talk.wav", np.column_stack([voice, voice // 2]), 8000)
    assert separate(tmp_path / "a" / "talk.wav", *options)[0] == 0
    assert "1 done before" in separate(tmp_path / "a" / "talk.wav", *options)[1]
    status, _, errors = separate(tmp_path / "b" / "talk.wav", *options)
    assert status == 1 and "is of another recording than" in errors


def test_files_that_are_another_recordings_stop_no_other_recording(separate, clips, tmp_path):
    voice, *_ = clips.values()
    changes = {
        "shorter": lambda path: sf.write(path, voice[:20000], 8000),
        "slower": lambda path: sf.write(path, voice, 4000),
        "empty": lambda path: sf.write(path, voice[:0], 8000),
        "sample": lambda path: sf.write(path, voice[:1], 8000),
        "untouched": lambda path: None,
    }
    recordings = [tmp_path / f"{name}.wav" for name in changes]
    for path in recordings:
        sf.write(path, voice, 8000)
    assert separate(*recordings)[0] == 0
    for name, change in changes.items():
        change(tmp_path / "out" / f"{name}_est2.wav")
    status, text, errors = separate(*recordings)
    assert status == 1 and "1 done before, 4 failed" in text
    assert errors.count("is of another recording than") == 4


@pytest.mark.parametrize("options", [("--format", "ogg"), ("--no-mixture-consistency",)])
def test_what_is_hardly_in_its_files_is_done_before_as_well(separate, clips, tmp_path, options):
    voice, *_ = clips.values()
    step = np.where(np.arange(len(voice)) < 16000, 0, 10000)
    tone = 9000 * np.sin(2.5 * np.arange(len(voice)))
    samples = {
        "cancels": np.column_stack([voice, -voice]),
        "steps": voice // 4 + step,
        "whistles": (voice // 50 + tone).astype(np.int16),
        "silent": 0 * voice,
    }
    for name, signal in samples.items():
        rate = 48000 if name == "whistles" else 8000  # 19 kHz, which no model hears
        sf.write(tmp_path / f"{name}.wav", signal.astype(np.int16), rate)
    recordings = [tmp_path / f"{name}.wav" for name in samples]
    assert separate(*recordings, *options)[0] == 0
    assert "4 done before, 0 failed" in separate(*recordings, *options)[1]


def test_silent_files_are_not_those_of_a_recording_with_sound(separate, clips, tmp_path):
    voice, *_ = clips.values()
    (tmp_path / "a").mkdir()
    sf.write(tmp_path / "a" / "talk.wav", 0 * voice, 8000)
    sf.write(tmp_path / "talk.wav", voice, 8000)
    assert separate(tmp_path / "a" / "talk.wav")[0] == 0
    status, _, errors = separate(tmp_path / "talk.wav")
    assert status == 1 and "is of another recording than" in errors


def test_a_recording_that_is_named_twice_is_separated_once(separate, talks, monkeypatch):
    monkeypatch.chdir(talks)
    name = sorted(talks.glob("*.wav"))[0].name
    status, text, _ = separate(name, talks / name)
    assert status == 0 and "1 separated" in text


def test_a_name_that_is_not_utf_8_and_a_reader_who_leaves(separator, talks, tmp_path):
    odd = os.fsencode(talks) + b"/caf\xe9.wav"
    shutil.copy(os.fsencode(sorted(talks.glob("*.wav"))[0]), odd)
    command = [sys.executable, "-m", "asteroid_tiny.cli", "separate", odd, "-m", str(separator)]
    command += ["-o", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is not UTF-8; rename it" in done.stderr and "1 failed: " in done.stdout
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_folder_without_recordings_is_named(separate, tmp_path):
    (tmp_path / "none" / "below").mkdir(parents=True)
    status, _, errors = separate(tmp_path / "none")
    assert status == 2 and "no recordings in" in errors


def test_nothing_is_written_over_unasked(separate, talks, tmp_path):
    (tmp_path / "out").mkdir()
    first = sorted(talks.glob("*.wav"))[0]
    in_the_way = tmp_path / "out" / f"{first.stem}_est2.wav"
    in_the_way.write_bytes(b"mine")
    status, _, errors = separate(first)
    assert status == 1 and f"{in_the_way} is in the way" in errors
    assert contents(tmp_path / "out") == {in_the_way.name: b"mine"}

    (talks / "more").mkdir()
    shutil.copy(first, talks / "more")
    status, text, errors = separate(first, talks / "more", out="other")
    assert status == 1 and "would both be written to" in errors and "1 separated" in text

    itself = shutil.copy(first, talks / "x_est1.wav")
    shutil.copy(first, talks / "x.wav")
    before = itself.read_bytes()
    status, _, errors = separate(talks / "x.wav", "--force", out="talks")
    assert status == 0  # x_est1.wav is there, and --force was asked for
    assert itself.read_bytes() != before


def test_a_file_that_may_hold_nobody_is_named(clips, tmp_path, capsys):
    shutil.copy(example_mixture(), tmp_path / "two.flac")
    for speaker, voice in clips.items():
        sf.write(tmp_path / f"{speaker}.wav", voice, 8000)
    told = {}
    for name in ("two", *clips):
        path = next(tmp_path.glob(f"{name}.*"))
        cli.main(["separate", str(path), "--device", "cpu", "-o", str(tmp_path / "out")])
        told[name] = "dB softer and may be nobody" in capsys.readouterr().out
    assert not told["two"] and sum(told.values()) >= 3, "of these four voices one is taken for two"
    for name, nobody in told.items():
        first, second = sorted((tmp_path / "out").glob(f"{name}_est*.wav"))
        power = [np.square(sf.read(file)[0]).sum() for file in (first, second)]
        assert (abs(10 * np.log10(power[0] / power[1])) > FAINT) == nobody


@pytest.mark.parametrize(
    "options, words",
    [
        (["--block", "0.01"], "--block must be at least 0.5 s"),
        (["--block", "inf"], "--block must be at least 0.5 s"),
        (["--peak", "3"], "the peak (--peak) must be from -90 dB to 0"),
        (["--peak", "-91"], "the peak (--peak) must be from -90 dB to 0"),
        (["--peak", "nan"], "the peak (--peak) must be from -90 dB to 0"),
        (["--batch", "0"], "and --batch at least 1"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["-m", "none.pth"], "none.pth"),
    ],
)
def test_bad_options_end_with_status_2_and_one_sentence(separate, talks, capsys, options, words):
    arguments = ["separate", str(talks), "-m", "x.pth", *options]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_ctrl_c_in_the_middle_leaves_no_part(separate, talks, tmp_path, monkeypatch):
    real, calls = blocks.write_tracks, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(blocks, "write_tracks", interrupted)
    status, _, _ = separate(talks)
    assert "the same command goes on" in status
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_name_that_is_too_long_is_told_and_the_others_are_done(separate, talks):
    voice = sorted(talks.glob("*.wav"))[0].read_bytes()
    (talks / f"{250 * 'x'}.wav").write_bytes(voice)
    status, text, errors = separate(talks)
    assert status == 1 and "4 separated" in text and "1 failed" in text
    assert errors.count("error:") == 1
    assert re.search(r"xxx(_est1)?\.wav\b.*: File name too long", errors)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["separate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--model", "--out", "--format", "--block", "--force", "--peak", "Exit status"):
        assert words in text


def test_the_command_line_itself(separator, talks, tmp_path):
    path = next(talks.glob("*.flac"))
    command = [sys.executable, "-W", "ignore", "-m", "asteroid_tiny.cli", "separate", path]
    done = subprocess.run(
        [*command, "-m", separator, "-o", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_hidden_files_of_a_folder_are_no_recordings(talks):
    shutil.copy(next(talks.glob("*.wav")), talks / ".talk_est1.1234.part.wav")
    assert not any(path.name.startswith(".") for path in find_recordings([str(talks)]))
    assert len(find_recordings([str(talks)])) == 4


def test_memory_that_is_too_little_fails_one_recording(separate, talks, monkeypatch):
    first = min(path.name for path in talks.iterdir())

    def too_large(path, *args):
        if path.name == first:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(path, *args)

    original = blocks.open_recording
    monkeypatch.setattr(blocks, "open_recording", too_large)
    status, out, err = separate(talks)
    assert status == 1 and "memory is too little; try a smaller --block" in err
    assert "3 separated" in out


def test_an_error_of_the_program_is_not_taken_for_one_of_memory(separate, talks, monkeypatch):
    def wrong(*_):
        raise RuntimeError("the shapes do not fit")

    monkeypatch.setattr(blocks, "open_recording", wrong)
    with pytest.raises(RuntimeError, match="the shapes"):
        separate(talks)


def test_block_batch_and_peak_are_those_that_are_asked_for(separate, clips, tmp_path, monkeypatch):
    voice, *_ = clips.values()
    sf.write(tmp_path / "talk.wav", np.tile(voice, 3), 8000)  # 12 s
    shapes, forward = [], TinySepformer.forward

    def seen(self, mixtures):
        shapes.append(tuple(mixtures.shape))
        return forward(self, mixtures)

    monkeypatch.setattr(TinySepformer, "forward", seen)
    options = ("--block", 2, "--batch", 4, "--peak", -6)
    status, text, _ = separate(tmp_path / "talk.wav", *options)
    assert status == 0 and "(gain " in text
    assert shapes == [(4, 16000), (4, 16000), (3, 16000)]  # a second from one to the next
    tracks = [sf.read(tmp_path / "out" / f"talk_est{k}.wav")[0] for k in (1, 2)]
    assert np.abs(tracks).max() == pytest.approx(10 ** (-6 / 20), abs=1e-3)


def test_a_namesake_of_another_rate_is_not_taken_for_done(separate, clips, tmp_path):
    voice, *_ = clips.values()
    for rate in (8000, 16000):
        (tmp_path / str(rate)).mkdir()
        sf.write(tmp_path / str(rate) / "talk.wav", voice[:9000], rate)
    assert separate(tmp_path / "8000" / "talk.wav")[0] == 0
    status, _, errors = separate(tmp_path / "16000" / "talk.wav")
    assert status == 1 and "talk_est1.wav is of another recording" in errors


def test_without_a_model_a_recording_gets_the_packaged_one_for_its_rate(clips, tmp_path, capsys):
    voice, *_ = clips.values()
    for rate in (8000, 11025, 16000, 44100):
        sf.write(tmp_path / f"{rate}.wav", resample_poly(voice[:8000] / 2**15, rate, 8000), rate)
    arguments = ["separate", *map(str, sorted(tmp_path.glob("*.wav"))), "--device", "cpu", "-o"]
    cli.main([*arguments, str(tmp_path / "ours")])
    text = capsys.readouterr().out
    assert "4 separated" in text
    for name, rates in ((DEFAULT, (8000, 11025)), (WIDE, (16000, 44100))):
        assert text.count(f"{name} was made for") == 1
        recordings = [str(tmp_path / f"{rate}.wav") for rate in rates]
        cli.main(["separate", *recordings, *arguments[-3:], str(tmp_path / name), "-m", name])
        theirs = contents(tmp_path / name)
        assert len(theirs) == 4 and theirs.items() <= contents(tmp_path / "ours").items()


def test_recordings_that_are_named_like_outputs_are_separated_unless_they_are(
    separate, clips, tmp_path
):
    voice, *_ = clips.values()
    for name in ("in/x.wav", "in/x_est1.wav", "out/y_est1.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sf.write(tmp_path / name, voice, 8000)
    status, text, _ = separate(tmp_path / "in", tmp_path / "out")
    assert status == 0 and "3 separated" in text and "left out" not in text


def test_recordings_are_found_whatever_the_case_of_their_suffix_and_at_any_depth(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name in ("1.WAV", "2.Mp3", "3.aif", "4.txt", "5.m4a"):
        (folder / name).touch()
    wanted = [folder / name for name in ("1.WAV", "2.Mp3", "3.aif", "5.m4a")]
    assert find_recordings([str(folder)]) == wanted
    assert find_recordings([str(tmp_path / "**" / "*.WAV")]) == wanted[:1]
    again = [wanted[1], wanted[0], wanted[1]]
    assert find_recordings([*map(str, again), str(folder)]) == [*again[:2], *wanted[2:]]


def test_of_namesakes_the_second_is_refused_also_if_the_first_was_done_before(
    separate, clips, tmp_path
):
    voice, *_ = clips.values()
    for name in ("a/talk.wav", "b/talk.wav"):
        (tmp_path / name).parent.mkdir()
        sf.write(tmp_path / name, voice, 8000)
    assert separate(tmp_path / "a")[0] == 0
    status, text, errors = separate(tmp_path / "a", tmp_path / "b")
    assert status == 1 and "1 done before" in text and "would both be written to" in errors


def test_a_name_that_is_too_long_fails_alone(separate, clips, tmp_path):
    voice, *_ = clips.values()
    longest = tmp_path / f"{'a' * 240}.wav"  # of which the estimates have names of 250
    for path in (longest, tmp_path / "talk.wav"):
        sf.write(path, voice[:9000], 8000)
    status, text, errors = separate(longest, "y" * 300, tmp_path / "talk.wav")
    assert status == 1 and "2 separated" in text and "yyy" in errors


def test_a_name_is_one_of_a_file_before_it_is_a_glob(tmp_path):
    for name in ("a[1].wav", "a1.wav", "b.wav"):
        (tmp_path / name).touch()
    wanted = [tmp_path / "b.wav", tmp_path / "a[1].wav"]
    assert find_recordings([str(path) for path in wanted]) == wanted
