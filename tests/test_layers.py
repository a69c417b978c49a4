"""Layers, stacks and chunks: their equations, sharing, checkpointing."""

import math

import asteroid
import numpy as np
import pytest
import torch
from small import both_axes, both_classes, first_layer, n_parameters, shaken, small
from torch import nn
from torch.nn import functional as F

from asteroid_tiny import layers
from asteroid_tiny.cost import SavedBytes, saved_bytes
from asteroid_tiny.layers import (
    INTER,
    INTRA,
    ConvAttentionLayer,
    FeedForward,
    LayerStack,
    SelfAttention,
    TransformerLayer,
    attend,
    positions,
)
from asteroid_tiny.masker import DualPathMasker, MaskerNorm, join_chunks, split_chunks

EPS = 1e-6  # of SpeechBrain's layer norms


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
@pytest.mark.parametrize("attn_chan, kernel_size", [(8, 5), (8, 11), (4, 5), (12, 5), (16, 5)])
def test_conv_attention_layer_computes_its_equations(axis, path_norm, attn_chan, kernel_size):
    layer = ConvAttentionLayer(16, 4, 24, attn_chan, kernel_size, path_norm)
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


@pytest.mark.parametrize("place", ["attention", "feed_forward", "output"])
@pytest.mark.parametrize("make", [TransformerLayer, ConvAttentionLayer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_dropout_drops_out_in_training_alone(make, place, dtype):
    layer, x = make(16, 2, 32, dropout=0.5).to(dtype), torch.randn(1, 4, 6, 16, dtype=dtype)
    for name, module in layer.named_modules():
        if hasattr(module, "dropout") and (name or "output") != place:
            module.dropout = 0.0 if name == "attention" else nn.Dropout(0.0)
    layer.train()
    assert not torch.equal(layer(x, INTRA), layer(x, INTRA))
    layer.eval()
    assert torch.equal(layer(x, INTRA), layer(x, INTRA))


@pytest.mark.parametrize("silent", ["paths", "feed_forward"])
@pytest.mark.parametrize("make", [TransformerLayer, ConvAttentionLayer])
def test_both_sums_of_a_layer_lose_half_and_double_the_rest(make, silent):
    layer, x = make(16, 2, 32, dropout=0.5), torch.randn(1, 20, 30, 16)
    layer.attention.dropout, layer.feed_forward.dropout = 0.0, nn.Dropout(0.0)
    paths = layer.path_norms if make is ConvAttentionLayer else layer.attention.out
    for parameter in (paths if silent == "paths" else layer.feed_forward.narrow).parameters():
        parameter.data.zero_()
    kept = (layer.train()(x, INTRA) - x) / (layer.eval()(x, INTRA) - x)
    gone = kept.abs() < 0.5
    assert 0.4 < gone.float().mean() < 0.6 and not kept[gone].any()
    torch.testing.assert_close(kept[~gone].median(), torch.tensor(2.0))


def test_hidden_channels_that_drop_out_leave_the_mean():
    layer, x = shaken(FeedForward(16, 32, dropout=0.5)), torch.randn(5, 16)
    mean = layer.train()(x.expand(5000, 5, 16)).mean(0)
    expected = layer.eval()(x)
    assert (mean - expected).norm() < 0.05 * expected.norm()


def test_a_second_derivative_is_refused_instead_of_wrong():
    x = torch.randn(2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(FeedForward(16, 32)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_any_number_of_frames_is_the_plain_one(dtype, monkeypatch):
    monkeypatch.setattr(layers, "VECTOR", 16)
    for n_keys in [*range(1, 34), 250]:
        signals = [torch.randn(3, n_keys, 2, 8).transpose(1, 2).to(dtype) for _ in range(3)]
        results = []
        for signals in (signals, [signal.double() for signal in signals]):
            signals = [signal.requires_grad_() for signal in signals]
            query, key, value = signals
            if signals[0].dtype == dtype:
                y = attend(*signals, 0.0)
                with torch.no_grad():
                    assert torch.allclose(attend(*signals, 0.0), y, rtol=0.03, atol=0.03)
            else:
                y = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1) @ value
            results.append([y, *torch.autograd.grad(y.square().sum(), signals)])
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for ours, exact in zip(*results, strict=True):
            assert (ours - exact).norm() <= tolerance * exact.norm() + 1e-5, n_keys


@pytest.mark.parametrize("dropout", [0.0, 0.5])  # which in eval is none
def test_feed_forward_is_plain_in_value_and_gradients_and_keeps_less(dropout):
    ours = shaken(FeedForward(16, 32, dropout)).eval()
    peer = nn.Sequential(nn.LayerNorm(16, eps=EPS), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    for part, twin in zip((ours.norm, ours.widen, ours.narrow), (peer[0], peer[1], peer[3])):
        twin.load_state_dict(part.state_dict())
    outputs, gradients, kept = [], [], []
    signal, direction = torch.randn(2, 100, 16), torch.randn(2, 100, 16)
    for module, call in ((ours, ours), (peer, lambda x: x + peer(x))):
        x = signal.clone().requires_grad_()
        saved = SavedBytes(module)
        with saved.count():
            # the input is the result of a sum, as in the layers, so that only the norm may keep it
            y = call(x + 0)
        grads = torch.autograd.grad(y, [x, *module.parameters()], direction)
        outputs.append(y)
        gradients.append(grads)
        kept.append(saved.total)
    assert torch.allclose(*outputs, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
    assert kept[0] < 0.4 * kept[1]


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
def test_far_positions_are_not_rounded_in_16_bits(axis):
    x = torch.zeros(1, 1000, 1000, 4)
    rounded = positions(x.bfloat16(), axis)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), positions(x, axis), rtol=0, atol=0.01)


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


@pytest.mark.parametrize("norm_type", ["gLN", "cLN"])
@pytest.mark.parametrize("scale", [3, 1e-4])
def test_masker_norm_is_asteroids(norm_type, scale):
    norm = shaken(MaskerNorm(6, norm_type))
    peer = asteroid.masknn.norms.get(norm_type)(6)
    peer.gamma.data, peer.beta.data = norm.weight.data, norm.bias.data
    x = scale * torch.randn(2, 11, 6) + scale / 3
    expected = peer(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(norm(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(norm(x), expected, atol=1e-5)


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


def make_conv_attention_layer():
    return shaken(ConvAttentionLayer(16, 2, 24, conv_kernel_size=3))


@both_axes
@pytest.mark.parametrize("cache", [2 * 9 * 2 + 3, 1], ids=["of some frames", "of one"])
def test_a_stack_by_parts_is_the_whole_one(axis, cache, monkeypatch):
    stack = shaken(LayerStack(lambda: TransformerLayer(16, 4, 32), 2, chan=16))
    x = torch.randn(2, 7, 9, 16)
    norm = shaken(MaskerNorm(16))  # over all parts
    whole = norm(stack(x, axis))
    monkeypatch.setattr(layers, "FRAMES_IN_CACHE", cache)
    with torch.no_grad():
        assert torch.allclose(stack(x, axis, finish=norm), whole, atol=1e-5)


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
    assert recomputed <= 0.3 * kept


def test_what_finishes_a_stack_is_computed_anew_with_its_layers():
    def layer():
        return TransformerLayer(16, 4, 32)

    stack, kept = LayerStack(layer, 2, chan=16, checkpoint_activations=True), []
    for finish in (nn.Identity(), nn.Sequential(nn.Sigmoid(), nn.Sigmoid())):
        saved = SavedBytes(stack)
        with saved.count():
            stack(torch.randn(1, 5, 10, 16), INTRA, finish)
        kept.append(saved.total)
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SelfAttention(16, 0), "n_heads"),
        (lambda: LayerStack(make_conv_attention_layer, 0, chan=16), "at least one layer"),
        (lambda: DualPathMasker(8, 0, make_conv_attention_layer), "n_src"),
    ],
)
def test_parts_that_are_used_alone_refuse_what_none_can_be(make, words):
    with pytest.raises(ValueError, match=words):
        make()
