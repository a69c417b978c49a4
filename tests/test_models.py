"""The models: their sizes, and the contract of Asteroid's models."""

import copy
import importlib
import inspect
import json

import asteroid
import numpy as np
import pytest
import soundfile as sf
import torch
from asteroid_filterbanks import FreeFB
from small import CLASSES, SIZES, both_classes, first_layer, n_parameters, small

from asteroid_tiny import (
    PRESETS,
    Sepformer,
    TinySepformer,
    example_mixture,
    from_pretrained,
    models,
)
from asteroid_tiny.filterbanks import sinusoid_pairs
from asteroid_tiny.layers import ConvAttentionLayer, TransformerLayer


@pytest.mark.parametrize(
    "preset, model_class, n_expected, tolerance, n_unique",
    [
        ("sepformer", Sepformer, 25_679_361, 0, 32),
        ("tiny-sepformer", TinySepformer, 20.0e6, 0.01, 32),
        ("tiny-sepformer-s", TinySepformer, 5.3e6, 0.01, 8),
        ("tiny-sepformer-xs", TinySepformer, 0.5e6, 1.0, 4),
    ],
)
def test_presets_have_their_sizes(preset, model_class, n_expected, tolerance, n_unique):
    model = model_class.from_preset(preset)
    assert type(model) is model_class and model.masker.n_src == 2 and model.sample_rate == 8000
    assert abs(n_parameters(model) - n_expected) <= tolerance * n_expected
    layers = [m for m in model.modules() if isinstance(m, (TransformerLayer, ConvAttentionLayer))]
    assert len(layers) == n_unique


def test_every_preset_is_tested_above_and_files_hold_nothing_but_parameters():
    assert set(PRESETS) == {"sepformer", "tiny-sepformer", "tiny-sepformer-s", "tiny-sepformer-xs"}
    model = TinySepformer.from_preset("tiny-sepformer-xs")
    assert sum(t.numel() for t in model.state_dict().values()) == n_parameters(model)


@pytest.mark.parametrize(
    "model_class, preset, words",
    [
        (TinySepformer, "tiny-sepformer-xl", ["'tiny-sepformer-xl'", *PRESETS]),
        (TinySepformer, "sepformer", ["Sepformer", "TinySepformer"]),
        (Sepformer, "tiny-sepformer-s", ["Sepformer", "TinySepformer"]),
    ],
)
def test_a_preset_that_does_not_fit_is_one_sentence(model_class, preset, words, refused):
    with refused(*words):
        model_class.from_preset(preset)


@both_classes
@pytest.mark.parametrize("n_src", [1, 2, 3])
@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_sources_and_sample_rates(model_class, n_src, sample_rate):
    preset = "sepformer" if model_class is Sepformer else "tiny-sepformer-s"
    model = model_class.from_preset(preset, n_src, sample_rate, **SIZES)
    assert model.sample_rate == model.encoder.sample_rate == sample_rate
    estimates = model(torch.randn(2, 321))
    assert estimates.shape == (2, n_src, 321)
    for i in range(n_src):
        for j in range(i):
            assert not torch.allclose(estimates[:, i], estimates[:, j])


#: Argument, another value than the default, and where that value is found in the model.
ARGUMENTS = {
    "n_src": (5, lambda m: m(torch.randn(1, 50)).shape[1]),
    "fb_name": ("stft", lambda m: m.encoder.filterbank.__class__.__name__[:4].lower()),
    "n_filters": (24, lambda m: m.encoder.filters().shape[0]),
    "kernel_size": (12, lambda m: m.encoder.filters().shape[2]),
    "stride": (6, lambda m: m.decoder.stride),
    "fb_init": (
        "sinusoids",
        lambda m: torch.equal(m.encoder.filters(), sinusoid_pairs(16, 16)) and "sinusoids",
    ),
    "encoder_activation": ("sigmoid", lambda m: m.enc_activation.__class__.__name__.lower()),
    "bn_chan": (20, lambda m: m.masker.bottleneck.out_features),
    "chunk_size": (12, lambda m: m.masker.chunk_size),
    "hop_size": (2, lambda m: m.masker.hop_size),
    "n_repeats": (3, lambda m: len(m.masker.inter)),
    "n_intra_layers": (3, lambda m: m.masker.intra[0].n_times * len(m.masker.intra[0].layers)),
    "n_inter_layers": (4, lambda m: m.masker.inter[1].n_times * len(m.masker.inter[1].layers)),
    "n_heads": (4, lambda m: first_layer(m).attention.n_heads),
    "ff_hid": (40, lambda m: first_layer(m).feed_forward.widen.out_features),
    "dropout": (0.25, lambda m: first_layer(m).dropout.p),
    "share_layers": (None, lambda m: len(m.masker.intra[0].layers) == 1),
    "norm_type": ("cLN", lambda m: m.masker.inter_norm[0].norm_type),
    "mask_act": ("sigmoid", lambda m: m.masker.mask_act.__class__.__name__.lower()),
    "checkpoint_activations": (True, lambda m: m.masker.inter[1].checkpoint_activations),
    "sample_rate": (16000, lambda m: m.sample_rate),
    "attn_chan": (12, lambda m: first_layer(m).attention.query.in_features),
    "conv_kernel_size": (5, lambda m: first_layer(m).conv.depthwise.kernel_size[0]),
    "path_norm": (False, lambda m: first_layer(m).path_norms is not None),
}


