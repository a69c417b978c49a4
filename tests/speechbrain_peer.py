"""SpeechBrain's SepFormer as its recipe for WSJ0-2mix builds it, and its weights in our names."""

import torch
from speechbrain.lobes.models.dual_path import (
    Decoder,
    Dual_Path_Model,
    Encoder,
    SBTransformerBlock,
)


class SpeechBrainSepformer(torch.nn.Module):
    """(batch, time) -> (batch, n_src, time), in the steps of SpeechBrain's `separate_batch`."""

    def __init__(self, n_src=2, n_repeats=2, n_layers=8, chunk_size=250):
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
            norm="ln",
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


def copy_weights(peer, model):
    """Copies the weights of a `SpeechBrainSepformer` into a `Sepformer` of the same sizes."""
    masknet, masker = peer.masknet, model.masker

    def copy(parameter, value):
        assert parameter.numel() == value.numel()
        parameter.data.copy_(value.reshape(parameter.shape))

    def copy_pair(ours, theirs):
        copy(ours.weight, theirs.weight)
        if ours.bias is not None:
            copy(ours.bias, theirs.bias)

    def copy_stack(ours, theirs):
        for layer, other in zip(ours.layers, theirs.mdl.layers):
            attention = other.self_att.att
            qkv = (layer.attention.query, layer.attention.key, layer.attention.value)
            weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
            for linear, weight, bias in zip(qkv, weights, biases):
                copy(linear.weight, weight)
                copy(linear.bias, bias)
            copy_pair(layer.attention.out, attention.out_proj)
            copy_pair(layer.attention_norm, other.norm1.norm)
            copy_pair(layer.feed_forward.norm, other.norm2.norm)
            copy_pair(layer.feed_forward.widen, other.pos_ffn.ffn[0])
            copy_pair(layer.feed_forward.narrow, other.pos_ffn.ffn[3])
        copy_pair(ours.norm, theirs.mdl.norm.norm)

    copy(model.encoder.filterbank._filters, peer.encoder.conv1d.weight)
    copy(model.decoder.filterbank._filters, peer.decoder.weight)
    copy_pair(masker.norm, masknet.norm)
    copy_pair(masker.bottleneck, masknet.conv1d)
    for i, block in enumerate(masknet.dual_mdl):
        copy_stack(masker.intra[i], block.intra_mdl)
        copy_pair(masker.intra_norm[i], block.intra_norm)
        copy_stack(masker.inter[i], block.inter_mdl)
        copy_pair(masker.inter_norm[i], block.inter_norm)
    copy(masker.prelu.weight, masknet.prelu.weight)
    copy_pair(masker.to_sources, masknet.conv2d)
    masker.to_sources.bias.data.mul_(2)  # theirs is added in each of two overlapping chunks
    copy_pair(masker.value, masknet.output[0])
    copy_pair(masker.gate, masknet.output_gate[0])
    copy_pair(masker.to_mask, masknet.end_conv1x1)
