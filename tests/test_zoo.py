"""The packaged weights: on disk as their cards say, and separating as they did when they came."""

import hashlib

import pytest
import torch

from asteroid_tiny import from_pretrained, list_models
from asteroid_tiny.data import draw_list
from asteroid_tiny.data.mixing import render
from asteroid_tiny.hub import ZOO
from asteroid_tiny.training import separation_loss

#: SI-SDRi in dB on 30 mixtures of the pack's validation speakers.
ON_THE_PACK = {"tiny-sepformer-xs_2spk_8k": 1.28}


def test_every_packaged_model_is_known_here():
    assert set(ON_THE_PACK) == set(list_models())


@pytest.mark.parametrize("name", ON_THE_PACK)
def test_packaged_weights_separate_as_they_did(name, valid_speech):
    model = from_pretrained(name).eval()
    gains = []
    for mixture in draw_list(valid_speech, 30, model.n_src, 16000, seed=1):
        mixed, sources = (signal[None] for signal in render(valid_speech, mixture))
        with torch.no_grad():
            estimates = model(mixed)
        unprocessed = mixed[:, None].expand_as(sources)
        gains.append(separation_loss(unprocessed, sources) - separation_loss(estimates, sources))
    assert sum(gains) / len(gains) == pytest.approx(ON_THE_PACK[name], abs=0.1)


@pytest.mark.parametrize("name", ON_THE_PACK)
def test_a_card_tells_data_licence_metrics_and_limits(name):
    about, card = list_models()[name], (ZOO / name / "README.md").read_text(encoding="utf-8")
    assert about["training"]["data"]["licence"] in card and about["licence"] in card
    assert f"{about['metrics']['si_sdr_i']:.2f}" in card
    assert "## Limits" in card and "run.sh" in card
    weights = (ZOO / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == about["sha256"]


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in ZOO.rglob("*")) < 22e6
