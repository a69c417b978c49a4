"""Evaluation on real speech: what the numbers, files and messages promise."""

import copy
import errno
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from asteroid_tiny import evaluation
from asteroid_tiny.errors import UserError
from asteroid_tiny.evaluation import evaluate
from asteroid_tiny.report import write_report
from asteroid_tiny.summary import METRICS, format_table, summarise

TEST_SPEECH = Path(__file__).parent.parent / "egs/minispeech/TinySepformer/data/test"


@functools.cache
def read_speakers(folder, seconds=3):
    """The first seconds of each speaker of a Kaldi data dir, and their sample rate."""
    read = {name: dict(line.split(None, 1) for line in (folder / name).read_text().splitlines())
            for name in ("wav.scp", "segments", "utt2spk")}  # fmt: skip
    speech = {}
    for utterance, speaker in sorted(read["utt2spk"].items()):
        recording, start, end = read["segments"][utterance].split()
        path = folder / read["wav.scp"][recording].strip()
        rate = soundfile.info(path).samplerate
        speech.setdefault(speaker, np.zeros(0, "float32"))
        if len(speech[speaker]) < seconds * rate:
            start, end = round(float(start) * rate), round(float(end) * rate)
            new, _ = soundfile.read(path, start=start, stop=end, dtype="float32")
            speech[speaker] = np.append(speech[speaker], new)[: seconds * rate]
    return speech, rate


class Mixtures:
    """Two mixtures of each pair of three speakers, of different lengths, as a dataset."""

    genders = ("f", "m", "unknown")
    productions = ("a play", "a play", None)

    def __init__(self, n_mixtures=6):
        speech, self.sample_rate = read_speakers(TEST_SPEECH)
        self.speakers = sorted(speech)[:3]
        self.items, self.pairs = [], []
        for n, (a, b) in enumerate(itertools.product(range(3), range(3))):
            if a != b:
                length = 8000 + 500 * n
                pair = [torch.from_numpy(speech[self.speakers[k]][-length:]) for k in (a, b)]
                self.items.append(torch.stack(pair))
                self.pairs.append((a, b))
        del self.items[n_mixtures:]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i].sum(0), self.items[i]

    def describe(self, i):
        a, b = self.pairs[i]
        return {
            "mixture_id": f"mix/{i}",
            "speakers": (self.speakers[a], self.speakers[b]),
            "genders": (self.genders[a], self.genders[b]),
            "productions": (self.productions[a], self.productions[b]),
        }


class Oracle(torch.nn.Module):
    """Knows the sources, gives them in the wrong order, each mixture with its own noise level."""

    def __init__(self, dataset, gain=1.0):
        super().__init__()
        self.sample_rate, self.gain = float(dataset.sample_rate), gain
        generator = torch.Generator().manual_seed(0)
        self.known = {}
        for i, sources in enumerate(dataset.items):
            noise = torch.randn(sources.shape, generator=generator)
            level = sources.std() * 10 ** (-(3 * i % 7 + 10) / 20)
            self.known[len(sources[0])] = sources.flip(0) + level * noise

    def forward(self, mixture):
        assert not self.training
        return self.gain * self.known[mixture.shape[1]][None]


class Double(torch.nn.Module):
    """Gives the mixture `n_src` times."""

    def __init__(self, sample_rate, n_src=2, spoil=None):
        super().__init__()
        self.sample_rate, self.n_src, self.spoil, self.n_calls = sample_rate, n_src, spoil, 0

    def forward(self, mixture):
        self.n_calls += 1
        if self.spoil:
            mixture = self.spoil(self.n_calls, mixture)
        return mixture[:, None].repeat(1, self.n_src, 1)


def si_sdr(reference, estimate):
    reference, estimate = (np.asarray(x, "float64") for x in (reference, estimate))
    reference, estimate = reference - reference.mean(), estimate - estimate.mean()
    target = reference * (reference @ estimate) / (reference @ reference)
    return 10 * np.log10((target @ target) / ((estimate - target) @ (estimate - target)))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dataset():
    return Mixtures()


