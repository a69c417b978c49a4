"""Recordings as people have them: of any format, damaged, cut short, read by ffmpeg or not."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf

from asteroid_tiny import UserError
from asteroid_tiny.data.kaldi import decode
from asteroid_tiny.longform import audio

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


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


@needs_ffmpeg
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


@needs_ffmpeg
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


@needs_ffmpeg
def test_mp3_is_read_to_its_end_whatever_length_it_tells(separate, talks, tmp_path):
    source = sorted(talks.glob("*.wav"))[0]
    command = ["ffmpeg", "-v", "error", "-stream_loop", "4", "-i", source]
    for name, more in (("vbr", ["-q:a", "6", "-write_xing", "0"]), ("cbr", ["-b:a", "32k"])):
        subprocess.run([*command, *more, talks / f"{name}.mp3"], check=True)
    assert abs(sf.info(talks / "vbr.mp3").duration - 20) > 5, "what it tells is an estimate"
    content = (talks / "cbr.mp3").read_bytes()
    (talks / "start.mp3").write_bytes(content[5001:])  # from amid a frame on
    (talks / "half.mp3").write_bytes(content[: len(content) // 2])
    half = len(content) // 2
    (talks / "hole.mp3").write_bytes(content[:half] + bytes(900) + content[half + 900 :])
    names = "vbr", "cbr", "start", "half", "hole"
    status, text, errors = separate(*(talks / f"{name}.mp3" for name in names))
    assert status == 1 and "4 separated" in text and "hole.mp3 is damaged" in errors
    lengths = [sf.info(tmp_path / "out" / f"{name}_est1.wav").duration for name in names[:4]]
    assert lengths == pytest.approx([20, 20, 19, 10], abs=0.5)
    assert text.count("may be incomplete") == 1
    missing = re.search(r"half.*it may be incomplete; it ends (.+) s before the length", text)
    assert float(missing[1]) == pytest.approx(20 - lengths[3], abs=0.06)


def test_mp3_that_ends_early_is_told_without_ffmpeg_too(separate, talks, monkeypatch):
    monkeypatch.setattr(audio.shutil, "which", lambda _: None)
    source = sorted(talks.glob("*.mp3"))[0]
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    status, text, _ = separate(source)
    assert status == 0 and re.search(r"it may be incomplete; it ends [12]\.. s", text)


@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_a_wav_file_that_was_cut_short_is_told(separate, clips, tmp_path, container):
    voice, *_ = clips.values()
    for name in ("whole", "cut", "pipe"):
        sf.write(tmp_path / f"{name}.wav", voice, 8000, format=container)
    content = bytearray((tmp_path / "cut.wav").read_bytes())
    (tmp_path / "cut.wav").write_bytes(content[: -len(voice)])  # of 2 bytes a sample
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff" * 4
    (tmp_path / "pipe.wav").write_bytes(content)
    status, text, _ = separate(*(tmp_path / f"{name}.wav" for name in ("whole", "cut", "pipe")))
    assert status == 0 and text.count("may be incomplete") == 1
    half = len(voice) / 16000
    line = next(line for line in text.splitlines() if "cut.wav" in line)
    assert f"it ends {half:.1f} s before the length that it tells" in line
    assert sf.info(tmp_path / "out" / "cut_est1.wav").duration == pytest.approx(half, abs=0.01)


def test_a_note_of_odd_length_in_a_wav_file_does_not_hide_that_it_was_cut(clips, tmp_path):
    voice, *_ = clips.values()
    path = tmp_path / "noted.wav"
    sf.write(path, voice, 8000)
    content = path.read_bytes()
    data = content.index(b"data")
    note = b"note" + (3).to_bytes(4, "little") + b"abc\0"
    path.write_bytes(content[:data] + note + content[data : -len(voice)])
    with audio.open_recording(path) as recording:
        assert sum(map(len, recording.pieces())) == len(voice) // 2
    assert "it ends 2.0 s before the length that it tells" in recording.warning


def test_a_wav_file_that_is_a_header_alone_fails_alone(separate, clips, tmp_path):
    voice, *_ = clips.values()
    for name in ("a_header", "whole"):
        sf.write(tmp_path / f"{name}.wav", voice, 8000)
    (tmp_path / "a_header.wav").write_bytes((tmp_path / "a_header.wav").read_bytes()[:44])
    status, text, errors = separate(tmp_path / "a_header.wav", tmp_path / "whole.wav")
    assert status == 1 and "1 separated" in text and "a_header.wav holds no samples" in errors


@needs_ffmpeg
def test_a_playlist_reads_no_other_file(separate, talks, tmp_path):
    private = sorted(talks.glob("*.mp3"))[0]
    lines = "#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:10,", f"file://{private}"
    for name, end in (("ends.mp4", ["#EXT-X-ENDLIST"]), ("goes_on.mp4", [])):
        (tmp_path / name).write_text("\n".join([*lines, *end, ""]))
        status, _, errors = separate(tmp_path / name)
        assert status == 1 and f"{name} cannot be read: its format is none that" in errors
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@needs_ffmpeg
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


def test_globs_formats_rates_and_channels(separate, tmp_path, talks):
    stereo = np.random.default_rng(0).normal(0, 0.1, (22050 * 3, 2))
    sf.write(talks / "music.flac", stereo, 22050)
    status, text, _ = separate(talks / "*.flac", "--format", "ogg", "--block", 2, "--peak", -3)
    assert status == 0
    assert "the mean of its 2 channels was separated" in text and "2 separated" in text
    info = sf.info(tmp_path / "out" / "music_est2.ogg")
    assert (info.samplerate, info.channels, info.frames) == (22050, 1, 22050 * 3)


STAND_IN = """#!{python}
import io, pathlib, signal, struct, sys
import soundfile
signal.alarm(20)  # rather than wait without end
if "0:a:1" in sys.argv:
    sys.exit("it has one sound track")
path = sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")
samples, rate = soundfile.read(io.BytesIO(pathlib.Path(path).read_bytes()), dtype="float32")
sys.stdout.buffer.write(struct.pack(">4s5I", b".snd", 24, 0xFFFFFFFF, 6, rate, 1))
sys.stdout.buffer.write(samples.astype(">f4").tobytes())
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a script into the place of ffmpeg."""

    def install(script):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "ffmpeg").write_text(script)
        (tmp_path / "bin" / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return install


def test_what_came_through_ffmpeg_is_done_before_as_well(separate, talks, tmp_path, stand_in):
    stand_in(STAND_IN.format(python=sys.executable))
    source = sorted(talks.glob("*.wav"))[0].rename(tmp_path / "talk.raw")
    for done in ("1 separated", "1 done before"):
        status, text, errors = separate(source)
        assert status == 0 and done in text, errors
    assert sf.info(tmp_path / "out" / "talk_est2.wav").frames == 32000


def test_a_recording_whose_reader_is_killed_is_not_taken_for_whole(
    separate, talks, tmp_path, stand_in
):
    killed = "sys.stdout.flush()\nsignal.raise_signal(signal.SIGKILL)\n"
    stand_in(STAND_IN.format(python=sys.executable) + killed)
    source = sorted(talks.glob("*.wav"))[0].rename(tmp_path / "talk.raw")
    status, _, errors = separate(source)
    assert status == 1 and "talk.raw is damaged: it ends too early" in errors
    assert not (tmp_path / "out" / "talk_est1.wav").exists()


@needs_ffmpeg
def test_a_colon_in_a_name_is_none_of_an_address(separate, talks, monkeypatch):
    monkeypatch.chdir(talks)
    sorted(talks.glob("*.mp3"))[0].rename("12:30 call.mp3")
    status, text, _ = separate("12:30 call.mp3")
    assert status == 0 and "1 separated" in text


def test_a_recording_that_may_not_be_read_is_told_so(separate, talks, monkeypatch):
    def closed(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(audio, "open", closed, raising=False)
    path = sorted(talks.glob("*.wav"))[0]
    status, _, errors = separate(path)
    assert status == 1 and f"{path} cannot be read: Permission denied" in errors


@needs_ffmpeg
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


@needs_ffmpeg
def test_the_first_of_several_sound_tracks_is_separated_and_that_is_told(separate, talks, tmp_path):
    first, second = sorted(talks.glob("*.wav"))
    command = ["ffmpeg", "-v", "error", "-i", first, "-i", second, "-f", "lavfi", "-i"]
    command += ["testsrc=d=4:s=64x64:r=5", "-map", "2:v", "-c:v", "mpeg4"]
    silence = tmp_path / "silence.wav"
    sf.write(silence, np.zeros(32000), 8000)
    command[command.index("-f") : command.index("-f")] = ["-i", silence]
    command[command.index("2:v")] = "3:v"
    sounds = {"one": ["0:a"], "silent": ["2:a", "0:a"], "two": ["0:a", "1:a"], "none": []}
    for name, maps in sounds.items():
        maps = [option for sound in maps for option in ("-map", sound)]
        subprocess.run([*command, *maps, "-c:a", "aac", tmp_path / f"{name}.mp4"], check=True)
    told = "it has several sound tracks; the first of them was separated"
    status, text, errors = separate(*sorted(tmp_path.glob("*.mp4")))
    assert status == 1 and "none.mp4 cannot be read: it holds no sound" in errors
    found = [line for line in text.splitlines() if ".mp4: " in line]
    assert [told in line for line in found] == [False, True, True] and "it is silent" in found[1]
    tracks = [sf.read(tmp_path / "out" / f"two_est{k}.wav")[0] for k in (1, 2)]
    assert np.corrcoef(sum(tracks)[:32000], sf.read(first)[0])[0, 1] > 0.9


@needs_ffmpeg
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


def test_channels_that_cancel_and_silence_are_told(separate, clips, tmp_path):
    voice, *_ = clips.values()
    opposite = np.stack([voice, -(voice * 0.95).astype(np.int16)], axis=-1)
    sf.write(tmp_path / "opposite.wav", opposite, 8000)
    sf.write(tmp_path / "stereo.wav", np.stack([voice, voice // 2], axis=-1), 8000)
    sf.write(tmp_path / "silent.wav", np.zeros(8000), 8000)
    offsets = voice[:, None] / 65536 + np.array([0.2, -0.2])
    sf.write(tmp_path / "offsets.wav", offsets, 8000)
    names = "opposite", "stereo", "silent", "offsets"
    lines = separate(*(tmp_path / f"{name}.wav" for name in names))[1]
    opposite, stereo, silent, offsets = (line for line in lines.splitlines() if "_est1.wav" in line)
    assert "its channels cancel each other" in opposite and "it is silent" in silent
    assert (
        "mean of its 2 channels was separated" in stereo
        and "cancel each other" not in stereo + offsets
    )
