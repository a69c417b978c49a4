"""`asteroid-tiny demo` in a real browser: separates, refuses, keeps visitors apart, cleans up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from small import small

from asteroid_tiny import cli
from asteroid_tiny.inspection import DEFAULT, open_model
from asteroid_tiny.longform import separate_file

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
GRADIO = pytest.importorskip("gradio", reason="gradio is not installed")
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
    server = Server(folder, "-m", str(model), "--minutes", "0.2", "--megabytes", "1")
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
    """Opens the page as a new visitor; all that it asks for must come from the server."""
    contexts, asked = [], []

    def open_page(width=1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.get_by_role("button", name="Separate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)


@pytest.fixture(scope="module")
def mixtures(clips, tmp_path_factory):
    """Two mixtures of two speakers each, one of them at 44.1 kHz in stereo."""
    folder = tmp_path_factory.mktemp("mixtures")
    a, b, c, d = (samples / 65536 for samples in clips.values())
    sf.write(folder / "one talk.wav", a + b, 8000)
    twice = np.repeat((c + d)[:12000], 2)
    sf.write(folder / "other.flac", np.stack([twice, 0 * twice], 1), 16000)
    return sorted(folder.iterdir())


def choose(page, name):
    page.get_by_role("listbox", name="Model").click()
    page.get_by_role("option", name=name).click()


def give(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.wait_for()


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
