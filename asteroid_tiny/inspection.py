"""What a stored model is: opened by name, described in a few lines, measured in memory."""

import copy
import json
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cost import count_macs
from .errors import UserError, printable
from .export import OnnxSeparator
from .hub import locate
from .models import from_pretrained
from .weights import open_stored

DEFAULT = "tiny-sepformer-xs-stride16_2spk_8k"
WIDE = "tiny-sepformer-xs-stride32_2spk_16k"
MEMORY_SECONDS = 4
SHOWN = ("si_sdr_i", "sdr_i", "stoi", "n_mixtures")  # of the metrics
#: What the other lines say, of what is told about a model.
SAID = "training metrics licence model_name model_args sample_rate n_src n_parameters".split()


def open_model(name=None):
    """The model of a name, in eval mode, and what is told about it.

    Args:
        name (str, optional): As `from_pretrained` takes it, or an ONNX file; `DEFAULT` if None.

    Returns:
        tuple: Model, and dict.

    Raises:
        UserError: If there is no such model.
    """
    path = locate(DEFAULT if name is None else name)
    if path.suffix == ".onnx":
        separator = OnnxSeparator(path)
        return separator, separator.about
    return from_pretrained(path), open_stored(path).infos


def default_for(sample_rate):
    """The packaged model for recordings of a rate in Hz (str): one that hears 8 kHz of the band,
    where there is so much, else `DEFAULT`."""
    return WIDE if sample_rate >= 16000 else DEFAULT


def speech_of(about):
    """What kind of speech a model was trained on, from what is told about it (str), or None."""
    data = about.get("training", {}).get("data", {})
    return data.get("name") or about.get("dataset")


def made_for(name, model, about):
    """A sentence that says what a model was made for, so that nobody expects more (str)."""
    speech = speech_of(about)
    trained = f"trained on {printable(speech)}" if speech else "trained on speech it does not name"
    return (
        f"{name} was made for {model.n_src} speakers at {model.sample_rate:g} Hz, {trained}; "
        "expect less of other recordings"
    )


def describe(model, about):
    """A few lines for people.

    Args:
        model (Sepformer, TinySepformer or OnnxSeparator): The model.
        about (dict): What is told about it; plain data.

    Returns:
        str: The lines.

    Examples:
        >>> from asteroid_tiny import TinySepformer
        >>> print(describe(TinySepformer.from_preset("tiny-sepformer-xs"), {}).splitlines()[1])
        sources         2, at 8000 Hz
    """
    rate = model.sample_rate
    told = {
        "trained on": speech_of(about) or "not told",
        "licence": about.get("licence") or "not told",
        "metrics": _metrics(about) or "not told",
    }
    if isinstance(model, OnnxSeparator):
        kind, precision = (model.facts.get(key, "not told") for key in ("model", "precision"))
        lines = {"model": f"{kind}, an ONNX file", "precision": precision}
        return _lines({**lines, "sources": f"{model.n_src}, at {rate:g} Hz", **told})
    args, masker = model.get_model_args(), model.masker
    n_parameters = sum(p.numel() for p in model.parameters())
    frame = args["kernel_size"] / rate * 1000
    chunk = ((masker.chunk_size - 1) * args["stride"] + args["kernel_size"]) / rate
    lines = {
        "model": f"{type(model).__name__}, {n_parameters:,} parameters",
        "sources": f"{masker.n_src}, at {rate:g} Hz",
        "frames": f"{frame:g} ms every {args['stride'] / rate * 1000:g} ms",
        "chunks": f"{chunk:.2f} s",
        "receptive field": "all that it is given, by attention across the chunks",
        "operations": _operations(model),
        "memory": f"{peak_memory(model, MEMORY_SECONDS) / 1e6:.0f} MB of tensors for "
        f"{MEMORY_SECONDS} s of audio, {4 * n_parameters / 1e6:.0f} MB of weights",
        **told,
    }
    rest = {key: value for key, value in about.items() if key not in SAID}
    if rest:
        try:
            lines["also told"] = json.dumps(rest, default=str)
        except (TypeError, ValueError, RecursionError):  # of strangers, who may tell anything
            lines["also told"] = repr(rest)
    return _lines(lines)


def _metrics(about):
    metrics = {k: v for k, v in about.get("metrics", {}).items() if k in SHOWN and v is not None}
    return ", ".join(f"{k} {v:.3g}" for k, v in metrics.items())


def _operations(model):
    try:
        macs = count_macs(copy.deepcopy(model).to("meta"))
    except RuntimeError:  # of a filterbank that computes its filters on the CPU
        return "not counted with this filterbank"
    return f"{macs / 1e9:.2f} GMAC a second of audio"


def _lines(texts):
    return "\n".join(f"{name:15} {printable(text)}" for name, text in texts.items())


def peak_memory(model, seconds):
    """The most bytes of tensors, weights aside, that one separation holds at a time.

    Counted on the CPU from what each operation returns; what it needs inside is not seen.

    Args:
        model (torch.nn.Module): With a `sample_rate`.
        seconds (float): Length of the mixture.
    """
    device = next(model.parameters()).device
    mixture = torch.zeros(1, round(seconds * model.sample_rate), device=device)
    with torch.inference_mode(), _Memory() as memory:
        model(mixture)
    return memory.peak


class _Memory(TorchDispatchMode):
    """Follows the tensors that operations make, until they are gone."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.alive = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        returned = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is not None and storage not in old and storage not in self.alive:
                self.alive.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return returned

    def _free(self, n_bytes):
        self.held -= n_bytes


def find_device(name):
    """The device of a name (torch.device); "auto" is a GPU, if there is one.

    Raises:
        UserError: If it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {told}") from None
    if device.type == "meta":
        raise UserError("--device meta cannot be used here: it holds no data")
    return device
