"""Trainings that begin with the weights of another model, and say so."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import soundfile
import torch
import yaml
from scipy.signal import resample_poly
from small import small

from asteroid_tiny import TinySepformer, UserError, average, example_mixture, from_pretrained
from asteroid_tiny.config import PATHS, read_conf
from asteroid_tiny.preparation import open_list
from asteroid_tiny.recipe import (
    build_model,
    evaluate_model,
    publish_model,
    recipe_defaults,
    run_command,
    train_model,
    without_paths,
)
from asteroid_tiny.transfer import copy_weights

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = "tiny-sepformer-xs_2spk_8k"
AS_PACKAGED = dict.fromkeys(
    key for key in recipes.SMALL if key in read_conf(ROOT / "local" / "conf.yml", section="model")
)


HOLD = """
import sys
from asteroid_tiny.files import alone
with alone(sys.argv[1], "trains"):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def make_run(little_speech, tmp_path):
    """Makes a run of the default recipe that changes nearly nothing: its folder and settings."""
    few = dict(
        speech=str(little_speech), check=False, n_valid=2, n_test=3, eval_segment=1.0, lr=1e-9
    )
    few |= AS_PACKAGED
    return lambda **more: recipes.prepare(tmp_path, "minispeech", **{**few, **more})


@pytest.fixture
def run(make_run):
    return make_run()


def test_a_training_goes_on_from_packaged_weights_and_its_card_names_them(run, capsys):
    exp_dir, settings = run
    assert settings["init_from"] == PACKAGED
    train_model(exp_dir, settings)
    assert f"begins with {PACKAGED} weights" in capsys.readouterr().out
    trained = TinySepformer.from_pretrained(exp_dir / "best_model.pth").state_dict()
    for key, value in from_pretrained(PACKAGED).state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-6)
    evaluate_model(exp_dir, settings)
    publish_model(exp_dir, settings, given=dict(data_name="two clips", data_licence="CC0"))
    card = " ".join((exp_dir / "publish" / "README.md").read_text().split())
    told = f"It began with the weights of {PACKAGED}, which were trained on speechocean762"
    assert told in card and "(CC BY 4.0)" in card


def test_the_first_weights_are_those_of_the_seed(make_run, monkeypatch):
    (exp_dir, settings), starts = make_run(init_from=None), []
    monkeypatch.setattr(
        "asteroid_tiny.training.train",
        lambda model, *_: starts.append(next(model.parameters()).sum().item()),
    )
    for seed in (5, 5, 6):
        train_model(exp_dir, {**settings, "fb_init": "random", "seed": seed})
    assert starts[0] == starts[1] != starts[2]


def test_weights_of_another_size_are_refused(run, refused):
    exp_dir, settings = run
    with refused("init_from", PACKAGED, "other sizes"):
        train_model(exp_dir, {**settings, "bn_chan": 64})


def test_a_training_goes_on_without_the_weights_that_it_began_with(make_run, tmp_path):
    start = tmp_path / "start.pth"
    from_pretrained(PACKAGED).save(start)
    exp_dir, settings = make_run(init_from=str(start))
    train_model(exp_dir, settings)
    start.unlink()
    (exp_dir / "best_model.pth").unlink()  # as if it had been stopped before
    train_model(exp_dir, settings)
    assert (exp_dir / "best_model.pth").exists()


def test_what_is_evaluated_is_the_trained_model_on_the_test_list(make_run, monkeypatch, refused):
    (exp_dir, settings), seen = make_run(), []
    with refused("best_model.pth is missing; run stage 2 (to its end) first"):
        evaluate_model(exp_dir, settings)
    model = build_model(settings)
    model.save(exp_dir / "best_model.pth")

    class Seen(Exception):
        pass

    def evaluate(*args, **_):
        seen[:] = args
        raise Seen

    monkeypatch.setattr("asteroid_tiny.evaluation.evaluate", evaluate)
    with pytest.raises(Seen):
        evaluate_model(exp_dir, settings)
    trained, mixtures, folder = seen
    assert folder == exp_dir / "results" and not trained.training
    assert torch.equal(next(trained.parameters()), next(model.parameters()))
    valid, test = (open_list(exp_dir, settings, split).mixtures for split in ("valid", "test"))
    assert mixtures.mixtures == test != valid


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"bootstrap": {}},
        {"bootstrap": {"unit": "", "draws": 9}},
        {"groups": {}},
        {"groups": {"all": {}}},
        {"sample_rate": "fast"},
    ],
    ids=str,
)
def test_a_broken_summary_is_named(make_run, summary, refused, change):
    exp_dir, settings = make_run()
    (exp_dir / "results").mkdir()
    path = exp_dir / "results" / "summary.json"
    path.write_text("" if change is None else json.dumps({**summary, **change}))
    for stage in (evaluate_model, publish_model):
        with refused(path, "no JSON" if change is None else "is no summary", "run stage 3"):
            stage(exp_dir, settings)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"steps": "many"}'])
