"""The page of an evaluation: what it says, what it shows, and that a browser plays it."""

import base64
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch

from asteroid_tiny.data import MixtureList, draw_list, write_list
from asteroid_tiny.evaluation import evaluate
from asteroid_tiny.plots import Axes, loudest, nice_ticks, spectrogram
from asteroid_tiny.report import training_curves, write_curves, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
CREDITS = 'By <A & B>, "http://x.org"'
PROBE = """<script>
addEventListener("load", async () => {
  const players = [...document.querySelectorAll("audio")];
  let played = 0;
  for (const player of players) {
    player.muted = true;
    try { await player.play(); played += player.duration > 1; } catch (error) {}
    player.pause();
  }
  const images = [...document.images].filter(image => image.naturalWidth > 100).length;
  const wide = [...document.querySelectorAll("body > :not(.scroll), figure")].filter(
    one => one.getBoundingClientRect().right > innerWidth).length;
  parent.postMessage(`played ${played}/${players.length} images ${images} wide ${wide} ` +
    `of ${innerWidth} scroll ${document.documentElement.scrollWidth > innerWidth}`, "*");
});
</script>"""


class Leaky(torch.nn.Module):
    """Knows the sources, each mixture with leakage of its own."""

    sample_rate = 8000

    def __init__(self, dataset):
        super().__init__()
        self.sources = {float(x.sum()): (k, s) for k, (x, s) in enumerate(dataset)}

    def forward(self, mixture):
        k, sources = self.sources[float(mixture.sum())]
        return (sources + 0.7 / (k + 1) * sources.flip(0))[None]


@pytest.fixture(scope="module")
def results(valid_speech, tmp_path_factory):
    """The folder of an evaluation of seven mixtures of two seconds."""
    folder = tmp_path_factory.mktemp("results")
    write_list(folder / "list.csv", draw_list(valid_speech, 7, 2, 16000, seed=1), 8000)
    dataset = MixtureList(valid_speech, folder / "list.csv")
    dataset = _Fixed(dataset)
    evaluate(Leaky(dataset), dataset, folder, n_workers=0)
    return folder


class _Fixed(list):
    """The items of a dataset, made once."""

    def __init__(self, dataset):
        super().__init__(dataset[i] for i in range(len(dataset)))
        self.describe, self.sample_rate = dataset.describe, dataset.sample_rate


@pytest.fixture(scope="module")
def page(results, run_logs):
    return write_report(results, "a <model>", CREDITS, training_curves(run_logs))


@pytest.fixture(scope="module")
def run_logs(tmp_path_factory):
    """The folder of a run that was stopped after 200 steps and went on: its logs."""
    folder = tmp_path_factory.mktemp("run")
    for version, steps in enumerate([range(9, 200, 10), range(199, 400, 10)]):
        rows = [{"step": step, "si_sdr": step / 100, "loss": -step / 100} for step in steps]
        rows += [{"step": step, "lr-AdamW": 1e-3} for step in steps]
        rows += [{"step": step, "val_si_sdr": step / 200} for step in (steps[9], steps[19])]
        log = folder / "logs" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        pd.DataFrame(rows).to_csv(log, index=False)
    return folder


