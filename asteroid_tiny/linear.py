"""Linear layers that are fast on any CPU, and a feed-forward network that keeps its input alone.

PyTorch hands float32 products on x86 to Intel's MKL, which is half as fast as it could be on some
of AMD's processors. oneDNN, which comes with PyTorch too, is about as fast elsewhere; it is used
wherever it can be: for float32 on such a CPU, outside of autocast, tracing, compilation, export and
`torch.func`, but for weight gradients on CPUs without AVX-512. Elsewhere, and with
``torch.backends.mkldnn.flags(enabled=False)``, the products are `torch.nn.functional.linear`.

Most of what a Transformer layer keeps for its backward pass are the hidden activations of its
feed-forward network. They are computed again instead, a block of rows at a time, so that on a CPU
they never leave its cache: there this costs no time, it saves some.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import flop_counter

BLOCK = 2**19  # hidden activations that fit in the cache of a CPU
VECTORS = torch.backends.cpu.get_cpu_capability()
ON_X86 = torch.backends.mkldnn.is_available() and "AVX" in VECTORS


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that can be.

    Shape:
        (.., in_features) -> (.., out_features).

    Examples:
        >>> layer, x = Linear(3, 5), torch.randn(2, 7, 3)
        >>> torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        True
    """

    def forward(self, x):
        if is_traced() or not by_onednn(x):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def feed_forward(x, widen, widen_bias, narrow, narrow_bias):
    """Linear, ReLU, linear; keeps `x` and the parameters for the backward pass, nothing else.

    Args:
        x (torch.Tensor): Input.
        widen (torch.Tensor): Weight of the first linear layer, (hidden, chan).
        widen_bias (torch.Tensor): Its bias, (hidden,).
        narrow (torch.Tensor): Weight of the second, (chan, hidden).
        narrow_bias (torch.Tensor): Its bias, (chan,).

    Shape:
        (.., chan) -> the same.
    """
    args = x, widen, widen_bias, narrow, narrow_bias
    if is_traced():
        return F.linear(F.relu(F.linear(*args[:3])), *args[3:])
    device = x.device.type
    casts = (
        x.dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )
    if casts:  # here, as the backward pass would know nothing of it
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _FeedForward.apply(*(arg.to(dtype) for arg in args))
    return _FeedForward.apply(*args)


def is_traced():
    """Whether the operations are recorded, to run elsewhere, or transformed by `torch.func`."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    )


def by_onednn(x):
    """Whether products with a tensor are oneDNN's (bool)."""
    return (
        ON_X86
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def product(x, weight, bias=None, relu=False):
    """`F.linear`, and a ReLU if asked for, without a gradient: (.., in) -> (.., out)."""
    if by_onednn(x):
        activation = "relu" if relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs):
    """Of oneDNN's product, for PyTorch's `FlopCounterMode`, which does not know it."""
    return 2 * math.prod(x_shape) * weight_shape[0]


if ON_X86:
    flop_counter.register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def weight_gradient(grad, x):
    """Of a linear layer with input (rows, in) and gradient (rows, out): (out, in).

    oneDNN wants transposed copies, which cost more than it gains on a CPU without AVX-512.
    """
    if by_onednn(x) and "AVX512" in VECTORS:
        return product(grad.contiguous().t(), x.contiguous().t())
    return grad.t() @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t().contiguous()) if needs_x else None,
            weight_gradient(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, widen, widen_bias, narrow, narrow_bias):
        ctx.save_for_backward(x, widen, widen_bias, narrow)
        y = [
            product(product(rows, widen, widen_bias, relu=True), narrow, narrow_bias)
            for rows in _blocks(x, len(widen))
        ]
        return torch.cat(y).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, widen, widen_bias, narrow = ctx.saved_tensors
        widen_t, narrow_t = widen.t().contiguous(), narrow.t().contiguous()
        sums, grad_x = [0, 0, 0], []
        for rows, grad_rows in zip(_blocks(x, len(widen)), _blocks(grad, len(widen))):
            hidden = product(rows, widen, widen_bias, relu=True)
            grad_hidden = product(grad_rows, narrow_t)
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
            parts = (
                weight_gradient(grad_hidden, rows),
                grad_hidden.sum(0),
                weight_gradient(grad_rows, hidden),
            )
            sums = [total + part for total, part in zip(sums, parts)]
            grad_x.append(product(grad_hidden, widen_t))
        return torch.cat(grad_x).view(x.shape), *sums, grad.flatten(0, -2).sum(0)


def _blocks(x, hidden):
    """Rows of (.., chan), on a CPU some at a time."""
    rows = x.flatten(0, -2)
    return rows.split(max(1, BLOCK // hidden)) if x.device.type == "cpu" else [rows]
