"""The benchmark: its peers are what they claim, its counts are right, its tables tell the truth."""

import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes import settings_of
from small import n_parameters, small

from asteroid_tiny.bench import benchmark as stage
from asteroid_tiny.bench import measure
from asteroid_tiny.bench.benchmark import benchmark
from asteroid_tiny.bench.page import Figures, gpu_table
from asteroid_tiny.bench.peers import PEERS, build_peer
from asteroid_tiny.cost import count_macs, saved_bytes
from asteroid_tiny.tables import number

ROOT = Path(__file__).resolve().parents[1]

#: Millions of parameters, as published or measured in other places.
SIZES = {
    "speechbrain-sepformer": 25.68,
    "speechbrain-re-sepformer": 7.96,
    "conv-tasnet": 5.05,
    "dprnn": 3.65,
    "dptnet": 2.86,
    "sudormrf": 2.63,
}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_size_of_its_recipe_and_learns_from_a_batch(name):
    peer = build_peer(name, n_src=2, sample_rate=8000).eval()
    assert n_parameters(peer) / 1e6 == pytest.approx(SIZES[name], abs=0.006)
    assert peer.sample_rate == 8000
    mixtures = torch.randn(2, 999)  # no whole number of strides or chunks
    estimates = peer(mixtures)
    assert estimates.shape == (2, 2, 999)
    assert torch.allclose(estimates[:1], peer(mixtures[:1]), atol=1e-4)  # items are kept apart
    estimates.square().sum().backward()
    assert next(peer.encoder.parameters()).grad.abs().max() > 0


def test_a_peer_that_is_missing_is_named(monkeypatch, refused):
    with refused("there is no peer 'sepfromer'", "conv-tasnet"):
        build_peer("sepfromer")
    monkeypatch.setitem(sys.modules, "speechbrain", None)
    with refused("speechbrain-sepformer needs the package speechbrain"):
        build_peer("speechbrain-sepformer")


def test_operations_are_those_of_the_layers():
    frames = (32000 - 16) // 8 + 1  # of ConvTasNet, which does not pad
    block = 128 * 512 + 3 * 512 + 2 * 512 * 128  # pointwise, depthwise, residual and skip
    ends = 16 * 512 + 512 * 128 + 128 * 1024 + 2 * 512 * 16  # filters, bottleneck, masks, filters
    peer = build_peer("conv-tasnet").to("meta")
    assert count_macs(peer) == pytest.approx((24 * block + ends) * frames / 4, rel=1e-6)


