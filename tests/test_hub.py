"""Stored models: damaged files, code in files, full disks."""

import copy
import errno
import os
import pickle

import numpy as np
import pytest
import torch
from small import small

from asteroid_tiny import TinySepformer


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
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence_and_nothing_is_run(damage, tmp_path, refused):
    path = tmp_path / "model.pth"
    conf = small(n_filters=8).serialize()  # too few filters for "bad filterbank"
    TinySepformer.from_pretrained(copy.deepcopy(conf))  # undamaged
    DAMAGES[damage](path, conf)
    with refused(path):
        TinySepformer.from_pretrained(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


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
