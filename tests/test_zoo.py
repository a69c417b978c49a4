"""The packaged weights and example: on disk as their cards say, separating as they did at first."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from asteroid_tiny import TinySepformer, example_mixture, from_pretrained, list_models
from asteroid_tiny.hub import ZOO
from asteroid_tiny.inspection import DEFAULT, WIDE

#: The defaults of the tools and of the recipes, and one for three speakers: separated by every run
#: of the tests, the others by those of the slow ones. That no file changed is tested for all.
OFTEN = DEFAULT, WIDE, "tiny-sepformer-xs_2spk_8k", "tiny-sepformer-xs_3spk_8k"
SCRIPT = "egs/minispeech/TinySepformer/local/make_example.py"


@pytest.fixture(scope="module")
def maker():
    """The script that made the example and the figures."""
    path = Path(__file__).resolve().parents[1] / SCRIPT
    spec = importlib.util.spec_from_file_location("make_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in list_models()],
)
def test_packaged_weights_separate_as_their_card_says(name, maker):
    told = list_models()[name]["minispeech"]
    found = maker.improvement(from_pretrained(name).eval())
    assert found == pytest.approx(told["si_sdr_i"], abs=0.1)
    sentence = maker.SENTENCE.format(n=told["n_mixtures"], value=told["si_sdr_i"])
    assert sentence in (ZOO / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["tiny-sepformer-xs_2spk_8k", "tiny-sepformer-xs_3spk_8k"])
def test_packaged_weights_are_of_the_preset_that_their_name_tells(name):
    stored = list_models()[name]["model_args"]
    preset = TinySepformer.from_preset("tiny-sepformer-xs", stored["n_src"]).get_model_args()
    assert preset == stored


def test_the_example_is_a_mixture_of_the_pack_and_names_its_speakers(maker):
    samples, rate = sf.read(example_mixture(), dtype="float32")
    assert rate == 8000 and Path(example_mixture()).stat().st_size < 60_000
    np.testing.assert_allclose(samples, maker.example(), atol=2**-14)
    credits = (ZOO / "example" / "README.md").read_text(encoding="utf-8")
    for words in ("Carlo Flora", "Maxim Topal", "creativecommons.org/licenses/by/3.0"):
        assert words in credits
    assert (ZOO / "example" / "spectrograms.png").stat().st_size < 150_000


def test_the_example_of_the_readme_separates_it(tmp_path, monkeypatch):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert "example_mixture()" in code and len(code.strip().splitlines()) <= 4
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    samples, _ = sf.read(example_mixture())
    tracks = [sf.read(path) for path in sorted(tmp_path.glob("mixture_est?.wav"))]
    assert [(len(track), rate) for track, rate in tracks] == [(len(samples), 8000)] * 2
    assert all(track.any() for track, _ in tracks)


@pytest.mark.parametrize("name", list_models())
def test_a_card_tells_data_training_licence_metrics_and_limits(name):
    about, card = list_models()[name], (ZOO / name / "README.md").read_text(encoding="utf-8")
    assert about["training"]["data"]["licence"] in card and about["licence"] in card
    assert f"{about['metrics']['si_sdr_i']:.2f}" in card
    assert f"h on {about['training']['device']}." in " ".join(card.split())
    assert "## Limits" in card and "run.sh" in card
    weights = (ZOO / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == about["sha256"]


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in ZOO.rglob("*")) < 22e6