@pytest.fixture(scope="module")
def done(dataset, tmp_path_factory):
    """The folder and the summary of an evaluation of the oracle."""
    out_dir = tmp_path_factory.mktemp("oracle")
    return out_dir, evaluate(Oracle(dataset).train(), dataset, out_dir, n_workers=0)


def test_swapped_sources_are_matched_and_the_numbers_agree_with_the_formula(dataset, done):
    table = pd.read_csv(done[0] / "metrics.csv")
    oracle = Oracle(dataset).eval()
    assert table.mixture_id.tolist() == [f"mix/{i}" for i in range(len(dataset))]
    for i, row in table.iterrows():
        mixture, sources = dataset[i]
        estimates = oracle(mixture[None])[0].flip(0)
        before = np.mean([si_sdr(s, mixture) for s in sources])
        after = np.mean([si_sdr(s, e) for s, e in zip(sources, estimates)])
        assert after > 5
        assert row.input_si_sdr == pytest.approx(before, abs=2e-3)
        assert row.si_sdr == pytest.approx(after, abs=2e-3)
        assert row.si_sdr_i == pytest.approx(after - before, abs=2e-3)
    assert (table[["sdr_i", "sir_i"]] > 5).all(axis=None)
    assert table.stoi.between(0.5, 1).all()
    assert done[1]["groups"]["all"]["sdr"]["mean"] == pytest.approx(table.sdr.mean(), abs=1e-3)


def test_groups_hold_the_right_mixtures(done):
    summary = json.loads((done[0] / "summary.json").read_text())
    assert summary == done[1]
    sizes = {name: group["n_mixtures"] for name, group in summary["groups"].items()}
    # Speaker 0 is "f", 1 is "m", 2 is "unknown"; 0 and 1 are of one play.
    assert sizes == {"all": 6, "different gender": 2, "gender unknown": 4, "same production": 2}
    assert (summary["n_mixtures"], summary["n_speaker_pairs"], summary["n_speakers"]) == (6, 3, 3)
    others = {"f unknown": "f f", "unknown f": "unknown unknown"}
    table = pd.read_csv(done[0] / "metrics.csv").replace({"genders": others})
    groups = summarise(table, 8000)["groups"]
    assert groups["same gender"]["n_mixtures"] == 1 and groups["gender unknown"]["n_mixtures"] == 3


def test_the_mixture_as_estimate_improves_nothing(tmp_path):
    dataset = Mixtures(3)
    evaluate(Double(dataset.sample_rate), dataset, tmp_path, n_workers=0)
    table = pd.read_csv(tmp_path / "metrics.csv")
    for metric in ("si_sdr_i", "sdr_i", "sir_i", "stoi_i"):
        assert (table[metric] == 0).all()


def test_workers_write_the_same_table_and_leave_the_model_in_its_mode(dataset, done, tmp_path):
    oracle = Oracle(dataset).train()
    evaluate(oracle, dataset, tmp_path, n_workers=2)
    assert oracle.training
    with_workers, without = (pd.read_csv(d / "metrics.csv") for d in (tmp_path, done[0]))
    pd.testing.assert_frame_equal(with_workers, without, check_exact=False, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "asked, cores, used", [(None, 4, 4), (None, 64, 6), (None, 1, 1), (0, 4, 0), (9, 4, 9)]
)
def test_there_are_as_many_workers_as_cores_or_mixtures_or_as_asked_for(
    dataset, tmp_path, monkeypatch, asked, cores, used
):
    class Counted(Exception):
        pass

    def count(jobs, n_workers):
        raise Counted(n_workers)

    monkeypatch.setattr(evaluation, "_in_workers", count)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    with pytest.raises(Counted, match=f"^{used}$"):
        evaluate(Oracle(dataset), dataset, tmp_path, n_workers=asked)


