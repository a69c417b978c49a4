"""Stored models: written whole, read without running code, checked before memory is taken.

Two formats are read and written:

- ``model.safetensors`` with ``config.json`` beside it, which says what the model is, what it was
  trained on and how well it does, and has the checksum of the weights;
- Asteroid's dictionaries (`serialize`) in a ``.pth`` or ``.bin`` file, with ``weights_only=True``.

Files come from strangers. `Stored` describes what one claims to hold; `build` compares that with
the model's own shapes, on the meta device, and only then makes the model and copies the weights.
"""

import inspect
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch.overrides import TorchFunctionMode

from .download import digest_of
from .errors import UserError, printable
from .files import reason, whole_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "asteroid_tiny/1"
MAX_CONFIG = 1 << 20  # bytes; one that we write has a few thousand
COUNTS = "n_src n_filters kernel_size stride bn_chan chunk_size n_heads ff_hid".split()
COUNTS += "n_repeats n_intra_layers n_inter_layers".split()
COUNTS_IF_ANY = "hop_size", "attn_chan", "conv_kernel_size"
MAX_LAYERS = 1000  # of a stack that shares them: more is a typing error


@dataclass
class Stored:
    """What a file or dictionary claims to hold.

    Attributes:
        where (str): What to call it in an error.
        model_name (str): Class of the model.
        model_args (dict): Arguments of its constructor.
        shapes (dict): Shape of each tensor, by key.
        floats (dict): Whether each tensor is of floating point, by key.
        read (callable): Reads one tensor, by key.
        infos (dict): All else that is told.
    """

    where: str
    model_name: str
    model_args: dict
    shapes: dict
    floats: dict
    read: Callable
    infos: dict = field(default_factory=dict)