def test_a_broken_record_of_the_training_is_named(make_run, summary, refused, monkeypatch, text):
    exp_dir, settings = make_run()
    (exp_dir / "results").mkdir()
    (exp_dir / "results" / "summary.json").write_text(json.dumps(summary))
    build_model(settings).save(exp_dir / "best_model.pth")
    if text is not None:
        (exp_dir / "training.json").write_text(text)
    monkeypatch.setattr("asteroid_tiny.recipe.compare_packaged", lambda *_: None)
    for stage in (evaluate_model, publish_model):
        with refused(exp_dir / "training.json", "run stage 2 again"):
            stage(exp_dir, settings)


def test_a_training_is_validated_on_its_list_and_its_model_comes_last(make_run, monkeypatch):
    (exp_dir, settings), seen = make_run(init_from=None), []
    old = exp_dir / "checkpoints" / ".last.deadbeef.9.part.ckpt"  # of a process that was killed
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))

    def train(model, speech, valid, *_):
        seen.append(valid.mixtures)
        return {"steps": 4, "val_si_sdr": 1.0}

    def save(model, path):
        seen.append((exp_dir / "training.json").exists())

    monkeypatch.setattr("asteroid_tiny.training.train", train)
    monkeypatch.setattr(TinySepformer, "save", save)
    train_model(exp_dir, settings)
    valid, test = (open_list(exp_dir, settings, split).mixtures for split in ("valid", "test"))
    assert seen == [valid, True] and valid != test and not old.exists()


def test_two_trainings_do_not_meet_in_one_folder(make_run, refused):
    exp_dir, settings = make_run()
    command, pipes = [sys.executable, "-c", HOLD, exp_dir], dict.fromkeys(("stdin", "stdout"), -1)
    with subprocess.Popen(command, **pipes, env={"PYTHONPATH": str(ROOT)}) as other:
        other.stdout.readline()
        with refused("another process trains in", exp_dir):
            train_model(exp_dir, settings)


def test_models_of_one_window_are_averaged_and_of_two_refused(refused):
    stft = dict(fb_name="stft", kernel_size=16, stride=8, n_filters=18)
    one, same, other = (
        small(window=window(16, dtype=torch.float32), **stft)
        for window in (torch.hann_window, torch.hann_window, torch.hamming_window)
    )
    mean = average([one, same])
    key = "masker.to_mask.weight"
    weights = [model.state_dict()[key] for model in (one, same, mean)]
    assert torch.allclose(weights[2], (weights[0] + weights[1]) / 2)
    for another in (other, small(**stft)):
        with refused("different classes or arguments"):
            average([one, another])


def test_a_mean_is_of_models_that_compute_the_same_however_they_were_trained(refused):
    class Mine(TinySepformer):
        pass

    trained = {}, {"dropout": 0.5}, {"checkpoint_activations": True}
    models = [small(**how).double() for how in trained]
    mean = average(iter(models))
    assert not mean.training and mean.get_model_args() == models[0].get_model_args()
    for key, value in mean.state_dict().items():
        torch.testing.assert_close(value, sum(m.state_dict()[key] for m in models) / 3)
    for others in ([small(norm_type="cLN")], [small(mask_act="sigmoid")], [small(Mine)]):
        with refused("different classes or arguments"):
            average([small(), *others])
    with refused("there are no models"):
        average([])


@pytest.mark.parametrize(
    "name, value",
    [("n_intra_layers", 5), ("n_inter_layers", 5), ("norm_type", "cLN"),
     ("encoder_activation", "linear")],
)  # fmt: skip
def test_weights_of_another_meaning_are_refused(name, value, tmp_path, refused):
    small().save(tmp_path / "m.pth")
    for options in ({}, {"share_layers": False}):
        with refused(f"is a model with {name}"):
            copy_weights(small(**{name: value}, **options), tmp_path / "m.pth")


def test_weights_of_fewer_layers_or_unshared_ones_are_refused_by_a_model_of_other_sizes(
    tmp_path, refused
):
    for other, own in (
        ({}, {"n_repeats": 3}),
        ({}, {"n_repeats": 3, "share_layers": False}),
        ({"share_layers": False}, {}),
    ):
        small(**other).save(tmp_path / "m.pth")
        with refused("other sizes"):
            copy_weights(small(**own), tmp_path / "m.pth")


