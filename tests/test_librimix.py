"""LibriMix on the fly against the arithmetic of its generator; its recipe through the stages."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch
from librimix_corpus import PARTS, RATE, make_corpus
from recipes import prepare, run_stages, settings_of
from scipy.signal import resample_poly
from sounds import peak_frequency

from asteroid_tiny.data import DynamicMixtures, librimix, mixed
from asteroid_tiny.data.kaldi import NoiseDir, write_dir
from asteroid_tiny.preparation import open_list, open_split


@pytest.fixture(scope="module")
def corpus(clips, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), clips)


def official(row, root, n_src, rate, mode):
    """Sources and noise of a row as LibriMix's generator makes them, before they are written."""
    tracks = [
        sf.read(root / "LibriSpeech" / row[f"source_{i}_path"], dtype="float32")[0]
        for i in range(1, n_src + 1)
    ]
    longest = max(map(len, tracks))
    noise, _ = sf.read(root / "wham_noise" / row["noise_path"], dtype="float32", stop=longest)
    tracks.append(extended(noise[:, 0], longest))
    gains = [row[f"source_{i}_gain"] for i in range(1, n_src + 1)] + [row["noise_gain"]]
    tracks = [resample_poly(t * float(g), rate, RATE) for t, g in zip(tracks, gains)]
    length = (min if mode == "min" else max)(map(len, tracks))
    return [np.pad(t, (0, max(0, length - len(t))))[:length] for t in tracks]


def extended(noise, length):
    """The noise, and again, each time overlapping by half a second under a Hann window."""
    fade = np.sin(np.pi * np.arange(8001) / 16000) ** 2
    whole = noise.astype(np.float64)
    while len(whole) < length:
        longer = np.zeros(len(whole) + len(noise) - 8001)
        longer[: len(whole)] = whole
        longer[len(whole) - 8001 : len(whole)] *= fade[::-1]
        again = noise.astype(np.float64)
        again[:8001] *= fade
        longer[len(whole) - 8001 :] += again
        whole = longer
    return whole[:length].astype(np.float32) if length <= len(noise) else whole[:length]


def written(signal, rate, path):
    """A signal as 16-bit steps, once soundfile has written and read it."""
    sf.write(path, signal, rate)
    return sf.read(path, dtype="int16")[0].astype(np.int64)


@pytest.fixture
def prepared(corpus, tmp_path):
    """Runs stages 0 and 1 with options: a function giving the run's folder and settings."""
    return lambda **options: prepare(tmp_path, "librimix", **{"speech": str(corpus), **options})


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("task", ["sep_clean", "sep_noisy"])
@pytest.mark.parametrize("n_src", [2, 3])
def test_mixtures_are_those_of_the_official_generator(
    corpus, prepared, tmp_path, n_src, task, rate, mode
):
    exp_dir, settings = prepared(n_src=n_src, task=task, sample_rate=rate, mode=mode)
    for split, part in PARTS.items():
        path = corpus / "metadata" / f"Libri{n_src}Mix" / f"libri{n_src}mix_{part}.csv"
        rows = list(csv.DictReader(path.open()))
        listed = open_list(exp_dir, settings, split)
        assert len(listed) == len(rows) == 2
        for row, (mixture, sources), at in zip(rows, listed, listed.mixtures):
            *wanted, noise = official(row, corpus, n_src, rate, mode)
            summed = np.sum([*wanted, noise] if task == "sep_noisy" else wanted, axis=0)
            for ours, theirs in zip([mixture, *sources], [summed, *wanted]):
                steps = written(theirs, rate, tmp_path / "a.wav")
                assert len(ours) == len(steps) == at.length
                assert np.abs(ours.numpy().astype(np.float64) * 32768 - steps).max() <= 1.001
                # nothing but the last bit of a float is different
                same = steps == written(ours.numpy(), rate, tmp_path / "a.wav")
                assert same.mean() > 0.998