def save_whole(content, path):
    """`torch.save` that leaves a whole file or none.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.
    """
    with whole_file(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's zip writer reports a failed write
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_weights_only(path, map_location="cpu", mmap=False):
    """`torch.load` that runs no code.

    Args:
        path (str or Path): The file.
        map_location: As `torch.load` takes it.
        mmap (bool): Whether tensors are left in the file until they are used, if it allows that.

    Raises:
        UserError: If the file is missing, broken, or holds more than plain data and tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    mmap = mmap and zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([torch.torch_version.TorchVersion]):
            return torch.load(str(path), map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # a broken zip, pickle or tensor raises anything
        raise UserError(
            f"{path} is broken or holds more than weights ({type(error).__name__}); nothing in it "
            "was run"
        ) from None


def write_pair(folder, conf, about, half=False):
    """Writes a model as `model.safetensors` and `config.json`.

    The two appear one after the other; a reader in between sees that the checksum is wrong.

    Args:
        folder (str or Path): Where to; other files there stay.
        conf (dict): What `serialize` returns.
        about (dict): What else config.json shall tell, such as training data and metrics.
        half (bool): Whether weights are stored in 16 bits.

    Returns:
        dict: The content of config.json.

    Raises:
        UserError: If the files cannot be written, the arguments are no plain data, or 16 bits do
            not hold the weights.
    """
    folder = Path(folder)
    state = {key: t.detach().cpu().contiguous() for key, t in conf["state_dict"].items()}
    state = {key: tensor.clone() for key, tensor in state.items()}  # none may share its memory
    if half:
        state = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
        for key, tensor in state.items():
            if not tensor.isfinite().all():
                raise UserError(f"{key} holds numbers that 16 bits cannot store")
    config = {
        "format": FORMAT,
        "model_name": conf["model_name"],
        "model_args": conf["model_args"],
        "sample_rate": conf["model_args"]["sample_rate"],
        "n_src": conf["model_args"]["n_src"],
        "n_parameters": sum(tensor.numel() for tensor in state.values()),
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        **about,
        "versions": conf["infos"]["software_versions"],
    }
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the model cannot be described in {CONFIG}: {error}") from None
    with whole_file(folder / WEIGHTS) as weights:
        weights.write_bytes(safetensors_torch.save(state, _label(config)))
        config["sha256"] = digest_of(weights)
        with whole_file(folder / CONFIG) as part:
            part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _label(config):
    """Class and arguments as they stand inside the weights' file, which its checksum covers.

    In one entry: of several safetensors would change the order, and the checksum, each time.
    """
    label = {key: config[key] for key in ("model_name", "model_args")}
    return {"model": json.dumps(label, sort_keys=True)}


def read_config(path, where=None):
    """The content of a config.json, as far as it must be right.

    Args:
        path (str or Path): The file.
        where (str, optional): What to call it in an error; `path` by default.

    Returns:
        dict: With `model_name`, `model_args`, `sha256`, `sample_rate`, `n_src` and more.

    Raises:
        UserError: If it is missing, no JSON, or lacks what describes a model.
    """
    path, where = Path(path), where or path
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise UserError(f"{where} is too large for the description of a model")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where} is missing; it must lie beside the weights") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {_line(error)}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{where} does not describe a model of this package (format {FORMAT!r})")
    for key, kind in (("model_name", str), ("model_args", dict), ("sha256", str)):
        if not isinstance(config.get(key), kind):
            raise UserError(f"{where} lacks {key!r}, or it is of a wrong type")
    for key in ("sample_rate", "n_src"):
        if config.get(key) != config["model_args"].get(key):
            raise UserError(
                f"{where} contradicts itself: {key} is {config.get(key)!r}, among the arguments "
                f"{config['model_args'].get(key)!r}"
            )
    return config


def open_stored(path):
    """What a file or folder holds, without reading the weights.

    Args:
        path (str or Path): A folder with `config.json` and `model.safetensors`, or a file:
            ``.safetensors`` with that beside it, or a dictionary of Asteroid.

    Returns:
        Stored: The description, with lazily read weights.

    Raises:
        UserError: If the file is missing, damaged, or no model.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX file, which asteroid_tiny.OnnxSeparator opens")
    if path.suffix != ".safetensors":
        return from_dict(load_weights_only(path, mmap=True), str(path))
    config = read_config(path.with_name(CONFIG))
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        file = safe_open(path, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}
        label = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {_line(error)}") from None
    if digest_of(path) != config["sha256"].lower():
        raise UserError(
            f"{path} is damaged, or {CONFIG} beside it belongs to other weights: the sha256 differ"
        )
    if not _label(config).items() <= label.items():
        raise UserError(f"{path} was stored with another class or other arguments than in {CONFIG}")
    return Stored(
        where=str(path),
        model_name=config["model_name"],
        model_args=config["model_args"],
        shapes={key: tuple(s.get_shape()) for key, s in slices.items()},
        floats={key: s.get_dtype() in ("F16", "BF16", "F32", "F64") for key, s in slices.items()},
        read=file.get_tensor,
        infos=told(config),
    )


def from_dict(conf, where):
    """What a dictionary of `serialize` holds.

    Raises:
        UserError: If something is missing or is not what it should be.
    """
    keys = {"model_name": str, "model_args": dict, "state_dict": dict}
    if not isinstance(conf, dict) or not keys.keys() <= conf.keys():
        raise UserError(f"{where} is no stored model; model_name, model_args or state_dict lack")
    for key, kind in keys.items():
        if not isinstance(conf[key], kind):
            raise UserError(f"{where} is no stored model; its {key} is no {kind.__name__}")
    for key, tensor in conf["state_dict"].items():
        if not isinstance(key, str) or not _is_plain(tensor):
            raise UserError(f"{where} has {key!r} among its weights, which is no plain tensor")
    state = conf["state_dict"]
    return Stored(
        where=where,
        model_name=conf["model_name"],
        model_args=conf["model_args"],
        shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
        floats={key: tensor.is_floating_point() for key, tensor in state.items()},
        read=state.__getitem__,
        infos=told(conf.get("infos")),
    )


def told(infos):
    """What a stranger tells of a model, without the parts that are not what they should be (dict).

    `training`, `data` in it and `metrics` are dictionaries, if they are there; metrics are numbers
    or None, data words or None, and the licence is a word.
    """
    infos = dict(infos) if isinstance(infos, dict) else {}
    for key in ("training", "metrics"):
        infos[key] = dict(infos[key]) if isinstance(infos.get(key), dict) else {}
    data = infos["training"].pop("data", None)
    if isinstance(data, dict):
        words = {key: x for key, x in data.items() if x is None or isinstance(x, str)}
        infos["training"]["data"] = words
    if not isinstance(infos.get("licence", ""), str):
        del infos["licence"]
    metrics = infos["metrics"].items()
    infos["metrics"] = {k: v for k, v in metrics if v is None or _is_number(v)}
    for key in ("steps", "hours", "minutes"):
        if not _is_number(infos["training"].get(key, 0)):
            del infos["training"][key]
    if not isinstance(infos["training"].get("device", ""), str):
        del infos["training"]["device"]
    if not _is_start(infos["training"].get("init_from")):
        infos["training"].pop("init_from", None)
    return {key: value for key, value in infos.items() if value != {}}


def _is_number(told):
    """Whether that is a number that can be shown."""
    return type(told) in (int, float) and abs(told) < 1e300


def _is_start(told):
    """Whether that is what a card says of the weights that a training began with."""
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        return False
    data = told.get("data") or {"name": "", "licence": ""}
    return isinstance(data, dict) and {"name", "licence"} <= data.keys()


def _is_plain(tensor):
    """Whether all elements are there; a tensor may claim a size without having it in memory."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    n_bytes = tensor.untyped_storage().nbytes()
    return not tensor.is_quantized and n_bytes >= tensor.numel() * tensor.element_size()


def build(stored, classes, **overrides):
    """The model that is stored.

    Args:
        stored (Stored): What the file claims to hold.
        classes (dict): The classes that may be built, by name.
        **overrides: Arguments of the model that differ from the stored ones.

    Raises:
        UserError: If the class is another, the weights do not fit it, or are not finite.
    """
    where = stored.where
    if stored.model_name not in classes:
        raise UserError(
            f"{where} holds a model of class {stored.model_name!r}, not {' or '.join(classes)}"
        )
    model_class = classes[stored.model_name]
    _check_overrides(stored, model_class, overrides)
    args = {**stored.model_args, **overrides}
    try:
        _check_sizes(args, stored, model_class)
        with torch.device("meta"), _NoNormals():  # shapes without memory
            _check_weights(model_class(**args), stored)
        model = model_class(**args)
        model.load_state_dict({key: stored.read(key) for key in stored.shapes})
    except Exception as error:  # arguments and weights of strangers raise anything
        raise UserError(f"{where} does not fit its class: {_line(error)}") from None
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{where} has NaN or infinite numbers in {key}; it is damaged")
    return model


class _NoNormals(TorchFunctionMode):
    """Leaves out starts of normal numbers, for which the meta device imports all of
    `torch.compile`: a second, longer than what loading takes otherwise."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.normal_:
            return args[0]
        return function(*args, **(kwargs or {}))


def _check_overrides(stored, model_class, overrides):
    known = inspect.signature(model_class).parameters
    for name in overrides:
        if name not in known and name not in stored.model_args:
            raise UserError(f"{model_class.__name__} has no argument {name!r} to override")
    rate, wanted = stored.model_args.get("sample_rate"), overrides.get("sample_rate")
    if wanted is not None and rate != wanted:
        raise UserError(
            f"{stored.where} was trained at {rate} Hz and cannot serve {wanted} Hz: resample the "
            "audio, or take a model of that rate"
        )


def _check_sizes(args, stored, model_class):
    """Refuses what would take forever to lay out, or more memory than there is."""
    defaults = {k: p.default for k, p in inspect.signature(model_class).parameters.items()}
    args = {**defaults, **args}
    if args["stride"] is None:
        args["stride"] = args["kernel_size"] // 2
    check_numbers(args)
    intra, inter = args["n_intra_layers"], args["n_inter_layers"]
    unique = args["n_repeats"] * (2 if args["share_layers"] else intra + inter)
    if unique > len(stored.shapes) or max(intra, inter) > MAX_LAYERS:
        n_layers = args["n_repeats"] * (intra + inter)
        raise ValueError(f"there are too few weights for {n_layers} layers")
    filters = stored.shapes.get("encoder.filterbank._filters", ())
    if args["fb_name"] == "free" and filters[-1:] != (args["kernel_size"],):
        raise ValueError(f"there are no filters of length {args['kernel_size']}")
    # what weights do not show: filterbanks that are computed, not learned; and a chunk of signal
    _check_memory(16 * args["n_filters"] * args["kernel_size"])
    _check_memory(16 * args["chunk_size"] * args["bn_chan"])


def check_numbers(args):
    """Refuses numbers that no model can have among the arguments of one.

    Raises:
        ValueError: If there is such a number.
    """
    given = [name for name in COUNTS_IF_ANY if args.get(name) is not None]
    for name in (*COUNTS, *given):
        if type(args[name]) is not int or args[name] < 1:
            raise ValueError(f"{name} must be a whole number above 0, not {args[name]!r}")
    for name, low, high in (("sample_rate", 1, 1e6), ("dropout", 0, 1)):
        value = args[name]
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low} to {high:g}, not {value!r}")
    if args["dropout"] == 1:
        raise ValueError("dropout must be below 1")
    if args["stride"] > args["kernel_size"]:
        raise ValueError(f"stride ({args['stride']}) must not be above the kernel_size")


def _check_weights(model, stored):
    """Compares keys, shapes and kinds of numbers with those of a model on the meta device."""
    own = model.state_dict()
    _check_memory(sum(tensor.numel() * tensor.element_size() for tensor in own.values()))
    theirs = stored.shapes.keys()
    for kind, keys in (("lacks", own.keys() - theirs), ("has also", theirs - own.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"it {kind} the weights {min(keys)!r}{more}")
    for key, tensor in own.items():
        if tuple(tensor.shape) != stored.shapes[key]:
            raise ValueError(
                f"{key} should have the shape {tuple(tensor.shape)}, not {stored.shapes[key]}"
            )
        if tensor.is_floating_point() != stored.floats[key]:
            raise ValueError(f"{key} holds another kind of numbers")


def _check_memory(n_bytes):
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > there:
        raise ValueError(
            f"it would take {n_bytes / 1e9:.3g} GB of memory, and there are {there / 1e9:.3g} GB"
        )


def _line(error):
    return printable(error) or type(error).__name__
