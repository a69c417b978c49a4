"""SpeechBrain's SepFormer as the folders that SpeechBrain publishes."""

import torch
from hyperpyyaml import load_hyperpyyaml
from small import shaken

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
