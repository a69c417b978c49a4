"""Stored models: both formats, damaged files, code in files, full disks."""

import copy
import errno
import json
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import SIZES, both_classes, small

from asteroid_tiny import TinySepformer, UserError, from_pretrained
from asteroid_tiny.download import digest_of
from asteroid_tiny.weights import CONFIG, WEIGHTS


class Bomb:
    """An object that makes a folder when it is unpickled by code that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged_dict(change):
    """Writes a stored model after `change` of its dictionary."""

    def write(path, conf):
        change(conf)
        torch.save(conf, path)

    return write


def truncated(path, conf):
    torch.save(conf, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path, conf):
    torch.save(conf, path)
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path, conf: path.write_bytes(b""),
    "text": lambda path, conf: path.write_text("<html>404</html>\n"),
    "random bytes": lambda path, conf: path.write_bytes(np.random.default_rng(0).bytes(9999)),
    "truncated": truncated,
    "end overwritten": overwritten,
    "code in zip": lambda path, conf: torch.save({**conf, "x": Bomb(path.parent / "boom")}, path),
    "code in pickle": lambda path, conf: path.write_bytes(
        pickle.dumps({**conf, "x": Bomb(path.parent / "boom")})
    ),
    "a list": lambda path, conf: torch.save([1, 2], path),
    "a tensor": lambda path, conf: torch.save(torch.ones(3), path),
    "no name": damaged_dict(lambda conf: conf.pop("model_name")),
    "no arguments": damaged_dict(lambda conf: conf.pop("model_args")),
    "no weights": damaged_dict(lambda conf: conf.pop("state_dict")),
    "unknown class": damaged_dict(lambda conf: conf.update(model_name="ConvTasNet")),
    "other class": damaged_dict(lambda conf: conf.update(model_name="Sepformer")),
    "list as name": damaged_dict(lambda conf: conf.update(model_name=["TinySepformer"])),
    "arguments no dict": damaged_dict(lambda conf: conf.update(model_args=3)),
    "weights no dict": damaged_dict(lambda conf: conf.update(state_dict=None)),
    "weight lacks": damaged_dict(lambda conf: conf["state_dict"].popitem()),
    "surplus weight": damaged_dict(lambda conf: conf["state_dict"].update(extra=torch.ones(2))),
    "number as key": damaged_dict(lambda conf: conf["state_dict"].update({3: torch.ones(2)})),
    "other shape": damaged_dict(
        lambda conf: conf["state_dict"].update({"masker.prelu.weight": torch.ones(7)})
    ),
    "other size": damaged_dict(lambda conf: conf["model_args"].update(bn_chan=18, n_heads=3)),
    "argument lacks": damaged_dict(lambda conf: conf["model_args"].pop("n_src")),
    "surplus argument": damaged_dict(lambda conf: conf["model_args"].update(n_fliters=16)),
    "bad argument": damaged_dict(lambda conf: conf["model_args"].update(n_heads=0)),
    "bad filterbank": damaged_dict(lambda conf: conf["model_args"].update(fb_name="stft")),
    "NaN": damaged_dict(lambda conf: conf["state_dict"]["masker.prelu.weight"].fill_(np.nan)),
    "whole numbers": damaged_dict(
        lambda conf: conf["state_dict"].update({"masker.prelu.weight": torch.ones(1).int()})
    ),
    "no memory behind": damaged_dict(
        lambda conf: conf["state_dict"].update({"extra": torch.ones(1).expand(10**6, 10**6)})
    ),
    "a petabyte": damaged_dict(lambda conf: conf["model_args"].update(ff_hid=10**12)),
    "a billion layers": damaged_dict(lambda conf: conf["model_args"].update(n_repeats=10**9)),
    "layers for ever": damaged_dict(lambda conf: conf["model_args"].update(n_intra_layers=10**9)),
    "long filters": damaged_dict(
        lambda conf: conf["model_args"].update(kernel_size=10**8, fb_init="sinusoids")
    ),
    "long computed filters": damaged_dict(
        lambda conf: conf["model_args"].update(kernel_size=10**8, n_filters=10**8, fb_name="stft")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence_and_nothing_is_run(damage, tmp_path, refused):
    path = tmp_path / "model.pth"
    conf = small(n_filters=8).serialize()  # too few filters for "bad filterbank"
    TinySepformer.from_pretrained(copy.deepcopy(conf))  # undamaged
    DAMAGES[damage](path, conf)
    began = time.monotonic()
    with refused(path):
        TinySepformer.from_pretrained(path)
    assert time.monotonic() - began < 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


@both_classes
@pytest.mark.parametrize("half", [False, True])
def test_a_folder_of_weights_and_description_gives_the_model_back(model_class, half, tmp_path):
    model = small(model_class, 3, sample_rate=16000)
    config = model.save_pretrained(tmp_path / "made" / "m", half=half, metrics={"si_sdr_i": 1.5})
    assert json.loads((tmp_path / "made" / "m" / CONFIG).read_text()) == config
    assert config["sha256"] == digest_of(tmp_path / "made" / "m" / WEIGHTS)
    assert config["n_src"] == 3 and config["sample_rate"] == 16000
    assert config["metrics"] == {"si_sdr_i": 1.5} and config["versions"]["torch_version"]
    stored = load_file(tmp_path / "made" / "m" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {
        torch.float16 if half else torch.float32
    }
    mixture = torch.randn(1, 500)
    for path in (tmp_path / "made" / "m", tmp_path / "made" / "m" / WEIGHTS):
        for twin in (model_class.from_pretrained(path).eval(), from_pretrained(str(path)).eval()):
            assert type(twin) is model_class and twin.get_model_args() == model.get_model_args()
            assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())
            with torch.no_grad():
                assert torch.allclose(twin(mixture), model(mixture), atol=1e-2 if half else 0)


def rewritten(change):
    """Writes the weights of a folder anew after `change`, with the checksum that fits."""

    def damage(folder):
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata)
        described(lambda config: config.update(sha256=digest_of(folder / WEIGHTS)))(folder)

    return damage


def described(change):
    """Writes the description of a folder anew after `change`."""

    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    described(lambda config: config.update(sha256=digest_of(folder / WEIGHTS)))(folder)


def long_header(folder):
    (folder / WEIGHTS).write_bytes((10**15).to_bytes(8, "little") + b"{}")


def unlabelled(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    described(lambda config: config.update(sha256=digest_of(folder / WEIGHTS)))(folder)


def of_another(folder):
    small().save_pretrained(folder.parent / "other")
    (folder.parent / "other" / WEIGHTS).rename(folder / WEIGHTS)


PRELU = "masker.prelu.weight"
FOLDER_DAMAGES = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "is missing"),
    "no description": (lambda folder: (folder / CONFIG).unlink(), "is missing"),
    "cut": (cut, "is damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is damaged"),
    "long header": (long_header, "is damaged"),
    "other weights": (of_another, "the sha256 differ"),
    "unlabelled": (unlabelled, "other arguments"),
    "lacking": (rewritten(lambda state: state.pop(PRELU)), "lacks the weights"),
    "surplus": (rewritten(lambda state: state.update(x=torch.ones(1))), "has also the weights"),
    "shape": (
        rewritten(lambda state: state.update({PRELU: torch.ones(2)})),
        "shape (1,), not (2,)",
    ),
    "numbers": (
        rewritten(lambda state: state.update({PRELU: torch.ones(1).int()})),
        "another kind",
    ),
    "NaN": (rewritten(lambda state: state[PRELU].fill_(np.nan)), "NaN"),
    "infinite": (rewritten(lambda state: state[PRELU].fill_(np.inf)), "infinite"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
    "deep": (lambda folder: (folder / CONFIG).write_text("[" * 10**5), "is no JSON"),
    "large": (lambda folder: (folder / CONFIG).write_text(" " * 2**21), "too large"),
    "a list as JSON": (lambda folder: (folder / CONFIG).write_text("[]"), "does not describe"),
    "no checksum": (described(lambda config: config.pop("sha256")), "lacks 'sha256'"),
    "no arguments": (described(lambda config: config.pop("model_args")), "lacks 'model_args'"),
    "sources": (described(lambda config: config.update(n_src=3)), "n_src is 3"),
    "of others": (described(lambda config: config.pop("format")), "does not describe"),
    "class": (described(lambda config: config.update(model_name="os.system")), "another class"),
    "rate": (described(lambda config: config.update(sample_rate=16000)), "contradicts itself"),
    "heads": (described(lambda config: config["model_args"].update(n_heads=4)), "other arguments"),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_a_damaged_folder_is_one_sentence(damage, tmp_path, refused):
    small().save_pretrained(tmp_path / "model")
    TinySepformer.from_pretrained(tmp_path / "model")  # undamaged
    change, words = FOLDER_DAMAGES[damage]
    change(tmp_path / "model")
    with refused(tmp_path / "model", words):
        TinySepformer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_any_floating_type_are_read(dtype, tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    rewritten(lambda state: state.update({k: t.to(dtype) for k, t in state.items()}))(tmp_path)
    for key, value in from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(dtype).float()), key


def test_files_of_torch_before_its_zip_format_are_read(tmp_path):
    model = small()
    torch.save(model.serialize(), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    for key, value in from_pretrained(tmp_path / "m.pth").state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_overrides_are_known_and_the_sample_rate_is_that_of_training(tmp_path, refused):
    model = small(sample_rate=8000)
    model.save_pretrained(tmp_path)
    for stored in (tmp_path, model.serialize()):
        twin = TinySepformer.from_pretrained(stored, chunk_size=20, sample_rate=8000)
        assert twin.masker.chunk_size == 20
        with refused("no argument 'chunk_sise'"):
            TinySepformer.from_pretrained(stored, chunk_sise=20)
        with refused("trained at 8000 Hz", "16000 Hz", "resample"):
            TinySepformer.from_pretrained(stored, sample_rate=16000)
        with refused("does not fit", "to_sources"):
            TinySepformer.from_pretrained(stored, n_src=3)


# A fuzz of our own: Hypothesis looks through all loaded modules, and SpeechBrain's lazy ones raise.
SCALARS = [None, True, 0, 1, -1, 2, 3, 7, 16, 10**12, 2**64, 0.5, 1e300, float("nan"), float("inf")]
SCALARS += ["", "16", "free", "stft", "relu", "\x00", [], {}, [16], {"a": 1}, [[[]]]]


def test_any_arguments_are_refused_or_fit(fuzzed):
    folder, conf, mixture, _ = fuzzed
    names = [*SIZES, "n_src", "fb_name", "dropout", "kernel_size", "stride", "sample_rate", "x"]
    n_refused = 0
    for name in names:
        for value in SCALARS:
            args = {**conf["model_args"], name: value}
            try:
                twin = TinySepformer.from_pretrained({**conf, "model_args": args}).eval()
            except UserError as error:
                assert str(error).isprintable(), (name, value)
                n_refused += 1
            else:  # what the weights do not show, such as the dropout
                of_none = conf["model_args"]["kernel_size"] // 2  # of the stride
                wanted = of_none if (name, value) == ("stride", None) else value
                assert twin.get_model_args()[name] == wanted, name
                with torch.no_grad():
                    assert twin(mixture).shape[-1] == mixture.shape[-1]
    assert n_refused > 0.8 * len(names) * len(SCALARS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "model.pth"])
def test_any_bytes_put_into_a_file_are_refused_or_change_nothing(fuzzed, name):
    folder, _, mixture, expected = fuzzed
    draw = random.Random(name)
    whole = (folder / name).read_bytes()
    try:
        for _ in range(60):
            place = draw.randrange(len(whole) if draw.random() < 0.5 else min(len(whole), 3000))
            content = draw.choice(
                [draw.randbytes(1), draw.randbytes(9), b"\0" * 9, b"9", b'"', b""]
            )
            cut = draw.choice([len(content), len(content), 0, 50])
            (folder / name).write_bytes(whole[:place] + content + whole[place + cut :])
            try:
                twin = from_pretrained(folder / "model.pth" if name == "model.pth" else folder)
            except UserError as error:
                assert str(error).isprintable(), (place, content, cut)
            else:
                # Asteroid's files have no checksum: that weights fit and are finite is all we know
                with torch.no_grad():
                    estimates = twin.eval()(mixture)
                assert name == "model.pth" or torch.equal(estimates, expected)
    finally:
        (folder / name).write_bytes(whole)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """(folder with a model in both formats, its dictionary, a mixture, its estimates)"""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    model, mixture = small(), torch.randn(1, 300)
    model.save_pretrained(folder)
    model.save(folder / "model.pth")
    with torch.no_grad():
        return folder, model.serialize(), mixture, model(mixture)


def test_the_bomb_of_the_test_above_is_live(tmp_path):
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "model.pth")
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "boom").is_dir()


def assert_intact(path, model):
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, refused):
    path = tmp_path / "model.pth"
    old, new = small(), small()
    old.save(path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refused(path, "disk is full"):
            new.save(path)
    assert_intact(path, old)
    new.save(path)
    assert_intact(path, new)


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, refused):
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.pth"
    old, new = small(), TinySepformer.from_preset("tiny-sepformer-xs")
    old.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with refused(path, "could not be written"):
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_intact(path, old)


@pytest.mark.parametrize("who", ["encoder", "decoder"])
def test_filters_that_encoder_and_decoder_share_are_stored(who, tmp_path):
    model = small(who_is_pinv=who)
    model.save_pretrained(tmp_path / "m")
    twin, mixture = from_pretrained(tmp_path / "m"), torch.randn(1, 800)
    with torch.no_grad():
        assert torch.allclose(twin(mixture), model(mixture), atol=1e-6)


def test_a_model_has_the_same_checksum_each_time_that_it_is_saved(tmp_path):
    model = small()
    for i in range(8):
        model.save_pretrained(tmp_path / f"{i}")
    assert len({path.read_bytes() for path in tmp_path.glob(f"*/{WEIGHTS}")}) == 1


def test_what_json_cannot_tell_is_not_written(tmp_path, refused):
    with refused("cannot be described in config.json"):
        small().save_pretrained(tmp_path / "m", metrics={"si_sdr_i": float("nan")})
    assert not (tmp_path / "m").exists()
