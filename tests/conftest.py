"""What several test files need: the embedded speech, small data dirs, errors of one sentence."""

import contextlib
import itertools
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recipes
import soundfile as sf
import torch
from small import small

from asteroid_tiny import cli
from asteroid_tiny.data import SpeechDir
from asteroid_tiny.errors import UserError
from asteroid_tiny.summary import METRICS, summarise

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a core for each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "egs" / "minispeech" / "TinySepformer" / "data"


@pytest.fixture
def refused():
    """A context in which a `UserError` of one line must be raised that contains all words given."""

    @contextlib.contextmanager
    def context(*words):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert message.isprintable(), f"more than a line: {message!r}"
        for word in words:
            assert str(word) in message, message

    return context


@pytest.fixture(scope="session")
def pack():
    """Path of the embedded speech pack, with its data dirs train, valid and test."""
    return DATA


@pytest.fixture(scope="session")
def little_speech(pack, tmp_path_factory):
    """A folder of data dirs with 20 s of three speakers a split, as wav files."""
    return recipes.few_minutes(pack, tmp_path_factory.mktemp("little"))


@pytest.fixture(scope="session")
def valid_speech(pack):
    """The validation split of the pack: four speakers, who stay decoded for all tests."""
    return SpeechDir(pack / "valid", 8000)


@pytest.fixture(scope="session")
def clips(valid_speech):
    """Four seconds of each speaker of the validation split, {speaker: int16 samples}."""
    found = {}
    for speaker, utterances in valid_speech.by_speaker.items():
        long = next(u for u in utterances if valid_speech.utterances[u].length >= 32000)
        samples = valid_speech.read(long, 0, 32000)
        found[speaker] = np.round(samples * 32768).astype(np.int16)
    return found


@pytest.fixture(scope="session")
def summary():
    """The summary of an evaluation of six mixtures at 8 kHz, as `evaluate` returns it."""
    values = np.random.default_rng(0).normal(2, 1, (6, len(METRICS)))
    table = pd.DataFrame(values, columns=list(METRICS))
    table["speakers"] = ["a b", "a c", "a d", "b c", "b d", "c d"]
    table["genders"], table["same_production"] = "f m", None
    return summarise(table, 8000)


@pytest.fixture
def make_dir(tmp_path):
    """Writes a Kaldi data dir: a function of recordings and lines of tables, giving its path."""

    def make(recordings, name="speech", rate=8000, suffix="wav", tables=None, **options):
        """One speaker a recording; `tables` gives tables another content, or none for None.

        Args:
            recordings (dict): Samples by recording, which is the name of its speaker, too.
            tables (dict): Text by name of the table.
            **options: For `soundfile.write`.
        """
        folder = tmp_path / name
        folder.mkdir()
        for key, samples in recordings.items():
            sf.write(folder / f"{key}.{suffix}", samples, rate, **options)
        content = {
            "wav.scp": "".join(f"{key} {key}.{suffix}\n" for key in recordings),
            "utt2spk": "".join(f"{key} {key}\n" for key in recordings),
            **(tables or {}),
        }
        for table, text in content.items():
            if text is not None:
                (folder / table).write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def run_folder():
    """Gives the folder of a run of a recipe, a new one at every call; they go in the end."""
    folders = []

    def make(recipe):
        name = f"test-{os.getpid()}-{time.monotonic_ns()}"
        folders.append(ROOT / "egs" / recipe / "TinySepformer" / "exp" / name)
        return folders[-1]

    yield make
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def separator(tmp_path_factory):
    """Path of a small model of two speakers at 8 kHz."""
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
def separate(separator, tmp_path, capsys):
    """Runs the subcommand into the folder out, and gives exit status, stdout and stderr."""

    def run(*arguments, out="out"):
        status = 0
        try:
            cli.main(["separate", *map(str, arguments), "-m", str(separator), "--device", "cpu",
                      "-o", str(tmp_path / out)])  # fmt: skip
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def talk(valid_speech):
    """Half a minute of real speech."""
    utterances = itertools.islice(valid_speech.utterances, 15)
    return np.concatenate([valid_speech.read(u) for u in utterances])[: 30 * 8000]