def test_unshared_layers_keep_their_own_weights(tmp_path):
    model, other = small(share_layers=False), small(share_layers=False)
    other.save(tmp_path / "m.pth")
    copy_weights(model, tmp_path / "m.pth")
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_filters_of_learned_bands_may_have_another_stride(tmp_path):
    model, other = (small(fb_name="param_sinc", kernel_size=17, stride=stride) for stride in (4, 8))
    other.save(tmp_path / "m.pth")
    copy_weights(model, tmp_path / "m.pth")
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_the_command_on_a_card_says_null_as_an_option_does():
    exp_dir = ROOT / "egs" / "minispeech" / "TinySepformer" / "exp" / "none"
    settings = {**recipe_defaults(exp_dir), "init_from": None}
    assert run_command(exp_dir, settings).endswith("--recipe minispeech --init_from null")


def test_what_is_published_names_no_folder_of_this_machine():
    exp_dir = ROOT / "egs" / "minispeech" / "TinySepformer" / "exp" / "none"
    places = dict.fromkeys((*PATHS, "speech", "init_from"), "/home/me/my data")
    public = without_paths({**recipe_defaults(exp_dir), **places})
    command = run_command(exp_dir, public)
    assert "/home" not in f"{public} {command}"
    assert "my data" in shlex.split(command), "one word of the shell"


def test_weights_for_two_sources_begin_a_training_for_three(make_run):
    exp_dir, settings = make_run(n_src=3)
    train_model(exp_dir, settings)
    trained = TinySepformer.from_pretrained(exp_dir / "best_model.pth")
    assert trained.n_src == 3
    for key, value in from_pretrained(PACKAGED).state_dict().items():
        if not key.startswith("masker.to_sources."):
            torch.testing.assert_close(trained.state_dict()[key], value, rtol=0, atol=1e-6)


def test_shared_weights_begin_a_model_of_unshared_layers(make_run):
    unshared = build_model({**make_run()[1], "share_layers": False}).eval()
    assert len(unshared.masker.intra[0].layers) == 4
    copy_weights(unshared, PACKAGED)
    mixture = torch.from_numpy(soundfile.read(example_mixture(), dtype="float32")[0])
    with torch.no_grad():
        torch.testing.assert_close(unshared(mixture), from_pretrained(PACKAGED)(mixture))


def test_weights_begin_a_model_of_half_the_stride_at_their_level(make_run):
    finer = build_model({**make_run()[1], "stride": 16, "chunk_size": 256}).eval()
    copy_weights(finer, PACKAGED)
    mixture = torch.from_numpy(soundfile.read(example_mixture(), dtype="float32")[0])
    with torch.no_grad():
        ours, theirs = finer(mixture), from_pretrained(PACKAGED)(mixture)
    assert (ours - theirs).square().sum() < 0.3 * theirs.square().sum()
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)


@pytest.mark.parametrize("n_filters, agreement", [(128, 25), (256, 12)])
def test_weights_for_8000_hz_do_the_same_in_their_band_of_16000(n_filters, agreement, make_run):
    frames = dict(n_filters=n_filters, kernel_size=128, stride=64)  # 8 ms and 4 ms, as packaged
    raised = build_model({**make_run()[1], "sample_rate": 16000, **frames}).eval()
    copy_weights(raised, PACKAGED)
    mixture, _ = soundfile.read(example_mixture(), dtype="float32")
    wide = torch.from_numpy(resample_poly(mixture, 2, 1))
    with torch.no_grad():
        estimates = from_pretrained(PACKAGED)(torch.from_numpy(mixture))
        lowered = torch.from_numpy(resample_poly(raised(wide).numpy(), 1, 2, axis=-1))
    error = (lowered[..., : estimates.shape[-1]] - estimates).square().sum(-1)
    assert (10 * torch.log10(estimates.square().sum(-1) / error) > agreement).all()


def test_masks_of_a_raised_rate_are_as_before_and_above_as_just_below(tmp_path):
    low = small(sample_rate=8000, n_filters=32, kernel_size=16, stride=8, mask_act="linear")
    high = small(sample_rate=16000, n_filters=64, kernel_size=32, stride=16, mask_act="linear")
    low.save(tmp_path / "low.pth")
    first = high.encoder.filterbank._filters.detach().unflatten(0, (4, 16)).clone()
    copy_weights(high, tmp_path / "low.pth")
    frames = torch.randn(1, 32, 40)
    frames -= frames.mean()
    positive, negative = frames.chunk(2, 1)
    with torch.no_grad():
        expected = low.masker(frames).unflatten(2, (2, 16))
        alike = torch.cat([positive, -positive, negative, -negative], 1)  # as loud above
        masks = high.masker(alike).unflatten(2, (4, 16))
    torch.testing.assert_close(masks[:, :, ::2], expected)
    upper = expected[:, :, :, 12:].mean(3, keepdim=True)
    torch.testing.assert_close(masks[:, :, 1::2], upper.expand_as(expected))
    filters = high.encoder.filterbank._filters.unflatten(0, (4, 16))
    assert torch.equal(filters[1::2], first[1::2]), "the new ones stay as they are"


