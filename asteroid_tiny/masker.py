"""The dual-path masker: from an encoded mixture to one mask a source.

    norm, linear -> overlapping chunks
      -> n_repeats x [intra stack, norm, skip -> inter stack, norm, skip]
      -> PReLU -> overlap-add -> linear to n_src signals -> tanh x sigmoid gate -> linear -> mask

This is SepFormer's masking network (C. Subakan et al., ICASSP 2021, section 2.2), which
Tiny-Sepformer keeps around its own layers. One thing is turned round: SepFormer widens the chunks
to `n_src` signals and then overlap-adds; both are linear, so overlap-add comes first here and the
widening costs half.
"""

import torch
from asteroid.masknn import activations
from asteroid.utils import has_arg
from torch import nn
from torch.nn import functional as F

from .layers import INTER, INTRA, LayerStack
from .linear import Linear, is_traced

NORM_EPS = 1e-8


class MaskerNorm(nn.Module):
    """Normalises each item over all its frames and channels ("gLN"), or each frame ("cLN").

    Args:
        chan (int): Number of channels, the last dimension.
        norm_type (str): "gLN" or "cLN".

    Raises:
        ValueError: If it is neither.

    Shape:
        (batch, .., chan) -> the same.
    """

    def __init__(self, chan, norm_type="gLN"):
        super().__init__()
        if norm_type not in ("gLN", "cLN"):
            raise ValueError(f"norm_type must be 'gLN' or 'cLN', not {norm_type!r}")
        self.norm_type = norm_type
        self.weight = nn.Parameter(torch.ones(chan))
        self.bias = nn.Parameter(torch.zeros(chan))

    def forward(self, x):
        if self.norm_type == "cLN":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, NORM_EPS)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not is_traced():
            # several times as fast as the variance over a long signal, which does without vectors
            y = F.layer_norm(x, x.shape[1:], eps=NORM_EPS)
            return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))
        # one scale and shift an item and channel, so that x alone is kept for the backward pass
        wide = x.float() if x.dtype == torch.float16 else x  # where NORM_EPS would be 0
        var, mean = torch.var_mean(wide.flatten(1), dim=1, correction=0)
        ones = (-1,) + (1,) * (x.ndim - 1)
        # not rsqrt(var + NORM_EPS): ONNX's exporter takes an addend of 1e-8 for nothing
        inverse_std = (var / NORM_EPS + 1).rsqrt() / NORM_EPS**0.5
        scale = inverse_std.reshape(ones) * self.weight
        return (wide * scale + (self.bias - mean.reshape(ones) * scale)).to(x.dtype)


