"""Downloads: resumed, checked, whole or not at all, from a server that misbehaves."""

import errno
import fcntl
import hashlib
import http.client
import multiprocessing
import os
import shutil
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from server import DATE, serving_files

from asteroid_tiny import download
from asteroid_tiny.download import fetch, identify

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGESTS = {name: hashlib.new(name, CONTENT).hexdigest() for name in ("sha256", "md5")}


@pytest.fixture(autouse=True)
def short_pause(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def ranges(server):
    return [headers.get("Range") for headers in server.asked]


def test_a_file_arrives_and_is_fetched_once(tmp_path):
    path = tmp_path / "made" / "speech.tar.gz"
    with serving_files({"/speech.tar.gz": CONTENT}) as server:
        for _ in range(2):
            assert fetch(f"{server.address}/speech.tar.gz", path, **DIGESTS) == path
        assert len(server.asked) == 1
    assert path.read_bytes() == CONTENT and names(path.parent) == [path.name]


def test_a_dropped_connection_is_taken_up_where_it_ended(tmp_path):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, drops=[100_000, 50_000]) as server:
        fetch(f"{server.address}/m", path)
        assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


def test_what_arrived_is_kept_for_the_next_call(tmp_path, refused):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, drops=[100_000, 0, 0, 0, 0]) as server:
        url = f"{server.address}/m"
        with refused(url, "100 kB have arrived", "run the same command again"):
            fetch(url, path)
        assert not path.exists()
        fetch(url, path)
        assert ranges(server)[-1] == "bytes=100000-"
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


@pytest.mark.parametrize("how", ["content", "address", "no etag", "no range", "one etag"])
def test_a_part_is_never_joined_to_something_else(tmp_path, refused, how):
    path, other = tmp_path / "model.pth", CONTENT[::-1]
    quirks = [how] if how.endswith(("etag", "range")) else []
    with serving_files({"/m": CONTENT}, [100_000, 0, 0, 0, 0], quirks) as server:
        with refused("ended early"):
            fetch(f"{server.address}/m", path)
        server.files = {"/m": other, "/n": other}
        server.drops.clear()
        fetch(f"{server.address}/{'n' if how in ('address', 'one etag') else 'm'}", path)
    assert path.read_bytes() == other


@pytest.mark.parametrize("quirk", ["wrong range", "weak etag"])
def test_a_part_goes_on_at_its_end_if_the_content_is_surely_the_same(tmp_path, refused, quirk):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, [100_000, 0, 0, 0, 0], [quirk]) as server:
        with refused("ended early"):
            fetch(f"{server.address}/m", path)
        server.drops.clear()
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT
    if quirk == "weak etag":  # which is not sure enough
        assert server.asked[-1]["If-Range"] == DATE


def test_a_part_is_no_beginning_of_content_of_no_size_that_comes_as_a_whole(tmp_path, refused):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, [100_000, 0, 0, 0, 0], ["no range"]) as server:
        with refused("ended early"):
            fetch(f"{server.address}/m", path)
        server.drops.clear()
        server.quirks.append("no size")
        fetch(f"{server.address}/m", path, **DIGESTS)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_more(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetch(f"{server.address}/m", path)
        fetch(f"{server.address}/m", path)
        assert ranges(server) == [None, "bytes=300000-"]
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", DIGESTS)
def test_a_wrong_checksum_is_said_and_not_kept(tmp_path, refused, name):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT[:-1] + b"!"}) as server:
        url = f"{server.address}/m"
        with refused(url, name, DIGESTS[name], "not kept"):
            fetch(url, path, **{name: DIGESTS[name]})
        assert names(tmp_path) == []
        path.write_bytes(b"something of the user")
        with refused(path, DIGESTS[name], "delete it"):
            fetch(url, path, **{name: DIGESTS[name]})
        assert path.read_bytes() == b"something of the user"


@pytest.mark.parametrize(
    "status, words",
    [
        (404, "check the address"),
        (410, "check the address"),
        (403, "cannot be fetched"),
        *((status, str(status)) for status in (408, 429, 500, 502, 503, 504)),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing(tmp_path, refused, status, words):
    with serving_files({"/m": status}) as server:
        with refused(f"{server.address}/m", status, words):
            fetch(f"{server.address}/m", tmp_path / "model.pth")
        assert len(server.asked) == (1 if status in (404, 410, 403) else download.TRIES)
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "model.pth", "http://", "http://[x/m"])
def test_only_web_addresses_are_fetched(tmp_path, refused, url):
    with refused(url):
        fetch(url, tmp_path / "model.pth")
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["http://x/a b", "http://x:y/m", "http://[x/m"])
def test_what_cannot_be_an_address_is_said_at_once(tmp_path, refused, url):
    with refused(url, "is no address"):
        fetch(url, tmp_path / "model.pth")


def test_a_server_that_is_not_there_is_one_sentence(tmp_path, refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/m"
    with refused(url, "cannot be reached", "refused"):
        fetch(url, tmp_path / "model.pth")
    assert names(tmp_path) == []


def test_without_a_size_only_a_checksum_tells_whether_it_is_whole(tmp_path, refused):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, quirks=["no size"]) as server:
        with refused("does not say its size", "checksum"):
            fetch(f"{server.address}/m", path)
        assert not path.exists()
        fetch(f"{server.address}/m", path, sha256=DIGESTS["sha256"])
    assert path.read_bytes() == CONTENT