@pytest.mark.parametrize(
    "model_class, name",
    [
        (cls, name)
        for cls in CLASSES
        for name in inspect.signature(cls).parameters
        if name != "fb_kwargs"
    ],
)
def test_every_size_is_an_argument_that_is_stored(model_class, name):
    value, found = ARGUMENTS[name]
    if name == "share_layers":
        value = not inspect.signature(model_class).parameters[name].default
    model = model_class(**{"n_src": 2, **SIZES, name: value})
    assert found(model) == value
    twin = model_class(**model.get_model_args())
    assert found(twin) == value and twin.get_model_args() == model.get_model_args()
    assert model(torch.randn(1, 200)).shape == (1, model.masker.n_src, 200)


@pytest.mark.parametrize(
    "sizes, word",
    [
        (dict(n_heads=3), "n_heads"),
        (dict(n_heads=0), "n_heads"),
        (dict(attn_chan=0), "attn_chan"),
        (dict(attn_chan=18), "attn_chan"),
        (dict(conv_kernel_size=4), "conv_kernel_size"),
        (dict(conv_kernel_size=-1), "conv_kernel_size"),
        (dict(chunk_size=11), "chunk_size"),
        (dict(chunk_size=1), "half of it by default"),
        (dict(hop_size=3), "hop_size"),
        (dict(hop_size=5.0), "hop_size"),
        (dict(dropout=1.0), "dropout"),
        (dict(norm_type="bN"), "norm_type"),
        (dict(bn_chan=15, n_heads=1), "bn_chan"),
        (dict(n_src=0), "n_src"),
        (dict(n_intra_layers=0), "n_intra_layers"),
        (dict(n_fliters=8), "'n_fliters'"),
        (dict(min_low_hz=10), "'min_low_hz'"),  # of another filterbank family
        (dict(kwargs=4), "'kwargs'"),
        (dict(n_repeats=0), "n_repeats"),
        (dict(stride=17), "stride"),
        (dict(fb_init="sines"), "fb_init must be .*'sines'"),
        (dict(fb_init="sinusoids", fb_name="analytic_free"), "fb_init must be"),
        (dict(fb_init="sinusoids", kernel_size=17), "even kernel_size"),
        (dict(fb_init="sinusoids", n_filters=15), "even n_filters"),
        (dict(fb_init="sinusoids", n_filters=34), "at most twice"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused_by_name(sizes, word):
    with pytest.raises(ValueError, match=word):
        TinySepformer(**{"n_src": 2, **SIZES, **sizes})


@both_classes
def test_one_two_and_three_dimensions(model_class):
    model = small(model_class)
    mixture = torch.randn(3, 333)
    with torch.no_grad():
        batch = model(mixture)
        assert batch.shape == (3, 2, 333)
        assert torch.equal(model(mixture[:, None]), batch)
        single = model(mixture[0])
        assert single.shape == (2, 333)
        assert torch.allclose(single, batch[0], atol=1e-5)


@both_classes
def test_models_travel_as_dictionary_and_file(model_class, tmp_path):
    model = small(model_class, 3, sample_rate=16000, checkpoint_activations=True)
    mixture = torch.randn(2, 500)
    with torch.no_grad():
        expected = model(mixture)
    conf = model.serialize()
    before = copy.deepcopy(conf["model_args"])
    path = tmp_path / "folder" / "model.pth"
    model.save(path)
    with pytest.raises(models.UserError, match="name the file"):
        model.save(tmp_path / "model.safetensors")
    plain = torch.load(path, weights_only=True)
    assert plain["model_name"] == model_class.__name__ and plain["infos"]["software_versions"]
    copies = [
        model_class.from_pretrained(conf),
        model_class.from_pretrained(path),
        model_class.from_pretrained(str(path), checkpoint_activations=False),
        model_class(**model.get_model_args()),
        asteroid.models.BaseModel.from_pretrained(str(path)),
        asteroid.models.BaseModel.from_pretrained(copy.deepcopy(conf)),
    ]
    copies[3].load_state_dict(model.state_dict())
    for twin in copies:
        assert type(twin) is model_class and twin.sample_rate == 16000
        with torch.no_grad():
            assert torch.equal(twin.eval()(mixture), expected)
    assert copies[1].masker.checkpoint_activations and not copies[2].masker.checkpoint_activations
    assert conf["model_args"] == before


def test_arguments_as_asteroid_and_numpy_have_them_can_be_stored(tmp_path, refused):
    sizes = dict(SIZES, stride=None, hop_size=np.int64(5), dropout=np.float32(0.5), fb_name=FreeFB)
    model = TinySepformer(np.int64(2), **sizes, fb_init="sinusoids", sample_rate=np.int64(8000))
    assert model.decoder.stride == 8 and model.get_model_args()["stride"] == 8
    model.save(tmp_path / "model.pth")
    model.double().save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["dtype"] == "float64"
    for name in ("model.pth", "folder"):
        twin = TinySepformer.from_pretrained(tmp_path / name)
        assert twin.get_model_args() == {**model.get_model_args(), "fb_name": "FreeFB"}
    with refused("mask_act is a type"):
        small(mask_act=torch.nn.ReLU).save(tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()


def test_a_softmax_shares_the_mixture_out_among_the_sources():
    model = small(n_src=3, mask_act="softmax")
    masks = model.forward_masker(model.forward_encoder(torch.randn(1, 1, 800)))
    torch.testing.assert_close(masks.sum(1), torch.ones(1, 16, 99))


def test_masks_may_go_without_an_activation():
    model = small(mask_act=None)
    twin = models.from_pretrained(model.serialize())
    masks = twin.forward_masker(twin.forward_encoder(torch.randn(1, 1, 800)))
    assert masks.min() < 0 < masks.max()


def test_classes_of_ones_own_are_made_and_loaded_as_theirs(refused):
    class Mine(TinySepformer):
        pass

    mine = Mine.from_preset("tiny-sepformer-xs", **SIZES)
    assert type(mine) is type(models.from_pretrained(mine.serialize())) is Mine
    assert type(Mine.from_pretrained(small().serialize())) is Mine
    with refused("'Sepformer', not Mine or TinySepformer"):
        Mine.from_pretrained(small(Sepformer).serialize())
    with refused("of Sepformer, not of Mine"):
        Mine.from_preset("sepformer")


def test_the_stored_arguments_cannot_be_changed_from_outside():
    model = small()
    model.get_model_args()["n_src"] = 7
    assert model.get_model_args()["n_src"] == 2


@both_classes
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("with_grad", "checkpoint_activations"), [(False, False), (True, False), (True, True)]
)
def test_traced_models_serve_other_lengths(
    model_class, with_grad, checkpoint_activations, tmp_path
):
    model = small(model_class, checkpoint_activations=checkpoint_activations)
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(model, torch.randn(1, 504))
    traced.save(str(tmp_path / "traced.pt"))
    reloaded = torch.jit.load(str(tmp_path / "traced.pt"))
    for shape in [(1, 504), (1, 505), (1, 1999), (1, 5), (3, 777), (2, 1, 400), (801,)]:
        mixture = torch.randn(shape)
        with torch.set_grad_enabled(with_grad):
            expected, estimates = model(mixture), reloaded(mixture)
        assert estimates.shape == expected.shape
        assert torch.allclose(estimates, expected, atol=1e-5), shape


def test_separate_takes_tensors_arrays_and_files(tmp_path):
    model = small(sample_rate=8000)
    mixture = 0.1 * torch.randn(1, 1, 2001)
    with torch.no_grad():
        expected = model(mixture)
    expected = expected * mixture.abs().sum() / expected.abs().sum()  # Asteroid's own scaling
    assert torch.allclose(model.separate(mixture), expected, atol=1e-5)
    assert np.allclose(model.separate(mixture.numpy()), expected.numpy(), atol=1e-5)
    path = tmp_path / "talk.wav"
    sf.write(path, mixture.flatten().numpy(), 8000, subtype="FLOAT")
    model.separate(str(path), output_dir=None)
    for i in (1, 2):
        written, rate = sf.read(tmp_path / f"talk_est{i}.wav", dtype="float32")
        assert rate == 8000 and np.allclose(written, expected[0, i - 1].numpy(), atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.warns(UserWarning, match="already exists"):
        model.separate(str(path))


def test_separate_takes_one_signal_of_any_type():
    model = from_pretrained("tiny-sepformer-xs_2spk_8k")
    mixture, _ = sf.read(example_mixture(), dtype="float32")
    mixture = torch.from_numpy(mixture / np.abs(mixture).max())
    short = mixture[:16000]
    wanted = model.separate(short)
    assert wanted.shape == (2, len(short))
    assert torch.equal(wanted, model.separate(short[None])[0])
    loud = (2 * short * 32768).clamp(-32768, 32767).to(torch.int16)
    assert torch.equal(model.separate(loud), model.separate(loud.float()))
    assert np.array_equal(model.separate(loud.numpy()), model.separate(loud))
    long = mixture.repeat(5)  # whose sum is beyond float16
    wanted = model.separate(long)
    halved = model.half().separate(long.half())
    assert (halved - wanted).norm() < 0.05 * wanted.norm()


def test_silence_is_separated_into_silence_and_nan_refused(tmp_path, refused):
    model = small()
    assert not model.separate(torch.zeros(1, 8000)).any()
    sf.write(tmp_path / "silence.wav", np.zeros(8000), 8000)
    model.separate(str(tmp_path / "silence.wav"))
    assert not sf.read(tmp_path / "silence_est1.wav")[0].any()
    with refused("NaN"):
        model.separate(np.full((1, 8000), np.nan, np.float32))


def test_what_differs_from_stored_arguments_may_be_what_the_constructor_takes():
    conf = small().serialize()
    model = from_pretrained(conf, stride=None, chunk_size=np.int64(20), dropout=np.float32(0.5))
    assert model.get_model_args()["chunk_size"] == 20 and first_layer(model).dropout.p == 0.5


def test_loaded_models_do_not_drop_out():
    model = TinySepformer.from_pretrained(small(dropout=0.5).serialize())
    mixture = torch.randn(1, 4000)
    assert torch.equal(model.separate(mixture), model.separate(mixture))


def test_separate_resamples_files_of_another_rate(tmp_path):
    model = small(sample_rate=8000)
    path = tmp_path / "talk.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    with pytest.raises(RuntimeError, match="resample"):
        model.separate(str(path))
    (tmp_path / "out").mkdir()
    model.separate(path, output_dir=tmp_path / "out", resample=True)
    written, rate = sf.read(tmp_path / "out" / "talk_est2.wav")
    assert rate == 16000 and len(written) == 4000 and np.abs(written).max() > 0


@both_classes
def test_asteroid_knows_the_models_by_name(model_class):
    name = model_class.__name__
    assert asteroid.models.get(name) is asteroid.models.get(name.lower()) is model_class


def test_importing_again_is_no_error(monkeypatch):
    assert importlib.import_module("asteroid_tiny.models") is models
    for model_class in CLASSES:  # for monkeypatch to put them back
        monkeypatch.setattr(asteroid.models, model_class.__name__, model_class)
    before = dict(vars(models))
    try:
        again = importlib.reload(models)
        assert again.TinySepformer is not TinySepformer
        assert asteroid.models.get("TinySepformer") is again.TinySepformer
    finally:
        vars(models).update(before)


def test_a_model_of_asteroid_by_the_same_name_is_not_replaced(monkeypatch):
    before = dict(vars(models))
    monkeypatch.setattr(asteroid.models, "Sepformer", asteroid.models.ConvTasNet)
    try:
        with pytest.raises(ValueError, match="already exists"):
            importlib.reload(models)
    finally:
        vars(models).update(before)


def test_a_size_that_is_given_comes_before_that_of_the_preset():
    args = TinySepformer.from_preset("tiny-sepformer-xs", **SIZES).get_model_args()
    assert SIZES.items() <= args.items()
    assert args["kernel_size"] == 64


def test_with_masks_of_one_a_start_of_sinusoids_gives_the_mixture_back():
    model, mixture = small(n_filters=32, fb_init="sinusoids"), torch.randn(1, 1, 800)
    with torch.no_grad():
        found = model.forward_decoder(model.forward_encoder(mixture)[:, None])
    torch.testing.assert_close(found[..., 8:-8], mixture[..., 8:-8], rtol=0, atol=1e-5)


def test_few_sinusoids_give_back_what_is_low():
    model, time = small(n_filters=16, fb_init="sinusoids"), torch.arange(800)
    tones = torch.stack([torch.sin(2 * np.pi * hz / 8000 * time) for hz in (500, 3500)])
    with torch.no_grad():
        found = model.forward_decoder(model.forward_encoder(tones[:, None])[:, None])[:, 0]
    low, high = found.std(1) / tones.std(1)
    assert low > 0.9 and high < 0.1


@both_classes
def test_separate_takes_samples_of_any_type_and_makes_the_folder(model_class, clips, tmp_path):
    model, (voice, *_) = small(model_class), clips.values()
    samples = voice[None, :8000] / np.float64(32768)
    found = model.separate(samples)
    np.testing.assert_allclose(found, model.separate(samples.astype(np.float32)), atol=1e-6)
    sf.write(tmp_path / "talk.wav", samples[0], 8000)
    model.separate(str(tmp_path / "talk.wav"), output_dir=tmp_path / "a" / "b")
    assert len(list((tmp_path / "a" / "b").glob("talk_est*.wav"))) == 2
