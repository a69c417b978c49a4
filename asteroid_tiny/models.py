"""Tiny-Sepformer and its baseline SepFormer, as models of Asteroid.

Both are an Asteroid filterbank around a `DualPathMasker`; they differ in the layers of its stacks.
`PRESETS` holds the sizes that have a name.
"""

import functools

import asteroid
import numpy as np
import torch
from asteroid.models.base_models import BaseEncoderMaskerDecoder
from torch.nn import functional as F

from . import speechbrain
from .errors import UserError
from .filterbanks import build_filterbank
from .hub import locate
from .layers import ConvAttentionLayer, TransformerLayer
from .linear import is_traced
from .masker import DualPathMasker
from .separable import Separable
from .weights import build, check_numbers, from_dict, open_stored, save_whole, write_pair


class _DualPathModel(Separable, BaseEncoderMaskerDecoder):
    """What the two models have in common: filterbank, masker, presets, arguments that round-trip.

    Args:
        args (dict): The arguments of the subclass' constructor, without `self`.
        make_layer (callable): Makes one layer of the masker.
    """

    def __init__(self, args, make_layer):
        fb_kwargs = {key: _plain(value) for key, value in args.pop("fb_kwargs").items()}
        if args["stride"] is None:
            args["stride"] = args["kernel_size"] // 2
        check_numbers(args)
        encoder, decoder = build_filterbank(
            args["fb_name"],
            args["n_filters"],
            args["kernel_size"],
            args["stride"],
            args["sample_rate"],
            args["fb_init"],
            **fb_kwargs,
        )
        masker = DualPathMasker(
            encoder.n_feats_out,
            args["n_src"],
            make_layer,
            bn_chan=args["bn_chan"],
            chunk_size=args["chunk_size"],
            hop_size=args["hop_size"],
            n_repeats=args["n_repeats"],
            n_intra_layers=args["n_intra_layers"],
            n_inter_layers=args["n_inter_layers"],
            share_layers=args["share_layers"],
            norm_type=args["norm_type"],
            mask_act=args["mask_act"],
            checkpoint_activations=args["checkpoint_activations"],
        )
        super().__init__(encoder, masker, decoder, args["encoder_activation"])
        fb_name = getattr(args["fb_name"], "__name__", args["fb_name"])  # a class by its name
        self._model_args = {**args, **fb_kwargs, "fb_name": fb_name}

    @property
    def n_src(self):
        """Number of sources (int)."""
        return self.masker.n_src

    @classmethod
    def from_preset(cls, name, n_src=2, sample_rate=8000, **overrides):
        """An untrained model of a size that has a name.

        Args:
            name (str): One of `PRESETS` that belongs to this class.
            n_src (int): Number of sources.
            sample_rate (float): Sample rate in Hz. The sizes in samples stay the same.
            **overrides: Any argument of the constructor.

        Raises:
            UserError: If there is no such preset, or it is of the other class.

        Examples:
            >>> model = TinySepformer.from_preset("tiny-sepformer-xs", n_src=3, sample_rate=16000)
            >>> model.sample_rate, model.masker.n_src
            (16000, 3)
        """
        if name not in PRESETS:
            raise UserError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        model_class, sizes = PRESETS[name]
        if issubclass(cls, model_class):
            model_class = cls
        elif not issubclass(model_class, cls):
            raise UserError(f"preset {name!r} is of {model_class.__name__}, not of {cls.__name__}")
        return model_class(**{**sizes, "n_src": n_src, "sample_rate": sample_rate, **overrides})

    def forward(self, wav):
        if not is_traced() and wav.ndim > 1 and not len(wav):  # Asteroid's decoders take none
            return wav.new_zeros(0, self.n_src, wav.shape[-1])
        return super().forward(wav)

    def forward_encoder(self, wav):
        """Encodes a mixture; one shorter than the filters is padded with zeros to their length.

        Args:
            wav (torch.Tensor): Mixture, (batch, 1, time), of at least one sample.

        Returns:
            torch.Tensor: Encoded mixture, (batch, filters, frames).

        Raises:
            UserError: If the mixture has more than one channel.
        """
        if not is_traced() and wav.shape[1] != 1:
            raise UserError(
                f"a mixture has one channel, not {wav.shape[1]}: its shape is (time,), "
                "(batch, time) or (batch, 1, time)"
            )
        # not `is_exporting()`, which is true in compiled code, too, that serves any length
        if torch.compiler._is_exporting_flag:  # the length is at least that of the filters
            return super().forward_encoder(wav)
        short = self.encoder.filterbank.kernel_size - wav.shape[-1]
        # max(short, 0) without a branch, so that a traced model serves other lengths
        return super().forward_encoder(F.pad(wav, (0, (short + abs(short)) // 2)))

    def get_model_args(self):
        """Arguments that build the same model again (dict)."""
        return dict(self._model_args)

    def serialize(self):
        """The model as a dictionary of plain data and tensors, as Asteroid stores models."""
        conf = super().serialize()
        versions = conf["infos"]["software_versions"]  # torch's is an object of its own class
        conf["infos"]["software_versions"] = {name: str(v) for name, v in versions.items()}
        return conf

    def save(self, path, **about):
        """Writes `serialize()` to a file, whole or not at all.

        Args:
            path (str or Path): The file, by custom ``*.pth``.
            **about: What else its infos shall tell: plain data, such as `licence`.

        Raises:
            UserError: If the file cannot be written, its name is one of another format, or an
                argument is of a kind that could not be read again, such as a class.
        """
        if str(path).endswith((".safetensors", ".onnx")):
            raise UserError(f"{path}: save writes Asteroid's format; name the file *.pth")
        for name, value in self._model_args.items():
            if not isinstance(value, (str, int, float, list, tuple, torch.Tensor, type(None))):
                raise UserError(
                    f"a model whose {name} is a {type(value).__name__} cannot be stored"
                )
        conf = self.serialize()
        conf["infos"] |= about
        save_whole(conf, path)

    def save_pretrained(self, folder, half=False, **about):
        """Writes the model as `model.safetensors` and `config.json`, for `from_pretrained`.

        Args:
            folder (str or Path): Where to; it is made if there is none, other files there stay.
            half (bool): Whether weights are stored in 16 bits; they are read as 32 again.
            **about: What else config.json shall tell: plain data, such as `metrics`.

        Returns:
            dict: The content of config.json.

        Raises:
            UserError: If the files cannot be written.
        """
        return write_pair(folder, self.serialize(), about, half)

    @classmethod
    def from_pretrained(cls, name_or_path, **overrides):
        """A model with stored weights, wherever they are, in eval mode; nothing in them is run.

        Args:
            name_or_path (str, Path or dict): What `serialize` returned, or one of these, tried in
                this order: a file that `save` wrote, or a folder of `save_pretrained`; a name of
                `asteroid_tiny.list_models`; a URL, with ``#sha256=...`` behind it to have the
                content checked; a model on the Hugging Face hub, ``user/repo`` or
                ``user/repo@revision``.
            **overrides: Arguments of the constructor that differ from the stored ones.

        Raises:
            UserError: If there is no such model, or it is damaged, unsafe, of another class, or
                of another sample rate than asked for.

        Examples:
            >>> model = TinySepformer.from_preset("tiny-sepformer-xs")
            >>> twin = TinySepformer.from_pretrained(model.serialize())
        """
        if isinstance(name_or_path, dict):
            stored = from_dict(name_or_path, "the dictionary")
        else:
            stored = open_stored(locate(name_or_path))
        bases = [c for c in cls.__mro__ if issubclass(c, _DualPathModel)]
        classes = {c.__name__: c for c in _subclasses(cls)} | {c.__name__: cls for c in bases}
        classes.pop(_DualPathModel.__name__)
        overrides = {name: _plain(value) for name, value in overrides.items()}
        return build(stored, classes, **overrides).eval()


class Sepformer(_DualPathModel):
    """SepFormer (C. Subakan et al., "Attention is all you need in speech separation", ICASSP 2021).

    The defaults are the paper's sizes with a feed-forward network of 1024 (SpeechBrain's recipe
    for WSJ0-2mix), preset ``"sepformer"``.

    Args:
        n_src (int): Number of sources.
        fb_name (str): Filterbank family, as `asteroid_filterbanks.make_enc_dec` takes it.
        n_filters (int): Number of filters.
        kernel_size (int): Length of the filters in samples.
        stride (int, optional): Hop of the filters in samples; half of `kernel_size` if None.
        fb_init (str): Start of the filters, ``"random"`` or, for ``"free"`` ones with a hop of half
            their length, ``"sinusoids"`` (`filterbanks.sinusoid_pairs`).
        encoder_activation (str): Activation after the encoder, by Asteroid's names.
        bn_chan (int): Channels inside the masker, D.
        chunk_size (int): Frames in a chunk.
        hop_size (int, optional): Frames between chunks; half of `chunk_size` by default.
        n_repeats (int): Repetitions of the pair of intra and inter stack.
        n_intra_layers (int): Layers applied in each intra stack.
        n_inter_layers (int): Layers applied in each inter stack.
        n_heads (int): Attention heads.
        ff_hid (int): Hidden channels of the feed-forward networks.
        dropout (float): Dropout in [0, 1).
        share_layers (bool): Whether the layers of one stack share their parameters.
        norm_type (str): ``"gLN"`` or ``"cLN"``, after the stacks.
        mask_act (str): Activation of the masks, by Asteroid's names; a softmax is over the sources,
            None is none.
        checkpoint_activations (bool): Trades a third more training time for several times less
            training memory; results stay the same.
        sample_rate (float): Sample rate in Hz.
        **fb_kwargs: Further arguments of the filterbank.

    Shape:
        (time,), (batch, time) or (batch, 1, time) -> (n_src, time) or (batch, n_src, time), for
        any number of samples from one on.

    Raises:
        ValueError: If a size does not fit the others.

    Examples:
        >>> import torch
        >>> model = Sepformer(n_src=2, n_repeats=1, n_intra_layers=1, n_inter_layers=1)
        >>> model(torch.randn(1, 4321)).shape
        torch.Size([1, 2, 4321])
    """

    def __init__(
        self,
        n_src,
        fb_name="free",
        n_filters=256,
        kernel_size=16,
        stride=8,
        fb_init="random",
        encoder_activation="relu",
        bn_chan=256,
        chunk_size=250,
        hop_size=None,
        n_repeats=2,
        n_intra_layers=8,
        n_inter_layers=8,
        n_heads=8,
        ff_hid=1024,
        dropout=0.0,
        share_layers=False,
        norm_type="gLN",
        mask_act="relu",
        checkpoint_activations=False,
        sample_rate=8000,
        **fb_kwargs,
    ):
        make_layer = functools.partial(TransformerLayer, bn_chan, n_heads, ff_hid, dropout=dropout)
        super().__init__(_arguments(locals()), make_layer)

    @classmethod
    def from_speechbrain(cls, source):
        """A SepFormer that was trained with SpeechBrain; nothing in its files is run.

        Args:
            source (str or Path): A folder, or a model on the Hugging Face hub, such as
                ``speechbrain/sepformer-wsj02mix`` or ``user/repo@revision``.

        Raises:
            UserError: If there is no such model, it is damaged, or of another kind.
        """
        stored = from_dict(speechbrain.read(source), str(source))
        return build(stored, {cls.__name__: cls})


class TinySepformer(_DualPathModel):
    """Tiny-Sepformer (J. Luo et al., "Tiny-Sepformer: a tiny time-domain Transformer network for
    speech separation", Interspeech 2022).

    SepFormer's skeleton with the paper's two ideas: Convolution-Attention layers, in which the
    channels are split between attention and a depthwise separable convolution
    (`layers.ConvAttentionLayer` has the equations), and parameters shared by the layers of each
    stack. The defaults are the paper's smaller model, preset ``"tiny-sepformer-s"``.

    What the paper leaves open, and what is chosen here:

    - *Sizes.* D = 256 with D_a = D_c = 128, feed-forward 1024, 8 heads is the only split that
      gives both published parameter counts (20.0 M and 5.3 M).
    - *Convolution kernel.* Any odd size from 3 to 33 fits those counts; 15 is the default. In a
      short comparison of the smallest preset 3, 15 and 31 came out alike (README, "The two ideas").
    - *Norms.* Each path normalises its sum, in the form of an independent re-implementation;
      ``path_norm=False`` gives the plain pre-norm layer, 0.09 dB behind in that comparison and
      an eighth cheaper, for which ``"tiny-sepformer-xs"`` has it.
    - *Positions* are added once a stack, and norms and skips stand around the stacks, as in
      SepFormer.

    Args:
        attn_chan (int, optional): Channels that attention reads, D_a; half of `bn_chan` by
            default. ``attn_chan=bn_chan`` leaves the convolution path out.
        conv_kernel_size (int): Length of the depthwise convolution, odd.
        path_norm (bool): Whether each path normalises its sum.
        share_layers (bool): Whether the layers of one stack share their parameters.

    The other arguments, the shapes and the errors are those of `Sepformer`.

    Examples:
        >>> model = TinySepformer.from_preset("tiny-sepformer-s", n_src=2, sample_rate=8000)
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        5.3
    """

    def __init__(
        self,
        n_src,
        fb_name="free",
        n_filters=256,
        kernel_size=16,
        stride=8,
        fb_init="random",
        encoder_activation="relu",
        bn_chan=256,
        attn_chan=None,
        conv_kernel_size=15,
        path_norm=True,
        chunk_size=250,
        hop_size=None,
        n_repeats=4,
        n_intra_layers=4,
        n_inter_layers=4,
        n_heads=8,
        ff_hid=1024,
        dropout=0.0,
        share_layers=True,
        norm_type="gLN",
        mask_act="relu",
        checkpoint_activations=False,
        sample_rate=8000,
        **fb_kwargs,
    ):
        make_layer = functools.partial(
            ConvAttentionLayer,
            bn_chan,
            n_heads,
            ff_hid,
            attn_chan=attn_chan,
            conv_kernel_size=conv_kernel_size,
            path_norm=path_norm,
            dropout=dropout,
        )
        super().__init__(_arguments(locals()), make_layer)


def _subclasses(cls):
    """All classes that are derived from one, however remotely."""
    return [c for child in cls.__subclasses__() for c in (child, *_subclasses(child))]


def _plain(value):
    """NumPy's numbers as Python's, which can be stored."""
    return value.item() if isinstance(value, np.generic) else value


def _arguments(local_variables):
    """The arguments of a constructor, from its `locals()`."""
    return {
        key: _plain(value)
        for key, value in local_variables.items()
        if key not in ("self", "__class__", "make_layer")
    }


#: Sizes that have a name: the class and the arguments that differ from its defaults.
PRESETS = {
    "sepformer": (Sepformer, {}),
    "tiny-sepformer": (
        TinySepformer,
        dict(n_repeats=2, n_intra_layers=8, n_inter_layers=8, share_layers=False),
    ),
    "tiny-sepformer-s": (TinySepformer, {}),
    "tiny-sepformer-xs": (
        TinySepformer,
        dict(
            n_filters=128,
            kernel_size=64,
            stride=32,
            fb_init="sinusoids",
            bn_chan=128,
            path_norm=False,
            chunk_size=128,  # half a second: few chunks to attend across in long recordings
            n_repeats=2,
            n_intra_layers=4,
            n_inter_layers=4,
            n_heads=4,
            ff_hid=256,
        ),
    ),
}

for _model in (Sepformer, TinySepformer):
    _known = getattr(asteroid.models, _model.__name__, None)
    if getattr(_known, "__module__", None) == __name__:  # this module is being reloaded
        delattr(asteroid.models, _model.__name__)
    asteroid.models.register_model(_model)


def from_pretrained(name_or_path, **overrides):
    """As `TinySepformer.from_pretrained`, for a model of either class."""
    return _DualPathModel.from_pretrained(name_or_path, **overrides)