def test_a_disk_that_is_or_becomes_full_is_said_and_the_part_kept(tmp_path, refused, monkeypatch):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, drops=[100_000]) as server:
        url = f"{server.address}/m"
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
            with refused("10 kB free", "300 kB are to come"):
                fetch(url, path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_disk)
            with refused(path, "the disk is full"):
                fetch(url, path)
        fetch(url, path)
        assert ranges(server)[-1].startswith("bytes=")
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


def full_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_processes_that_fetch_the_same_wait_for_each_other(tmp_path):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}) as server:
        fork = multiprocessing.get_context("fork")
        arguments = f"{server.address}/m", path, DIGESTS["sha256"]
        processes = [fork.Process(target=fetch, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len(server.asked) == 1
    assert all(process.exitcode == 0 for process in processes)
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


def test_a_connection_may_drop_often_as_long_as_bytes_come(tmp_path):
    path = tmp_path / "model.pth"
    drops = [40_000] * (download.TRIES + 2)
    with serving_files({"/m": CONTENT}, drops) as server:
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT


def test_room_is_needed_for_what_is_to_come_alone(tmp_path, monkeypatch):
    path, free = tmp_path / "model.pth", iter([300_000, 100_000])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    with serving_files({"/m": CONTENT}, drops=[200_000]) as server:
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_content_is_not_taken_for_it(tmp_path, refused):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, [200_000, 0, 0, 0, 0], ["one etag"]) as server:
        with refused("ended early"):
            fetch(f"{server.address}/m", path)
        server.files = {"/m": CONTENT[:100_000]}
        server.drops.clear()
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT[:100_000]


def test_checksums_may_be_in_capitals(tmp_path):
    with serving_files({"/m": CONTENT}) as server:
        digests = {name: digest.upper() for name, digest in DIGESTS.items()}
        fetch(f"{server.address}/m", tmp_path / "model.pth", **digests)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_part_that_another_process_removed_meanwhile_is_begun_anew(tmp_path, monkeypatch):
    path, lock = tmp_path / "model.pth", fcntl.flock

    def waits(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / ".model.pth.part").unlink()  # by who had the lock, and an error
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", waits)
    with serving_files({"/m": CONTENT}) as server:
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


@pytest.mark.parametrize("step", ["begin", "read"])
def test_a_network_that_is_gone_for_a_moment_is_no_fault_of_the_disk(tmp_path, monkeypatch, step):
    path, works = tmp_path / "model.pth", getattr(http.client.HTTPResponse, step)

    def gone(*_):
        monkeypatch.setattr(http.client.HTTPResponse, step, works)
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setattr(http.client.HTTPResponse, step, gone)
    with serving_files({"/m": CONTENT}) as server:
        fetch(f"{server.address}/m", path)
        assert len(server.asked) == 2
    assert path.read_bytes() == CONTENT


def test_what_another_process_left_while_this_one_waited_is_gone_on_with(tmp_path, monkeypatch):
    path, lock = tmp_path / "model.pth", fcntl.flock
    with serving_files({"/m": CONTENT}) as server:
        url = f"{server.address}/m"

        def waits(file, how):
            monkeypatch.setattr(fcntl, "flock", lock)
            server.drops[:] = [100_000]
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(time, "sleep", interrupted)
                fetch(url, path)  # of the other process
            lock(file, how)

        monkeypatch.setattr(fcntl, "flock", waits)
        fetch(url, path)
        assert ranges(server) == [None, "bytes=100000-"]
    assert path.read_bytes() == CONTENT and names(tmp_path) == [path.name]


def test_with_a_checksum_a_part_of_content_without_an_etag_is_gone_on_with(tmp_path):
    path = tmp_path / "model.pth"
    with serving_files({"/m": CONTENT}, [100_000], ["no etag"]) as server:
        fetch(f"{server.address}/m", path, **DIGESTS)
        assert ranges(server) == [None, "bytes=100000-"]
        assert "If-Range" not in server.asked[-1]
    assert path.read_bytes() == CONTENT


def test_a_server_that_says_nothing_is_not_waited_for_forever(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/m"
        ended = threading.Timer(5, silent.shutdown, [socket.SHUT_RDWR])
        ended.start()
        with refused(url, "timed out"):
            fetch(url, tmp_path / "model.pth")
        with refused(url, "cannot be reached", "timed out"):
            identify(url)
        ended.cancel()


def test_content_without_an_etag_is_told_by_its_date():
    with serving_files({"/m": CONTENT}, quirks=["no etag", "date"]) as server:
        assert identify(f"{server.address}/m") == DATE
        server.quirks = ["no etag"]
        assert identify(f"{server.address}/m") is None


def test_a_connection_that_is_reset_at_its_beginning_is_tried_again(tmp_path, monkeypatch):
    path, works = tmp_path / "model.pth", http.client.HTTPConnection.connect

    def reset(*_):
        monkeypatch.setattr(http.client.HTTPConnection, "connect", works)
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(http.client.HTTPConnection, "connect", reset)
    with serving_files({"/m": CONTENT}) as server:
        fetch(f"{server.address}/m", path)
    assert path.read_bytes() == CONTENT