def test_speakers_and_genders_are_librispeechs(prepared):
    exp_dir, settings = prepared()
    listed = open_list(exp_dir, settings, "test")
    speech = open_split(exp_dir, settings, "test")
    assert (speech.sample_rate, speech.recorded_rate) == (8000, 16000)
    assert speech.spk2gender == {"120": "f", "121": "m", "122": "f"}
    described = listed.describe(0)
    assert described["speakers"] == tuple(
        part.split("-")[0] for part in described["mixture_id"].split("_")
    )


def test_no_file_but_the_first_is_opened_again(prepared, monkeypatch):
    exp_dir, settings = prepared()
    opened = []
    real = sf.info
    monkeypatch.setattr(sf, "info", lambda path: opened.append(path) or real(path))
    assert len(open_split(exp_dir, settings, "train").utterances) == 6
    assert len(opened) == 1


def test_a_recording_that_became_shorter_is_named(prepared, refused):
    exp_dir, settings = prepared()
    speech = open_split(exp_dir, settings, "test")
    key = "120-7-0001"
    table = speech.path / "utt2num_samples"
    length = speech.utterances[key].length
    table.write_text(table.read_text().replace(f"{key} {length}", f"{key} {length + 1}"))
    with refused(f"{key}.flac is shorter", "make it anew"):
        open_split(exp_dir, settings, "test").read(key)


def test_training_mixtures_can_be_drawn_afresh_at_half_the_rate(prepared):
    exp_dir, settings = prepared(dynamic_mixing=True)
    assert not (exp_dir / "lists" / "train.csv").exists()
    drawn = DynamicMixtures(
        open_split(exp_dir, settings, "train"), 2, 6000, seed=0, speeds=(95, 105)
    )
    for i in range(5):
        mixture, sources = drawn[i]
        assert sources.shape == (2, 6000) and torch.equal(mixture, sources.sum(0))
        assert (sources.square().mean(1) > 1e-6).all()
        power = np.abs(np.fft.rfft(sources.numpy())) ** 2  # of speech that had 4 kHz
        assert power[:, 2950:].sum() < 0.02 * power.sum()


