"""That the models learn, and that the smallest is fast."""

import time

import pytest
import torch
from small import both_classes
from torch import nn

from asteroid_tiny import TinySepformer
from asteroid_tiny.data import SpeechDir, draw_list
from asteroid_tiny.data.mixing import render
from asteroid_tiny.training import separation_loss


@pytest.fixture(scope="module")
def mixture(pack):
    """One second of a real mixture of two speakers: (1, time) and (1, n_src, time)."""
    speech = SpeechDir(pack / "train", 8000)
    (drawn,) = draw_list(speech, 1, n_src=2, length=8000, seed=0)
    mixture, sources = render(speech, drawn)
    return mixture[None], sources[None]


@both_classes
def test_a_small_model_learns_one_real_mixture(model_class, mixture, one_thread):
    mixed, sources = mixture
    sizes = dict(n_filters=64, bn_chan=64, n_heads=4, ff_hid=128, chunk_size=64, n_repeats=1)
    model = model_class(2, n_intra_layers=2, n_inter_layers=2, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    untreated = separation_loss(mixed.expand(1, 2, -1), sources).item()
    for _ in range(150):
        loss = separation_loss(model(mixed), sources)
        if untreated - loss.item() > 11:
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.inference_mode():
        loss = separation_loss(model.eval()(mixed), sources)
    assert untreated - loss.item() > 10, "dB of SI-SDR improvement"


def test_the_smallest_preset_is_fast_on_one_thread(one_thread):
    model = TinySepformer.from_preset("tiny-sepformer-xs").eval()
    seconds = 4
    mixture = torch.randn(1, seconds * 8000)
    times = []
    with torch.inference_mode():
        for _ in range(4):  # the first one warms up
            start = time.process_time()
            model(mixture)
            times.append(time.process_time() - start)
    assert min(times[1:]) / seconds < 0.25
