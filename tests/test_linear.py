"""Linear layers by oneDNN and the lean feed-forward network: equal to the plain ones."""

import pytest
import torch
from small import both_classes, shaken, small
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from asteroid_tiny import linear
from asteroid_tiny.cost import SavedBytes
from asteroid_tiny.layers import INTRA, LayerStack, TransformerLayer
from asteroid_tiny.linear import Linear, add_feed_forward, by_onednn
from asteroid_tiny.models import PRESETS

each_cpu = pytest.mark.parametrize("vectors", ["AVX2", "AVX512"])  # it decides who multiplies
needs_x86 = pytest.mark.skipif(not linear.ON_X86, reason="oneDNN is taken on x86 alone")


def values_and_gradients(function, *args):
    """What a function returns, and the gradients of a fixed sum of it."""
    args = [arg.clone().requires_grad_() for arg in args]
    y = function(*args)
    direction = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad(y, args, direction.to(y.dtype))]


def close(ours, theirs):
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(ours, theirs, strict=True))


@needs_x86
@each_cpu
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_nn_linear_on_a_part_of_the_channels_too(bias, vectors, monkeypatch):
    monkeypatch.setattr(linear, "VECTORS", vectors)
    ours, theirs = Linear(24, 48, bias=bias), nn.Linear(24, 48, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 60, 40)
    assert by_onednn(x)
    results = []
    for layer in (ours, theirs):
        part = x.clone().requires_grad_()
        y = layer(part[..., 3:27])  # channels of others on both sides
        results.append([y, *torch.autograd.grad(y.square().sum(), [part, *layer.parameters()])])
    assert close(*results)


def feed_forward_arguments(*shape, dtype=torch.float32):
    """A signal of 16 channels, and weights and biases of 32 hidden ones."""
    shapes = (*shape, 16), (32, 16), (32,), (16, 32), (16,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def plain_feed_forward(x, widen, widen_bias, narrow, narrow_bias):
    hidden = F.relu(F.linear(F.layer_norm(x, (16,)), widen, widen_bias))
    return x + F.linear(hidden, narrow, narrow_bias)


def lean_feed_forward(*args):
    return add_feed_forward(*args, 1e-5)


@each_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feed_forward_in_blocks_is_the_plain_one(dtype, vectors, monkeypatch):
    monkeypatch.setattr(linear, "VECTORS", vectors)
    monkeypatch.setattr(linear, "BLOCK", 7 * 32)  # blocks of 7 rows, the last of 3
    args = feed_forward_arguments(2, 19, dtype=dtype)
    plain = values_and_gradients(plain_feed_forward, *args)
    assert close(values_and_gradients(lean_feed_forward, *args), plain)
    turned = args[0].transpose(0, 1), *args[1:]  # no longer contiguous
    plain = values_and_gradients(plain_feed_forward, *turned)
    assert close(values_and_gradients(lean_feed_forward, *turned), plain)
    with torch.no_grad():
        assert close([lean_feed_forward(*turned)], plain[:1])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lean_feed_forward, [arg.requires_grad_() for arg in args])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_feed_forward_takes_signals_of_any_level(scale):
    args = feed_forward_arguments(50, dtype=torch.float64)
    args[0] *= scale
    (ours, *gradients), (theirs, *wanted) = (
        values_and_gradients(lambda x, *rest: function(x, *rest) - x, *args)
        for function in (lean_feed_forward, plain_feed_forward)
    )
    assert close([ours, *gradients], [theirs, *wanted])


def test_gradients_in_bfloat16_do_not_lose_one_block_of_many(monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 4 * 32)
    args = feed_forward_arguments(8000)
    args[0] = args[0].abs()  # so that the gradients of all blocks point one way

    def rounded(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return lean_feed_forward(*args)

    args = [arg.requires_grad_() for arg in args]
    found, wanted = (
        torch.autograd.grad(function(*args).sum(), args[1:])
        for function in (rounded, lean_feed_forward)
    )
    assert all((a - b).norm() < 0.02 * b.norm() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_linear_under_autocast_is_exact_but_for_rounding_once(inputs):
    layer, x = Linear(24, 48), torch.randn(2, 500, 40, dtype=inputs)[..., 3:27]
    rounded = (arg.bfloat16().float() for arg in (x, layer.weight, layer.bias))
    expected = F.linear(*rounded)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-5)


@needs_x86
@both_classes
def test_a_model_computes_the_same_without_onednn(model_class):
    model, x = shaken(small(model_class)), torch.randn(1, 4000)
    results = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert by_onednn(x) == enabled
            y = model(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-6 for a, b in zip(*results, strict=True))


def test_autocast_decides_in_which_type_a_linear_layer_multiplies():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(24, 48)(torch.randn(5, 24)).dtype == torch.bfloat16


def test_operations_are_counted_alike_with_and_without_onednn():
    model, counts = small(), []
    for enabled in (True, False):
        counter = FlopCounterMode(display=False)
        with torch.backends.mkldnn.flags(enabled=enabled), counter:
            model(torch.randn(1, 4000)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 1e7


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_gradients_of_each_mixture_by_torch_func_are_those_of_autograd(checkpoint_activations):
    model, mixtures = small(checkpoint_activations=checkpoint_activations), torch.randn(2, 800)
    parameters = dict(model.named_parameters())

    def energy(parameters, mixture):
        return torch.func.functional_call(model, parameters, mixture[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(energy), (None, 0))(parameters, mixtures)
    for i, mixture in enumerate(mixtures):
        wanted = torch.autograd.grad(energy(parameters, mixture), list(parameters.values()))
        pairs = zip((found[key][i] for key in parameters), wanted, strict=True)
        assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-5 for a, b in pairs)


def test_a_traced_model_asks_for_no_operation_of_one_processor(tmp_path):
    model = small().eval()
    traced = torch.jit.trace(model, torch.randn(1, 4000))
    assert "mkldnn" not in str(traced.inlined_graph)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("training", [True, False])
def test_a_preset_is_compiled_without_a_graph_break(name, training):
    torch._dynamo.reset()
    sizes = dict(n_repeats=1, n_intra_layers=1, n_inter_layers=1)
    model = PRESETS[name][0].from_preset(name, **sizes).train(training)
    x = torch.randn(1, 4000)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        ours, theirs = compiled(x), model(x)
    assert close([ours], [theirs])
    if training:
        gradients = [
            torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (ours, theirs)
        ]
        assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-6 for a, b in zip(*gradients))


def test_a_compiled_stack_computes_anew_what_the_plain_one_does():
    torch._dynamo.reset()
    stack = LayerStack(lambda: TransformerLayer(16, 4, 32), 2, 16, checkpoint_activations=True)
    kept = []
    for run in (stack, torch.compile(stack, backend="aot_eager")):
        saved = SavedBytes(stack)
        with saved.count():
            run(torch.randn(1, 30, 40, 16), INTRA)
        kept.append(saved.total)
    assert kept[1] < 1.5 * kept[0]  # the parameters are counted, too


@both_classes
def test_a_compiled_model_drops_out_alike_and_serves_any_length(model_class):
    torch._dynamo.reset()
    model = small(model_class, dropout=0.5, n_repeats=1)
    compiled = torch.compile(model, backend="eager")
    for length in (700, 9, 1, 500):
        mixture = torch.randn(1, length)
        torch.testing.assert_close(compiled(mixture), model(mixture))
    model.train()
    found = []
    for either in (compiled, model):
        torch.manual_seed(0)
        found.append(either(mixture))
    torch.testing.assert_close(*found)
