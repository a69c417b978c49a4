"""`asteroid-tiny demo` in a real browser: separates, refuses, keeps visitors apart, cleans up."""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from small import small

from asteroid_tiny import cli, demo
from asteroid_tiny.demo import build_page, launch, separate_upload
from asteroid_tiny.errors import UserError
from asteroid_tiny.inspection import DEFAULT, WIDE, open_model
from asteroid_tiny.longform import separate_file
from asteroid_tiny.longform.audio import Recording

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
browsers = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
#: The command line, with a note of whoever is called outside this machine.
WATCHED = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" else args[0]
        if host not in ("127.0.0.1", "localhost", "::1", None):
            print("outside:", host, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from asteroid_tiny.cli import main
main(["demo", *sys.argv[1:]])
"""


class Server:
    """The demo as a process of its own, whose temporary files all lie in one folder."""

    def __init__(self, folder, *options):
        self.temporary, self.log = folder / "tmp", folder / "log"
        self.temporary.mkdir()
        command = [sys.executable, "-W", "ignore", "-c", WATCHED, "--device", "cpu", *options]
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        for _ in range(600):
            if "http" in self.log.read_text():
                break
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.url = self.log.read_text().split("the page is at ")[1].split()[0]

    def files(self):
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pth"
    small(n_src=3).save(path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("demo")
    server = Server(folder, "-m", str(model), "--minutes", "1", "--megabytes", "1")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as a new visitor; all that it asks for must be on this machine."""
    contexts, asked = [], []

    def open_page(width=1280, url=server.url):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # ms; beside other work the first visit takes long
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.get_by_role("button", name="Separate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in asked)


@pytest.fixture(scope="module")
def mixtures(clips, tmp_path_factory):
    """Two mixtures of two speakers each, one of them at 44.1 kHz in stereo."""
    folder = tmp_path_factory.mktemp("mixtures")
    a, b, c, d = (samples / 65536 for samples in clips.values())
    sf.write(folder / "one talk.wav", a + b, 8000)
    twice = np.repeat((c + d)[:12000], 2)
    sf.write(folder / "other.flac", np.stack([twice, 0 * twice], 1), 16000)
    return sorted(folder.iterdir())


def wait_for(condition):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come about in 30 s")


def separate(page):
    page.get_by_role("button", name="Separate").click()


def choose(page, name):
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=name).click()


def give(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_role("button", name="Clear").wait_for()


def downloads(page, folder):
    """The downloads that the page offers, by name."""
    folder.mkdir()
    page.get_by_role("button", name="Download speaker 1").wait_for()
    for button in page.get_by_role("button", name="Download speaker").all():
        with page.expect_download() as download:
            button.click()
        download.value.save_as(folder / download.value.suggested_filename)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(path, name, folder):
    model, _ = open_model(name)
    folder.mkdir()
    targets = [folder / f"{path.stem}_est{k}.wav" for k in range(1, model.n_src + 1)]
    separate_file(model, path, targets)
    return {target.name: target.read_bytes() for target in targets}


@browsers
@pytest.mark.parametrize("width", [390, 1280])
def test_speakers_are_seen_heard_and_downloaded(visit, mixtures, tmp_path, width):
    page = visit(width)
    choose(page, DEFAULT)
    page.get_by_text("was made for 2 speakers at 8000 Hz, trained on speechocean762").wait_for()
    give(page, mixtures[0])
    separate(page)
    found = downloads(page, tmp_path / "found")
    assert found == expected(mixtures[0], DEFAULT, tmp_path / "expected") and len(found) == 2
    assert "4.0 s separated" in page.locator("#status").inner_text()
    for name in ("the recording", "speaker 1", "speaker 2"):
        box = page.get_by_alt_text(f"spectrogram of {name}").bounding_box()
        assert 250 < box["width"] < width and 100 < box["height"] < 200
    assert page.get_by_role("button", name="Play", exact=True).count() == 3
    page.get_by_role("button", name="Play", exact=True).last.click()
    page.get_by_role("button", name="Pause").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.get_by_role("button", name="Share").count() == 0  # which would send it elsewhere


@browsers
def test_two_visitors_at_once_get_each_their_own(visit, mixtures, tmp_path, model):
    pages = [visit(), visit()]
    for page, path in zip(pages, mixtures):
        give(page, path)
    for page in pages:
        separate(page)
    for k, (page, path) in enumerate(zip(pages, mixtures)):
        found = downloads(page, tmp_path / f"found{k}")
        assert found == expected(path, model, tmp_path / f"expected{k}") and len(found) == 3
    assert "the mean of its 2 channels" in pages[1].locator("#status").inner_text()


@browsers
def test_bad_recordings_get_a_sentence(visit, server, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    broken = np.where(np.arange(16000) == 300, np.nan, noise)
    (tmp_path / "text.wav").write_text("no sound")
    sf.write(tmp_path / "empty.wav", noise[:0], 8000)
    sf.write(tmp_path / "short.wav", noise[:2000], 8000)
    sf.write(tmp_path / "nan.wav", broken, 8000, subtype="FLOAT")
    sf.write(tmp_path / "long.flac", np.tile(noise, 31), 8000)
    page = visit()
    separate(page)
    page.get_by_text("There is no recording yet").wait_for()
    for name, words in {
        "text.wav": "text.wav cannot be read",
        "empty.wav": "empty.wav is too short: 0 s",
        "short.wav": "short.wav is too short: 0.25 s",
        "nan.wav": "samples that are NaN",
        "long.flac": "long.flac is longer than the 1 minutes allowed",
    }.items():
        give(page, tmp_path / name)
        separate(page)
        page.locator("#status", has_text=words).wait_for()
        assert str(server.temporary) not in page.locator("#status").inner_text()
        page.get_by_role("button", name="Clear").click()
    sf.write(tmp_path / "big.wav", np.zeros(600_000), 48000)
    for name, words in {"big.wav": "exceed the maximum", "notes.txt": "Invalid file type"}.items():
        (tmp_path / "notes.txt").write_text("no sound")
        page.locator("input[type=file]").first.set_input_files(tmp_path / name)
        page.get_by_text(words).first.wait_for()
    assert page.get_by_role("button", name="Download speaker").count() == 0


@browsers
def test_files_are_deleted_after_the_time_told(visit, mixtures, model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    served = build_page([str(model)], kept_minutes=0.1, device="cpu")
    launch(served, quiet=True, prevent_thread_lock=True)
    try:
        page = visit(url=served.local_url)
        give(page, mixtures[0])
        separate(page)
        page.get_by_text("4.0 s separated").wait_for()
        assert len([path for path in tmp_path.rglob("*.wav")]) == 1 + 3
        wait_for(lambda: not [path for path in tmp_path.rglob("*") if path.is_file()])
    finally:
        served.close(verbose=False)


@browsers
def test_a_page_that_is_stopped_in_its_work_leaves_nothing_and_called_nobody(
    visit, server, clips, tmp_path
):
    page = visit()
    choose(page, DEFAULT)
    sf.write(
        tmp_path / "talk.wav", np.tile(np.concatenate([*clips.values()]), 2)[: 8000 * 30], 8000
    )
    give(page, tmp_path / "talk.wav")
    assert "talk.wav" in [path.name for path in server.files()]
    separate(page)
    page.get_by_text(re.compile("[1-9][0-9.]*%")).first.wait_for()
    assert server.stop() == 0
    assert list(server.temporary.iterdir()) == []
    assert "outside" not in server.log.read_text() and "Traceback" not in server.log.read_text()


def test_an_upload_that_is_broken_off_is_deleted_after_the_time_told(model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    served = build_page([str(model)], kept_minutes=0.05, device="cpu")
    launch(served, quiet=True, prevent_thread_lock=True)
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n"
        b"Content-Type: multipart/form-data; boundary=X\r\n\r\n--X\r\n"
        b'Content-Disposition: form-data; name="files"; filename="talk.wav"\r\n\r\n'
    )
    try:
        with socket.create_connection(("127.0.0.1", served.server_port)) as connection:
            connection.sendall(head + bytes(100_000))
            wait_for(lambda: [path for path in tmp_path.iterdir() if path.is_file()])
        wait_for(lambda: not [path for path in tmp_path.iterdir() if path.is_file()])
    finally:
        served.close(verbose=False)


def test_wrong_options_are_told(capsys):
    for options, words in (
        (["--minutes", "0"], "--minutes must be above 0"),
        (["-m", "no-such-model"], "no-such-model is neither"),
        (["--port", "0"], "--port must be from 1 to 65535, not 0"),
        (["--port", "65536"], "--port must be from 1 to 65535, not 65536"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["demo", *options])
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_recording_that_tells_no_length_is_bounded_as_well(monkeypatch, refused):
    @contextlib.contextmanager
    def recorded(path):  # as browsers do it
        yield Recording(8000, 1, None, (np.zeros((8000, 1)) for _ in range(9)))

    monkeypatch.setattr(demo, "open_recording", recorded)
    assert len(demo.read("talk.webm", 8000, 9 / 60)) == 9 * 8000
    with refused("talk.webm is longer than the 0.1 minutes"):
        demo.read("talk.webm", 8000, 0.1)


def test_errors_name_no_folder_of_the_server(tmp_path, refused):
    (tmp_path / "talk.wav").write_text("no sound")
    sf.write(tmp_path / "short.wav", np.zeros(2000), 8000)
    for name, words in {"talk.wav": "cannot be read", "short.wav": "is too short: 0.25 s"}.items():
        with pytest.raises(UserError, match=f"^{name} {words}") as caught:
            separate_upload(lambda _: small(), tmp_path / name, tmp_path / "out", 1.0, print)
        assert str(tmp_path) not in str(caught.value)


def test_without_a_choice_the_rate_of_the_recording_chooses(tmp_path, clips):
    page = build_page(device="cpu")
    (run,) = (block.fn for block in page.fns.values() if block.fn.__name__ == "separate")
    (chosen,) = (b for b in page.blocks.values() if getattr(b, "label", None) == "Model")
    page.GRADIO_CACHE, page.is_running = str(tmp_path), True
    a, b, *_ = clips.values()
    for rate, wanted in ((8000, DEFAULT), (16000, WIDE)):
        path = tmp_path / f"{rate}.wav"
        sf.write(path, (a + b)[:16000] / 65536, rate)
        targets = [Path(target) for target in run(str(path), chosen.value)[4::4] if target]
        found = {target.name: target.read_bytes() for target in targets}
        assert found == expected(path, wanted, tmp_path / f"expected{rate}") and len(found) == 2


def test_names_of_recordings_are_no_html(tmp_path, separator):
    page = build_page([str(separator)], device="cpu")
    (run,) = (block.fn for block in page.fns.values() if block.fn.__name__ == "separate")
    path = tmp_path / "<img src=x>.wav"
    path.write_text("no sound")
    page.GRADIO_CACHE, page.is_running = str(tmp_path), True
    assert run(str(path), str(separator))[0].startswith("<p>&lt;img src=x&gt;.wav cannot be read")


def test_a_disk_without_room_for_a_folder_is_told(tmp_path, separator, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    page = build_page([str(separator)], device="cpu")
    (run,) = (block.fn for block in page.fns.values() if block.fn.__name__ == "separate")
    monkeypatch.setattr(demo.tempfile, "mkdtemp", full)
    said = run(str(tmp_path / "talk.wav"), str(separator))[0]
    assert said.startswith("<p>The files could not be written: the disk is full; free some space")