def test_examples_are_what_they_claim(dataset, done):
    table = pd.read_csv(done[0] / "metrics.csv").set_index("mixture_id").si_sdr_i.sort_values()
    folders = {f.name.split("_")[0]: f for f in (done[0] / "examples").iterdir()}
    wanted = {"worst": table.index[0], "median": table.index[3], "best": table.index[5]}
    others = {folders.pop(f"random{k}").name.split("_", 1)[1] for k in (1, 2)}
    assert others < {f"mix_{i}" for i in range(6)} - {f.name[-5:] for f in folders.values()}
    assert {k: f.name for k, f in folders.items()} == {
        k: f"{k}_{name}".replace("/", "_") for k, name in wanted.items()
    }
    for rank, folder in folders.items():
        wav = {f.stem: soundfile.read(f)[0] for f in folder.iterdir()}
        assert sorted(wav) == ["estimate_1", "estimate_2", "mixture", "s1", "s2"]
        gains = [si_sdr(wav[f"s{k}"], wav[f"estimate_{k}"]) - si_sdr(wav[f"s{k}"], wav["mixture"])
                 for k in (1, 2)]  # fmt: skip
        assert np.mean(gains) == pytest.approx(table[wanted[rank]], abs=0.1)
        assert soundfile.info(folder / "s1.wav").samplerate == dataset.sample_rate


def test_loud_estimates_do_not_clip_and_replace_old_examples(tmp_path):
    dataset = Mixtures(3)
    (tmp_path / "examples" / "old").mkdir(parents=True)
    evaluate(Oracle(dataset, gain=50.0), dataset, tmp_path, n_workers=0)
    assert len(list((tmp_path / "examples").iterdir())) == 3
    for folder in (tmp_path / "examples").iterdir():
        i = int(folder.name[-1])
        wav = {f.stem: soundfile.read(f)[0] for f in folder.iterdir()}
        peak = max(np.abs(w).max() for w in wav.values())
        assert 0.999 < peak <= 1
        gain = 1 / np.abs(50 * Oracle(dataset).known[len(wav["mixture"])].numpy()).max()
        np.testing.assert_allclose(wav["mixture"], gain * dataset[i][0].numpy(), atol=2**-15)


def test_what_cannot_be_computed_is_empty_and_counted(dataset, tmp_path):
    class Spoilt(Mixtures):
        def __init__(self):
            super().__init__(3)
            self.items[1][1] = 0
            self.items[2] = self.items[2][:, 4000:4800]

    spoilt = Spoilt()
    summary = evaluate(Oracle(spoilt), spoilt, tmp_path, n_workers=0)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table.loc[1, [*METRICS, "snr"]].isna().all()
    assert table.loc[2, ["sdr", "sir", "sar", "stoi", "input_stoi", "stoi_i"]].isna().all()
    assert np.isfinite(table.si_sdr_i[2])
    whole = summary["groups"]["all"]
    assert [whole[m]["n_missing"] for m in ("si_sdr_i", "sdr", "stoi")] == [1, 2, 2]
    assert whole["si_sdr_i"]["mean"] == pytest.approx(table.si_sdr_i.mean(), abs=1e-3)
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert "si_sdr_i 1, sdr_i 2, stoi_i 2" in " ".join(format_table(summary).split())


class Spare(torch.nn.Module):
    """An oracle of two that gives a third estimate before the others, 30 dB below the loudest."""

    def __init__(self, dataset):
        super().__init__()
        self.oracle, self.sample_rate = Oracle(dataset), float(dataset.sample_rate)

    def forward(self, mixture):
        estimates = self.oracle(mixture)
        noise = torch.randn(1, 1, mixture.shape[1], generator=torch.Generator().manual_seed(1))
        power = estimates.square().sum(-1).max() / noise.square().sum()
        return torch.cat([10**-1.5 * power.sqrt() * noise, estimates], 1)


