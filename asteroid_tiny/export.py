"""Models outside PyTorch: ONNX files with a dynamic time axis, in fp32 or int8, and their use.

A file is checked against its model before it is kept, and says in its metadata what it is.
"""

import contextlib
import copy
import json
import logging
import os
import textwrap
import warnings
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from .errors import UserError, printable
from .files import sweep, whole_file
from .hub import example_mixture
from .separable import Separable
from .weights import told

LENGTHS = (8000, 12345, 24001, 40000)  # samples at which a file is checked
TOLERANCE = 1e-3  # of the largest sample of the estimates, for fp32
SILENCE = 1e-3  # sample value that silence may become
MOST_SIZE = 0.35  # of an int8 file, relative to fp32
LEAST_DB = 20.0  # SI-SDR of the estimates of int8 with respect to fp32
PROVENANCE = ("name", "licence", "training", "metrics", "made_with")  # of what is told of a model
TRACED_LENGTH = 16000  # samples of the example; any of two chunks or more does


def export_onnx(model, path, quantize=None, speech=None, about=None):
    """Writes a model as an ONNX file, once it agrees with the model.

    Inputs of the file are `mixture`, (1, time), its outputs `estimates`, (1, n_src, time), for any
    time of at least the length of the filters.

    Args:
        model (torch.nn.Module): A `TinySepformer` or `Sepformer`.
        path (str or Path): The file to write.
        quantize (str, optional): ``"int8"`` for weights of 8 bits; fp32 without.
        speech (torch.Tensor, optional): Mixture of (time,) samples on which int8 is compared with
            fp32; the bundled one (`example_mixture`) without.
        about (dict, optional): What is told of the model, of which the file takes the provenance:
            `PROVENANCE`.

    Returns:
        dict: `bytes`, and what was checked: `largest_error` of fp32 or `si_sdr` (dB) and `size`
        (relative to fp32) of int8.

    Raises:
        UserError: If the ONNX packages are missing, the file disagrees with the model or cannot be
            written; nothing is kept then.
    """
    if quantize not in (None, "int8"):
        raise UserError(f"quantize must be int8, not {quantize!r}")
    onnx = _import("onnx")
    model = copy.deepcopy(model).cpu().eval()
    sweep(Path(path).parent)
    with whole_file(path) as part, quiet():
        save_fp32(model, part)
        outcome = {"largest_error": check_lengths(model, part)}
        if quantize:
            outcome = save_int8(part, model.sample_rate, speech)
        file = onnx.load(part)
        facts = {"sample_rate": f"{model.sample_rate:g}", "n_src": str(model.masker.n_src)}
        facts["model"] = type(model).__name__
        facts["args"] = json.dumps(model.get_model_args(), default=str)
        facts |= {"precision": quantize or "fp32", "made_by": "asteroid_tiny"}
        provenance = {key: about[key] for key in PROVENANCE if key in about} if about else {}
        facts["about"] = json.dumps(provenance, default=str)
        facts["shortest"] = str(model.encoder.filterbank.kernel_size)
        onnx.helper.set_model_props(file, facts)
        onnx.save(file, part)
        outcome["bytes"] = part.stat().st_size
    return outcome