def test_noise_of_another_speed_is_played_at_it(corpus, prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    hum = 0.1 * np.sin(2 * np.pi * 1000 / RATE * np.arange(40000))
    sf.write(copy / "wham_noise" / "tr" / "long_1.5_x.wav", np.stack([hum, 0 * hum], 1), RATE)
    path = copy / "metadata" / "Libri2Mix" / "libri2mix_train-clean-100.csv"
    path.write_text(path.read_text().replace("long_1.5_x.wav", "long_1.5_xsp08.wav"))
    exp_dir, settings = prepared(task="sep_noisy", speech=str(copy))
    mixture, sources = open_list(exp_dir, settings, "train")[0]
    noise = (mixture - sources.sum(0)).numpy()
    assert peak_frequency(noise) == pytest.approx(800, abs=1)
    assert np.abs(noise[-500:]).max() > 0.02, "to the end"


def generate(root, corpus, n_src, rate, mode):
    """Writes a LibriMix as its generator does, but for the paths, which lead nowhere."""
    tree = root / f"Libri{n_src}Mix" / f"wav{rate // 1000}k" / mode
    (tree / "metadata").mkdir(parents=True)
    for part, folder in zip(PARTS.values(), ("train-100", "dev", "test")):
        names = []
        path = corpus / "metadata" / f"Libri{n_src}Mix" / f"libri{n_src}mix_{part}.csv"
        for row in csv.DictReader(path.open()):
            *sources, noise = official(row, corpus, n_src, rate, mode)
            tracks = {f"s{k}": source for k, source in enumerate(sources, 1)}
            tracks |= {"noise": noise, "mix_clean": sum(sources), "mix_both": sum(sources) + noise}
            for name, samples in tracks.items():
                (tree / folder / name).mkdir(parents=True, exist_ok=True)
                sf.write(tree / folder / name / f"{row['mixture_ID']}.wav", samples, rate)
            names.append(row["mixture_ID"])
        for mix in ("mix_clean", "mix_both"):
            (tree / "metadata" / f"mixture_{folder}_{mix}.csv").write_text(
                "mixture_ID,mixture_path\n" + "".join(f"{n},/moved/{n}.wav\n" for n in names)
            )
    return tree


@pytest.mark.parametrize("task, mix", [("sep_clean", "mix_clean"), ("sep_noisy", "mix_both")])
def test_a_generated_librimix_serves_as_well(
    corpus, prepared, tmp_path, capsys, refused, task, mix
):
    tree = generate(tmp_path / "made", corpus, 2, 8000, "min")
    exp_dir, settings = prepared(librimix_dir=str(tmp_path / "made"), task=task)
    listed = open_list(exp_dir, settings, "test")
    assert len(listed) == 2
    for (mixture, sources), at in zip(listed, listed.mixtures):
        stored, _ = sf.read(tree / "test" / mix / f"{at.mixture_id}.wav", dtype="float32")
        assert np.abs(mixture.numpy() - stored).max() * 32768 <= 4
        first, _ = sf.read(tree / "test" / "s1" / f"{at.mixture_id}.wav", dtype="float32")
        assert np.array_equal(sources[0], first)
    assert "differ" not in capsys.readouterr().out
    (tmp_path / "made").rename(tmp_path / "moved")
    with refused("is missing; if the corpus was moved, run again from --stage 0"):
        open_list(exp_dir, settings, "test")


def test_noise_that_is_cut_short_is_refused_where_sums_are_not_compared(
    corpus, prepared, refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(mixed, "check_sums", lambda *_: 0)
    tree = generate(tmp_path / "made", corpus, 2, 8000, "min")
    path = sorted((tree / "dev" / "noise").glob("*"))[-1]
    samples, rate = sf.read(path, dtype="int16")
    sf.write(path, samples[:5000], rate)
    with refused(path, "5000 samples", f"have {len(samples)}", "cut short"):
        prepared(librimix_dir=str(tmp_path / "made"), task="sep_noisy")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"task": "sep_loud"}, "task must be sep_clean or sep_noisy"),
        ({"subset": "train-500"}, "subset must be train-100 or train-360"),
        ({"mode": "mean"}, "mode must be min or max"),
        ({"sample_rate": 44100}, "sample_rate must be 8000 or 16000"),
        ({"librispeech_dir": "/none"}, "/none/train-clean-100 is missing; --librispeech_dir"),
        ({"metadata_dir": "/none"}, "libri2mix_train-clean-100.csv cannot be read"),
        ({"librimix_dir": "/none"}, "mixture_train-100_mix_clean.csv cannot be read"),
        ({"wham_dir": "/none"}, "wham_dir has no effect with task sep_clean"),
        ({"librimix_dir": "/a", "metadata_dir": "/b"}, "metadata_dir has no effect with"),
        ({"task": "sep_noisy", "dynamic_mixing": True}, "sep_noisy needs dynamic_mixing false"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(prepared, refused, options, words):
    with refused(words):
        prepared(**options)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("source_2_gain", "gain"),
        lambda text: text.replace("tt/long", "").replace(",test-clean", ",0,test-clean", 1),
        lambda text: text[: text.rindex(",")],
    ],
    ids=["column missing", "column too many", "cut off"],
)
def test_broken_metadata_are_named(corpus, tmp_path, refused, change):
    path = tmp_path / "a.csv"
    original = corpus / "metadata" / "Libri2Mix" / "libri2mix_test-clean.csv"
    path.write_text(change(original.read_text()))
    with refused(path, "is not a file of LibriMix's metadata"):
        librimix.read_metadata(path)


