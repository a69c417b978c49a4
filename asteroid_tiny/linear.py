"""Linear layers that are fast on any CPU, and a feed-forward network that keeps little.

PyTorch hands float32 products on x86 to Intel's MKL, which is half as fast as it could be on some
of AMD's processors, and computes a sum with a bias or a ReLU in bfloat16 in passes of their own.
oneDNN, which comes with PyTorch too, does neither; it is used wherever it can be: on such a CPU,
outside of tracing, compilation, export and `torch.func`, but for weight gradients in bfloat16 or
on CPUs without AVX-512. Elsewhere, and with ``torch.backends.mkldnn.flags(enabled=False)``, the
products are `torch.nn.functional.linear`.

Most of what a Transformer layer keeps for its backward pass are the hidden activations of its
feed-forward network. They are computed again instead, a block of rows at a time, so that on a CPU
they never leave its cache: there this costs no time, it saves some.
"""

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import flop_counter

BLOCK = 2**19  # hidden activations that fit in the cache of a CPU
VECTORS = torch.backends.cpu.get_cpu_capability()
ON_X86 = torch.backends.mkldnn.is_available() and "AVX" in VECTORS
DTYPES = [torch.float32]  # of oneDNN's products on this CPU
if ON_X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES.append(torch.bfloat16)


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
        if is_traced() or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        dtype = product_dtype(x)
        x, weight = x.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        # in bfloat16 PyTorch's own gradients are the faster ones
        plain = not by_onednn(x) or (torch.is_grad_enabled() and x.dtype == torch.bfloat16)
        return F.linear(x, weight, bias) if plain else _Linear.apply(x, weight, bias)


def add_feed_forward(x, widen, widen_bias, narrow, narrow_bias, eps):
    """x + linear(ReLU(linear(x, normalised over the channels))).

    For the backward pass the normalised signal is kept, in the type of the products, and the
    parameters; neither `x` nor what is hidden.

    Args:
        x (torch.Tensor): Input.
        widen (torch.Tensor): Weight of the first linear layer, (hidden, chan).
        widen_bias (torch.Tensor): Its bias, (hidden,).
        narrow (torch.Tensor): Weight of the second, (chan, hidden).
        narrow_bias (torch.Tensor): Its bias, (chan,).
        eps (float): What the norm adds to the variance.

    Shape:
        (.., chan) -> the same.
    """
    settings = eps, product_dtype(x), torch.is_grad_enabled()
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    # without autocast inside, as the backward pass would know nothing of it
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        return _AddFeedForward.apply(x, widen, widen_bias, narrow, narrow_bias, *settings)


def product_dtype(x):
    """The type in which `x` is multiplied (torch.dtype): its own, or that of autocast."""
    device = x.device.type
    casts = (
        x.dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )
    return torch.get_autocast_dtype(device) if casts else x.dtype


def is_traced():
    """Whether the operations are recorded, to run elsewhere, or transformed by `torch.func`."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    )


def by_onednn(x):
    """Whether products with a tensor of this device and type are oneDNN's (bool)."""
    return ON_X86 and x.device.type == "cpu" and x.dtype in DTYPES and torch.backends.mkldnn.enabled


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

    oneDNN wants transposed copies, which cost more than it gains in bfloat16 and on a CPU without
    AVX-512.
    """
    if by_onednn(x) and x.dtype == torch.float32 and "AVX512" in VECTORS:
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


class _AddFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, widen, widen_bias, narrow, narrow_bias, eps, dtype, keep):
        def normalise(rows):
            y, _, inverse_std = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
            return y.to(dtype), inverse_std

        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        blocks_x, blocks_out = (_blocks(part, len(widen)) for part in (x, out))
        if keep:
            y, inverse_std = normalise(x)
            ctx.save_for_backward(y, inverse_std, widen, widen_bias, narrow)
            blocks_y = _blocks(y, len(widen))
        else:
            blocks_y = (normalise(rows)[0] for rows in blocks_x)
        parameters = (part.to(dtype) for part in (widen, widen_bias, narrow, narrow_bias))
        widen, widen_bias, narrow, narrow_bias = parameters
        for rows, rows_x, rows_out in zip(blocks_y, blocks_x, blocks_out):
            hidden = product(rows, widen, widen_bias, relu=True)
            torch.add(rows_x, product(hidden, narrow, narrow_bias), out=rows_out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, inverse_std, *parameters = ctx.saved_tensors
        widen, widen_bias, narrow = (parameter.to(y.dtype) for parameter in parameters)
        widen_t, narrow_t = widen.t().contiguous(), narrow.t().contiguous()
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        sums = [torch.zeros_like(parameter) for parameter in parameters]  # in their precision
        blocks = [_blocks(part, len(widen)) for part in (y, inverse_std, grad, grad_x)]
        for rows, rows_std, rows_grad, rows_grad_x in zip(*blocks):
            rows_grad_y = rows_grad.to(y.dtype)
            hidden = product(rows, widen, widen_bias, relu=True)
            grad_hidden = product(rows_grad_y, narrow_t)
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
            parts = (
                weight_gradient(grad_hidden, rows),
                grad_hidden.sum(0),
                weight_gradient(rows_grad_y, hidden),
            )
            for total, part in zip(sums, parts):
                total += part
            # of a norm whose input were its result, which is all that the gradient needs to know
            mean, one = torch.zeros_like(rows_std), torch.ones_like(rows_std)
            grad_rows, _, _ = torch.ops.aten.native_layer_norm_backward(
                product(grad_hidden, widen_t).to(grad.dtype),
                rows.to(grad.dtype),
                rows.shape[-1:],
                mean,
                one,
                None,
                None,
                [True, False, False],
            )
            torch.addcmul(rows_grad, grad_rows, rows_std, out=rows_grad_x)
        return grad_x, *sums, grad.flatten(0, -2).sum(0), None, None, None


def _blocks(x, hidden):
    """Rows of (.., chan), on a CPU some at a time."""
    rows = x.flatten(0, -2)
    return rows.split(max(1, BLOCK // hidden)) if x.device.type == "cpu" else [rows]
