"""SpeechBrain's SepFormer models as arguments and weights of `Sepformer`.

A folder or a repository on the hub, as `speechbrain/sepformer-wsj02mix`, holds
``hyperparams.yaml``, whose tags would build Python objects, and the weights ``encoder.ckpt``,
``masknet.ckpt`` and ``decoder.ckpt``. The YAML is read as plain data: no tag is executed, and
``!ref <name>`` is looked up as text. Sizes are taken from the weights themselves, the rest (heads,
chunks, norms) from the YAML.
"""

import re
from pathlib import Path

import yaml

from .errors import UserError
from .hub import HUB_ID, hub_errors
from .weights import MAX_CONFIG, load_weights_only

YAML = "hyperparams.yaml"
PARTS = ("encoder", "masknet", "decoder")
NORMS = {"ln": "gLN", "gln": "gLN", "cln": "cLN"}
#: What a published SepFormer has, and the only thing `Sepformer` can do.
MASKNET = {
    "skip_around_intra": True,
    "linear_layer_after_inter_intra": False,
    "use_global_pos_enc": False,
}
STACK = {
    "activation": "relu",
    "use_positional_encoding": True,
    "norm_before": True,
    "attention_type": "regularMHA",
}
#: SpeechBrain's defaults, where they are not those above.
DEFAULTS = {
    "linear_layer_after_inter_intra": True,
    "use_positional_encoding": False,
    "norm_before": False,
}


def is_speechbrain(source):
    """Whether a name is a folder of SpeechBrain's, or a repository of SpeechBrain's own."""
    return (Path(source) / YAML).is_file() or str(source).startswith("speechbrain/")


def read(source):
    """The arguments and weights for `Sepformer` that a model of SpeechBrain has.

    Args:
        source (str or Path): A folder, or a model on the hub, ``user/repo`` or
            ``user/repo@revision``.

    Returns:
        dict: `model_name`, `model_args` and `state_dict`.

    Raises:
        UserError: If files are missing or damaged, or the model is no SepFormer that fits.
    """
    folder = _locate(source)
    settings = read_yaml(folder / YAML)
    parts = {part: load_weights_only(folder / f"{part}.ckpt", mmap=True) for part in PARTS}
    try:
        args = {**_sizes(**parts), **_settings(settings)}
        state = convert(**parts)
    except UserError as error:
        raise UserError(f"{source} {error}") from None
    except KeyError as error:
        raise UserError(f"{source} lacks {error}, and is no SepFormer that fits") from None
    except Exception as error:  # files of strangers raise anything
        raise UserError(f"{source} is no SepFormer that fits ({type(error).__name__})") from None
    return {"model_name": "Sepformer", "model_args": args, "state_dict": state}


def _locate(source):
    folder, (repo, _, revision) = Path(source), str(source).partition("@")
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{source} is neither a folder nor a model on the hub (user/repo)")
    from huggingface_hub import snapshot_download

    patterns = [YAML, *(f"{part}.ckpt" for part in PARTS)]
    with hub_errors(repo, revision or None):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))


class _Plain(yaml.SafeLoader):
    """Reads any tag as the plain data behind it; ``!new:x.Y`` leaves ``Y`` under the key `!new`."""


def _untag(loader, suffix, node):
    if isinstance(node, yaml.MappingNode):
        name = suffix.rpartition(".")[2] if suffix.startswith("new:") else None
        return {**loader.construct_mapping(node, deep=True), "!new": name}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Plain.add_multi_constructor("!", _untag)