def test_of_two_rows_of_one_id_the_last_counts(corpus, prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    path = copy / "metadata" / "Libri2Mix" / "libri2mix_test-clean.csv"
    *rows, last = path.read_text().splitlines()
    name, file, gain, rest = last.split(",", 3)
    path.write_text("\n".join([*rows, f"{name},{file},0.125,{rest}", last]))
    exp_dir, settings = prepared(speech=str(copy))
    _, mixture = open_list(exp_dir, settings, "test").mixtures
    assert mixture.sources[0].gain == pytest.approx(20 * np.log10(float(gain)))


@pytest.mark.parametrize("other, speaker", [("train-clean-100", "100"), ("dev-clean", "110")])
def test_a_speaker_of_another_part_in_test_is_refused(
    corpus, prepared, refused, tmp_path, other, speaker
):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    speech = copy / "LibriSpeech"
    shutil.copytree(speech / other / speaker, speech / "test-clean" / speaker)
    with refused(f"speaker '{speaker}' is in", "and in test"):
        prepared(speech=str(copy))


def test_metadata_that_name_missing_speech(corpus, prepared, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    path = copy / "metadata" / "Libri2Mix" / "libri2mix_dev-clean.csv"
    named = next(csv.DictReader(path.open()))["source_2_path"]
    (copy / "LibriSpeech" / named).unlink()
    with refused(f"lacks {named}, which LibriMix's metadata name"):
        prepared(speech=str(copy))


def test_generated_files_of_another_rate_than_their_folder_are_refused(
    corpus, prepared, refused, tmp_path
):
    tree = generate(tmp_path / "made", corpus, 2, 8000, "max")
    for path in tree.rglob("*.wav"):
        sf.write(path, sf.read(path, dtype="int16")[0], 16000)
    with refused("has 16000 Hz where 8000 Hz are needed"):
        prepared(librimix_dir=str(tmp_path / "made"), mode="max")


@pytest.mark.parametrize("part", ["tr", "tt"])
def test_broken_noise_is_found_before_the_training(
    part, corpus, prepared, refused, tmp_path, capsys
):
    shutil.copytree(corpus / "wham_noise", tmp_path / "noise")
    path = next((tmp_path / "noise" / part).glob("long*"))
    sf.write(path, np.full((40000, 2), np.nan), RATE, subtype="FLOAT")
    with refused("1 fault(s)"):
        prepared(speech=str(corpus), task="sep_noisy", wham_dir=str(tmp_path / "noise"))
    assert f"{path} holds samples that are NaN" in capsys.readouterr().out


def test_lists_of_another_number_of_sources_are_refused(corpus, prepared, refused, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    of_three = copy / "metadata" / "Libri3Mix" / "libri3mix_dev-clean.csv"
    of_three.rename(copy / "metadata" / "Libri2Mix" / "libri2mix_dev-clean.csv")
    with refused("libri2mix_dev-clean.csv has mixtures of 3 sources, not of 2"):
        prepared(speech=str(copy))
    tree = generate(tmp_path / "made", corpus, 3, 8000, "min").parent.parent
    with refused("mixture_train-100_mix_clean.csv has mixtures of 3 sources, not of 2"):
        prepared(librimix_dir=str(tree))


def test_speakers_without_a_gender_are_taken(corpus, prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    table = copy / "LibriSpeech" / "SPEAKERS.TXT"
    table.write_text(table.read_text().replace("100 | F |", "100 |  |"))
    exp_dir, _ = prepared(speech=str(copy))
    assert "100" not in (exp_dir / "speech" / "train" / "spk2gender").read_text()


def test_noise_of_few_samples_is_repeated_as_well(tmp_path):
    sf.write(tmp_path / "click.wav", np.full(1, 0.5), 8000)
    write_dir(
        tmp_path / "noise",
        {"wav.scp": {"click": str(tmp_path / "click.wav")}, "utt2spk": {"click": "noise"}},
        NoiseDir,
    )
    noise = NoiseDir(tmp_path / "noise").read("click", 3, 400)
    assert (
        noise.shape == (400,) and noise.dtype == np.float32 and np.allclose(noise, 0.5, atol=1e-4)
    )


def test_the_recipe_runs_through_its_stages(corpus, tmp_path, capsys):
    exp_dir = tmp_path / "recipe" / "exp" / "run"
    settings = settings_of("librimix", speech=str(corpus), task="sep_noisy", n_test=1)
    run_stages(exp_dir, settings)
    summary = json.loads((exp_dir / "results" / "summary.json").read_text())
    assert summary["n_mixtures"] == 1
    assert json.loads((exp_dir / "training.json").read_text())["steps"] == 4
    said = capsys.readouterr().out
    assert "note: train has 2 mixtures, the official corpus has 13900" in said
    assert "valid: 2 mixtures" in said
