"""`asteroid-tiny separate` and `info`, as from the command line, on real files."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch
from small import n_parameters, small

from asteroid_tiny import UserError, cli, example_mixture
from asteroid_tiny.data.kaldi import decode
from asteroid_tiny.longform import audio, blocks
from asteroid_tiny.longform.folder import FAINT, find_recordings
from asteroid_tiny.weights import told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pth"
    small().save(path)
    return path


@pytest.fixture
def talks(clips, tmp_path):
    """A folder with a wav file of each of three speakers, and an .mp3 of the fourth."""
    folder = tmp_path / "talks"
    folder.mkdir()
    for (speaker, samples), suffix in zip(clips.items(), ["wav", "wav", "flac", "mp3"]):
        sf.write(folder / f"{speaker}.{suffix}", samples, 8000)
    return folder


@pytest.fixture
def separate(model, tmp_path, capsys):
    """Runs the subcommand into the folder out, and gives exit status, stdout and stderr."""

    def run(*arguments, out="out"):
        status = 0
        try:
            cli.main(["separate", *map(str, arguments), "-m", str(model), "--device", "cpu",
                      "-o", str(tmp_path / out)])  # fmt: skip
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


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
        sf.write(path, np.zeros(32000), 8000)
    mine = contents(out)
    status, text, _ = separate(talks)
    assert status == 0 and "4 done before" in text
    assert contents(out) == mine
    status, text, _ = separate(talks, "--force")
    assert status == 0 and contents(out) == before


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


def test_a_recording_damaged_inside_is_refused_and_its_namesake_is_done(separate, clips, tmp_path):
    voice, *_ = clips.values()
    path = tmp_path / "hole.ogg"
    sf.write(path, np.tile(voice, 6), 8000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    sf.write(tmp_path / "hole.wav", voice, 8000)
    status, text, errors = separate(path, tmp_path / "hole.wav")
    assert status == 1 and "hole.ogg is damaged: only" in errors and "1 separated" in text
    written, _ = sf.read(tmp_path / "out" / "hole_est1.wav")
    assert len(written) == len(voice)


def test_samples_that_are_no_number_are_refused_by_name(separate, tmp_path):
    sf.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 8000, subtype="FLOAT")
    status, _, errors = separate(tmp_path / "nan.wav")
    assert status == 1 and "nan.wav holds samples that are NaN" in errors


def test_estimates_of_more_speakers_are_not_taken_for_those_of_fewer(separate, talks, tmp_path):
    first = sorted(talks.glob("*.wav"))[0]
    assert separate(first)[0] == 0
    (tmp_path / "out" / f"{first.stem}_est3.wav").write_bytes(b"of a third speaker")
    for options in ([], ["--force"]):
        status, _, errors = separate(first, *options)
        assert status == 1 and "a model of more speakers" in errors


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


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("suffix", ["m4a", "mp3"])
def test_a_namesake_whose_length_is_not_told_is_not_taken_for_done(separate, talks, suffix):
    source = sorted(talks.glob("*.wav"))[0]
    for folder, seconds in (("a", "1.5"), ("b", "3")):
        (talks / folder).mkdir()
        command = ["ffmpeg", "-v", "error", "-i", source, "-t", seconds]
        subprocess.run([*command, talks / folder / f"talk.{suffix}"], check=True)
    for done in ("1 separated", "1 done before"):
        assert done in separate(talks / "a" / f"talk.{suffix}")[1]
    status, _, errors = separate(talks / "b" / f"talk.{suffix}")
    assert status == 1 and "talk_est1.wav is of another recording" in errors


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_what_ffmpeg_finds_damaged_is_refused_and_what_ends_early_is_told(
    separate, talks, tmp_path
):
    source = sorted(talks.glob("*.wav"))[0]
    command = ["ffmpeg", "-v", "error", "-stream_loop", "5", "-i", source]
    subprocess.run([*command, "-c:a", "aac", "-ar", "44100", talks / "hole.m4a"], check=True)
    content = bytearray((talks / "hole.m4a").read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    (talks / "hole.m4a").write_bytes(content)
    subprocess.run([*command, "-c:a", "libopus", talks / "cut.webm"], check=True)
    content = (talks / "cut.webm").read_bytes()
    (talks / "cut.webm").write_bytes(content[: len(content) // 2])
    subprocess.run([*command, "-c:a", "aac", talks / "end.aac"], check=True)
    (talks / "end.aac").write_bytes((talks / "end.aac").read_bytes()[:-57])
    status, text, errors = separate(*(talks / name for name in ("hole.m4a", "cut.webm", "end.aac")))
    assert status == 1 and "hole.m4a is damaged" in errors and "2 separated" in text
    assert not list((tmp_path / "out").glob("hole*"))
    assert "it may be incomplete; ffmpeg says: File ended prematurely" in text
    assert sf.info(tmp_path / "out" / "end_est1.wav").duration == pytest.approx(24, abs=0.3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_playlist_reads_no_other_file(separate, talks, tmp_path):
    private = sorted(talks.glob("*.mp3"))[0]
    lines = "#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:10,", f"file://{private}"
    for name, end in (("ends.mp4", ["#EXT-X-ENDLIST"]), ("goes_on.mp4", [])):
        (tmp_path / name).write_text("\n".join([*lines, *end, ""]))
        status, _, errors = separate(tmp_path / name)
        assert status == 1 and f"{name} cannot be read: its format is none that" in errors
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_wav_file_whose_recorder_died_is_read_whole(separate, talks, tmp_path):
    content = bytearray(sorted(talks.glob("*.wav"))[0].read_bytes())
    data = content.index(b"data")
    content[4:8], content[data + 4 : data + 8] = (36).to_bytes(4, "little"), bytes(4)
    (tmp_path / "died.wav").write_bytes(content)
    assert sf.info(tmp_path / "died.wav").frames == 0
    assert separate(tmp_path / "died.wav")[0] == 0
    assert sf.info(tmp_path / "out" / "died_est1.wav").frames == 32000


def test_a_recording_that_is_absurdly_loud_is_named(separate, tmp_path):
    sf.write(tmp_path / "loud.wav", np.full(8000, 3e6, np.float32), 8000, subtype="FLOAT")
    status, _, errors = separate(tmp_path / "loud.wav")
    assert status == 1 and "loud.wav holds samples beyond 1e+06" in errors


def test_a_recording_that_is_named_twice_is_separated_once(separate, talks, monkeypatch):
    monkeypatch.chdir(talks)
    name = sorted(talks.glob("*.wav"))[0].name
    status, text, _ = separate(name, talks / name)
    assert status == 0 and "1 separated" in text


def test_a_name_that_is_not_utf_8_and_a_reader_who_leaves(model, talks, tmp_path):
    odd = os.fsencode(talks) + b"/caf\xe9.wav"
    shutil.copy(os.fsencode(sorted(talks.glob("*.wav"))[0]), odd)
    command = [sys.executable, "-m", "asteroid_tiny.cli", "separate", odd, "-m", str(model)]
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


def test_globs_formats_rates_and_channels(separate, tmp_path, talks):
    stereo = np.random.default_rng(0).normal(0, 0.1, (22050 * 3, 2))
    sf.write(talks / "music.flac", stereo, 22050)
    status, text, _ = separate(talks / "*.flac", "--format", "ogg", "--block", 2, "--peak", -3)
    assert status == 0
    assert "the mean of its 2 channels was separated" in text and "2 separated" in text
    info = sf.info(tmp_path / "out" / "music_est2.ogg")
    assert (info.samplerate, info.channels, info.frames) == (22050, 1, 22050 * 3)


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
        (["--peak", "3"], "--peak must be 0 dB"),
        (["--peak", "nan"], "--peak must be 0 dB"),
        (["--device", "toaster"], "--device toaster cannot be used"),
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
    from asteroid_tiny.longform import blocks

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


STAND_IN = """#!{python}
import io, pathlib, signal, struct, sys
import soundfile
signal.alarm(20)  # rather than wait without end
path = sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")
samples, rate = soundfile.read(io.BytesIO(pathlib.Path(path).read_bytes()), dtype="float32")
sys.stdout.buffer.write(struct.pack(">4s5I", b".snd", 24, 0xFFFFFFFF, 6, rate, 1))
sys.stdout.buffer.write(samples.astype(">f4").tobytes())
"""


def test_what_came_through_ffmpeg_is_done_before_as_well(separate, talks, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    source = sorted(talks.glob("*.wav"))[0].rename(tmp_path / "talk.raw")
    for done in ("1 separated", "1 done before"):
        status, text, errors = separate(source)
        assert status == 0 and done in text, errors
    assert sf.info(tmp_path / "out" / "talk_est2.wav").frames == 32000


def test_a_name_that_is_too_long_is_told_and_the_others_are_done(separate, talks):
    voice = sorted(talks.glob("*.wav"))[0].read_bytes()
    (talks / f"{250 * 'x'}.wav").write_bytes(voice)
    status, text, errors = separate(talks)
    assert status == 1 and "4 separated" in text and "1 failed" in text
    assert errors.count("error:") == 1
    assert re.search(r"xxx(_est1)?\.wav\b.*: File name too long", errors)


def test_a_recording_that_may_not_be_read_is_told_so(separate, talks, monkeypatch):
    def closed(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(audio, "open", closed, raising=False)
    path = sorted(talks.glob("*.wav"))[0]
    status, _, errors = separate(path)
    assert status == 1 and f"{path} cannot be read: Permission denied" in errors


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_reads_what_soundfile_does_not(separate, talks, tmp_path):
    source = sorted(talks.glob("*.wav"))[0]
    command = ["ffmpeg", "-v", "error", "-i", source, "-ar", "44100", "-ac", "2", "-c:a", "aac"]
    subprocess.run([*command, tmp_path / "m.m4a"], check=True)
    (tmp_path / "bad.m4a").write_bytes(b"no sound" * 100)
    status, text, errors = separate(tmp_path / "m.m4a", tmp_path / "bad.m4a")
    assert status == 1 and "bad.m4a cannot be read" in errors and "2 channels" in text
    assert "1 done before" in separate(tmp_path / "m.m4a")[1]
    tracks = [sf.read(tmp_path / "out" / f"m_est{k}.wav")[0] for k in (1, 2)]
    assert sf.info(tmp_path / "out" / "m_est1.wav").samplerate == 44100
    assert len(tracks[0]) == pytest.approx(4 * 44100, abs=4096)
    mixture = np.interp(np.arange(len(tracks[0])) / 44100, np.arange(32000) / 8000,
                        sf.read(source)[0])  # fmt: skip
    assert np.corrcoef(sum(tracks), mixture)[0, 1] > 0.9


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_flac_that_came_through_a_pipe_is_read_whole(separate, talks, tmp_path):
    source = sorted(talks.glob("*.wav"))[0]
    command = ["ffmpeg", "-v", "error", "-i", source, "-f", "flac", "-"]
    piped = subprocess.run(command, check=True, capture_output=True).stdout
    (tmp_path / "piped.flac").write_bytes(piped)
    assert sf.info(tmp_path / "piped.flac").frames > 2**60
    status, _, _ = separate(tmp_path / "piped.flac")
    assert status == 0 and sf.info(tmp_path / "out" / "piped_est2.wav").frames == 32000
    with pytest.raises(UserError, match="piped.flac does not tell its length"):
        decode(tmp_path / "piped.flac")


def test_a_raw_file_is_named_and_no_folder_is_searched_for_it(separate, talks):
    raw = talks / "samples.raw"
    raw.write_bytes(bytes(16000))
    status, text, errors = separate(raw, talks)
    assert status == 1 and "samples.raw cannot be read" in errors
    assert "4 separated" in text and "1 failed" in text
    assert separate(talks, out="again")[0] == 0


def test_info_tells_what_a_model_is(model, capsys):
    cli.main(["info", str(model)])
    text = capsys.readouterr().out
    for words in (
        f"{n_parameters(small()):,} parameters",
        "2, at 8000 Hz",
        "GMAC a second",
        "MB of tensors for 4 s",
    ):
        assert words in text


@pytest.mark.parametrize(
    "about",
    [
        {"training": "Libri2Mix"},
        {"training": None},
        {"training": {"data": "Libri2Mix"}},
        {"metrics": 12.3},
        {"metrics": {"si_sdr_i": "12.3 dB", "stoi": 0.9}},
    ],
    ids=str,
)
def test_whatever_a_model_tells_of_itself_it_is_told_and_used(about, tmp_path, capsys, talks):
    small().save_pretrained(tmp_path / "told", **about)
    cli.main(["info", str(tmp_path / "told")])
    assert "trained on      not told" in capsys.readouterr().out
    path = sorted(talks.glob("*.wav"))[0]
    cli.main(["separate", str(path), "-m", str(tmp_path / "told"), "-o", str(tmp_path / "o")])
    assert len(contents(tmp_path / "o")) == 2


@pytest.mark.parametrize("fb_name", ["param_sinc", "torch_stft"])
def test_info_tells_of_models_with_any_filterbank(fb_name, tmp_path, capsys):
    small(fb_name=fb_name).save(tmp_path / "model.pth")
    cli.main(["info", str(tmp_path / "model.pth")])
    text = capsys.readouterr().out
    assert "operations" in text and ("GMAC" in text or "not counted with this" in text)


def test_the_receptive_field_is_all_that_the_model_is_given_as_info_says(model, capsys):
    cli.main(["info", str(model)])
    assert "receptive field all that it is given" in capsys.readouterr().out
    mixture = torch.randn(1, 8000, requires_grad=True)
    small()(mixture)[0, 0, :100].sum().backward()
    assert mixture.grad.abs().min() > 0


def test_the_memory_that_info_tells_grows_with_the_length(model):
    from asteroid_tiny.inspection import open_model, peak_memory

    network, _ = open_model(model)
    short, long = (peak_memory(network, seconds) for seconds in (1, 4))
    n_bytes = 4 * 16 * 8000 / 8  # of one second of frames inside the masker
    assert short > 4 * n_bytes and 3 < long / short < 5


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["separate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--model", "--out", "--format", "--block", "--force", "--peak", "Exit status"):
        assert words in text


def test_the_command_line_itself(model, talks, tmp_path):
    path = next(talks.glob("*.flac"))
    command = [sys.executable, "-W", "ignore", "-m", "asteroid_tiny.cli", "separate", path]
    done = subprocess.run(
        [*command, "-m", model, "-o", tmp_path / "out"], capture_output=True, text=True
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


def test_numbers_of_strangers_are_numbers():
    metrics = {"si_sdr_i": 10**400, "sdr_i": True, "stoi": float("nan"), "sdr": 5.0}
    kept = told({"metrics": metrics, "training": {"steps": 5, "hours": "many", "init_from": "x"}})
    assert kept == {"metrics": {"sdr": 5.0}, "training": {"steps": 5}}