class DualPathMasker(nn.Module):
    """Estimates one mask a source from an encoded mixture.

    Args:
        in_chan (int): Channels of the encoded mixture.
        n_src (int): Number of sources, at least 1.
        make_layer (callable): Makes one layer of the stacks; takes (.., axis), see `layers`.
        bn_chan (int): Channels inside the masker, even.
        chunk_size (int): Frames in a chunk.
        hop_size (int, optional): Frames from one chunk to the next; divides `chunk_size`, of
            which it is half by default.
        n_repeats (int): How often the pair of intra and inter stack is repeated.
        n_intra_layers (int): Layers applied in each intra stack.
        n_inter_layers (int): Layers applied in each inter stack.
        share_layers (bool): Whether the layers of one stack share their parameters.
        norm_type (str): ``"gLN"`` or ``"cLN"``, Asteroid's names.
        mask_act (str): Activation of the masks, by Asteroid's names; a softmax is over the sources,
            None is none.
        checkpoint_activations (bool): See `LayerStack`.

    Shape:
        (batch, in_chan, frames) -> (batch, n_src, in_chan, frames), for any number of frames.
    """

    def __init__(
        self,
        in_chan,
        n_src,
        make_layer,
        bn_chan=256,
        chunk_size=250,
        hop_size=None,
        n_repeats=2,
        n_intra_layers=8,
        n_inter_layers=8,
        share_layers=False,
        norm_type="gLN",
        mask_act="relu",
        checkpoint_activations=False,
    ):
        super().__init__()
        half = ", half of it by default" if hop_size is None else ""
        hop_size = chunk_size // 2 if hop_size is None else hop_size
        if hop_size < 1 or chunk_size % hop_size:
            raise ValueError(f"hop_size ({hop_size}{half}) must divide chunk_size ({chunk_size})")
        if bn_chan % 2:
            raise ValueError(f"bn_chan must be even, not {bn_chan}")
        if n_src < 1:
            raise ValueError(f"n_src must be at least 1, not {n_src}")
        self.n_src = n_src
        self.chunk_size = chunk_size
        self.hop_size = hop_size
        self.checkpoint_activations = checkpoint_activations

        def norm(chan):
            return MaskerNorm(chan, norm_type)

        def stack(n_layers):
            return LayerStack(make_layer, n_layers, bn_chan, share_layers, checkpoint_activations)

        self.norm = norm(in_chan)
        self.bottleneck = Linear(in_chan, bn_chan, bias=False)
        self.intra = nn.ModuleList(stack(n_intra_layers) for _ in range(n_repeats))
        self.intra_norm = nn.ModuleList(norm(bn_chan) for _ in range(n_repeats))
        self.inter = nn.ModuleList(stack(n_inter_layers) for _ in range(n_repeats))
        self.inter_norm = nn.ModuleList(norm(bn_chan) for _ in range(n_repeats))
        self.prelu = nn.PReLU()
        self.to_sources = Linear(bn_chan, n_src * bn_chan)
        self.value = Linear(bn_chan, bn_chan)
        self.gate = Linear(bn_chan, bn_chan)
        self.to_mask = Linear(bn_chan, in_chan, bias=False)
        mask_act = activations.get(mask_act or "linear")
        self.mask_act = mask_act(dim=1) if has_arg(mask_act, "dim") else mask_act()

    def forward(self, mixture):
        """
        Args:
            mixture (torch.Tensor): Encoded mixture, (batch, in_chan, frames).

        Returns:
            torch.Tensor: Masks, (batch, n_src, in_chan, frames).
        """
        x = self.bottleneck(self.norm(mixture.transpose(1, 2)))
        chunks = split_chunks(x, self.chunk_size, self.hop_size)
        stages = zip(self.intra, self.intra_norm, self.inter, self.inter_norm)
        for intra, intra_norm, inter, inter_norm in stages:
            chunks = chunks + intra(chunks, INTRA, intra_norm)
            chunks = chunks + inter(chunks, INTER, inter_norm)
        x = join_chunks(self.prelu(chunks), x.shape[1], self.hop_size)
        x = self.to_sources(x).unflatten(-1, (self.n_src, -1))
        x = torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x))
        return self.mask_act(self.to_mask(x).permute(0, 2, 3, 1))


def split_chunks(x, chunk_size, hop_size):
    """Cuts a signal into overlapping chunks, padded with zeros so that all frames count alike.

    Every frame of `x` lies in exactly chunk_size / hop_size chunks. No branch depends on the
    length, so that the function can be traced and exported.

    Args:
        x (torch.Tensor): Signal, (batch, frames, chan).
        chunk_size (int): Frames in a chunk.
        hop_size (int): Frames between the starts of two chunks; divides `chunk_size`.

    Returns:
        torch.Tensor: Chunks, (batch, chunks, chunk_size, chan).

    Examples:
        >>> split_chunks(torch.arange(1., 5.).reshape(1, 4, 1), 4, 2).squeeze()
        tensor([[0., 0., 1., 2.],
                [1., 2., 3., 4.],
                [3., 4., 0., 0.],
                [0., 0., 0., 0.]])
    """
    batch, n_frames, chan = x.shape
    n_hops, lead = chunk_size // hop_size, chunk_size - hop_size
    n_chunks = ((n_frames + lead) // chunk_size + 1) * n_hops
    n_parts = n_chunks + n_hops - 1
    x = F.pad(x, (0, 0, lead, n_parts * hop_size - lead - n_frames))
    x = x.reshape(batch, n_parts, hop_size, chan)
    return torch.cat([x[:, i : i + n_chunks] for i in range(n_hops)], dim=2)


def join_chunks(chunks, n_frames, hop_size):
    """Overlap-adds chunks by padding and adding slices; undoes `split_chunks` up to a factor.

    Args:
        chunks (torch.Tensor): Chunks, (batch, chunks, chunk_size, chan).
        n_frames (int): Frames of the signal that was split.
        hop_size (int): Frames between the starts of two chunks.

    Returns:
        torch.Tensor: Signal, (batch, n_frames, chan): each frame is the sum, not the mean, of the
        chunk_size / hop_size chunks that it lies in.

    Examples:
        >>> x = torch.randn(2, 31, 3)
        >>> torch.allclose(join_chunks(split_chunks(x, 8, 2), 31, 2), 4 * x)
        True
    """
    n_hops = chunks.shape[2] // hop_size
    parts = chunks.unflatten(2, (n_hops, hop_size)).unbind(2)
    x = sum(F.pad(part, (0, 0, 0, 0, i, n_hops - 1 - i)) for i, part in enumerate(parts))
    lead = (n_hops - 1) * hop_size
    return x.flatten(1, 2)[:, lead : lead + n_frames]