class Recurrent(torch.nn.Module):
    sample_rate = 50

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(1, 16, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.lstm(x[..., None])


def test_operations_of_an_lstm_are_counted():
    assert count_macs(Recurrent().to("meta")) == 50 * 2 * 4 * 16 * (1 + 16)


@pytest.mark.parametrize("name, megabytes", [("conv-tasnet", 2086), ("dptnet", 1432)])
def test_saved_bytes_are_those_counted_elsewhere(name, megabytes):
    assert saved_bytes(build_peer(name), 32000) / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_peak_memory_is_that_of_the_tensors():
    held = []

    def prepare(mixture):
        return lambda: held.clear() or held.append(torch.ones(mixture.shape[1], 1000))

    # from 32 MB on memory comes from the system, not from what other tests have freed
    rows = list(measure.at_each([1.5, 4], 100, prepare))
    for row in rows:
        wanted = row["length"] * 8000 * 1000 * 4
        assert 0.95 * wanted <= row["peak_bytes"] <= 1.5 * wanted + 30e6
        assert row["cpu_s"] > 0 and row["n_runs"] >= 2


@pytest.mark.parametrize(
    "seconds, cpu, wall, n_runs",
    [
        ([(1.0, 9.0), (2.0, 2.0), (1.5, 1.5), (0.75, 20.0)], 0.75, 20.0, 4),  # a busy machine
        ([(6.0, 6.0), (7.0, 7.0)], 6.0, 6.0, 2),  # slow, but twice
        ([(0.25, 0.5)] * 10, 0.25, 0.5, 10),  # fast, but no more than ten times
    ],
)
def test_a_time_is_that_of_the_run_with_the_least_cpu_time(monkeypatch, seconds, cpu, wall, n_runs):
    now, runs = [0.0, 0.0], iter(seconds)
    clocks = {"process_time": lambda: now[0], "perf_counter": lambda: now[1]}
    monkeypatch.setattr(measure, "time", SimpleNamespace(**clocks))

    def run():
        now[:] = (clock + took for clock, took in zip(now, next(runs)))

    assert measure.timed(run) == {"cpu_s": cpu, "wall_s": wall, "n_runs": n_runs}


def test_a_training_step_changes_all_weights():
    model = small().train()
    before = [parameter.clone() for parameter in model.parameters()]
    measure.training_step(model)(torch.randn(1, 800))
    assert not any(map(torch.equal, before, model.parameters()))


def test_the_rate_of_a_product_is_of_its_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr(measure, "timed", lambda run, at_least: {"cpu_s": 2.0})
    assert measure.matrix_rate("float32", 8)["flops"] == 512


def test_what_would_take_too_much_is_not_tried(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET", 0)
    lengths, waste = [0.5, 1, 20], lambda mixture: lambda: torch.randn(mixture.shape[1], 4000)
    *_, long = measure.at_each(lengths, 0.5, waste)
    assert long.keys() == {"length", "skipped"} and long["skipped"].endswith(" s")
    monkeypatch.setattr(measure, "available_bytes", lambda: 1e9)
    *_, large = measure.at_each(lengths, 1000, waste)  # 128 MB a second
    assert large["skipped"].endswith(" GB")


def test_what_others_do_meanwhile_does_not_make_a_run_too_long():
    row = {"cpu_s": 1.0, "wall_s": 100.0, "peak_bytes": 0}
    assert measure.too_much(row, 4, limit=5) is None
    assert measure.too_much(row, 6, limit=5) == "about 6 s"


def test_files_in_onnx_and_int8_are_timed_beside_the_model():
    sizes = dict(n_filters=64, bn_chan=64, ff_hid=512, n_repeats=1, n_inter_layers=1)
    fp32, int8 = measure.exported(small(**sizes), 1)
    assert int8["bytes"] < 0.35 * fp32["bytes"] and int8["si_sdr"] > 20
    assert fp32["cpu_s"] > 0 and int8["cpu_s"] > 0


@pytest.fixture
def quick(monkeypatch, one_thread):
    """Measures in this process, each thing twice, without ONNX files; lists what was measured."""
    measured = []

    def in_this_process(task):
        measured.append((task.get("name"), task["kind"]))
        return json.loads(json.dumps(list(measure.figures_of(task))))

    monkeypatch.setattr(measure, "BUDGET", 0)
    monkeypatch.setattr(measure, "MATRIX", 256)
    monkeypatch.setattr(measure, "MIXTURES", 4)
    monkeypatch.setattr(stage, "EXPORTED", ())
    monkeypatch.setattr(stage, "measure", in_this_process)
    return measured


def cells(page, heading, model):
    """A line of a table of the page: its texts by their columns."""
    lines = page.split(f"## {heading}")[1].splitlines()
    table = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    for line in table:
        if line[0].strip() == model:
            return {key.strip(): text.strip() for key, text in zip(table[0], line)}
    return None


def test_the_page_tells_what_was_measured(quick, run_folder):
    folder = run_folder("minispeech")
    names = ["tiny-sepformer-xs", "speechbrain-sepformer"]
    settings = settings_of(
        "minispeech", bench_models=",".join(names), bench_lengths="0.1,0.2,3000", bench_limit=20
    )
    figures = benchmark(folder, settings)["measured"]
    kept = (folder / "benchmark.json").read_text()
    assert str(folder) not in kept and '"speech"' not in kept  # no folders of this machine
    rows = {(e["task"].get("name"), e["task"]["kind"]): e["rows"] for e in figures}
    page = (folder / "benchmark.md").read_text()

    xs, peer = ([r["cpu_s"] for r in rows[name, "inference"] if "cpu_s" in r] for name in names)
    table = cells(page, "Inference", "SpeechBrain SepFormer")
    assert table["parameters, M"] == "25.7" and table["GMAC/s"] == "59.2"
    assert float(table["CPU s"]) == pytest.approx(peer[1], rel=0.01)
    table = cells(page, "Cost against length", "`tiny-sepformer-xs`")
    assert float(table["0.1 s"]) == pytest.approx(xs[0] / 0.1, rel=0.02)
    assert table["3000 s"].startswith("not tried (about ")
    ratios = cells(page, "Ratios", "`tiny-sepformer-xs`")
    assert float(ratios["inference"]) == pytest.approx(xs[1] / peer[1], abs=0.01)
    saved = [rows[name, "training"][1]["saved_bytes"] for name in names]
    assert float(ratios["saved"]) == pytest.approx(saved[0] / saved[1], abs=0.01) != 0
    assert 0 < float(ratios["saved, checkpointed"]) < float(ratios["saved"]) < 0.2
    assert cells(page, "Mixing", "SpeechBrain SepFormer")["mixer is faster by"] != "-"
    for name, word in ("cost", "SpeechBrain SepFormer"), ("quality", "SepReformer-T"):
        assert f"({name}.svg)" in page
        assert word in "".join(ET.parse(folder / f"{name}.svg").getroot().itertext())

    quick.clear()  # again: nothing is measured but what is new
    settings |= {"bench_models": f"{names[0]},conv-tasnet"}
    benchmark(folder, settings)
    assert quick == [("conv-tasnet", "inference"), ("conv-tasnet", "training")]
    assert "SpeechBrain's SepFormer was not measured" in (folder / "benchmark.md").read_text()


@pytest.mark.parametrize(
    "change", [None, [], {}, {"about": []}, {"measured": 3}, {"measured": [{}]}], ids=str
)
def test_figures_that_are_none_are_measured_anew(tmp_path, change):
    about = stage.describe_machine()
    task = {"kind": "machine"}
    kept = {"about": about, "measured": [{"task": task, "rows": [{"flops": 1.0}]}]}
    if change is not None:
        kept = {**kept, **change} if change else change
    (tmp_path / "benchmark.json").write_text(json.dumps(kept))
    found = stage.kept_figures(tmp_path / "benchmark.json", about, [task])
    assert [*found] == ([(None, "machine")] if change is None else [])


def test_a_peer_that_is_not_installed_is_left_out_and_named(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "speechbrain", None)
    names = "tiny-sepformer-xs,speechbrain-re-sepformer"
    settings = settings_of("own", bench_models=names, bench_lengths="0.25")
    benchmark(tmp_path / "recipe" / "exp" / "run", settings)
    assert "re-sepformer is left out: it needs the package speechbrain" in capsys.readouterr().out
    page = (tmp_path / "recipe" / "exp" / "run" / "benchmark.md").read_text()
    assert "Left out: SpeechBrain RE-SepFormer, since speechbrain is not installed." in page
    assert cells(page, "Inference", "SpeechBrain RE-SepFormer") is None
    assert "machine, mixing: " in page.split("## What failed")[1]  # there is no speech to mix


def test_a_measurement_runs_in_a_process_of_its_own(capfd):
    size, row, macs = stage.measure(
        {"kind": "inference", "name": "tiny-sepformer-xs", "lengths": [0.25], "limit": 9}
    )
    assert size["n_parameters"] == 470529 and macs["macs_per_s"] > 0.5e9
    assert row["peak_bytes"] > 1e6
    assert "tiny-sepformer-xs        inference 0.25 s of audio" in capfd.readouterr().out
    (row,) = stage.measure({"kind": "bf16", "name": "tiny-sepformer-xs", "limit": 9, "length": -1})
    assert "negative dimension" in row["failed"]


def test_a_processor_that_does_not_multiply_bfloat16_takes_no_hours(monkeypatch):
    rates = {"float32": 60e9, "bfloat16": 0.3e9}

    def rate(dtype, size):
        assert size < measure.MATRIX or rates[dtype] > measure.SLOW
        return {"dtype": dtype, "size": size, "flops": rates[dtype]}

    monkeypatch.setattr(measure, "matrix_rate", rate)
    assert [row["flops"] for row in measure.machine()] == list(rates.values())
    (row,) = measure.bf16("sepformer", length=4, limit=300)
    assert re.fullmatch(r"about 15\d\d s", row["skipped"])


class Clock:
    """In place of a CUDA event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


def test_the_measurement_on_a_gpu_with_a_cpu_in_its_place(monkeypatch):
    instead = {
        "Event": Clock,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 10**9,
        "get_device_name": lambda: "a GPU",
    }
    for key, value in instead.items():
        monkeypatch.setattr(torch.cuda, key, value)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(measure, "MOST_BATCH", 2)
    plain, other = measure.gpu("tiny-sepformer-xs", 0.25, device="cpu")
    assert plain["largest_batch"] == 2 and plain["peak_bytes"] == 10**9
    assert 0 < plain["step_s"] < 5 and 0 < other["step_s"] < 5 and len(compiled) == 1
    entry = {"task": {"kind": "gpu", "name": "tiny-sepformer-xs"}, "rows": [plain, other]}
    about = {"models": ["tiny-sepformer-xs"], "reference": 0.25, "lengths": [0.25]}
    table = gpu_table(Figures(about, [entry]))
    assert all(number(1e3 * row["step_s"]) in table for row in (plain, other))
    assert stage.describe(other).endswith("s a step on a GPU, compiled")


def test_stage_5_is_a_stage_and_refuses_what_it_cannot_measure(refused, run_folder):
    with refused("there is no 'tasnet'", "conv-tasnet"):
        stage.read_models("tiny-sepformer-s,tasnet")
    for _ in range(20):  # a set has NaN at another place each time
        with refused("bench_lengths must be seconds"):
            stage.read_lengths("1,nan,4")
    assert stage.read_models("conv-tasnet,dprnn,conv-tasnet") == ["conv-tasnet", "dprnn"]
    options = ["--stage", "5", "--bench_lengths", "long", "--tag", run_folder("minispeech").name]
    command = [ROOT / "run.sh", "--python_path", sys.executable, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Stage 5: benchmark" in done.stdout
    assert done.stderr.startswith("error: bench_lengths must be seconds")
