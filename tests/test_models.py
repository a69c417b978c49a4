"""The two models: sizes, equations, Asteroid's contract, robustness, files, and that they learn."""

import copy
import errno
import importlib
import inspect
import math
import os
import pickle
import time

import asteroid
import asteroid_filterbanks
import numpy as np
import pytest
import soundfile as sf
import torch
from memory import SavedBytes, saved_bytes
from torch import nn
from torch.nn import functional as F

from asteroid_tiny import PRESETS, Sepformer, TinySepformer, models
from asteroid_tiny.data import SpeechDir, draw_list
from asteroid_tiny.data.mixing import render
from asteroid_tiny.layers import (
    INTER,
    INTRA,
    NORM_EPS,
    ConvAttentionLayer,
    FeedForward,
    LayerStack,
    TransformerLayer,
    normalise,
    positions,
)
from asteroid_tiny.masker import GlobalNorm, join_chunks, split_chunks
from asteroid_tiny.training import separation_loss

CLASSES = [TinySepformer, Sepformer]
SIZES = dict(
    n_filters=16,
    bn_chan=16,
    n_heads=2,
    ff_hid=32,
    chunk_size=10,
    n_repeats=2,
    n_intra_layers=2,
    n_inter_layers=2,
)

both_classes = pytest.mark.parametrize("model_class", CLASSES)
both_axes = pytest.mark.parametrize("axis", [INTRA, INTER], ids=["intra", "inter"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def small(model_class=TinySepformer, n_src=2, **sizes):
    return shaken(model_class(n_src, **{**SIZES, **sizes})).eval()


def shaken(module):
    """The module with norms and biases moved off their ones and zeros, which would hide mix-ups."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def ratio_db(estimate, reference):
    return float(10 * torch.log10(reference.square().sum() / (estimate - reference).square().sum()))


# Sizes


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


def first_layer(model):
    return model.masker.intra[0].layers[0]


#: argument, another value than the default, and where that value is found in the model
ARGUMENTS = {
    "n_src": (5, lambda m: m(torch.randn(1, 50)).shape[1]),
    "fb_name": ("stft", lambda m: m.encoder.filterbank.__class__.__name__[:4].lower()),
    "n_filters": (24, lambda m: m.encoder.filters().shape[0]),
    "kernel_size": (12, lambda m: m.encoder.filters().shape[2]),
    "stride": (6, lambda m: m.decoder.stride),
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
    "norm_type": ("cLN", lambda m: "cLN" if m.masker.inter_norm[0].per_frame else "gLN"),
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
        (dict(chunk_size=11), "chunk_size"),
        (dict(hop_size=3), "hop_size"),
        (dict(norm_type="bN"), "norm_type"),
        (dict(bn_chan=15, n_heads=1), "bn_chan"),
        (dict(n_src=0), "n_src"),
        (dict(n_intra_layers=0), "at least one layer"),
        (dict(n_fliters=8), "'n_fliters'"),
        (dict(min_low_hz=10), "'min_low_hz'"),  # of another filterbank family
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused_by_name(sizes, word):
    with pytest.raises(ValueError, match=word):
        TinySepformer(**{"n_src": 2, **SIZES, **sizes})


# Layers


def reference_convolution(conv, x):
    """Depthwise, then pointwise convolution of (length, chan) by plain `nn.Conv1d`."""
    chan = x.shape[1]
    kernel_size = conv.depthwise.kernel_size[0]
    depthwise = nn.Conv1d(chan, chan, kernel_size, padding=kernel_size // 2, groups=chan).double()
    depthwise.load_state_dict(conv.depthwise.state_dict())
    pointwise = nn.Conv1d(chan, chan, 1).double()
    pointwise.weight.data = conv.pointwise.weight[:, :, None]
    pointwise.bias.data = conv.pointwise.bias
    return pointwise(depthwise(x.T[None]))[0].T


def reference_attention(attention, x):
    """Attention over (length, chan) by `nn.MultiheadAttention`."""
    peer = nn.MultiheadAttention(x.shape[1], attention.n_heads, batch_first=True).double()
    projections = attention.query, attention.key, attention.value
    peer.in_proj_weight.data = torch.cat([p.weight for p in projections])
    peer.in_proj_bias.data = torch.cat([p.bias for p in projections])
    peer.out_proj.load_state_dict(attention.out.state_dict())
    return peer(x[None], x[None], x[None])[0][0]


def reference_layer(layer, x):
    """`ConvAttentionLayer` on one sequence (length, chan), by the equations of its docstring."""

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    d_a = layer.attention.query.in_features
    h_n = norm(layer.norm, x)
    paths = [(h_n[:, :d_a], reference_attention(layer.attention, h_n[:, :d_a]))]
    if d_a < x.shape[1]:
        paths.append((h_n[:, d_a:], reference_convolution(layer.conv, h_n[:, d_a:])))
    if layer.path_norms is None:
        outputs = [out for _, out in paths]
    else:
        outputs = [norm(n, part + out) for n, (part, out) in zip(layer.path_norms, paths)]
    h = x + torch.cat(outputs, dim=1)
    feed_forward = layer.feed_forward
    return h + feed_forward.narrow(feed_forward.widen(norm(feed_forward.norm, h)).relu())


@both_axes
@pytest.mark.parametrize("path_norm", [True, False])
@pytest.mark.parametrize("attn_chan", [8, 4, 12, 16])
def test_conv_attention_layer_computes_its_equations(axis, path_norm, attn_chan):
    layer = ConvAttentionLayer(16, 4, 24, attn_chan, conv_kernel_size=5, path_norm=path_norm)
    layer = shaken(layer).double()
    x = torch.randn(2, 6, 9, 16, dtype=torch.double, requires_grad=True)
    y = torch.empty_like(x)
    if axis == INTRA:
        for i, j in np.ndindex(2, 6):
            y[i, j] = reference_layer(layer, x[i, j])
    else:
        for i, j in np.ndindex(2, 9):
            y[i, :, j] = reference_layer(layer, x[i, :, j])
    out = layer(x, axis)
    assert torch.allclose(out, y)
    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad(out, x, direction)
    (expected,) = torch.autograd.grad(y, x, direction)
    assert torch.allclose(grad, expected)


def test_attention_on_all_channels_leaves_the_convolution_out():
    layer = ConvAttentionLayer(16, 4, 24, attn_chan=16)
    assert layer.conv is None and len(layer.path_norms) == 1
    assert not any("conv" in name for name, _ in layer.named_parameters())
    # without the norm of the sum what is left is the plain layer of SepFormer
    layer = shaken(ConvAttentionLayer(16, 4, 24, attn_chan=16, path_norm=False))
    plain = TransformerLayer(16, 4, 24)
    weights = {
        k.replace("norm.", "attention_norm.", 1) if k.startswith("norm.") else k: v
        for k, v in layer.state_dict().items()
    }
    plain.load_state_dict(weights)
    x = torch.randn(1, 5, 7, 16)
    assert torch.allclose(layer(x, INTER), plain(x, INTER), atol=1e-6)


@both_axes
@pytest.mark.parametrize("kind", ["attention", "conv"])
def test_paths_see_along_their_axis_and_nowhere_else(axis, kind):
    layer = ConvAttentionLayer(16, 4, 24, conv_kernel_size=3)
    path = getattr(layer, kind)
    x = torch.randn(1, 6, 7, 8)
    moved = x.clone()
    moved[0, 2, 3] += 1.0
    changed = (path(moved, axis) != path(x, axis)).any(-1)[0]
    reach = 1 if kind == "conv" else 10
    expected = torch.zeros(6, 7, dtype=torch.bool)
    if axis == INTRA:
        expected[2, max(0, 3 - reach) : 3 + reach + 1] = True
    else:
        expected[max(0, 2 - reach) : 2 + reach + 1, 3] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalise_is_layer_norm_in_value_and_gradient(scale):
    x = (scale * torch.randn(3, 4, 8, dtype=torch.double)).requires_grad_()
    y = normalise(x)
    expected = F.layer_norm(x, (8,), eps=NORM_EPS)
    assert type(y.grad_fn).__name__ == "_NormaliseBackward"
    assert torch.allclose(y, expected)
    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad(y, x, direction)
    (expected_grad,) = torch.autograd.grad(expected, x, direction)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-6 / scale)
    with torch.no_grad():
        assert torch.allclose(normalise(x), expected)


def test_normalise_passes_gradcheck():
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(normalise, x, eps=1e-6, atol=1e-5)
    transposed = x.transpose(1, 2)  # no longer contiguous
    assert torch.autograd.gradcheck(lambda x: normalise(x).transpose(1, 2), transposed, atol=1e-5)


def test_feed_forward_is_plain_in_value_and_gradients_and_keeps_less():
    ours = shaken(FeedForward(16, 32))
    peer = nn.Sequential(
        nn.LayerNorm(16, eps=NORM_EPS), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)
    )
    for part, twin in zip((ours.norm, ours.widen, ours.narrow), (peer[0], peer[1], peer[3])):
        twin.load_state_dict(part.state_dict())
    outputs, gradients, kept = [], [], []
    signal, direction = torch.randn(2, 100, 16), torch.randn(2, 100, 16)
    for module in (ours, peer):
        x = signal.clone().requires_grad_()
        saved = SavedBytes(module)
        with saved.count():
            # the input is the result of a sum, as in the layers, so that only the norm may keep it
            y = module(x + 0)
        grads = torch.autograd.grad(y, [x, *module.parameters()], direction)
        outputs.append(y)
        gradients.append(grads)
        kept.append(saved.total)
    assert torch.allclose(*outputs, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
    assert kept[0] < kept[1]


def test_positions_are_the_sinusoids_of_vaswani():
    expected = torch.empty(7, 6)
    for place in range(7):
        for i in range(3):
            angle = place / 10000 ** (2 * i / 6)
            expected[place, 2 * i], expected[place, 2 * i + 1] = math.sin(angle), math.cos(angle)
    x = torch.zeros(2, 5, 7, 6)
    assert torch.allclose(x + positions(x, INTRA), expected.expand(2, 5, 7, 6), atol=1e-6)
    x = torch.zeros(2, 7, 5, 6)
    expected = expected[:, None].expand(2, 7, 5, 6)
    assert torch.allclose(x + positions(x, INTER), expected, atol=1e-6)


@both_axes
def test_a_stack_is_positions_then_its_layers_then_a_norm(axis):
    stack = shaken(LayerStack(lambda: TransformerLayer(16, 2, 24), 2, 16))
    x = torch.randn(2, 5, 6, 16)
    expected = x + positions(x, axis)
    for layer in stack.layers:
        expected = layer(expected, axis)
    assert torch.allclose(stack(x, axis), stack.norm(expected), atol=1e-6)
    # without positions, a stack of attention alone would not notice the order
    order = torch.randperm(x.shape[axis])
    shuffled = stack(x.index_select(axis, order), axis)
    assert not torch.allclose(shuffled, stack(x, axis).index_select(axis, order), atol=1e-2)


@pytest.mark.parametrize("per_frame", [False, True])
def test_global_norm_is_asteroids(per_frame):
    norm = shaken(GlobalNorm(6, per_frame))
    peer = asteroid.masknn.norms.get("cLN" if per_frame else "gLN")(6)
    peer.gamma.data, peer.beta.data = norm.weight.data, norm.bias.data
    x = 3 * torch.randn(2, 11, 6) + 1
    assert torch.allclose(norm(x), peer(x.transpose(1, 2)).transpose(1, 2), atol=1e-5)


# Sharing and checkpointing


def make_conv_attention_layer():
    return shaken(ConvAttentionLayer(16, 2, 24, conv_kernel_size=3))


@both_axes
def test_a_shared_stack_is_one_layer_applied_again_and_again(axis):
    shared = shaken(LayerStack(make_conv_attention_layer, 4, 16, share_layers=True)).double()
    unshared = LayerStack(make_conv_attention_layer, 4, 16).double()
    assert len(shared.layers) == 1 and len(unshared.layers) == 4
    for layer in unshared.layers:
        layer.load_state_dict(shared.layers[0].state_dict())
    unshared.norm.load_state_dict(shared.norm.state_dict())
    x = torch.randn(2, 5, 6, 16, dtype=torch.double)
    out, expected = shared(x, axis), unshared(x, axis)
    assert torch.allclose(out, expected)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    for name, parameter in shared.layers[0].named_parameters():
        total = sum(layer.get_parameter(name).grad for layer in unshared.layers)
        assert torch.allclose(parameter.grad, total), name


@both_classes
def test_models_share_inside_a_stack_only(model_class):
    n_layer = n_parameters(first_layer(small(model_class)))
    shared = small(model_class, share_layers=True)
    unshared = small(model_class, share_layers=False)
    assert n_parameters(unshared) - n_parameters(shared) == 4 * n_layer  # of 8 layers 4 remain
    layers = [stack.layers[0] for stack in [*shared.masker.intra, *shared.masker.inter]]
    assert len({id(layer) for layer in layers}) == 4


@both_classes
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_neither_outputs_nor_gradients(model_class, dropout):
    kept = small(model_class, dropout=dropout).train()
    recomputed = model_class.from_pretrained(kept.serialize(), checkpoint_activations=True).train()
    mixture = torch.randn(2, 500)
    direction = torch.randn(2, 2, 500)
    outputs = []
    for model in (kept, recomputed):
        torch.manual_seed(1)  # the same dropout
        outputs.append(model(mixture))
        outputs[-1].backward(direction)
    assert torch.allclose(*outputs, atol=1e-6)
    for (name, a), b in zip(kept.named_parameters(), recomputed.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


@both_classes
def test_checkpointing_saves_memory(model_class):
    sizes = dict(n_intra_layers=6, n_inter_layers=6, ff_hid=128)
    kept = saved_bytes(small(model_class, **sizes), 8000)
    recomputed = saved_bytes(small(model_class, checkpoint_activations=True, **sizes), 8000)
    assert recomputed <= 0.25 * kept


# Asteroid's contract


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


def test_the_stored_arguments_cannot_be_changed_from_outside():
    model = small()
    model.get_model_args()["n_src"] = 7
    assert model.get_model_args()["n_src"] == 2


@both_classes
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("checkpoint_activations", [True, False])
def test_traced_models_serve_other_lengths(
    model_class, with_grad, checkpoint_activations, tmp_path
):
    model = small(model_class, checkpoint_activations=checkpoint_activations)
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(model, torch.randn(1, 504))
    traced.save(str(tmp_path / "traced.pt"))
    reloaded = torch.jit.load(str(tmp_path / "traced.pt"))
    for shape in [(1, 504), (1, 505), (1, 1999), (1, 160), (1, 5), (3, 777), (2, 1, 400), (801,)]:
        mixture = torch.randn(shape)
        with torch.set_grad_enabled(with_grad):
            expected = model(mixture)
            for candidate in (traced, reloaded):
                estimates = candidate(mixture)
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


def test_separate_resamples_files_of_another_rate(tmp_path):
    model = small(sample_rate=8000)
    path = tmp_path / "talk.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(4000), 16000)
    with pytest.raises(RuntimeError, match="resample"):
        model.separate(str(path))
    (tmp_path / "out").mkdir()
    model.separate(str(path), output_dir=str(tmp_path / "out"), resample=True)
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


# Any length, any batch, any precision, any filterbank


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
def test_every_filterbank_family_builds_runs_and_travels(conf, tmp_path, monkeypatch):
    # what the gammatone family of asteroid_filterbanks 0.4.0 still asks of NumPy
    monkeypatch.setattr(np, "float", float, raising=False)
    monkeypatch.setattr(np, "math", math, raising=False)
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


# Chunks


@pytest.mark.parametrize(
    "chunk_size, hop_size", [(8, 4), (8, 2), (8, 8), (6, 1), (250, 125), (1, 1), (2, 1), (12, 3)]
)
def test_chunks_are_slices_that_add_up_again(chunk_size, hop_size):
    n_hops = chunk_size // hop_size
    for n_frames in [*range(1, 3 * min(chunk_size, 20) + 2), 249, 250, 251, 375, 1003]:
        x = torch.randint(-9, 10, (2, n_frames, 3)).double()
        chunks = split_chunks(x, chunk_size, hop_size)
        assert chunks.shape[2:] == (chunk_size, 3)
        # chunk c begins hop_size * c - (chunk_size - hop_size) frames into the signal
        lead = chunk_size - hop_size
        padded = F.pad(x, (0, 0, lead, len(chunks[0]) * hop_size + chunk_size))
        for c in (0, len(chunks[0]) // 2, len(chunks[0]) - 1):
            assert torch.equal(chunks[:, c], padded[:, c * hop_size :][:, :chunk_size])
        assert torch.equal(join_chunks(chunks, n_frames, hop_size), n_hops * x)


# Files


class Bomb:
    """An object that makes a folder when it is unpickled by code that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged_dict(change):
    """Writes a stored model after `change` of its dictionary."""

    def write(path, conf):
        change(conf)
        torch.save(conf, path)

    return write


def truncated(path, conf):
    torch.save(conf, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path, conf):
    torch.save(conf, path)
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path, conf: path.write_bytes(b""),
    "text": lambda path, conf: path.write_text("<html>404</html>\n"),
    "random bytes": lambda path, conf: path.write_bytes(np.random.default_rng(0).bytes(9999)),
    "truncated": truncated,
    "end overwritten": overwritten,
    "code in zip": lambda path, conf: torch.save({**conf, "x": Bomb(path.parent / "boom")}, path),
    "code in pickle": lambda path, conf: path.write_bytes(
        pickle.dumps({**conf, "x": Bomb(path.parent / "boom")})
    ),
    "a list": lambda path, conf: torch.save([1, 2], path),
    "a tensor": lambda path, conf: torch.save(torch.ones(3), path),
    "no name": damaged_dict(lambda conf: conf.pop("model_name")),
    "no arguments": damaged_dict(lambda conf: conf.pop("model_args")),
    "no weights": damaged_dict(lambda conf: conf.pop("state_dict")),
    "unknown class": damaged_dict(lambda conf: conf.update(model_name="ConvTasNet")),
    "other class": damaged_dict(lambda conf: conf.update(model_name="Sepformer")),
    "list as name": damaged_dict(lambda conf: conf.update(model_name=["TinySepformer"])),
    "arguments no dict": damaged_dict(lambda conf: conf.update(model_args=3)),
    "weights no dict": damaged_dict(lambda conf: conf.update(state_dict=None)),
    "weight lacks": damaged_dict(lambda conf: conf["state_dict"].popitem()),
    "surplus weight": damaged_dict(lambda conf: conf["state_dict"].update(extra=torch.ones(2))),
    "number as key": damaged_dict(lambda conf: conf["state_dict"].update({3: torch.ones(2)})),
    "other shape": damaged_dict(
        lambda conf: conf["state_dict"].update({"masker.prelu.weight": torch.ones(7)})
    ),
    "other size": damaged_dict(lambda conf: conf["model_args"].update(bn_chan=18, n_heads=3)),
    "argument lacks": damaged_dict(lambda conf: conf["model_args"].pop("n_src")),
    "surplus argument": damaged_dict(lambda conf: conf["model_args"].update(n_fliters=16)),
    "bad argument": damaged_dict(lambda conf: conf["model_args"].update(n_heads=0)),
    "bad filterbank": damaged_dict(lambda conf: conf["model_args"].update(fb_name="stft")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_sentence_and_nothing_is_run(damage, tmp_path, refused):
    path = tmp_path / "model.pth"
    conf = small(n_filters=8).serialize()  # too few filters for "bad filterbank"
    TinySepformer.from_pretrained(copy.deepcopy(conf))  # undamaged
    DAMAGES[damage](path, conf)
    with refused(path):
        TinySepformer.from_pretrained(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_the_bomb_of_the_test_above_is_live(tmp_path):
    torch.save(Bomb(tmp_path / "boom"), tmp_path / "model.pth")
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "boom").is_dir()


def assert_intact(path, model):
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, refused):
    path = tmp_path / "model.pth"
    old, new = small(), small()
    old.save(path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refused(path, "disk is full"):
            new.save(path)
    assert_intact(path, old)
    new.save(path)
    assert_intact(path, new)


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, refused):
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.pth"
    old, new = small(), TinySepformer.from_preset("tiny-sepformer-xs")
    old.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with refused(path, "could not be written"):
            new.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_intact(path, old)


# Learning and speed


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
