"""Other separation models of the field, to be measured and trained beside those of this package.

Each has the settings of its toolkit's own recipe for two speakers in clean speech at 8 kHz and is a
module of (batch, time) -> (batch, n_src, time) that can be trained. SpeechBrain is optional.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import UserError


class Peer(NamedTuple):
    """A model of another toolkit.

    Args:
        make (callable): Builds it, of (n_src, sample_rate).
        package (str): The package that it needs.
        recipe (str): Where its settings are from.
    """

    make: Callable
    package: str
    recipe: str


def build_peer(name, n_src=2, sample_rate=8000):
    """An untrained peer.

    Args:
        name (str): One of `PEERS`.
        n_src (int): Number of sources.
        sample_rate (float): Sample rate in Hz. The sizes in samples stay the same.

    Returns:
        torch.nn.Module: With an attribute `sample_rate`.

    Shape:
        (batch, time) -> (batch, n_src, time).

    Raises:
        UserError: If there is no such peer or its package is missing.

    Examples:
        >>> build_peer("conv-tasnet", n_src=3)(torch.randn(2, 4321)).shape
        torch.Size([2, 3, 4321])
    """
    if name not in PEERS:
        raise UserError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    package = PEERS[name].package
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f"{name} needs the package {package}: pip install {package}") from None
    return PEERS[name].make(n_src, sample_rate)


def asteroid_model(name, **sizes):
    """How to build a model of Asteroid: a function of (n_src, sample_rate)."""

    def make(n_src, sample_rate):
        import asteroid

        return asteroid.models.get(name)(n_src, sample_rate=sample_rate, **sizes)

    return make


class SpeechBrainSeparator(torch.nn.Module):
    """Encoder, mask network and decoder of SpeechBrain, in the steps of its `separate_batch`.

    Args:
        masknet (torch.nn.Module): (batch, chan, frames) -> (n_src, batch, chan, frames).
        chan (int): Number of filters.
        sample_rate (float): Sample rate in Hz, for the record.
        one_by_one (bool): Whether the items of a batch go through the mask network by themselves.

    Shape:
        (batch, time) -> (batch, n_src, time).
    """

    def __init__(self, masknet, chan, sample_rate=8000, one_by_one=False):
        super().__init__()
        from speechbrain.lobes.models.dual_path import Decoder, Encoder

        self.sample_rate = sample_rate
        self.one_by_one = one_by_one
        self.encoder = Encoder(kernel_size=16, out_channels=chan)
        self.masknet = masknet
        self.decoder = Decoder(chan, 1, kernel_size=16, stride=8, bias=False)

    def forward(self, mixture):
        encoded = self.encoder(mixture)
        parts = encoded.split(1) if self.one_by_one else [encoded]
        masked = torch.cat([self.masknet(part) for part in parts], dim=1) * encoded
        estimates = torch.stack([self.decoder(source) for source in masked], dim=1)
        return torch.nn.functional.pad(estimates, (0, mixture.shape[1] - estimates.shape[2]))


def speechbrain_sepformer(n_src=2, sample_rate=8000):
    """SepFormer of SpeechBrain."""
    from speechbrain.lobes.models.dual_path import Dual_Path_Model, SBTransformerBlock

    def stack():
        return SBTransformerBlock(
            num_layers=8,
            d_model=256,
            nhead=8,
            d_ffn=1024,
            dropout=0,
            use_positional_encoding=True,
            norm_before=True,
        )

    masknet = Dual_Path_Model(
        in_channels=256,
        out_channels=256,
        intra_model=stack(),
        inter_model=stack(),
        num_layers=2,
        norm="ln",
        K=250,
        num_spks=n_src,
        skip_around_intra=True,
        linear_layer_after_inter_intra=False,
    )
    return SpeechBrainSeparator(masknet, 256, sample_rate)


def speechbrain_re_sepformer(n_src=2, sample_rate=8000):
    """RE-SepFormer of SpeechBrain.

    Its memory runs over the chunks of the whole batch as over one signal, which is right for the
    recipe's batches of one; here the items of a larger batch are kept apart.
    """
    from speechbrain.lobes.models import resepformer

    def stack():
        return resepformer.SBTransformerBlock_wnormandskip(
            num_layers=8,
            d_model=128,
            nhead=8,
            d_ffn=1024,
            dropout=0,
            use_positional_encoding=True,
            norm_before=True,
            use_norm=True,
            use_skip=True,
        )

    masknet = resepformer.ResourceEfficientSeparator(
        input_dim=128,
        num_spk=n_src,
        causal=False,
        unit=256,
        segment_size=150,
        layer=2,
        mem_type="av",
        seg_model=stack(),
        mem_model=stack(),
    )
    return SpeechBrainSeparator(masknet, 128, sample_rate, one_by_one=True)


WSJ0MIX = "SpeechBrain recipes/WSJ0Mix/separation/hparams"

#: The peers by name. What a recipe leaves to the class' defaults is left to them here.
PEERS = {
    "speechbrain-sepformer": Peer(
        speechbrain_sepformer, "speechbrain", f"{WSJ0MIX}/sepformer.yaml"
    ),
    "speechbrain-re-sepformer": Peer(
        speechbrain_re_sepformer, "speechbrain", f"{WSJ0MIX}/resepformer.yaml"
    ),
    "conv-tasnet": Peer(
        asteroid_model("ConvTasNet", mask_act="relu"),
        "asteroid",
        "Asteroid egs/librimix/ConvTasNet (as in egs/wham)",
    ),
    "dprnn": Peer(
        asteroid_model("DPRNNTasNet", kernel_size=16, stride=8, chunk_size=100),
        "asteroid",
        "Asteroid egs/wham/DPRNN, kernel 16 and chunk 100 as its README's results; its conf.yml "
        "has kernel 2, which costs eight times as much",
    ),
    "dptnet": Peer(
        asteroid_model("DPTNet", n_repeats=2, mask_act="sigmoid"),
        "asteroid",
        "Asteroid egs/wham/DPTNet, 2 repeats where the paper has 6",
    ),
    "sudormrf": Peer(
        asteroid_model("SuDORMRFImprovedNet", kernel_size=21, stride=10),
        "asteroid",
        "Asteroid egs/librimix/SuDORMRFImprovedNet, kernel 21 in place of 41 since 8 kHz in place "
        "of 16 kHz",
    ),
}
