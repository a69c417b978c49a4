"""LibriSpeech and LibriMix's metadata, fetched from a server on the loopback and unpacked."""

import hashlib
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from librimix_corpus import PARTS, make_corpus
from recipes import settings_of

from asteroid_tiny.data import librimix
from asteroid_tiny.preparation import prepare_speech


@pytest.fixture(scope="module")
def corpus(clips, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), clips)


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback, ranges as well; drops the first connections half-way."""

    def __init__(self, folder, n_drops=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.n_drops = n_drops
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.asked.append((path.name, begin))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        self.send_response(206 if begin else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", len(content) - begin)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.server.n_drops:
            self.server.n_drops -= 1
            self.wfile.write(content[begin : begin + (len(content) - begin) // 2])
        else:
            self.wfile.write(content[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(corpus, tmp_path, monkeypatch):
    """Serves the corpus as the archives of OpenSLR: a function that starts a server."""
    folder = tmp_path / "served"
    folder.mkdir()
    for part in PARTS.values():
        path = folder / f"{part}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(corpus / "LibriSpeech" / part, f"LibriSpeech/{part}")
            archive.add(corpus / "LibriSpeech" / "SPEAKERS.TXT", "LibriSpeech/SPEAKERS.TXT")
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        archive = librimix.Archive(path.name, md5, 0.001, 0.002)
        monkeypatch.setitem(librimix.ARCHIVES, part, archive)
    servers = []

    def start(**options):
        servers.append(Server(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetching(corpus, tmp_path):
    """Runs stage 0 where LibriSpeech is still to be fetched: a function of the server."""

    def prepare(server, **options):
        target = tmp_path / "fetched"
        options = {"metadata_dir": str(corpus / "metadata"), **options}
        settings = settings_of(
            "librimix", speech=str(target), librispeech_url=server.url, **options
        )
        prepare_speech(tmp_path / "recipe" / "exp" / "run", settings)
        return target

    return prepare


def test_librispeech_is_fetched_over_a_connection_that_drops(corpus, served, fetching, capsys):
    server = served(n_drops=2)
    folder = fetching(server)
    assert [name for name, begin in server.asked if begin], "it went on where it was cut"
    for path in (corpus / "LibriSpeech").rglob("*.*"):
        found = folder / "LibriSpeech" / path.relative_to(corpus / "LibriSpeech")
        assert found.read_bytes() == path.read_bytes()
    there = {path.name for path in (folder / "LibriSpeech").iterdir()}
    assert there == {*PARTS.values(), "SPEAKERS.TXT", ".lock"}, "no archive stays"
    said = capsys.readouterr().out
    assert "to fetch: train-clean-100, dev-clean, test-clean" in said and "space needed" in said
    n_asked = len(server.asked)
    fetching(server)
    assert len(server.asked) == n_asked, "what is there is not fetched again"


def test_metadata_are_fetched(corpus, served, fetching, monkeypatch):
    server = served()
    monkeypatch.setattr(librimix, "METADATA_URL", f"{server.url}/metadata")
    shutil.copytree(corpus / "metadata", server.folder / "metadata")
    given = {"metadata_dir": None, "librispeech_dir": str(corpus / "LibriSpeech")}
    folder = fetching(server, **given) / "metadata" / "Libri2Mix"
    assert len(server.asked) == 3
    for path in folder.iterdir():
        assert path.read_bytes() == (corpus / "metadata" / "Libri2Mix" / path.name).read_bytes()


def test_a_wrong_checksum_leaves_no_speech(served, fetching, refused, monkeypatch):
    archive = librimix.ARCHIVES["train-clean-100"]._replace(md5="0" * 32)
    monkeypatch.setitem(librimix.ARCHIVES, "train-clean-100", archive)
    with refused("train-clean-100.tar.gz has the md5", "not 0000"):
        fetching(served())


@pytest.mark.parametrize("part", ["dev-clean", "another"])
def test_an_archive_that_is_broken_or_another_is_named(served, refused, tmp_path, part):
    server, place = served(), tmp_path / "LibriSpeech"
    path = server.folder / "dev-clean.tar.gz"
    if part == "dev-clean":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    archive = librimix.Archive(path.name, None, 0.001, 0.002)  # no checksum tells it
    with refused("dev-clean.tar.gz", "delete it to fetch it again"):
        librimix.fetch_archives({place / part: archive}, server.url)
    assert {path.name for path in place.iterdir()} == {"dev-clean.tar.gz", ".lock"}


def test_an_address_that_does_not_exist_is_named(served, fetching, refused):
    server = served()
    (server.folder / "dev-clean.tar.gz").unlink()
    with refused(f"{server.url}/dev-clean.tar.gz answers 404"):
        fetching(server)


def test_too_little_space_is_said_before_anything_is_fetched(
    served, fetching, refused, monkeypatch
):
    server = served()
    archive = librimix.ARCHIVES["dev-clean"]._replace(unpacked=1e9)
    monkeypatch.setitem(librimix.ARCHIVES, "dev-clean", archive)
    with refused("GB free where 1000000000.0 GB are needed"):
        fetching(server)
    assert not server.asked


def test_after_an_interruption_space_is_asked_for_the_rest_alone(served, tmp_path, monkeypatch):
    server, place = served(), tmp_path / "LibriSpeech"
    archive = server.folder / "dev-clean.tar.gz"
    size = archive.stat().st_size
    wanted = {place / "dev-clean": librimix.ARCHIVES["dev-clean"]._replace(size=size / 1e9)}
    for part in (place / ".dev-clean.tar.gz.part", place / ".unpacking-dev-clean" / "a.flac"):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(archive.read_bytes()[: size // 2])
    free = size - size // 2 + 2_000_100  # for the other half, and what is unpacked
    usage = shutil.disk_usage(place)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    librimix.fetch_archives(wanted, server.url)
    assert {path.name for path in place.iterdir()} == {"dev-clean", "SPEAKERS.TXT", ".lock"}
