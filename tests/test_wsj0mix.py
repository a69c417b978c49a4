"""WSJ0-mix: a tree with its exact layout, filled with the embedded speech, through the stages."""

import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from recipes import prepare, run_stages, settings_of

from asteroid_tiny.data import DynamicMixtures, SpeechDir, mixed, wsj0mix
from asteroid_tiny.preparation import open_list, open_split
from asteroid_tiny.recipe import train_model

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"train": "tr", "valid": "cv", "test": "tt"}
#: Speakers of WSJ0 by part; those of cv are those of tr.
SPEAKERS = {"tr": ["011", "01a", "02b"], "cv": ["011", "01a", "02b"], "tt": ["050", "22g", "44x"]}


@pytest.fixture(scope="module")
def corpus(clips, tmp_path_factory):
    """A folder with 2speakers and 3speakers, each with two mixtures a part, 1 to 1.5 s long."""
    root = tmp_path_factory.mktemp("wsj0-mix")
    for n_src in (2, 3):
        for part, speakers in SPEAKERS.items():
            for i in range(2):
                voices = list(clips.values())[: n_src + 1][-n_src:]
                write_mixture(root, n_src, part, speakers, i, voices)
    return root


def write_mixture(root, n_src, part, speakers, i, voices):
    """Writes mix, s1, s2 and so on as WSJ0-mix's script does: scaled together, then rounded."""
    folder = root / f"{n_src}speakers" / "wav8k" / "min" / part
    names, sources = [], []
    length = 8001 + 3999 * i
    for k in range(n_src):
        level = (1.3053, -1.3053, 0)[k]
        names += [f"{speakers[k]}c02{i}{k}", f"{level:g}"]
        clip = voices[k][5000 * i :][:length] / 32768
        sources.append(0.05 * 10 ** (level / 20) * clip / clip.std())
    sources = np.array(sources)
    scale = 0.9 / np.abs([*sources, sources.sum(0)]).max()
    for name, samples in zip(
        ("mix", *(f"s{k}" for k in range(1, n_src + 1))), (sources.sum(0), *sources)
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = folder / name / f"{'_'.join(names)}.wav"
        sf.write(path, np.round(samples * scale * 32768).astype(np.int16), 8000)


@pytest.fixture
def prepared(corpus, tmp_path):
    """Runs stages 0 and 1 with options: a function giving the run's folder and settings."""
    return lambda **options: prepare(tmp_path, "wsj0-mix", **{"speech": str(corpus), **options})


@pytest.mark.parametrize("n_src", [2, 3])
def test_mixtures_are_those_on_disk(corpus, prepared, capsys, n_src):
    exp_dir, settings = prepared(n_src=n_src, dynamic_mixing=False)
    for split, part in SPLITS.items():
        listed = open_list(exp_dir, settings, split)
        assert len(listed) == 2 and not listed.is_of_one_length()
        for (mixture, sources), at in zip(listed, listed.mixtures):
            folder = corpus / f"{n_src}speakers" / "wav8k" / "min" / part
            stored = {
                path.parent.name: sf.read(path, dtype="float32")[0]
                for path in folder.glob(f"*/{at.mixture_id}.wav")
            }
            for k, source in enumerate(sources, 1):
                assert np.array_equal(source, stored[f"s{k}"])
            steps = np.abs(mixture.numpy() - stored["mix"]).max() * 32768
            assert steps <= (n_src + 1) / 2 + 0.01  # of rounding
    assert "differ" not in capsys.readouterr().out


def test_speakers_are_those_of_the_names(prepared):
    exp_dir, settings = prepared(n_src=3)
    assert open_list(exp_dir, settings, "test").describe(0)["speakers"] == ("050", "22g", "44x")
    assert list(open_split(exp_dir, settings, "train").by_speaker) == SPEAKERS["tr"]


def test_training_draws_from_the_sources_of_tr_alone(corpus, prepared, monkeypatch):
    exp_dir, settings = prepared()
    read = []
    real = SpeechDir.read
    monkeypatch.setattr(
        SpeechDir, "read", lambda self, key, *a: read.append(self.wavs[key]) or real(self, key, *a)
    )
    drawn = DynamicMixtures(open_split(exp_dir, settings, "train"), 2, 4000, seed=0)
    groups = defaultdict(int)
    for i in range(20):
        mixture, sources = drawn[i]
        groups[tuple(read[-2:])] += 1
    assert {Path(path).parents[1].name for path in read} == {"tr"}
    assert len(groups) > 2, "other pairs than those of the list"


def test_training_without_dynamic_mixing_is_on_the_list(prepared, refused):
    exp_dir, settings = prepared(dynamic_mixing=False)
    path = exp_dir / "lists" / "train.csv"
    path.write_text(path.read_text().splitlines()[0])
    with refused(path, "holds no mixture"):
        train_model(exp_dir, settings)


def test_files_of_another_rate_than_their_folders_are_refused(corpus, prepared, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    for path in copy.rglob("*.wav"):
        sf.write(path, sf.read(path, dtype="int16")[0], 16000)
    with refused("has 16000 Hz where 8000 Hz are needed"):
        prepared(speech=str(copy))


def test_counts_other_than_the_official_are_reported(prepared, capsys):
    prepared()
    said = capsys.readouterr().out
    for split, count in (("train", 20000), ("valid", 5000), ("test", 3000)):
        assert f"note: {split} has 2 mixtures, the official corpus has {count}" in said
    assert "speakers of valid may be those of train" in said


@pytest.fixture
def copy(corpus, tmp_path):
    """A corpus to break."""
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_mixtures_that_are_not_sums_are_reported(copy, prepared, capsys, subtype):
    for path in (copy / "2speakers" / "wav8k" / "min" / "tt").rglob("*.wav"):
        samples, _ = sf.read(path)
        sf.write(path, samples / 2 if path.parent.name == "mix" else samples, 8000, subtype)
    prepared(speech=str(copy))
    said = capsys.readouterr().out
    assert said.count("steps of 16 bits from the sums") == 1 and "tt/mix" in said


@pytest.mark.parametrize("part, track", [("tr", "s1"), ("cv", "mix"), ("tt", "s2")])
def test_a_file_that_is_cut_short_is_refused(copy, prepared, refused, part, track):
    folder = copy / "2speakers" / "wav8k" / "min" / part
    path = sorted((folder / track).glob("*"))[-1]
    path.write_bytes(path.read_bytes()[:9000])
    with refused(path.name, "cut short"):
        prepared(speech=str(copy))


def test_a_source_is_as_long_as_the_others_where_sums_are_not_compared(
    copy, prepared, refused, monkeypatch
):
    monkeypatch.setattr(mixed, "check_sums", lambda *_: 0)
    path = sorted((copy / "2speakers" / "wav8k" / "min" / "tr" / "s2").glob("*"))[0]
    path.write_bytes(path.read_bytes()[:9000])
    with refused(path, "4478 samples", "there are 8001"):
        prepared(speech=str(copy))


def test_what_a_mac_leaves_beside_each_file_is_no_mixture(copy, prepared):
    for path in list(copy.rglob("*.wav")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    exp_dir, settings = prepared(speech=str(copy))
    assert len(open_list(exp_dir, settings, "test")) == 2


@pytest.mark.parametrize("source", ["s1", "s2"])
def test_a_missing_source_is_named(copy, prepared, refused, source):
    path = next((copy / "2speakers" / "wav8k" / "min" / "cv" / source).glob("*"))
    path.unlink()
    with refused(path, "is missing"):
        prepared(speech=str(copy))


def rename_speaker(part, old, new):
    for path in list(part.glob(f"*/*{old}*")):
        path.rename(path.with_name(path.name.replace(old, new)))


def test_a_speaker_of_tt_who_is_in_tr_is_refused(copy, prepared, refused):
    rename_speaker(copy / "2speakers" / "wav8k" / "min" / "tt", "050", "011")
    with refused("speaker '011' is in train and in test"):
        prepared(speech=str(copy))


def test_a_speaker_of_tt_who_is_in_cv_alone_is_refused(copy, prepared, refused):
    rename_speaker(copy / "2speakers" / "wav8k" / "min" / "cv", "011", "050")
    with refused("speaker '050' is in valid and in test"):
        prepared(speech=str(copy))


@pytest.mark.parametrize(
    "options, words, hint",
    [
        ({"speech": "/none"}, "no wav file in /none/2speakers/wav8k/min/tr/s1", "as --speech"),
        ({"mode": "max"}, "2speakers/wav8k/max/tr/s1", "has 2speakers/wav8k/min, "),
        ({"sample_rate": 16000}, "2speakers/wav16k/min/tr/s1", "see --n_src, --sample_rate"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named(prepared, refused, options, words, hint):
    with refused(words, hint):
        prepared(**options)


def test_a_part_that_is_not_there_is_named(copy, prepared, refused):
    shutil.rmtree(copy / "2speakers" / "wav8k" / "min" / "tt")
    with refused("no wav file in", "min/tt/s1", "must hold tr, cv and tt"):
        prepared(speech=str(copy))


def test_a_mixture_of_two_channels_is_named(copy, prepared, refused):
    for path in (copy / "2speakers" / "wav8k" / "min" / "tr" / "mix").glob("*"):
        samples, rate = sf.read(path)
        sf.write(path, np.column_stack([samples, samples]), rate)
    with refused("tr/mix/", "has 2 channels; it must be mono"):
        prepared(speech=str(copy))


def test_names_of_another_corpus_are_refused(refused):
    with refused("1-2_3-4.wav is not named as WSJ0-mix"):
        wsj0mix.speakers_of("1-2_3-4", 2)


@pytest.mark.parametrize("n_src, dynamic_mixing", [(2, False), (3, True)])
def test_the_recipe_runs_through_its_stages(corpus, tmp_path, n_src, dynamic_mixing):
    exp_dir = tmp_path / "recipe" / "exp" / "run"
    options = dict(speech=str(corpus), n_src=n_src, n_test=1, dynamic_mixing=dynamic_mixing)
    run_stages(exp_dir, settings_of("wsj0-mix", **options))
    summary = json.loads((exp_dir / "results" / "summary.json").read_text())
    assert summary["n_mixtures"] == 1 and summary["n_speakers"] == n_src
    assert (exp_dir / "lists" / "train.csv").exists() != dynamic_mixing


def run_sh(*options):
    done = subprocess.run([str(ROOT / "run.sh"), *options], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_run_sh_knows_the_options_of_each_corpus():
    assert "--mode " in run_sh("--recipe", "wsj0-mix", "--help")
    stopped = ["--python_path", "/no/python"]  # which comes after the options
    assert "/no/python is no program" in run_sh("--mode", "max", "--recipe", "wsj0-mix", *stopped)
    for recipe, option in (("minispeech", "--mode"), ("wsj0-mix", "--task")):
        assert f"no option {option}" in run_sh("--recipe", recipe, option, "max", *stopped)
