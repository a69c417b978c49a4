"""SpeechBrain's SepFormer: in one module, and as the folders that it publishes."""

import torch
from hyperpyyaml import load_hyperpyyaml
from small import shaken
from speechbrain.lobes.models.dual_path import (
    Decoder,
    Dual_Path_Model,
    Encoder,
    SBTransformerBlock,
)


class SpeechBrainSepformer(torch.nn.Module):
    """(batch, time) -> (batch, n_src, time), in the steps of SpeechBrain's `separate_batch`."""

    def __init__(self, n_src=2, n_repeats=2, n_layers=8, chunk_size=250, norm="ln"):
        super().__init__()

        def stack():
            return SBTransformerBlock(
                num_layers=n_layers,
                d_model=256,
                nhead=8,
                d_ffn=1024,
                dropout=0,
                use_positional_encoding=True,
                norm_before=True,
            )

        self.n_src = n_src
        self.encoder = Encoder(kernel_size=16, out_channels=256)
        self.masknet = Dual_Path_Model(
            in_channels=256,
            out_channels=256,
            intra_model=stack(),
            inter_model=stack(),
            num_layers=n_repeats,
            norm=norm,
            K=chunk_size,
            num_spks=n_src,
            skip_around_intra=True,
            linear_layer_after_inter_intra=False,
        )
        self.decoder = Decoder(256, 1, kernel_size=16, stride=8, bias=False)

    def forward(self, mixture):
        encoded = self.encoder(mixture)
        masked = self.masknet(encoded) * encoded
        estimates = torch.stack([self.decoder(source) for source in masked], dim=1)
        return torch.nn.functional.pad(estimates, (0, mixture.shape[1] - estimates.shape[2]))


#: The layout of hyperparams.yaml in speechbrain/sepformer-wsj02mix and its sisters.
HYPERPARAMS = """\
sample_rate: 8000
num_spks: 2

Encoder: !new:speechbrain.lobes.models.dual_path.Encoder
  kernel_size: 16
  out_channels: 256

SBtfintra: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
  num_layers: 8
  d_model: 256
  nhead: 8
  d_ffn: 1024
  dropout: 0
  use_positional_encoding: true
  norm_before: true

SBtfinter: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
  num_layers: 8
  d_model: 256
  nhead: 8
  d_ffn: 1024
  dropout: 0
  use_positional_encoding: true
  norm_before: true

MaskNet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
  num_spks: !ref <num_spks>
  in_channels: 256
  out_channels: 256
  num_layers: 2
  K: 250
  intra_model: !ref <SBtfintra>
  inter_model: !ref <SBtfinter>
  norm: ln
  linear_layer_after_inter_intra: false
  skip_around_intra: true

Decoder: !new:speechbrain.lobes.models.dual_path.Decoder
  in_channels: 256
  out_channels: 1
  kernel_size: 16
  stride: 8
  bias: false

modules:
  encoder: !ref <Encoder>
  decoder: !ref <Decoder>
  masknet: !ref <MaskNet>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables:
    encoder: !ref <Encoder>
    masknet: !ref <MaskNet>
    decoder: !ref <Decoder>
"""


def write_folder(folder, **changes):
    """A folder as SpeechBrain publishes it, written by its own classes with random weights.

    Args:
        folder (Path): Where to; it is made.
        **changes: Other values of the keys of `HYPERPARAMS`, wherever they stand.
    """
    text = HYPERPARAMS
    for key, value in changes.items():
        assert f"{key}: " in text
        text = "".join(
            f"{line.partition(key)[0]}{key}: {value}\n"
            if line.strip().startswith(f"{key}: ") and "<" not in line
            else line
            for line in text.splitlines(keepends=True)
        )
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text)
    for name, module in load_hyperpyyaml(text)["modules"].items():
        torch.save(shaken(module).state_dict(), folder / f"{name}.ckpt")
    return folder
