"""Where models come from: paths, packaged models, addresses, the hub's own client on a loopback."""

import errno
import hashlib
import json
import os
import pwd
import shutil
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from server import GATED, commit_name, serving_files, serving_hub
from small import small

import asteroid_tiny
from asteroid_tiny import Sepformer, TinySepformer, from_pretrained, hub, list_models
from asteroid_tiny.download import digest_of
from asteroid_tiny.publish import publish, push
from asteroid_tiny.weights import CONFIG, WEIGHTS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Caches of this test's own, and a working folder without anything in it."""
    monkeypatch.setenv("ASTEROID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache" / "asteroid_tiny"


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    return tmp_path / "zoo"


def alike(model, other):
    state, theirs = model.state_dict(), other.state_dict()
    return type(model) is type(other) and all(torch.equal(state[key], theirs[key]) for key in state)


def files_of(model, folder, prefix="/"):
    """What a web server needs to serve a model: {path: content}."""
    model.save_pretrained(folder)
    model.save(folder / "model.pth")
    return {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_who_has_no_home_can_name_a_cache(monkeypatch, refused):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert hub.cache_dir().name == "asteroid_tiny"
    monkeypatch.setenv("ASTEROID_CACHE", "")
    with refused("no home", "set ASTEROID_CACHE"):
        hub.cache_dir()


def test_a_cache_may_be_named_from_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ASTEROID_CACHE", "~/kept")
    assert hub.cache_dir() == tmp_path / "kept" / "asteroid_tiny"


def test_packaged_models_are_listed_and_load_by_name(zoo):
    model = small(Sepformer, 3)
    model.save_pretrained(zoo / "a-model", metrics={"si_sdr_i": 7.5}, licence="mit")
    model.save_pretrained(zoo / ".b-model.1.part")  # of a process that was killed
    (zoo / ".b-model.1.part" / WEIGHTS).unlink()
    assert asteroid_tiny.list_models().keys() == {"a-model"}
    facts = list_models()["a-model"]
    assert facts["n_src"] == 3 and facts["metrics"]["si_sdr_i"] == 7.5
    assert alike(from_pretrained("a-model"), model)
    assert alike(Sepformer.from_pretrained("a-model"), model)


def test_a_packaged_model_of_the_other_class_is_said(zoo, refused):
    small(Sepformer).save_pretrained(zoo / "a-model")
    with refused("'Sepformer', not TinySepformer"):
        TinySepformer.from_pretrained("a-model")


def test_a_path_comes_before_a_packaged_name_and_the_clash_is_said(zoo):
    packaged, own = small(), small()
    packaged.save_pretrained(zoo / "a-model")
    own.save_pretrained("a-model")
    with pytest.warns(UserWarning, match="both a path here and a packaged model"):
        assert alike(from_pretrained("a-model"), own)


def test_a_name_of_nothing_says_what_there_is(zoo, refused):
    small().save_pretrained(zoo / "a-model")
    with refused("no-model is neither", "there are a-model", "user/repo"):
        from_pretrained("no-model")


def test_a_name_that_is_too_long_for_a_file_is_one_sentence(refused):
    with refused("cannot be read: File name too long"):
        from_pretrained(300 * "x")
    with refused("127.0.0.1"):
        from_pretrained(f"https://127.0.0.1:9/model.pth?sig={5000 * 'x'}")


@pytest.mark.parametrize("name", ["", None, 5])
def test_what_is_no_name_is_refused(zoo, refused, name):
    with refused(f"{name!r} names no model"):
        from_pretrained(name)


def test_an_address_is_fetched_once_as_long_as_its_content_is_the_same(tmp_path, cache):
    first, second = small(), small()
    with serving_files(files_of(first, tmp_path / "first")) as server:
        url = f"{server.address}/model.pth"
        assert alike(from_pretrained(url), first)
        assert alike(from_pretrained(url), first)
        assert len(server.asked) == 3  # who it is, its content; who it is
        server.files = files_of(second, tmp_path / "second")
        assert alike(from_pretrained(url), second)
        server.quirks = ["no etag"]
        server.files = files_of(first, tmp_path / "first")
        assert alike(from_pretrained(url), first)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"model.pth"}


def test_a_server_that_does_not_tell_what_has_changed_is_asked_every_time(
    tmp_path, cache, refused, monkeypatch
):
    files = [files_of(small(), tmp_path / name) for name in ("a", "b")]
    monkeypatch.setattr(hub.tempfile, "tempdir", "/dev/null")  # the cache may be another disk
    with serving_files({}, quirks=["no etag"]) as server:
        for server.files in (files[0], files[1], files[0]):
            kept = hub.locate(f"{server.address}/model.pth")
            assert kept.read_bytes() == server.files["/model.pth"]
        assert len([path for path in cache.rglob("*") if path.is_file()]) == 2
        shutil.rmtree(cache)
        cache.write_text("in the way")
        with refused(cache, "a file is in the place of a folder"):
            from_pretrained(f"{server.address}/model.pth")


def test_what_is_fetched_keeps_its_suffix_which_says_what_it_is():
    graph = b"a graph"
    with serving_files({"/model.onnx": graph}) as server:
        for fragment in ("", f"#sha256={hashlib.sha256(graph).hexdigest()}", ""):
            kept = hub.locate(f"{server.address}/model.onnx{fragment}")
            assert kept.suffix == ".onnx" and kept.read_bytes() == graph
            server.quirks = ["no etag"]


def test_an_address_may_end_in_a_query(tmp_path):
    model = small()
    with serving_files(files_of(model, tmp_path / "model"), quirks=["token"]) as server:
        for name in ("model.pth", WEIGHTS):
            assert alike(from_pretrained(f"{server.address}/{name}?of=a/b.c&token=x"), model)


def test_the_same_file_name_on_two_servers_is_two_models(tmp_path):
    first, second = small(), small()
    files = files_of(first, tmp_path / "1", "/a/") | files_of(second, tmp_path / "2", "/b/")
    with serving_files(files) as server:
        for name in ("model.pth", WEIGHTS):
            assert alike(from_pretrained(f"{server.address}/a/{name}"), first)
            assert alike(from_pretrained(f"{server.address}/b/{name}"), second)


def test_two_addresses_with_one_etag_are_two_models(tmp_path):
    first, second = small(), small()
    files = files_of(first, tmp_path / "1", "/a/") | files_of(second, tmp_path / "2", "/b/")
    with serving_files(files, quirks=["one etag"]) as server:
        assert alike(from_pretrained(f"{server.address}/a/model.pth"), first)
        assert alike(from_pretrained(f"{server.address}/b/model.pth"), second)


def test_a_checksum_in_the_address_is_verified_and_saves_the_question(tmp_path, refused):
    model = small()
    files = files_of(model, tmp_path / "model")
    digest = digest_of(tmp_path / "model" / "model.pth")
    with serving_files(files) as server:
        url = f"{server.address}/model.pth"
        with refused(url, "0" * 64, "not kept"):
            from_pretrained(f"{url}#sha256={'0' * 64}")
        assert alike(from_pretrained(f"{url}#sha256={digest}"), model)
        with refused("64 hexadecimal digits"):
            from_pretrained(f"{url}#md5=1")
        with refused(CONFIG, digest):
            from_pretrained(f"{server.address}/{WEIGHTS}#sha256={digest}")
        weights = digest_of(tmp_path / "model" / WEIGHTS)
        assert alike(from_pretrained(f"{server.address}/{WEIGHTS}#sha256={weights}"), model)
    assert alike(from_pretrained(f"{url}#sha256={digest}"), model)  # no server any more


def test_weights_that_are_replaced_at_their_address_are_fetched_anew(tmp_path):
    with serving_files({}) as server:
        for name in ("first", "second"):
            model = small()
            server.files = files_of(model, tmp_path / name)
            assert alike(from_pretrained(f"{server.address}/{WEIGHTS}"), model)
            digest = digest_of(tmp_path / name / "model.pth")
            assert alike(from_pretrained(f"{server.address}/model.pth#sha256={digest}"), model)


def test_a_description_that_is_replaced_beside_its_weights_is_fetched_anew(tmp_path):
    files = files_of(small(), tmp_path / "model")
    with serving_files(files) as server:
        for licence in ("mit", "cc0-1.0"):
            config = {**json.loads(files[f"/{CONFIG}"]), "licence": licence}
            server.files = {**files, f"/{CONFIG}": json.dumps(config).encode()}
            kept = hub.locate(f"{server.address}/{WEIGHTS}")
            assert json.loads(kept.with_name(CONFIG).read_text()) == config
            assert kept.read_bytes() == files[f"/{WEIGHTS}"]


def test_a_checksum_in_the_address_may_be_in_capitals(tmp_path):
    model = small()
    with serving_files(files_of(model, tmp_path / "model")) as server:
        for name in ("model.pth", WEIGHTS):
            digest = digest_of(tmp_path / "model" / name).upper()
            assert alike(from_pretrained(f"{server.address}/{name}#sha256={digest}"), model)


def test_a_filled_cache_is_not_written_to_and_may_be_read_only(tmp_path, cache):
    model = small()
    with serving_files(files_of(model, tmp_path / "model")) as server:
        urls = [f"{server.address}/{name}" for name in ("model.pth", WEIGHTS)]
        before = None
        for _ in range(2):
            assert all(alike(from_pretrained(url), model) for url in urls)
            changes = {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}
            assert before in (None, changes)
            before = changes


def test_an_address_with_another_description_or_none_is_one_sentence(tmp_path, refused):
    files = files_of(small(), tmp_path / "model")
    with serving_files(files) as server:
        with refused(f"{server.address}/no.pth answers 404"):
            from_pretrained(f"{server.address}/no.pth")
        server.files = {**files, f"/{CONFIG}": b"<html>"}
        with refused(f"{server.address}/{CONFIG} is no JSON"):
            from_pretrained(f"{server.address}/{WEIGHTS}")
        config = {**json.loads(files[f"/{CONFIG}"]), "sha256": "\x1b[2Jfine"}
        server.files = {**files, f"/{CONFIG}": json.dumps(config).encode()}
        with refused("gives '?[2Jfine' for a sha256, which it is not"):
            from_pretrained(f"{server.address}/{WEIGHTS}")
        server.files = {**files, f"/{WEIGHTS}": files[f"/{WEIGHTS}"][:-1] + b"!"}
        with refused(f"{server.address}/{WEIGHTS}", "not kept"):
            from_pretrained(f"{server.address}/{WEIGHTS}")


@pytest.fixture
def on_hub(monkeypatch):
    """A hub on the loopback, which the real client talks to with a token that may write."""
    with serving_hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet has servers of its own
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits before it tries again
        yield server


@pytest.fixture
def published(tmp_path, summary):
    """(a model, its publish folder)"""
    about = dict(name="m", data_name="d", data_licence="CC0", licence="mit", summary=summary)
    model = small()
    return model, publish(model, tmp_path / "publish", about)


def test_an_onnx_file_of_weights_before_does_not_stay_on_the_hub(on_hub, published):
    _, folder = published
    (folder / "model.onnx").write_bytes(b"as those before were")
    push(folder, "me/model")
    assert "model.onnx" in on_hub.commits["me/model"][-1]
    push(folder, "me/model")
    assert "model.onnx" in on_hub.commits["me/model"][-1]
    (folder / "model.onnx").unlink()
    push(folder, "me/model")
    assert "model.onnx" not in on_hub.commits["me/model"][-1]
    assert WEIGHTS in on_hub.commits["me/model"][-1]


def test_a_model_goes_to_the_hub_and_comes_back(on_hub, published, tmp_path):
    model, folder = published
    url = push(folder, "me/model")
    assert url.startswith(f"{on_hub.address}/me/model/commit/")
    assert on_hub.commits["me/model"][-1].keys() == {
        "README.md",
        CONFIG,
        WEIGHTS,
        "pytorch_model.bin",
    }
    assert alike(from_pretrained("me/model"), model)
    assert alike(TinySepformer.from_pretrained("me/model@main"), model)
    (tmp_path / "asteroid").mkdir()
    (tmp_path / "asteroid" / "model.bin").write_bytes(
        on_hub.commits["me/model"][-1]["pytorch_model.bin"]
    )
    assert alike(from_pretrained(tmp_path / "asteroid" / "model.bin"), model)


def test_a_revision_stays_what_it_was_and_the_cache_serves_without_network(
    on_hub, published, tmp_path, summary, monkeypatch, refused
):
    first, folder = published
    old = push(folder, "me/model").rpartition("/")[2]
    second = small()
    about = dict(name="m", data_name="d", data_licence="CC0", licence="mit", summary=summary)
    push(publish(second, folder, about), "me/model")
    assert alike(from_pretrained("me/model"), second)
    assert alike(from_pretrained(f"me/model@{old}"), first)
    n_asked = len(on_hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert alike(from_pretrained("me/model"), second)
    assert alike(from_pretrained(f"me/model@{old}"), first)
    with refused("me/other is not in the cache"):
        from_pretrained("me/other")
    assert len(on_hub.asked) == n_asked


def test_a_repository_of_asteroid_has_one_file(on_hub, tmp_path):
    model = small()
    content = files_of(model, tmp_path / "model")["/model.pth"]
    on_hub.commits["me/old"] = [{"pytorch_model.bin": content}]
    assert alike(from_pretrained("me/old"), model)
    other = files_of(small(), tmp_path / "other")["/model.pth"]
    on_hub.commits["me/old"].append({"pytorch_model.bin": other})
    assert alike(from_pretrained(f"me/old@{commit_name(0)}"), model)


def test_both_files_are_of_one_commit_whatever_is_pushed_meanwhile(on_hub, tmp_path, monkeypatch):
    model = small()
    on_hub.commits["me/model"] = [files_of(model, tmp_path / "model", "")]
    other = files_of(small(), tmp_path / "other", "")
    download = huggingface_hub.hf_hub_download

    def then_pushed(repo, name, **options):
        found = download(repo, name, **options)
        on_hub.commits[repo].append(other)
        return found

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", then_pushed)
    assert alike(from_pretrained("me/model"), model)


def test_what_is_not_on_the_hub_is_one_sentence(on_hub, published, refused):
    push(published[1], "me/model")
    on_hub.commits["me/empty"] = [{}]
    with refused("me/none does not exist on the hub"):
        from_pretrained("me/none")
    with refused("me/model@v9 has no revision 'v9'"):
        from_pretrained("me/model@v9")
    on_hub.commits["me/gated"] = GATED
    with refused("me/gated asks for consent: give it on its page"):
        from_pretrained("me/gated")
    with refused("me/empty holds neither"):
        from_pretrained("me/empty")
    with refused("me/..x is no name on the hub"):
        from_pretrained("me/..x")


def test_a_hub_that_is_not_there_is_one_sentence(on_hub, monkeypatch, refused):
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        told = getattr(constants, name).replace(on_hub.address, "http://127.0.0.1:9")
        monkeypatch.setattr(constants, name, told)
    with refused("me/model is not in the cache, and the hub cannot be reached"):
        from_pretrained("me/model")


def test_a_refused_token_is_one_sentence_and_nothing_is_made(
    on_hub, published, monkeypatch, refused
):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with refused("me/model", "401", "hf auth login"):
        push(published[1], "me/model")
    assert on_hub.commits == {}


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_a_connection_dropped_in_the_upload_leaves_no_commit(on_hub, published, where, refused):
    model, folder = published
    on_hub.drop = where
    with refused("me/model could not be transferred"):
        push(folder, "me/model")
    assert on_hub.commits["me/model"] == [{}]
    on_hub.drop = None
    push(folder, "me/model")
    assert alike(from_pretrained("me/model"), model)


def test_a_full_disk_while_downloading_is_said_and_nothing_half_is_used(
    on_hub, published, monkeypatch, refused
):
    model, folder = published
    push(folder, "me/model")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", full)
        with refused("me/model", "the disk is full"):
            from_pretrained("me/model")
    assert alike(from_pretrained("me/model"), model)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, refused):
    names = [f"runs/model{suffix}" for suffix in (".pth", ".bin", ".ckpt", ".safetensors", ".onnx")]
    for name in (*names, "./model", "~/model", tmp_path / "model"):
        with refused(f"{name} is missing"):
            from_pretrained(name)
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    with refused("which asteroid_tiny.OnnxSeparator opens"):
        from_pretrained(tmp_path / "model.onnx")


def test_names_that_are_none_are_not_uploaded(published, refused, tmp_path):
    with refused("must be user/repo"):
        push(published[1], "model")
    with refused("is no publish folder"):
        push(tmp_path, "me/model")
