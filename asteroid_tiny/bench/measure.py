"""One measurement, in a process of its own: python -m asteroid_tiny.bench.measure TASK

TASK is a JSON object: `kind` is one of `MEASUREMENTS`, the rest are its arguments. Each figure goes
to stdout as a line of JSON as soon as it is there, so that those before a crash are not lost.

Times are CPU seconds of one thread, and the wall time of the same run: of several runs the one
with the least CPU time, since what disturbs a run can only make it slower. Memory is the peak over
the loaded model, from the kernel's count of resident pages. What would take too long or too much
memory, in proportion to the next shorter length, is not tried.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..cost import count_macs, saved_bytes
from ..errors import UserError
from ..models import PRESETS
from .machine import available_bytes, peak_bytes, reset_peak, resident_bytes
from .peers import PEERS, build_peer

SAMPLE_RATE = 8000
BUDGET = 5.0  # CPU s of repetitions, after which no other begins
MOST_RUNS = 10
MEMORY_SHARE = 0.8  # of the available memory that a measurement may need
MATRIX, SMALL_MATRIX = 2048, 256  # rows and columns of the matrices whose product is timed
SLOW = 1e10  # operations a second, which any CPU exceeds in a type that it multiplies
MIXTURES = 200  # that are mixed to measure how fast it goes
MOST_BATCH = 1024  # that is tried on a GPU


def inference(name, lengths, limit):
    """What a model is and what a forward pass costs, at each length (s)."""
    model = build(name).eval()
    state = model.state_dict().values()
    yield {
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state),
    }
    with torch.inference_mode():
        yield from at_each(lengths, limit, lambda mixture: lambda: model(mixture))
    yield {"macs_per_s": count_macs(model.train().to("meta"))}  # last: it leaves memory behind


def training(name, lengths, limit):
    """What a training step costs at each length: time, peak memory, bytes kept for backward."""
    model = build(name).train()
    step = training_step(model)

    def prepare(mixture):
        return lambda: step(mixture)

    for row in at_each(lengths, limit, prepare):
        if "skipped" not in row:
            n_samples = round(row["length"] * SAMPLE_RATE)
            row["saved_bytes"] = saved_bytes(model, n_samples)
            if name in PRESETS and row["length"] == lengths[-1]:
                lean = build(name, checkpoint_activations=True)
                row["checkpointed_bytes"] = saved_bytes(lean, n_samples)
        yield row


def bf16(name, length, limit):
    """Time of a forward pass under bf16 autocast, if the products alone keep to the limit."""
    rate = matrix_rate("bfloat16", SMALL_MATRIX)["flops"]
    seconds = 2 * length * count_macs(build(name).to("meta")) / rate
    if seconds > limit:
        yield {"length": length, "skipped": f"about {seconds:.0f} s"}
        return
    model, mixture = build(name).eval(), noise(length)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield {"length": length, **timed(lambda: model(mixture))}


def onnx(name, length):
    """Size of the ONNX files of a model, fp32 and int8, and their time in onnxruntime."""
    yield from exported(build(name).eval(), length)


def exported(model, length):
    """As `onnx`, of a model that is there."""
    from ..export import OnnxSeparator, export_onnx, save_int8

    mixture = noise(length)
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        export_onnx(model, fp32)
        for form, path in ("fp32", fp32), ("int8", int8):
            row = {"form": form, "length": length}
            try:
                if form == "int8":
                    shutil.copy(fp32, int8)
                    row |= save_int8(int8, model.sample_rate)
                separator = OnnxSeparator(path, n_threads=1, sample_rate=model.sample_rate)
                row |= {"bytes": path.stat().st_size, **timed(lambda: separator(mixture))}
            except UserError as error:
                row["failed"] = str(error)
            yield row


def machine():
    """How many floating-point operations a second this machine does in a large matrix product.

    In a small one of a type that the processor does not multiply.
    """
    for dtype in ("float32", "bfloat16"):
        small = matrix_rate(dtype, SMALL_MATRIX)
        yield small if small["flops"] < SLOW else matrix_rate(dtype, MATRIX)


def matrix_rate(dtype, size):
    """Operations a second in products of square matrices of `size` rows, and their time (dict)."""
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    times = timed(lambda: a @ b, at_least=3)
    return {"dtype": dtype, "size": size, "flops": 2 * size**3 / times["cpu_s"], **times}


def mixing(exp_dir, settings):
    """How many training mixtures a second one core mixes on the fly, as the recipe trains."""
    from ..preparation import open_split
    from ..training import training_loader

    speech = open_split(exp_dir, settings, "train")
    mixtures = training_loader(speech, {**settings, "num_workers": 0}).dataset
    for index in range(MIXTURES, 2 * MIXTURES):  # which decodes most of the speech
        mixtures[index]
    times = timed(lambda: [mixtures[index] for index in range(MIXTURES)])
    yield {"length": settings["segment"], "mixtures_per_s": MIXTURES / times["cpu_s"], **times}


def gpu(name, length, device="cuda"):
    """A training step under bf16 autocast on a GPU: time, memory, largest batch; time of the
    compiled model. Tested with the CPU in the place of a GPU alone.
    """
    mixture = noise(length).to(device)
    common = {"length": length, "device": torch.cuda.get_device_name()}

    def step_of(model):
        return training_step(model.to(device).train(), torch.autocast(device, torch.bfloat16))

    step = step_of(build(name))
    row = {**common, "compiled": False, "step_s": cuda_seconds(lambda: step(mixture))}
    row |= {"peak_bytes": torch.cuda.max_memory_allocated()}

    def fits(batch_size):
        try:
            step(mixture.expand(batch_size, -1))
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    yield {**row, "largest_batch": largest(fits)}
    model = build(name)
    model.compile()
    step = step_of(model)
    yield {**common, "compiled": True, "step_s": cuda_seconds(lambda: step(mixture))}


def cuda_seconds(run, n_runs=10):
    """Mean time of a run on a GPU in seconds, after three to warm up; peak memory begins anew."""
    for _ in range(3):
        run()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n_runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / n_runs


def largest(fits):
    """The largest number up to `MOST_BATCH` for which `fits` holds, 0 if for none.

    Args:
        fits (callable): Of a number; what does not fit has nothing larger that does.

    Examples:
        >>> largest(lambda n: n <= 37)
        37
    """
    good, bad = 0, 1
    while bad <= MOST_BATCH and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1 and good < MOST_BATCH:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


MEASUREMENTS = {of.__name__: of for of in (inference, training, bf16, onnx, machine, mixing, gpu)}


def build(name, **overrides):
    """A preset or a peer, untrained, always with the same weights."""
    torch.manual_seed(0)
    if name in PEERS:
        return build_peer(name, sample_rate=SAMPLE_RATE)
    return PRESETS[name][0].from_preset(name, sample_rate=SAMPLE_RATE, **overrides)


def noise(length):
    """A mixture of noise, (1, time), of a length in seconds."""
    return 0.1 * torch.randn(1, round(length * SAMPLE_RATE))


def training_step(model, context=None):
    """A function of a mixture that trains one step: forward, SI-SDR loss, backward, AdamW.

    Args:
        model (torch.nn.Module): The model.
        context (context manager, optional): For the forward pass and the loss.
    """
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr

    loss_of = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(mixture):
        sources = torch.randn(len(mixture), 2, mixture.shape[1], device=mixture.device)
        with context or contextlib.nullcontext():
            loss = loss_of(model(mixture), sources)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def at_each(lengths, limit, prepare):
    """Times something at ascending lengths, and its peak memory over what there is now.

    Args:
        lengths (list of float): Seconds of audio, ascending.
        limit (float): CPU seconds above which a run is not tried.
        prepare (callable): Of a mixture; returns what to run.

    Yields:
        dict: `length`, `cpu_s`, `wall_s`, `n_runs` and `peak_bytes`, or `skipped` with the reason.
    """
    base, last = resident_bytes(), None
    for length in lengths:
        reason = last and too_much(last, length / last["length"], limit)
        if reason:
            yield {"length": length, "skipped": reason}
            continue
        run = prepare(noise(length))
        if last is None:
            run()  # warm-up
        reset_peak()
        last = {"length": length, **timed(run, at_least=2 if length <= 4 else 1)}
        last["peak_bytes"] = max(0, peak_bytes() - base)
        yield last


def too_much(row, factor, limit):
    """Why a measurement that needs `factor` times a row's time and memory is not tried, or None."""
    seconds, needed = factor * row["cpu_s"], factor * row["peak_bytes"]
    if seconds > limit:
        return f"about {seconds:.0f} s"
    if needed > MEMORY_SHARE * available_bytes():
        return f"about {needed / 1e9:.0f} GB"
    return None


def timed(run, at_least=2):
    """Runs several times; CPU and wall seconds of the run with the least CPU time (dict)."""
    runs = []
    while len(runs) < at_least or (sum(c for c, _ in runs) < BUDGET and len(runs) < MOST_RUNS):
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        runs.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = min(runs)
    return {"cpu_s": cpu, "wall_s": wall, "n_runs": len(runs)}


def figures_of(task):
    """The figures of a task, as they come.

    Args:
        task (dict): `kind`, one of `MEASUREMENTS`, and its arguments.

    Yields:
        dict: Plain data; `failed` with the reason if the user can mend it.
    """
    arguments = dict(task)
    try:
        yield from MEASUREMENTS[arguments.pop("kind")](**arguments)
    except UserError as error:
        yield {"failed": str(error)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for figure in figures_of(json.loads(sys.argv[1])):
        print(json.dumps(figure), flush=True)