def test_fewer_sources_than_estimates_leave_a_spare_one_whose_level_is_told(done, tmp_path):
    dataset = Mixtures()
    summary = evaluate(Spare(dataset), dataset, tmp_path, n_workers=0)
    table, before = (pd.read_csv(d / "metrics.csv") for d in (tmp_path, done[0]))
    assert table.spare_level.to_numpy() == pytest.approx(np.full(6, -30), abs=1e-2)
    pd.testing.assert_frame_equal(table[list(METRICS)], before[list(METRICS)], atol=1e-3)
    assert table.snr.to_numpy() == pytest.approx(before.snr.to_numpy(), abs=0.2)
    text = " ".join(format_table(summary).split())
    assert "the loudest other one lies at -30.0 dB [-30.0, -30.0] re the loudest of all" in text
    for folder in (tmp_path / "examples").iterdir():
        assert {f"estimate_{k}.wav" for k in (1, 2, 3)} < {f.name for f in folder.iterdir()}
    assert "estimate 3" in write_report(tmp_path, "spare").read_text()
    assert "spare_level" not in done[1]["groups"]["all"]


def test_of_single_speakers_there_is_an_si_sdr_but_no_improvement(tmp_path):
    class Single(Mixtures):
        def __getitem__(self, i):
            return self.items[i][0], self.items[i][:1]

        def describe(self, i):
            return {k: v if k == "mixture_id" else v[:1] for k, v in super().describe(i).items()}

    dataset = Single()
    summary = evaluate(Spare(dataset), dataset, tmp_path, n_workers=0)
    table = pd.read_csv(tmp_path / "metrics.csv")
    improvements = [m for m in METRICS if m.startswith("input_") or m.endswith("_i")]
    assert table[improvements].isna().all(axis=None) and (table.si_sdr > 5).all()
    assert summary["bootstrap"]["unit"] == "speaker" and summary["n_speaker_pairs"] == 3
    text = " ".join(format_table(summary).split())
    assert (
        f"SI-SDR of {table.si_sdr.mean():.2f} dB" in text and "over the 3 speakers, drawn" in text
    )
    assert len(list((tmp_path / "examples").iterdir())) == 5
    page = write_report(tmp_path, "single").read_text()
    assert f"worst: SI-SDR {table.si_sdr.min():.1f} dB" in page
    assert "nan" not in re.sub('base64,[^"]*', "", page)


def test_silence_everywhere_leaves_no_numbers_but_ends_well(dataset, tmp_path):
    class Silent(Mixtures):
        def __getitem__(self, i):
            return torch.zeros(8000), torch.zeros(2, 8000)

    summary = evaluate(Double(dataset.sample_rate), Silent(), tmp_path, n_workers=0)
    nothing = {"mean": None, "low": None, "high": None, "n_missing": 6}
    assert summary["groups"]["all"]["si_sdr_i"] == nothing
    assert list((tmp_path / "examples").iterdir()) == []
    assert "nan" not in format_table(summary).lower()


def spoil_third(n_calls, mixture):
    mixture = mixture.clone()
    mixture[:, 5] = float("nan") if n_calls == 3 else 0
    return mixture


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda rate: Double(rate, spoil=spoil_third), "NaN or infinite samples for mixture mix/2"),
        (
            lambda rate: Double(rate, spoil=lambda n, x: x / (n != 2)),
            "infinite samples for mixture mix/1",
        ),
        (lambda rate: Double(rate, n_src=1), r"mixture mix/0 has 2 sources"),
        (lambda rate: Double(rate, spoil=lambda _, x: x[:, 1:]), r"mixture mix/0 has 2 sources"),
        (lambda rate: Double(rate + 1), r"Hz, the test set at"),
    ],
)
def test_models_that_do_not_fit_are_refused(dataset, tmp_path, model, message):
    model = model(dataset.sample_rate)
    with pytest.raises(UserError, match=message):
        evaluate(model, dataset, tmp_path, n_workers=0)
    assert contents(tmp_path) == {} and model.training