@contextlib.contextmanager
def quiet():
    """Without what the exporters say of packages and steps that are not needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def save_fp32(model, path):
    """Writes the ONNX file of a model, unchecked."""
    _import("onnxscript")
    n_shortest = model.encoder.filterbank.kernel_size
    example = torch.zeros(1, max(TRACED_LENGTH, 2 * n_shortest))
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["mixture"],
            output_names=["estimates"],
            dynamic_shapes=({1: torch.export.Dim.AUTO},),
        )
    except Exception as error:  # of many classes, and of a hundred lines
        cause = error
        while cause.__cause__ or (cause.__context__ and not cause.__suppress_context__):
            cause = cause.__cause__ or cause.__context__
        what = textwrap.shorten(printable(f"{type(cause).__name__}: {cause}"), 200)
        raise UserError(
            f"PyTorch's exporter fails with this {type(model).__name__} ({what}); it takes none of "
            "one source or with some filterbanks"
        ) from error
    program.save(path)
    make_small(path)


def make_small(path):
    """Takes out of an ONNX file what no runtime needs: traces (with paths in them), shapes, names
    of nodes, and those of tensors but for a number.

    In a small model they are larger than the weights.
    """
    onnx = _import("onnx")
    file = onnx.load(path)
    del file.metadata_props[:], file.graph.metadata_props[:], file.graph.value_info[:]
    for node in file.graph.node:
        del node.metadata_props[:]
        node.name = ""
    keep_weights_once(file.graph)
    number_tensors(file.graph)
    onnx.save(file, path)


def keep_weights_once(graph):
    """Transposes weights in the file rather than at every use, and keeps equal ones once.

    The exporter does the former for some uses only, so that shared layers would be there twice;
    and what is transposed at run time is not quantised.
    """
    helper = _import("onnx").numpy_helper
    arrays = {tensor.name: helper.to_array(tensor) for tensor in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in arrays]:
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        arrays[node.output[0]] = np.ascontiguousarray(arrays[node.input[0]].transpose(order))
        graph.node.remove(node)
    first = {}
    same = {
        name: first.setdefault((array.dtype, array.shape, array.tobytes()), name)
        for name, array in arrays.items()
    }
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(
        helper.from_array(array, name) for name, array in arrays.items() if name in used
    )


def number_tensors(graph):
    """Names the tensors of a graph by numbers, all but what goes in and comes out."""
    kept = {value.name for value in [*graph.input, *graph.output]} | {""}  # "": left out
    outputs = [name for node in graph.node for name in node.output]
    inner = [name for name in [w.name for w in graph.initializer] + outputs if name not in kept]
    numbers = {name: f"{number:x}" for number, name in enumerate(inner)}
    for weight in graph.initializer:
        weight.name = numbers[weight.name]
    for node in graph.node:
        node.input[:] = [numbers.get(name, name) for name in node.input]
        node.output[:] = [numbers.get(name, name) for name in node.output]


def check_lengths(model, path):
    """The largest error of a file at `LENGTHS`, relative to the largest sample (float).

    Raises:
        UserError: If it is above `TOLERANCE`.
    """
    separator, worst = OnnxSeparator(path, sample_rate=model.sample_rate), 0.0
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        mixture = 0.1 * torch.randn(1, length, generator=generator)
        with torch.no_grad():
            wanted = model(mixture)
        found = separator(mixture)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if found.shape != wanted.shape or not error <= TOLERANCE:
            raise UserError(
                f"the ONNX file disagrees with the model at {length} samples (by {error:.1e} of "
                "the largest sample); it was not kept"
            )
        worst = max(worst, error)
    check_silence(separator)
    return worst


def check_silence(separator):
    """Raises a `UserError` if an `OnnxSeparator` gives anything for silence."""
    if not separator(torch.zeros(1, LENGTHS[0])).abs().max() <= SILENCE:  # NaN neither
        raise UserError("the ONNX file does not leave silence silent; it was not kept")


def save_int8(path, sample_rate, speech=None):
    """Quantises an ONNX file in place; its weights become int8, its activations as they come.

    Raises:
        UserError: If it does not get smaller than `MOST_SIZE` or not stay closer than `LEAST_DB`.
    """
    from asteroid.losses import pairwise_neg_sisdr

    quantization = _import("onnxruntime.quantization")
    if speech is None:
        speech = real_mixture(sample_rate)
    wanted = OnnxSeparator(path, sample_rate=sample_rate)(speech[None])
    fp32_bytes = path.stat().st_size
    small = path.with_name(f"{path.stem}.int8{path.suffix}")
    try:
        # unsigned: onnxruntime's products with signed ones overflow on CPUs without VNNI
        quantization.quantize_dynamic(path, small, weight_type=quantization.QuantType.QUInt8)
        make_small(small)
        quantized = OnnxSeparator(small, sample_rate=sample_rate)
        check_silence(quantized)
        found = quantized(speech[None])
        si_sdr = -pairwise_neg_sisdr(found, wanted)[0].diagonal().max().item()
        size = small.stat().st_size / fp32_bytes
        if si_sdr < LEAST_DB or size > MOST_SIZE:
            raise UserError(
                f"int8 would take {size:.2f} of the size and leave {si_sdr:.1f} dB SI-SDR to the "
                f"fp32 estimates, where at most {MOST_SIZE} and at least {LEAST_DB:g} dB are "
                "wanted; nothing was kept, fp32 is the choice for this model"
            )
        small.replace(path)
    finally:
        small.unlink(missing_ok=True)
    return {"si_sdr": si_sdr, "size": size}


def real_mixture(sample_rate):
    """The mixture of two speakers that comes with the package, at any rate: (time,)."""
    samples, rate = soundfile.read(example_mixture(), dtype="float32")
    return torch.from_numpy(soxr.resample(samples, rate, sample_rate))


class OnnxSeparator(Separable, torch.nn.Module):
    """A model in an ONNX file, used like one of PyTorch.

    Args:
        path (str or Path): A file of `export_onnx`.
        n_threads (int, optional): Threads that it may use; all without.
        sample_rate (float, optional): That of a file without metadata.

    Attributes:
        facts (dict of str): The file's metadata.
        about (dict): What it tells of the model's provenance.

    Shape:
        (time,), (batch, time) or (batch, 1, time) -> (n_src, time) or (batch, n_src, time).

    Raises:
        UserError: If the file is missing or no ONNX file of a separator.
    """

    def __init__(self, path, n_threads=None, sample_rate=None):
        super().__init__()
        runtime = _import("onnxruntime")
        if not Path(path).is_file():
            raise UserError(f"{path} is missing")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if n_threads:
            options.intra_op_num_threads = n_threads
        try:
            self.session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of a class of its own for each thing that can be wrong
            raise UserError(f"{path} is no ONNX file that runs here: {error}") from None
        facts = self.session.get_modelmeta().custom_metadata_map
        if "sample_rate" not in facts and sample_rate is None:
            raise UserError(f"{path} does not say its sample rate; asteroid-tiny export writes it")
        self.facts, self.about = facts, _told(facts.get("about", "{}"))
        self._arguments = (os.path.abspath(path), n_threads, sample_rate)
        self.in_channels = 1
        self.device = torch.device("cpu")
        taken = [(given.name, len(given.shape)) for given in self.session.get_inputs()]
        shape = self.session.get_outputs()[0].shape
        try:
            self.sample_rate = float(facts.get("sample_rate", sample_rate or 0))
            self.shortest = int(facts.get("shortest", 1))
            fits = taken == [("mixture", 2)] and len(shape) == 3 and isinstance(shape[1], int)
        except ValueError:
            fits = False
        if not fits or not 1 <= self.sample_rate <= 1e6 or self.shortest < 1:
            raise UserError(
                f"{path} is no separator: it must take mixture, (1, time), at a sample rate, and "
                "give (1, n_src, time)"
            )
        self.n_src = shape[1]

    def __reduce__(self):  # onnxruntime's sessions cannot be pickled
        return type(self), self._arguments

    def forward(self, mixture):
        mixture = torch.as_tensor(mixture, dtype=torch.float32, device="cpu").detach()
        if mixture.ndim == 0:
            raise UserError("a mixture has samples, (time,), and is no single number")
        if mixture.ndim > 2 and mixture.shape[-2] != 1:
            raise UserError(f"a mixture has one channel, not {mixture.shape[-2]}")
        if mixture.numel() == 0:
            lead = mixture.shape[:1] if mixture.ndim > 1 else ()
            return mixture.new_zeros(*lead, self.n_src, mixture.shape[-1])
        batch = mixture.reshape(-1, mixture.shape[-1])
        padded = torch.nn.functional.pad(batch, (0, max(0, self.shortest - batch.shape[-1])))
        rows = [self.session.run(None, {"mixture": row[None].numpy()})[0] for row in padded]
        estimates = torch.from_numpy(np.concatenate(rows))[..., : mixture.shape[-1]]
        return estimates[0] if mixture.ndim == 1 else estimates


def _told(text):
    """What a stranger's JSON tells; nothing if it is none."""
    try:
        return told(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _import(name):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            "export needs onnx, onnxscript and onnxruntime: pip install -e '.[export]' in the "
            "repository of asteroid-tiny"
        ) from None
