"""The comparison on real speech: the same batches for all, budgets, kills, failures, tables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes import prepare
from torch.optim.optimizer import register_optimizer_step_pre_hook

from asteroid_tiny import Sepformer
from asteroid_tiny.bench import comparison, peers
from asteroid_tiny.bench.comparison import (
    ablations,
    budget_points,
    build_contender,
    choose,
    compare,
    format_comparison,
    train_apart,
    train_contender,
)
from asteroid_tiny.bench.milestones import Meter, Points, improvements
from asteroid_tiny.data import MixtureList
from asteroid_tiny.evaluation import measure, separate
from asteroid_tiny.preparation import open_list

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    n_valid=6,
    n_test=2,
    eval_segment=1.0,
    budget_steps=4,
    budget_minutes=0.0,
    budget_points=2,
    contenders="base,kernel-3",
)


@pytest.fixture(scope="module")
def run(little_speech, tmp_path_factory):
    """A run with lists: its folder and settings."""
    folder = tmp_path_factory.mktemp("run")
    return prepare(folder, "minispeech", speech=str(little_speech), check=False, **TINY)


@pytest.fixture
def fresh(run, tmp_path):
    """The same run in a folder of its own."""
    exp_dir = tmp_path / "recipe" / "exp" / "run"
    (exp_dir / "lists").mkdir(parents=True)
    for path in (run[0] / "lists").iterdir():
        (exp_dir / "lists" / path.name).write_bytes(path.read_bytes())
    return exp_dir, dict(run[1])


def result_of(exp_dir, name):
    return json.loads((exp_dir / "comparison" / name / "result.json").read_text())


def test_contenders_change_one_thing(run):
    _, settings = run
    base = build_contender("base", settings).get_model_args()
    for name, changes in ablations(settings).items():
        sizes = build_contender(name, settings).get_model_args()
        assert all(sizes[key] == value for key, value in changes.items())
        changed = {key for key in sizes if sizes[key] != base[key]}
        assert changed <= set(changes)
        assert len(changed) == {"base": 0, "sepformer-layers": 2}.get(name, 1)
    assert set(ablations(settings)) >= {"no-sharing", "no-convolution", "kernel-31", "path-norm"}
    unshared = ablations({**settings, "share_layers": False})
    assert "sharing" in unshared and "no-sharing" not in unshared


def test_sepformer_layers_are_those_of_sepformer_at_the_size_of_the_run(run):
    model = build_contender("sepformer-layers", run[1])
    sizes = model.get_model_args()
    for name in ("attn_chan", "conv_kernel_size", "path_norm"):
        del sizes[name]
    peer = Sepformer(**sizes)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    assert not sizes["share_layers"]


@pytest.mark.parametrize("name", comparison.MASKERS)
def test_maskers_of_asteroid_stand_in_the_filterbank_of_the_run(run, name):
    torch.manual_seed(0)
    base = build_contender("base", run[1])
    torch.manual_seed(0)
    model = build_contender(name, run[1])
    filters = [m.state_dict() for bank in (base, model) for m in (bank.encoder, bank.decoder)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(filters, filters[2:]) for key in a)
    assert type(model.masker).__name__ in ("TDConvNet", "DPRNN")
    mixture = torch.randn(2, 4321)
    estimates = model(mixture)
    assert estimates.shape == (2, 2, 4321)
    # the items of a batch keep apart, and the masker learns
    assert torch.allclose(model(mixture[1:]), estimates[1:], atol=1e-4)
    estimates.square().sum().backward()
    assert next(model.masker.parameters()).grad.any()


def test_presets_have_their_own_sizes(run):
    model = build_contender("tiny-sepformer-xs", run[1])  # the recipe's filters are longer
    assert sum(parameter.numel() for parameter in model.parameters()) == 470_529


def test_groups_and_names_are_chosen(run, refused):
    _, settings = run
    found = choose({**settings, "contenders": "models, base,dprnn"})
    assert found == [*comparison.MODELS, "base"]
    assert choose({**settings, "contenders": "architectures"}) == [*comparison.ARCHITECTURES]
    unshared = choose({**settings, "contenders": "architectures", "share_layers": False})
    assert "base" in unshared and "no-sharing" not in unshared
    with refused("no contender 'kernel-4'", "kernel-3", "conv-tasnet"):
        choose({**settings, "contenders": "base,kernel-4"})


def test_all_contenders_see_the_same_batches(fresh, monkeypatch):
    exp_dir, settings = fresh
    small = peers.Peer(
        peers.asteroid_model("ConvTasNet", n_filters=16, n_blocks=1, n_repeats=1), "asteroid", ""
    )
    monkeypatch.setitem(peers.PEERS, "conv-tasnet", small)
    seen = {}
    for name in ("base", "conv-tasnet"):
        model = build_contender(name, settings)
        inputs = seen[name] = []
        model.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].clone()) if module.training else None
        )
        monkeypatch.setattr(comparison, "build_contender", lambda *_, model=model: model)
        monkeypatch.setattr(comparison, "count_macs", lambda _: 1.0)
        train_contender(exp_dir, settings, name)
    assert len(seen["base"]) == len(seen["conv-tasnet"]) == 4
    assert all(map(torch.equal, seen["base"], seen["conv-tasnet"]))
    assert not torch.equal(seen["base"][0], seen["base"][1])
    first, second = (result_of(exp_dir, name)["points"] for name in seen)
    assert [p["batches"] for p in first] == [p["batches"] for p in second]
    assert [p["steps"] for p in first] == [2, 4]


def test_points_of_both_budgets(fresh):
    exp_dir, settings = fresh
    settings |= {"budget_minutes": 0.02}
    train_contender(exp_dir, settings, "base")
    result = result_of(exp_dir, "base")
    points = result["points"]
    assert {2, 4} <= {point["steps"] for point in points}
    last, before = points[-1], points[-2]
    assert last["seconds"] >= 1.2 and last["steps"] >= 4
    assert before["seconds"] < 1.2 or before["steps"] < 4  # and not a step more
    assert any(0.6 <= p["seconds"] for p in points[:-1])
    assert 0 < result["step_seconds"] < 1.2 and result["step_memory"] >= 0
    assert re.match(r"CPU \(.+\), \d+ thread", result["device"])


def test_the_rate_rises_over_a_tenth_of_the_steps_and_then_stays(fresh):
    exp_dir, settings = fresh
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    train_contender(exp_dir, {**settings, "budget_steps": 20, "budget_points": 1}, "base")
    hook.remove()
    assert rates == pytest.approx([settings["lr"] * share for share in [0.5] + [1.0] * 19])


def test_ctrl_c_ends_a_training_without_a_word_of_its_own(fresh, monkeypatch):
    exp_dir, settings = fresh
    seen = []

    def stop(process):
        status = Path(f"/proc/{process.pid}/status").read_text()
        seen.append((process, int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.process.BaseProcess.join", stop)
        with pytest.raises(KeyboardInterrupt):
            train_apart(exp_dir, settings, "base")
    ((process, ignored),) = seen
    process.join(20)
    assert process.exitcode == -signal.SIGKILL and ignored >> (signal.SIGINT - 1) & 1
    assert not (exp_dir / "comparison" / "base" / "error.txt").exists()


def test_a_training_that_is_done_gives_its_result_again_and_takes_no_step(fresh):
    exp_dir, settings = fresh
    train_contender(exp_dir, settings, "base")
    result = result_of(exp_dir, "base")
    (exp_dir / "comparison" / "base" / "result.json").unlink()
    train_contender(exp_dir, settings, "base")
    assert result_of(exp_dir, "base") == result


def test_a_budget_of_time_is_read_where_it_was_used_first():
    settings = dict(budget_steps=10, budget_minutes=1.0, budget_points=2)
    times = [(4, 30.5), (5, 40.0), (8, 60.5), (10, 75.0)]
    result = {"points": [{"steps": steps, "seconds": seconds} for steps, seconds in times]}
    at_steps, in_time = budget_points(result, settings)
    assert [point["steps"] for point in at_steps] == [5, 10] and in_time["steps"] == 8
    assert budget_points(result, {**settings, "budget_minutes": 0.0}) == (at_steps, None)


class Device:
    """In place of a `Meter`: steps take 1, 2 and 4 s, what is between them takes 100 s."""

    name = "a GPU"

    def __init__(self, device=None):
        self.times, self.held = iter([0, 1, 101, 103, 203, 207]), 5

    def seconds(self):
        return next(self.times)

    def memory(self):
        return self.held

    def reset(self):
        self.held = 5


def points_of(monkeypatch, at_steps, minutes, batches):
    """Points of a training of three steps, what they tell, and after which steps it would end."""
    monkeypatch.setattr("asteroid_tiny.bench.milestones.Meter", Device)
    points = Points([], dict(budget_points=2, budget_minutes=minutes), at_steps)
    trainer = SimpleNamespace(global_step=0, default_root_dir="here")
    measured, ends = [], []

    def add_point(trainer, system):
        measured.append(trainer.global_step)
        points.meter.held = 900  # of the validation

    points.add_point = add_point
    points.on_train_start(trainer, SimpleNamespace(device=None))
    for step, batch in enumerate(batches, 1):
        points.on_train_batch_start(trainer, None, (torch.tensor(batch), None), step)
        trainer.global_step = step
        points.on_train_batch_end(trainer, None, None, None, step)
        ends += [step] * trainer.should_stop
    return points, measured, ends


def test_time_and_memory_are_those_of_the_steps_alone(monkeypatch):
    points, measured, ends = points_of(monkeypatch, {2}, 0.1, [1.0, 2.0, 3.0])
    assert measured == [2, 3] and ends == [3]  # 6 s are used in the third step
    assert points.state["seconds"] == 7
    assert points.result()["step_seconds"] == 2 and points.result()["step_memory"] == 5
    _, measured, ends = points_of(monkeypatch, {1, 3}, 0.0, [1.0, 2.0, 3.0])
    assert measured == [1, 3] and ends == [3]


def test_the_name_of_the_batches_is_of_all_so_far(monkeypatch):
    names = {
        points_of(monkeypatch, {3}, 0.0, batches)[0].state["batches"]
        for batches in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 2.0, 3.0])
    }
    assert len(names) == 2


def test_a_training_goes_on_on_the_device_where_it_was_begun(monkeypatch, refused):
    points, *_ = points_of(monkeypatch, {3}, 0.0, [1.0])
    monkeypatch.setattr(Device, "name", "another GPU")
    with refused("here was begun on a GPU, not on another GPU"):
        points.on_train_start(
            SimpleNamespace(default_root_dir="here"), SimpleNamespace(device=None)
        )


def test_a_meter_counts_work_and_what_is_held_beyond_the_beginning():
    meter = Meter(torch.device("cpu"))
    began, before = meter.seconds(), meter.memory()
    time.sleep(0.1)
    assert meter.seconds() - began < 0.05
    held = torch.ones(25_000_000)
    assert before < 30e6 and 95e6 < meter.memory() < 130e6
    del held
    assert meter.memory() > 95e6
    meter.reset()
    assert meter.memory() < 30e6


@pytest.mark.parametrize("exitcode, words", [(-signal.SIGKILL, "ended by SIGKILL"), (0, None)])
def test_a_contender_that_was_ended_is_named_and_an_old_error_goes(
    fresh, monkeypatch, exitcode, words
):
    exp_dir, settings = fresh
    process = SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=exitcode)
    context = SimpleNamespace(Process=lambda **_: process)
    monkeypatch.setattr(comparison.multiprocessing, "get_context", lambda _: context)
    error = exp_dir / "comparison" / "base" / "error.txt"
    error.parent.mkdir(parents=True)
    error.write_text("an old error")
    train_apart(exp_dir, settings, "base")
    assert words in error.read_text() if words else not error.exists()


def test_si_sdri_is_that_of_the_evaluation(run):
    exp_dir, settings = run
    valid = open_list(exp_dir, settings, "valid")
    model = build_contender("base", {**settings, "dropout": 0.5})
    assert isinstance(valid, MixtureList)
    values = improvements(model, valid, settings)
    assert model.training
    model.eval()
    expected = [measure(*separate(model, valid, i), 8000)["si_sdr_i"] for i in range(len(valid))]
    assert values == pytest.approx(expected, abs=0.02)


START = """
import json, sys
from asteroid_tiny.bench.comparison import compare
from asteroid_tiny.errors import exit_on_user_error
if __name__ == "__main__":
    with exit_on_user_error():
        compare(sys.argv[1], json.loads(sys.argv[2]))