def test_without_its_examples_an_evaluation_has_no_summary(dataset, tmp_path, monkeypatch):
    def rename(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", rename)  # as `whole_folder` puts a folder in its place
    with pytest.raises(UserError, match="examples could not be written"):
        evaluate(Oracle(dataset), dataset, tmp_path, n_workers=0)
    assert contents(tmp_path) == {}, "by a summary stage 3 is done"


def test_a_full_disk_leaves_the_old_results(done, monkeypatch):
    dataset, before = Mixtures(1), contents(done[0])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"could not be written: the disk is full") as caught:
        evaluate(Double(dataset.sample_rate), dataset, done[0], n_workers=0)
    assert "\n" not in str(caught.value)
    assert contents(done[0]) == before


def test_modes_of_parts_stay_and_rates_may_be_floats(dataset, tmp_path):
    model = Double(dataset.sample_rate)
    model.frozen, model.free = torch.nn.Dropout(), torch.nn.Dropout()
    model.frozen.eval()
    floats = copy.copy(dataset)
    floats.sample_rate = float(dataset.sample_rate)
    evaluate(model, floats, tmp_path, n_workers=0)
    assert model.training and model.free.training and not model.frozen.training
    assert (tmp_path / "summary.json").exists()


def test_a_process_that_cannot_be_started_is_told(dataset, tmp_path, monkeypatch):
    def submit(self, *job):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match=r"\(AF_UNIX path too long\); set TMPDIR to a folder"):
        evaluate(Double(dataset.sample_rate), dataset, tmp_path, n_workers=1)


def test_an_out_dir_that_cannot_be_is_told_before_the_work(dataset, tmp_path):
    (tmp_path / "file").touch()
    model = Double(dataset.sample_rate)
    with pytest.raises(UserError, match="file"):
        evaluate(model, dataset, tmp_path / "file", n_workers=0)
    assert model.n_calls == 0


def test_a_dead_worker_and_ctrl_c_end_the_evaluation(dataset, tmp_path):
    def kill_workers(n_calls, mixture):
        if n_calls == 4:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
        return mixture

    def interrupt(n_calls, mixture):
        if n_calls == 4:
            raise KeyboardInterrupt
        return mixture

    with pytest.raises(UserError, match="fewer workers than 2"):
        model = Double(dataset.sample_rate, spoil=kill_workers)
        evaluate(model, dataset, tmp_path, n_workers=2)
    with pytest.raises(KeyboardInterrupt):
        model = Double(dataset.sample_rate, spoil=interrupt)
        evaluate(model, dataset, tmp_path, n_workers=2)
    assert multiprocessing.active_children() == []
    assert contents(tmp_path) == {}


def test_ctrl_c_never_reaches_a_worker(dataset, tmp_path):
    def look(n_calls, mixture):
        for child in multiprocessing.active_children():
            status = Path(f"/proc/{child.pid}/status").read_text()
            blocked.append(int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16))
        return mixture

    blocked = []
    evaluate(Double(dataset.sample_rate, spoil=look), dataset, tmp_path, n_workers=2)
    assert blocked and all(mask >> (signal.SIGINT - 1) & 1 for mask in blocked)


def test_nothing_to_evaluate_is_refused(dataset, tmp_path, refused):
    with refused("the test set holds no mixture"):
        evaluate(Double(dataset.sample_rate), Mixtures(0), tmp_path / "out", n_workers=0)
    assert not (tmp_path / "out").exists()


def test_the_seed_is_that_of_the_bootstrap_and_of_the_examples(dataset, done, tmp_path):
    found = evaluate(Oracle(dataset), dataset, tmp_path, n_workers=0, seed=7)
    assert found["bootstrap"]["seed"] == 7 and done[1]["bootstrap"]["seed"] == 0
    names, before = (
        {path.name for path in (folder / "examples").iterdir()} for folder in (tmp_path, done[0])
    )
    assert len(names & before) < 5 and {n for n in names if n[0] != "r"} <= before


def test_a_single_speaker_in_noise_can_be_improved():
    clean, noise = np.random.default_rng(0).normal(size=(2, 1, 8000))
    row = evaluation.measure((clean + noise)[0], clean, clean + 0.1 * noise, 8000)
    assert row["si_sdr_i"] == pytest.approx(20, abs=0.5)
