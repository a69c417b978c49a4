"""Any length, batch, precision and filterbank."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import asteroid_filterbanks
import numpy as np
import pytest
import torch
from small import both_classes, ratio_db, small
from torch._subclasses.fake_tensor import FakeTensorMode

from asteroid_tiny import TinySepformer


def chunk_edges():
    """Lengths around those at which the number of chunks of 10 frames with hop 5 changes."""
    return [16 + 8 * (frames - 1) + d for frames in (5, 10, 11, 20) for d in (-1, 0, 1)]


@both_classes
def test_any_length_works(model_class):
    model = small(model_class)
    for n_samples in [*range(1, 26), 999, *chunk_edges()]:
        mixture = torch.randn(1, n_samples)
        with torch.no_grad():
            estimates = model(mixture)
        assert estimates.shape == (1, 2, n_samples)
        assert torch.isfinite(estimates).all()


@both_classes
def test_a_batch_of_no_mixtures_has_no_estimates(model_class):
    model, batch = small(model_class), torch.zeros(0, 800)
    for mixtures in (batch, batch[:, None]):
        assert model(mixtures).shape == model.separate(batch[:, None]).shape == (0, 2, 800)


@both_classes
def test_autocast_leaves_64_bits_alone(model_class):
    model, mixture = small(model_class).double(), torch.randn(1, 800).double()
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(mixture)
    assert torch.equal(cast, model(mixture))


@both_classes
@pytest.mark.parametrize("norm_type", ["gLN", "cLN"])
def test_on_a_gpu_nothing_is_made_on_the_cpu(model_class, norm_type):
    """Fake tensors need no GPU: they know where they would be, and refuse to meet others."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model, mixture = small(model_class, norm_type=norm_type), torch.randn(2, 800)
        for training in (False, True):
            estimates = model.train(training)(mixture)
            assert estimates.device.type == "cuda" and estimates.shape == (2, 2, 800)


@both_classes
def test_a_mixture_shorter_than_the_filters_is_one_of_their_length(model_class):
    model, mixture = small(model_class), torch.randn(2, 5)
    with torch.no_grad():
        padded = model(torch.nn.functional.pad(mixture, (0, 11)))
        assert torch.equal(model(mixture), padded[..., :5])


@both_classes
def test_a_mixture_has_one_channel(model_class, refused):
    model = small(model_class)
    assert torch.equal(model(torch.ones(2, 1, 99)), model(torch.ones(2, 99)))
    with refused("one channel, not 2", "(batch, time)"):
        model(torch.ones(1, 2, 99))


@both_classes
def test_the_shortest_mixture_has_gradients(model_class):
    model = small(model_class).train()
    model(torch.randn(1, 1)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@both_classes
@pytest.mark.parametrize("mixture", [torch.zeros(1, 400), torch.ones(1, 400)])
def test_silence_and_constants_give_finite_outputs_and_gradients(model_class, mixture):
    model = small(model_class).train()
    estimates = model(mixture)
    estimates.square().sum().backward()
    assert torch.isfinite(estimates).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@both_classes
@pytest.mark.parametrize("level", [0.0, 1e-4, 1e-2])
def test_silence_and_whispers_are_finite_in_float16(model_class, level):
    model = small(model_class)
    mixture = level * torch.randn(1, 2000)
    with torch.inference_mode():
        wanted = model(mixture)
        model = model.half()
        found = model(mixture.half())
        assert found.dtype == torch.float16 and found.isfinite().all()
        with torch.autocast("cpu", torch.float16):
            assert small(model_class)(mixture).isfinite().all()
    if level == 1e-2:
        assert ratio_db(found.float(), wanted) > 30


@both_classes
@pytest.mark.parametrize("norm_type", ["gLN", "cLN"])
def test_neighbours_in_a_batch_do_not_matter(model_class, norm_type):
    model = small(model_class, norm_type=norm_type)
    quiet, loud = 0.1 * torch.randn(1, 1000), 100 * torch.randn(1, 1000)
    with torch.no_grad():
        alone = model(quiet)
        together = model(torch.cat([loud, quiet, loud]))[1:2]
    assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


@both_classes
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_bf16_autocast_is_close_to_fp32_forward_and_backward(model_class, checkpoint_activations):
    sizes = dict(n_filters=64, bn_chan=64, ff_hid=128)
    model = small(model_class, checkpoint_activations=checkpoint_activations, **sizes)
    mixture, direction = torch.randn(1, 4000), torch.randn(1, 2, 4000)
    exact = model(mixture)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()), direction)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(mixture)
        rough_grads = torch.autograd.grad(rough.float(), list(model.parameters()), direction)
    assert torch.isfinite(rough).all() and ratio_db(rough.float(), exact) > 20
    assert not torch.equal(rough.float(), exact)
    everything = [torch.cat([g.flatten() for g in grads]) for grads in (rough_grads, exact_grads)]
    assert torch.isfinite(everything[0]).all() and ratio_db(*everything) > 10


FILTERBANKS = [
    dict(fb_name="free"),
    dict(fb_name="free", kernel_size=2, stride=1),
    dict(fb_name="free", kernel_size=33, stride=11, who_is_pinv="decoder"),
    dict(fb_name="free", who_is_pinv="encoder"),
    dict(fb_name="free", padding=8),
    dict(fb_name=asteroid_filterbanks.FreeFB),
    dict(fb_name="analytic_free", kernel_size=21, stride=10),
    dict(fb_name="param_sinc", kernel_size=17, min_low_hz=30, min_band_hz=20),
    dict(fb_name="param_sinc"),  # which makes its even kernel odd
    dict(fb_name="stft", n_filters=32, encoder_activation="linear", mask_act="linear"),
    dict(fb_name="torch_stft", pad_mode="constant"),  # needs n_filters == kernel_size
    dict(fb_name="mpgtf", n_filters=48),  # needs a filter pair for each of its 24 frequencies
    dict(fb_name="multiphase_gammatone", n_filters=64),
]


@pytest.mark.parametrize("conf", FILTERBANKS, ids=str)
def test_every_filterbank_family_builds_runs_and_travels(conf, tmp_path):
    model = small(**conf)
    model.save(tmp_path / "model.pth")
    twin = TinySepformer.from_pretrained(tmp_path / "model.pth").eval()
    for n_samples in (1, 16, 500, 501):
        mixture = torch.randn(2, n_samples)
        with torch.no_grad():
            estimates = model(mixture)
            assert torch.equal(twin(mixture), estimates)
        assert estimates.shape == (2, 2, n_samples) and torch.isfinite(estimates).all()
    assert estimates.abs().max() > 0


def test_what_a_family_borrows_of_numpy_is_taken_back(monkeypatch):
    before = set(vars(np))
    small(fb_name="mpgtf", n_filters=48)
    with pytest.raises(AssertionError):
        small(fb_name="stft", n_filters=8)  # fewer than a window's samples
    assert set(vars(np)) == before
    monkeypatch.setattr(np, "math", math, raising=False)  # as an older NumPy has it
    small(fb_name="mpgtf", n_filters=48)
    assert np.math is math


def test_threads_may_build_models_at_the_same_time(monkeypatch):
    make, delays = asteroid_filterbanks.make_enc_dec, [0.5, 0.1]

    def after_a_while(*args, **kwargs):
        time.sleep(delays.pop())  # the second begins before the first ends, and ends after it
        return make(*args, **kwargs)

    monkeypatch.setattr(asteroid_filterbanks, "make_enc_dec", after_a_while)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: small(fb_name="mpgtf", n_filters=48), range(2)))
    assert len(models) == 2