"""


def test_a_killed_comparison_continues_and_names_who_failed(fresh, tmp_path):
    exp_dir, settings = fresh
    settings |= {"budget_steps": 40, "budget_points": 8}
    train_contender(exp_dir, settings, "kernel-3")  # at one go, to compare with
    whole = result_of(exp_dir, "kernel-3")
    for path in sorted((exp_dir / "comparison").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()

    (tmp_path / "start.py").write_text(START)
    settings |= {"contenders": "kernel-3,speechbrain-sepformer"}
    (tmp_path / "speechbrain.py").write_text("raise ImportError")  # as if it were not installed
    command = [sys.executable, tmp_path / "start.py", exp_dir, json.dumps(settings)]
    options = dict(env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, text=True)
    last = exp_dir / "comparison" / "kernel-3" / "checkpoints" / "last.ckpt"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
        deadline = time.monotonic() + 200
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)  # its child dies with it
    assert not (exp_dir / "comparison" / "kernel-3" / "result.json").exists()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 40

    done = subprocess.run(command, capture_output=True, timeout=900, **options)
    assert done.returncode == 0, done.stderr
    continued = result_of(exp_dir, "kernel-3")
    assert len(continued["points"]) == len(whole["points"]) == 8
    for one, other in zip(continued["points"], whole["points"]):
        assert one["batches"] == other["batches"]
        assert one["si_sdr_i"] == pytest.approx(other["si_sdr_i"], abs=0.02)
    assert continued["points"][-1]["seconds"] > continued["points"][0]["seconds"]
    failed = "speechbrain-sepformer needs the package speechbrain"
    assert failed in done.stdout
    assert failed in (exp_dir / "comparison" / "comparison.md").read_text()
    again = compare(exp_dir, {**settings, "contenders": "kernel-3"})
    assert again is None and result_of(exp_dir, "kernel-3") == continued


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": [{}]}'])
def test_a_broken_result_is_named(fresh, refused, text):
    exp_dir, settings = fresh
    path = exp_dir / "comparison" / "base" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with refused(path, "delete it and run stage 6 again"):
        compare(exp_dir, {**settings, "contenders": "base"})


def test_budgets_of_a_comparison_stay(fresh, refused):
    exp_dir, settings = fresh
    train_contender(exp_dir, settings, "base")
    compare(exp_dir, {**settings, "contenders": "base"})
    with refused("comparison was begun with budget_steps 4, not 8"):
        compare(exp_dir, {**settings, "contenders": "base", "budget_steps": 8})
    with refused("one device", "--devices"):
        compare(exp_dir, {**settings, "devices": 2})


def test_the_table_has_the_figures_of_the_json(fresh):
    exp_dir, settings = fresh
    settings |= {"budget_minutes": 0.001}
    for name in ("base", "kernel-3"):
        train_contender(exp_dir, settings, name)
    (exp_dir / "comparison" / "kernel-31").mkdir()
    (exp_dir / "comparison" / "kernel-31" / "error.txt").write_text("OutOfMemoryError: 80 GB")
    compare(exp_dir, {**settings, "contenders": "base,kernel-3"})
    folder = exp_dir / "comparison"
    whole = json.loads((folder / "comparison.json").read_text())
    text = (folder / "comparison.md").read_text()
    assert text == format_comparison(whole)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    for name in ("base", "kernel-3"):
        result = whole["contenders"][name]
        assert f"{result['n_parameters']:,}" in rows[name]
        for point in budget_points(result, settings)[0]:
            cell = f"{point['si_sdr_i']:.2f} [{point['low']:.2f}, {point['high']:.2f}]"
            assert cell in rows[name]
        assert result["device"] in text
    both = (whole["contenders"][name] for name in ("kernel-3", "base"))
    last = [budget_points(result, settings)[0][-1] for result in both]
    difference = sum(a - b for a, b in zip(*(p["values"] for p in last))) / 6
    assert f" {difference:+.2f} [" in rows["kernel-3"]
    assert "failed: OutOfMemoryError: 80 GB" in rows["kernel-31"]
    assert "speech" not in whole["settings"]  # no folders of this machine
    picture = (folder / "comparison.svg").read_text()
    assert picture.count("<polyline") == 2 and "kernel-3, 4 steps" in picture