@pytest.mark.parametrize(
    "frames, words",
    [
        ({}, ("8000 Hz", "--n_filters 256 --kernel_size 128 --stride 64")),
        (dict(n_filters=64, kernel_size=128, stride=64), ("8000 Hz", "--n_filters 256")),
        (dict(n_filters=256, kernel_size=128, stride=64, bn_chan=64), ("other sizes",)),
        (dict(sample_rate=8000, n_heads=8), ("n_heads 4, not 8",)),
        (dict(sample_rate=8000, mask_act="sigmoid"), ("mask_act relu, not sigmoid",)),
    ],
)
def test_weights_that_would_not_mean_the_same_are_refused(frames, words, make_run, refused):
    model = build_model({**make_run()[1], "sample_rate": 16000, **frames})
    with refused(PACKAGED, *words):
        copy_weights(model, PACKAGED)


@pytest.mark.parametrize(
    "misfit",
    [
        dict(kernel_size=16),
        dict(stride=8),
        dict(n_filters=12),
        dict(n_filters=33),
        dict(fb_name="analytic_free"),
    ],
    ids=str,
)
def test_weights_of_another_rate_want_filters_that_last_as_long(misfit, tmp_path, refused):
    low = small(sample_rate=8000, n_filters=32, kernel_size=16, stride=8)
    sizes = dict(sample_rate=16000, n_filters=32, kernel_size=32, stride=16)
    high = small(**sizes)
    for name, model in (("low.pth", low), ("high.pth", high)):
        model.save(tmp_path / name)
    copy_weights(high, tmp_path / "low.pth")
    with refused("it wants filters as long as its own", "--kernel_size 32 --stride 16"):
        copy_weights(small(**{**sizes, **misfit}), tmp_path / "low.pth")
    with pytest.raises(UserError, match="not for 8000 Hz$"):  # there is nothing to be done
        copy_weights(low, tmp_path / "high.pth")


@pytest.mark.parametrize(
    "options, start",
    [
        ([], PACKAGED),
        (["--lr", "0.001", "--preset", "tiny-sepformer-xs"], PACKAGED),
        (["--checkpoint_activations", "true", "--fb_init", "random"], PACKAGED),
        (["--init_from", "null"], None),
        (["--n_src", "3"], PACKAGED),
        (["--preset", "tiny-sepformer-s"], None),
        (["--n_filters", "64"], None),
        (["--dropout", "0.1", "--n_heads", "4"], PACKAGED),  # 4 is what the preset has
        (["--n_filters", "64", "--init_from", PACKAGED], PACKAGED),  # refused when it trains
    ],
)
def test_a_recipe_begins_with_its_weights_where_they_fit(options, start, run_folder):
    exp = run_folder("minispeech")
    command = [sys.executable, ROOT / "local" / "configure.py", "minispeech", exp.name, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == str(exp), done.stderr
    assert read_conf(exp / "conf.yml")["init_from"] == start


def test_a_spoilt_setting_of_a_run_is_named(run_folder):
    exp = run_folder("minispeech")
    exp.mkdir(parents=True)
    settings = {**recipe_defaults(exp), "steps_per_epoch": "few"}
    (exp / "conf.yml").write_text(yaml.safe_dump({"settings": settings}))
    command = [sys.executable, ROOT / "local" / "configure.py", "minispeech", exp.name]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{exp}/conf.yml: steps_per_epoch must be a whole number, not 'few'" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_folders_are_where_the_user_is(there, run_folder, tmp_path):
    if there:
        (tmp_path / "voices").mkdir()
    exp = run_folder("own")
    command = [sys.executable, ROOT / "local" / "configure.py", "own", exp.name]
    subprocess.run([*command, "--speech", "voices"], check=True, cwd=tmp_path,
                   env={"PYTHONPATH": str(ROOT)}, capture_output=True)  # fmt: skip
    assert read_conf(exp / "conf.yml")["speech"] == str(tmp_path / "voices")


@pytest.mark.parametrize("script", ["configure", "make_lists"])
def test_ctrl_c_while_packages_are_imported_is_told_without_a_traceback(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, ROOT / "local" / f"{script}.py", "there"]
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.stderr == "stopped\n" and done.returncode == -signal.SIGINT