def read_yaml(path):
    """The content of a hyperparams.yaml as plain data, with no tag executed (dict).

    Raises:
        UserError: If it is missing, too large, or no YAML mapping.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise UserError(f"{path} is too large for settings")
        settings = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except OSError:
        raise UserError(f"{path} is missing") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings")
    return settings


def _settings(settings):
    """The arguments that the weights do not show."""

    def look_up(value, depth=0):
        name = re.fullmatch(r"<(\w+)>", value.strip()) if isinstance(value, str) else None
        return look_up(settings[name[1]], depth + 1) if name and depth < 9 else value

    def part(value, kind):
        found = look_up(value)
        if not isinstance(found, dict) or found.get("!new") != kind:
            raise UserError(f"is no SepFormer: its {YAML} has no {kind} where one is needed")
        return {key: look_up(v) if isinstance(v, str) else v for key, v in found.items()}

    def check(found, wanted):
        for key, value in wanted.items():
            has = found.get(key, DEFAULTS.get(key, value))
            if has != value:
                raise UserError(f"does not fit Sepformer: its {key} is {has!r}, not {value!r}")

    masknet = part(settings["modules"]["masknet"], "Dual_Path_Model")
    stacks = [part(masknet[f"{key}_model"], "SBTransformerBlock") for key in ("intra", "inter")]
    check(masknet, MASKNET)
    for stack in stacks:
        check(stack, STACK)
    if stacks[0]["nhead"] != stacks[1]["nhead"]:
        raise UserError("does not fit Sepformer: its two kinds of stacks differ in their heads")
    if masknet.get("norm", "ln") not in NORMS:
        raise UserError(f"does not fit Sepformer: its norm is {masknet['norm']!r}")
    return {
        "n_heads": stacks[0]["nhead"],
        "chunk_size": masknet.get("K", 200),
        "norm_type": NORMS[masknet.get("norm", "ln")],
        "sample_rate": look_up(settings["sample_rate"]),
    }


def _sizes(encoder, masknet, decoder):
    """The arguments that the weights show."""
    n_filters, _, kernel_size = encoder["conv1d.weight"].shape
    bn_chan = masknet["conv1d.weight"].shape[0]

    def count(pattern):
        return len({found[1] for key in masknet if (found := re.match(pattern, key))})

    return {
        "n_src": masknet["conv2d.weight"].shape[0] // bn_chan,
        "n_filters": n_filters,
        "kernel_size": kernel_size,
        "stride": kernel_size // 2,  # SpeechBrain's encoder has no other
        "bn_chan": bn_chan,
        "n_repeats": count(r"dual_mdl\.(\d+)\."),
        "n_intra_layers": count(r"dual_mdl\.0\.intra_mdl\.mdl\.layers\.(\d+)\."),
        "n_inter_layers": count(r"dual_mdl\.0\.inter_mdl\.mdl\.layers\.(\d+)\."),
        "ff_hid": masknet["dual_mdl.0.intra_mdl.mdl.layers.0.pos_ffn.ffn.0.weight"].shape[0],
    }


#: Modules, ours and theirs.
MASKER = {
    "norm": "norm",
    "bottleneck": "conv1d",
    "prelu": "prelu",
    "to_sources": "conv2d",
    "value": "output.0",
    "gate": "output_gate.0",
    "to_mask": "end_conv1x1",
}
LAYER = {
    "attention.out": "self_att.att.out_proj",
    "attention_norm": "norm1.norm",
    "feed_forward.norm": "norm2.norm",
    "feed_forward.widen": "pos_ffn.ffn.0",
    "feed_forward.narrow": "pos_ffn.ffn.3",
}


def convert(encoder, masknet, decoder):
    """The weights of SpeechBrain's three modules under the names that `Sepformer` has.

    Args:
        encoder, masknet, decoder (dict): Their `state_dict`.

    Returns:
        dict: A `state_dict` for `Sepformer`.

    Raises:
        UserError: If there are weights that it has no place for.
        KeyError: If one lacks.
    """
    left = {key: tensor for key, tensor in masknet.items() if not key.endswith("pos_enc.pe")}
    if len(encoder) + len(decoder) > 2:
        raise UserError("does not fit Sepformer: its encoder or decoder has more than filters")
    state = {
        "encoder.filterbank._filters": encoder["conv1d.weight"],
        "decoder.filterbank._filters": decoder["weight"],
    }
    pairs = dict(MASKER)
    for key in list(left):
        stack = re.match(r"(dual_mdl\.(\d+)\.(intra|inter)_)mdl\.mdl\.(layers\.\d+\.|norm\.)", key)
        if not stack:
            continue
        block, number, axis, inside = stack.groups()
        pairs[f"{axis}_norm.{number}"] = f"{block}norm"
        ours, theirs = f"{axis}.{number}.{inside}", f"{block}mdl.mdl.{inside}"
        if inside == "norm.":
            pairs[ours[:-1]] = f"{theirs}norm"
        else:
            pairs |= {ours + mine: theirs + other for mine, other in LAYER.items()}
        if key.endswith(("in_proj_weight", "in_proj_bias")):
            for name, tensor in zip(("query", "key", "value"), left.pop(key).chunk(3)):
                kind = key.rpartition("_")[2]
                state[f"masker.{ours}attention.{name}.{kind}"] = tensor
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in left:
                tensor = left.pop(f"{theirs}.{kind}")
                # theirs are convolutions of length 1, and norms with channels in front
                shape = tensor.shape[:1] if "norm" in ours else tensor.shape[:2]
                state[f"masker.{ours}.{kind}"] = tensor.reshape(shape)
    if left:
        raise UserError(f"does not fit Sepformer: it has no place for {min(left)}")
    # theirs is added in each of the two chunks that overlap
    state["masker.to_sources.bias"] = 2 * state["masker.to_sources.bias"]
    return state