class Parts(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.words = {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_what_was_measured_and_gives_credit(results, page):
    text = " ".join(" ".join(Parts(page.read_text()).words).split())
    all_mixtures = json.loads((results / "summary.json").read_text())["groups"]["all"]
    assert f"{all_mixtures['si_sdr_i']['mean']:.2f}" in text
    for words in ("a <model>", CREDITS, "best", "median", "worst", "random1", "random2"):
        assert words in text
    table = pd.read_csv(results / "metrics.csv").sort_values("si_sdr_i")
    assert f"worst: SI-SDR {table.input_si_sdr.iloc[0]:.1f} → {table.si_sdr.iloc[0]:.1f} dB" in text


def test_the_page_needs_no_network_and_holds_the_audio(results, page):
    parts = Parts(page.read_text()).found
    assert not {"script", "link", "iframe"} & set(parts)
    sources = [one["src"] for tag in ("img", "audio") for one in parts[tag]]
    assert all(source.startswith("data:") for source in sources)
    assert len(parts["audio"]) == len(parts["img"]) == 5 * 5
    best = next(results.glob("examples/best_*"))
    heard, rate = sf.read(io.BytesIO(base64.b64decode(parts["audio"][0]["src"].split(",")[1])))
    np.testing.assert_array_equal(heard, sf.read(best / "mixture.wav")[0])
    assert rate == 8000


def test_pictures_show_every_mixture(results, page):
    pictures = re.findall(r"<svg.*?</svg>", page.read_text(), flags=re.S)
    assert len(pictures) == 5
    roots = [ElementTree.fromstring(picture) for picture in pictures]
    tags = [[one.tag.rpartition("}")[2] for one in root.iter()] for root in roots]
    titles = [title.text for title in roots[1].iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(title.split(":")[0] for title in titles) == [f"mix{i:05d}" for i in range(7)]
    assert tags[2].count("circle") == 7
    assert all("nan" not in picture.lower() for picture in pictures)


def test_a_table_with_nothing_measured_still_gives_a_page(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    table = pd.read_csv(tmp_path / "copy" / "metrics.csv")
    table.assign(si_sdr_i=np.nan).to_csv(tmp_path / "copy" / "metrics.csv", index=False)
    assert "<h1>" in write_report(tmp_path / "copy", "none").read_text()


def test_ids_of_digits_keep_their_zeros_and_na_is_an_id(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    for path in [tmp_path / "copy" / "metrics.csv", *(tmp_path / "copy" / "examples").iterdir()]:
        if path.is_dir():
            path.rename(path.with_name(path.name.replace("mix", "").replace("00001", "NA")))
        else:
            path.write_text(path.read_text().replace("mix0", "0").replace("00001", "NA"))
    page = write_report(tmp_path / "copy", "digits").read_text()
    assert len(re.findall(r"<h3>\w+: SI-SDR", page)) == 5


def test_the_page_counts_what_became_worse_and_draws_medians(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    table = pd.read_csv(tmp_path / "copy" / "metrics.csv")
    table = table.assign(si_sdr_i=[-1.0, -2, 0, 4, 5, 6, 90], genders=["m m"] * 7)
    table.to_csv(tmp_path / "copy" / "metrics.csv", index=False)
    page = write_report(tmp_path / "copy", "some").read_text()
    assert ">29 % of the mixtures became worse." in page and ">median 4.0 dB<" in page
    assert ">same gender<" in page and ">different<" not in page
    found = json.loads((results / "summary.json").read_text())["groups"]["all"]
    low, high = (f"{found['si_sdr_i'][bound]:.2f}" for bound in ("low", "high"))
    assert f"[{low}, {high}]" in page
    assert f"<td>7</td><td>{found['n_speaker_pairs']}</td></tr>" in page


def test_no_results_are_refused(results, tmp_path, refused):
    with refused(tmp_path / "summary.json", "is missing", "stage 3"):
        write_report(tmp_path, "nothing")
    shutil.copytree(results, tmp_path / "copy")
    path = tmp_path / "copy" / "metrics.csv"
    text = path.read_text()
    for spoilt in ("", "a,b\n1,2\n", text.replace("genders", "x"), text.replace("0.", "no")):
        path.write_text(spoilt)
        with refused(path, "is missing or broken"):
            write_report(tmp_path / "copy", "nothing")


def test_a_broken_example_is_named(results, tmp_path, refused):
    shutil.copytree(results, tmp_path / "copy")
    example = sorted((tmp_path / "copy" / "examples").glob("*/*.wav"))[0]
    example.write_bytes(b"no sound")
    with refused(example, "broken", f"delete {tmp_path / 'copy'} and run again"):
        write_report(tmp_path / "copy", "some")


def test_names_from_outside_stay_words(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    for folder in [*(tmp_path / "copy" / "examples").iterdir()]:
        folder.rename(folder.with_name(folder.name.replace("mix", "mix_")))
    table = pd.read_csv(tmp_path / "copy" / "metrics.csv")
    names = table.mixture_id.str.replace("mix", "mix/")
    genders = ["m f", "f m", "f m", "unknown f", "m f", "f m", "m f"]
    table = table.assign(mixture_id=names, speakers="<i>a b", genders=genders, si_sdr_i=3.0)
    table.to_csv(tmp_path / "copy" / "metrics.csv", index=False)
    page = write_report(tmp_path / "copy", "a <model>").read_text()
    assert page.count("&lt;i&gt;a b</h3>") == 5 and page.count("a &lt;model&gt;") == 2
    assert "<i>" not in page and "<model>" not in page
    assert ">f+m<" in page and ">m+f<" not in page
    assert ">unknown<" in page and ">different<" in page


@pytest.mark.parametrize(
    "text", ["\n\n", 'a,b\n1,"2', "step,si_sdr\nx,1\n", "a\n1\n1,2,3\n"], ids=repr
)
def test_a_broken_log_is_named(tmp_path, refused, text):
    log = tmp_path / "logs" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(text)
    with refused(log, "is missing or broken"):
        write_curves(tmp_path)


def test_the_last_start_of_a_run_has_the_last_word(tmp_path):
    logs = {9: "step,si_sdr\n9,1\n19,2\n", 10: "step,si_sdr\n19,5\n", 11: ""}
    logs |= {12: "a\n1\n", 13: "step,val_si_sdr\n19,1\n"}  # stopped before they told anything
    for version, text in logs.items():
        log = tmp_path / "logs" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(text)
    (picture,) = training_curves(tmp_path)
    root = ElementTree.fromstring(picture)
    trained = next(root.iter("{http://www.w3.org/2000/svg}polyline")).get("points").split()
    heights = [float(point.split(",")[1]) for point in trained]
    axes = Axes([9, 19], [1, 3], "", "")  # the mean of 1 and 5 comes last
    axes.line([9, 19], [1, 3])
    wanted = re.search('points="([^"]*)"', axes.svg())[1].split()
    assert heights == [float(point.split(",")[1]) for point in wanted]


def test_curves_go_on_over_a_stop(run_logs, tmp_path):
    write_curves(run_logs)
    root = ElementTree.fromstring((run_logs / "training.svg").read_text())
    lines = [one.get("points").split() for one in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [40, 4, 40]  # step 199 is in both logs
    across = [float(point.split(",")[0]) for point in lines[0]]
    assert across == sorted(across)
    write_curves(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_spectrogram_is_bright_where_the_tone_is():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 8000)
    png = spectrogram(tone, loudest([tone]))
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    data = png[png.index(b"IDAT") + 4 : png.index(b"IEND") - 8]
    pixels = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, width + 1)[:, 1:]
    assert height == 129 and 400 < width < 600
    assert pixels[:, width // 2].argmax() == 128 - 32  # 1000 Hz, counted from above
    assert pixels.max() == 255 and np.median(pixels) == 0


@pytest.mark.parametrize("values", [[0, 0], [-3.2, 17], [1e-4, 3e-4], [5, 1e6], []])
def test_ticks_hold_the_values(values):
    ticks = nice_ticks(values)
    assert 2 <= len(ticks) <= 9 and np.ptp(np.diff(ticks)) < 1e-6 * np.ptp(ticks)
    if values:
        assert ticks[0] <= min(values) and ticks[-1] >= max(values) * (1 - 1e-9)


def test_titles_cannot_break_the_picture():
    axes = Axes([0, 1], [0, 1], "a < b", "c & d")
    axes.dots([0.5], [0.5], ['"<script>'], name="<b>")
    ElementTree.fromstring(axes.svg())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_plays_all_and_nothing_sticks_out(page, tmp_path, width):
    (tmp_path / "probe.html").write_text(page.read_text() + PROBE)
    frame = tmp_path / "frame.html"  # as windows cannot be as narrow as a phone
    frame.write_text(
        "<script>onmessage = event => document.title = event.data</script>"
        f'<iframe src="probe.html" width="{width}" height="900" frameborder="0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--window-size=1500,900", "--autoplay-policy=no-user-gesture-required"]
    command += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=90)
    title = re.search("<title>(.*?)</title>", done.stdout).group(1)
    assert title == f"played 25/25 images 25 wide 0 of {width} scroll false"
