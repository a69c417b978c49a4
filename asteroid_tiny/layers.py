"""The layers of a dual-path Transformer, and the stack that repeats them.

`TransformerLayer` is SepFormer's [1]_: self-attention, then a feed-forward network.
`ConvAttentionLayer` is Tiny-Sepformer's [2]_: the attention is split over the channels into two
paths, attention on the first and a depthwise separable convolution on the rest.
`LayerStack` runs several layers along one axis of a chunked signal; its layers may be one and the
same, which is the second idea of [2]_.

All of them work on one layout, (batch, chunks, chunk, chan), along `axis` 2 (inside the chunks,
"intra") or 1 (across the chunks, "inter"). The other axis is folded into the batch or into the
heads by views alone, so that no transposed copy is ever made or kept for the backward pass.

References
    [1] C. Subakan et al., "Attention is all you need in speech separation", ICASSP 2021.
    [2] J. Luo et al., "Tiny-Sepformer: a tiny time-domain Transformer network for speech
        separation", Interspeech 2022.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .linear import VECTORS, Linear, add_feed_forward, is_traced, product_dtype

INTRA, INTER = 2, 1
VECTOR = 16 if "AVX512" in VECTORS else 1  # whole ones are worth it with AVX-512 alone
NORM_EPS = 1e-6
FRAMES_IN_CACHE = 2**13  # of a CPU, with what a layer makes of them


class SelfAttention(nn.Module):
    """Multi-head self-attention along one axis, through `scaled_dot_product_attention`.

    The attention weights are never asked for, so that they are neither computed whole nor stored
    (with dropout on a CPU PyTorch does both).

    Args:
        chan (int): Number of channels.
        n_heads (int): Number of heads; divides `chan`.
        dropout (float): Dropout on the attention weights, in [0, 1).
    """

    def __init__(self, chan, n_heads, dropout=0.0):
        super().__init__()
        if n_heads < 1 or chan % n_heads:
            raise ValueError(f"n_heads ({n_heads}) must divide the attention's {chan} channels")
        self.n_heads = n_heads
        self.dropout = dropout
        self.query = Linear(chan, chan)
        self.key = Linear(chan, chan)
        self.value = Linear(chan, chan)
        self.out = Linear(chan, chan)

    def forward(self, x, axis):
        """
        Args:
            x (torch.Tensor): Input.
            axis (int): Axis to attend along, `INTRA` or `INTER`.

        Shape:
            (batch, chunks, chunk, chan) -> the same.
        """
        if not is_traced():
            x = x.to(product_dtype(x))  # once for the three
        signals = [self._heads(layer(x), axis) for layer in (self.query, self.key, self.value)]
        heads = attend(*signals, self.dropout if self.training else 0.0)
        return self.out(heads.transpose(1, 2).reshape(x.shape))

    def _heads(self, x, axis):
        """A view (items, heads, axis, head chan) in which the other axis is batch or more heads."""
        x = x.unflatten(-1, (self.n_heads, -1))
        x = x.flatten(0, 1) if axis == INTRA else x.flatten(2, 3)
        return x.transpose(1, 2)


def attend(query, key, value, dropout):
    """`scaled_dot_product_attention`, on a CPU round two of its corners.

    PyTorch takes exponentials by vectors there and one by one what they leave over, so that 15 keys
    take twice as long as 16: keys are filled up with masked ones. And its backward pass in bfloat16
    is nine times as slow as in float32, which it is left to.
    """
    if query.device.type != "cpu" or is_traced():
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    dtype = query.dtype
    if dtype == torch.bfloat16 and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
    n_keys, mask = key.shape[-2], None
    left_over = n_keys % VECTOR
    if left_over >= VECTOR / 2 and not dropout:  # with which PyTorch goes another way
        pad = (0, 0, 0, VECTOR - left_over)
        key, value = F.pad(key, pad), F.pad(value, pad)
        mask = query.new_zeros(key.shape[-2])
        mask[n_keys:] = -math.inf
        mask = mask.expand(query.shape[-2], -1)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout).to(dtype)


class DepthwiseSeparableConv(nn.Module):
    """A convolution of each channel by itself along one axis, then a linear mix of the channels.

    No activation stands between the two; the borders are padded with zeros.

    Args:
        chan (int): Number of channels.
        kernel_size (int): Length of the convolution, odd.

    The depthwise module holds parameters, but is not called: hooks on it do not run.
    """

    def __init__(self, chan, kernel_size):
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"conv_kernel_size must be odd, not {kernel_size}")
        self.depthwise = nn.Conv1d(chan, chan, kernel_size, padding="same", groups=chan)
        self.pointwise = Linear(chan, chan)

    def forward(self, x, axis):
        """
        Args:
            x (torch.Tensor): Input.
            axis (int): Axis to convolve along, `INTRA` or `INTER`.

        Shape:
            (batch, chunks, chunk, chan) -> the same.
        """
        # An image in channels-last memory, as high as the axis is long: oneDNN takes ten times as
        # long to go back through one whose kernel is wide, or higher than the image.
        image = x.flatten(0, 1).unsqueeze(2) if axis == INTRA else x
        height, kernel_size = image.shape[1], self.depthwise.kernel_size[0]
        if not is_traced() and height < kernel_size:
            image = F.pad(image, (0, 0, 0, 0, 0, kernel_size - height))
        image = F.conv2d(
            image.permute(0, 3, 1, 2),
            self.depthwise.weight.unsqueeze(3),
            self.depthwise.bias,
            padding=(kernel_size // 2, 0),
            groups=x.shape[-1],
        )
        return self.pointwise(image[:, :, :height].permute(0, 2, 3, 1).reshape(x.shape))


class FeedForward(nn.Module):
    """Norm, linear, ReLU, linear, and the way around them: x + linear(ReLU(linear(norm(x)))).

    The scale and shift of the norm are folded into the first linear layer, so that for the
    backward pass the normalised signal is kept and not the input of the norm as well.

    Args:
        chan (int): Number of channels.
        hidden (int): Hidden channels.
        dropout (float): Dropout on the hidden channels, in [0, 1).

    Its modules hold the parameters, but are not called: hooks on them do not run, as those of
    `torch.nn.utils.prune` and the older `weight_norm` (`torch.nn.utils.parametrize` needs none),
    and what replaces them, as PyTorch's dynamic quantisation does, does not fit (`asteroid-tiny
    export` quantises). With dropout the hidden channels are kept for the backward pass.

    Shape:
        (.., chan) -> the same.
    """

    def __init__(self, chan, hidden, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(chan, eps=NORM_EPS)
        self.widen = Linear(chan, hidden)
        self.dropout = nn.Dropout(dropout)
        self.narrow = Linear(hidden, chan)

    def forward(self, x, dropout=nn.Dropout(0.0)):
        """
        Args:
            x (torch.Tensor): Input.
            dropout (torch.nn.Dropout): Of what is added to it.

        Shape:
            (.., chan) -> the same.
        """
        drops_out = self.training and (self.dropout.p or dropout.p)
        if drops_out or is_traced():  # an exported file has the parameters as they are
            hidden = self.dropout(F.relu(self.widen(self.norm(x))))
            return x + dropout(self.narrow(hidden))
        weight = self.widen.weight * self.norm.weight
        bias = self.widen.bias + self.widen.weight @ self.norm.bias
        return add_feed_forward(x, weight, bias, self.narrow.weight, self.narrow.bias, NORM_EPS)


class TransformerLayer(nn.Module):
    """Pre-norm Transformer encoder layer, as SepFormer has it.

    Args:
        chan (int): Number of channels.
        n_heads (int): Number of attention heads.
        ff_hid (int): Hidden channels of the feed-forward network.
        dropout (float): Dropout in [0, 1).

    Shape:
        (batch, chunks, chunk, chan) -> the same.

    Examples:
        >>> layer = TransformerLayer(chan=16, n_heads=4, ff_hid=32)
        >>> layer(torch.randn(1, 5, 10, 16), axis=INTRA).shape
        torch.Size([1, 5, 10, 16])
    """

    def __init__(self, chan, n_heads, ff_hid, dropout=0.0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(chan, eps=NORM_EPS)
        self.attention = SelfAttention(chan, n_heads, dropout)
        self.feed_forward = FeedForward(chan, ff_hid, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, axis):
        x = x + self.dropout(self.attention(self.attention_norm(x), axis))
        return self.feed_forward(x, self.dropout)


class ConvAttentionLayer(nn.Module):
    """Tiny-Sepformer's layer: attention and convolution side by side, then feed-forward.

    With Hn = LayerNorm(x), of which attention reads the first `attn_chan` channels (D_a) and the
    convolution the others (D_c)::

        H_a = LayerNorm(Hn[.., :D_a] + SelfAttention(Hn[.., :D_a]))
        H_c = LayerNorm(Hn[.., D_a:] + DepthwiseSeparableConv(Hn[.., D_a:]))
        H   = x + concat(H_a, H_c)
        out = H + FeedForward(LayerNorm(H))

    Args:
        chan (int): Number of channels, D.
        n_heads (int): Number of attention heads; divides `attn_chan`.
        ff_hid (int): Hidden channels of the feed-forward network.
        attn_chan (int, optional): D_a, from 1 to `chan`; half of `chan` by default. With
            `attn_chan == chan` there is no convolution path.
        conv_kernel_size (int): Length of the convolution, odd.
        path_norm (bool): Whether each path normalises its sum, as above; without it the layer is
            a plain pre-norm one, H = x + concat(SelfAttention(..), DepthwiseSeparableConv(..)).
        dropout (float): Dropout in [0, 1).

    Shape:
        (batch, chunks, chunk, chan) -> the same.

    Examples:
        >>> layer = ConvAttentionLayer(chan=16, n_heads=4, ff_hid=32)
        >>> layer(torch.randn(1, 5, 10, 16), axis=INTER).shape
        torch.Size([1, 5, 10, 16])
    """

    def __init__(
        self,
        chan,
        n_heads,
        ff_hid,
        attn_chan=None,
        conv_kernel_size=15,
        path_norm=True,
        dropout=0.0,
    ):
        super().__init__()
        attn_chan = chan // 2 if attn_chan is None else attn_chan
        if not 1 <= attn_chan <= chan:
            raise ValueError(f"attn_chan must be from 1 to {chan}, not {attn_chan}")
        self.split = [attn_chan, chan - attn_chan]
        self.norm = nn.LayerNorm(chan, eps=NORM_EPS)
        self.attention = SelfAttention(attn_chan, n_heads, dropout)
        self.conv = None
        if self.split[1]:
            self.conv = DepthwiseSeparableConv(self.split[1], conv_kernel_size)
        self.path_norms = None
        if path_norm:
            self.path_norms = nn.ModuleList(nn.LayerNorm(n, eps=NORM_EPS) for n in self.split if n)
        self.feed_forward = FeedForward(chan, ff_hid, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, axis):
        x = x + self.dropout(self._paths(self.norm(x), axis))
        return self.feed_forward(x, self.dropout)

    def _paths(self, x, axis):
        inputs = x.split(self.split, dim=-1) if self.conv is not None else (x,)
        paths = (self.attention, self.conv)
        outputs = [path(part, axis) for path, part in zip(paths, inputs)]
        if self.path_norms is not None:
            outputs = [
                norm(part + out) for norm, part, out in zip(self.path_norms, inputs, outputs)
            ]
        return torch.cat(outputs, dim=-1)


class LayerStack(nn.Module):
    """Layers one after the other along one axis, behind positions and before a norm.

    Args:
        make_layer (callable): Makes one layer.
        n_layers (int): How many layers are applied, at least 1.
        chan (int): Number of channels.
        share_layers (bool): Whether one layer is applied `n_layers` times.
        checkpoint_activations (bool): Whether the layers' activations are computed anew in the
            backward pass instead of being kept. Costs about a third more time and changes
            nothing else.

    Examples:
        >>> stack = LayerStack(lambda: TransformerLayer(16, 4, 32), 3, chan=16, share_layers=True)
        >>> len(stack.layers)
        1
        >>> stack(torch.randn(1, 5, 10, 16), axis=INTRA).shape
        torch.Size([1, 5, 10, 16])
    """

    def __init__(
        self, make_layer, n_layers, chan, share_layers=False, checkpoint_activations=False
    ):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"a stack needs at least one layer, not {n_layers}")
        n_unique = 1 if share_layers else n_layers
        self.layers = nn.ModuleList(make_layer() for _ in range(n_unique))
        self.n_times = n_layers // n_unique
        self.norm = nn.LayerNorm(chan, eps=NORM_EPS)
        self.checkpoint_activations = checkpoint_activations

    def forward(self, x, axis, finish=nn.Identity()):
        """
        Args:
            x (torch.Tensor): Input.
            axis (int): Axis to work along, `INTRA` or `INTER`.
            finish (callable): What is done with the result; its activations, too, are computed
                anew in the backward pass where those of the layers are.

        Shape:
            (batch, chunks, chunk, chan) -> the same, before `finish`.
        """
        # of what records operations, compilation alone takes checkpoints: two traces through one
        # differ, which `torch.jit.trace` refuses, and `torch.func` has no hooks of saved tensors
        may_recompute = torch.compiler.is_compiling() or not is_traced()
        recompute = self.checkpoint_activations and torch.is_grad_enabled() and may_recompute
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced():
            return finish(self._by_parts(x, axis))
        return self._all(x, axis, finish, recompute)

    def _all(self, x, axis, finish=nn.Identity(), recompute=False):
        def last(x, axis):
            return finish(self.norm(self.layers[-1](x, axis)))

        x = x + positions(x, axis)
        for layer in ([*self.layers] * self.n_times)[:-1] + [last]:
            x = checkpoint(layer, x, axis, use_reentrant=False) if recompute else layer(x, axis)
        return x

    def _by_parts(self, x, axis):
        """Some places of the other axis after the others, as many as fit in a CPU's cache."""
        other = INTRA + INTER - axis
        size = max(1, FRAMES_IN_CACHE // (len(x) * x.shape[axis]))
        return torch.cat([self._all(part, axis) for part in x.split(size, dim=other)], dim=other)


def positions(x, axis):
    """Sinusoidal positions along `axis`, computed on the fly, to be added to `x`.

    Channel 2i of place p is sin(p / 10000^(2i/chan)), channel 2i+1 the cosine (Vaswani et al.,
    "Attention is all you need", NeurIPS 2017, section 3.5).

    Args:
        x (torch.Tensor): The signal, with an even number of channels.
        axis (int): `INTRA` or `INTER`.

    Shape:
        (batch, chunks, chunk, chan) -> (1, chunk, chan) or (chunks, 1, chan).
    """
    chan = x.shape[-1]
    place = torch.arange(x.shape[axis], device=x.device, dtype=torch.float32)
    even = torch.arange(0, chan, 2, device=x.device, dtype=torch.float32)
    angle = place[:, None] * torch.exp(even * (-math.log(10000.0) / chan))
    wave = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(x.dtype)
    return wave.unsqueeze(0 if axis == INTRA else 1)
