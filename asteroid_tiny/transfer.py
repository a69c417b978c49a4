"""Weights of one model for the start of another: of other sources, rate, stride or sharing; and the
mean of several."""

import re

import asteroid_filterbanks
import torch
from scipy.signal import resample_poly

from .errors import UserError

ENCODER, DECODER = "encoder.filterbank._filters", "decoder.filterbank._filters"
TO_MASK = "masker.to_mask.weight"
#: What no shape shows, of shared layers their number.
MEANINGS = "n_heads n_intra_layers n_inter_layers norm_type encoder_activation mask_act".split()


def copy_weights(model, name_or_path):
    """Gives a model the weights of another of the same sizes, to go on from there.

    From a model of another number of sources all weights come but those of the one layer that makes
    a signal for each source, which stay as they are. From one of a lower sample rate whose filters
    and hops last as long, they come by `raise_rate`. From one of another hop learned filters of the
    decoder are scaled, since more or fewer frames sum to the signal. From a model that shares its
    layers to one that does not, each layer of a stack gets those of the shared one; both compute
    the same.

    Raises:
        UserError: If there is no such model, it has other sizes or another rate than that, or
            weights of the same sizes mean something else in it (`MEANINGS`).
    """
    other = type(model).from_pretrained(name_or_path)
    args, other_args = model.get_model_args(), other.get_model_args()
    weights, own = other.state_dict(), model.state_dict()
    if other.masker.n_src != model.masker.n_src:
        weights.update({key: own[key] for key in own if key.startswith("masker.to_sources.")})
    if other.sample_rate != model.sample_rate:
        if not _lasts_as_long(model, other):
            ratio, filters = model.sample_rate / other.sample_rate, other.encoder.filterbank
            sizes = " ".join(
                f"--{name} {ratio * getattr(filters, name):g}"
                for name in ("n_filters", "kernel_size", "stride")
            )
            hint = f"; it wants filters as long as its own: {sizes}" if ratio > 1 else ""
            raise UserError(
                f"--init_from {name_or_path} is a model for {other.sample_rate:g} Hz, not for "
                f"{model.sample_rate:g} Hz{hint}"
            )
        weights = raise_rate(weights, own, round(model.sample_rate), round(other.sample_rate))
    elif model.decoder.stride != other.decoder.stride and DECODER in weights:
        weights[DECODER] = weights[DECODER] * (model.decoder.stride / other.decoder.stride)
    if other_args["share_layers"] and not args["share_layers"]:
        shared = {key: re.sub(r"\.layers\.\d+\.", ".layers.0.", key) for key in own}
        weights = {key: weights[shared[key]] for key in own if shared[key] in weights}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"--init_from {name_or_path} has other sizes than this run's model; give its preset "
            "as an option"
        ) from None
    for name in MEANINGS:
        if args[name] != other_args[name]:
            raise UserError(
                f"--init_from {name_or_path} is a model with {name} {other_args[name]}, not "
                f"{args[name]}"
            )


def _lasts_as_long(model, other):
    """Whether a frame lasts as long in a model of free filters as in another of a lower rate."""
    ratio = model.sample_rate / other.sample_rate
    filters, others = model.encoder.filterbank, other.encoder.filterbank
    return (
        ratio > 1
        and all(isinstance(bank, asteroid_filterbanks.FreeFB) for bank in (filters, others))
        and filters.kernel_size == ratio * others.kernel_size
        and filters.stride == ratio * others.stride
        and len(filters._filters) >= len(others._filters)
        and len(filters._filters) % 2 == len(others._filters) % 2 == 0
    )


def raise_rate(weights, own, sample_rate, old_rate):
    """Weights of a model for a higher sample rate, which does in the old band what the model did.

    The filters are interpolated. Where the new model has more of them, these stay as they are,
    count for nothing at first in what the masker reads, and get the mean mask of the upper quarter
    of the old ones. Filters are taken to be in the order of `filterbanks.sinusoid_pairs`, by
    frequency and then the same with opposite sign, so that the new ones are of the upper band.

    Args:
        weights (dict): `state_dict` of the old model.
        own (dict): Of the new model, with filters that last as long as the old ones.
        sample_rate, old_rate (int): Of the new and the old model, in Hz.

    Returns:
        dict: `state_dict` for the new model.
    """
    n, n_old = len(own[ENCODER]), len(weights[ENCODER])
    kept = torch.cat([torch.arange(n_old // 2), torch.arange(n_old // 2) + n // 2])
    raised = dict(weights)
    for key, gain in ((ENCODER, old_rate / sample_rate), (DECODER, 1.0)):
        filters = resample_poly(weights[key].double().numpy(), sample_rate, old_rate, axis=-1)
        raised[key] = own[key].clone()
        raised[key][kept] = gain * torch.from_numpy(filters).float()
    for key in ("masker.norm.weight", "masker.norm.bias"):
        raised[key] = own[key].clone()
        raised[key][kept] = weights[key]
    read = weights["masker.bottleneck.weight"]
    raised["masker.bottleneck.weight"] = read.new_zeros(len(read), n)
    raised["masker.bottleneck.weight"][:, kept] = read
    rows = weights[TO_MASK].unflatten(0, (2, -1))  # of the filters and of their opposites
    upper = rows[:, -max(1, n_old // 8) :].mean(1, keepdim=True)
    raised[TO_MASK] = torch.cat([rows, upper.expand(-1, (n - n_old) // 2, -1)], 1).flatten(0, 1)
    return raised


def average(models):
    """The model whose weights are the means of those of others.

    Trainings that went on from the same weights with different mixtures may be averaged so, and
    the outcome has much of the strength of each (M. Wortsman et al., "Model soups", ICML 2022).

    Args:
        models (iterable of Sepformer or TinySepformer): At least one, all of the same arguments.

    Returns:
        Sepformer or TinySepformer: A new model, in eval mode.

    Raises:
        UserError: If there is none, or they are not of one class and of the same arguments.

    Examples:
        >>> from asteroid_tiny import TinySepformer
        >>> model = TinySepformer.from_preset("tiny-sepformer-xs")
        >>> mean = average([model, model])
        >>> torch.equal(mean.encoder.filterbank.filters(), model.encoder.filterbank.filters())
        True
    """
    models = list(models)
    if not models:
        raise UserError("there are no models to average")
    first, *others = models
    args = first.get_model_args()
    of_training = {key: args[key] for key in ("dropout", "checkpoint_activations")}
    theirs = [m.get_model_args() | of_training for m in others]
    if not all(type(m) is type(first) for m in others) or not all(_alike(x, args) for x in theirs):
        raise UserError("models of different classes or arguments cannot be averaged")
    mean = type(first)(**args).to(next(first.parameters()).dtype).eval()
    states = [m.state_dict() for m in models]
    mean.load_state_dict({k: sum(s[k] for s in states) / len(states) for k in states[0]})
    return mean


def _alike(args, others):
    """Whether arguments of models, of which a window may be a tensor, are the same."""
    if not isinstance(args, dict) or not isinstance(others, dict):
        tensors = [isinstance(x, torch.Tensor) for x in (args, others)]
        return torch.equal(args, others) if all(tensors) else not any(tensors) and args == others
    return args.keys() == others.keys() and all(_alike(args[key], others[key]) for key in args)
