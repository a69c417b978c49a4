"""Stage 5: measures every preset and every peer, and writes what they cost into a page.

`measure` makes the figures, those of a kind and model in a process of its own; `page` the page.
They are kept as they come, in benchmark.json: what is there already is not measured again,
unless the machine or what is asked for has changed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from ..config import BENCHMARK
from ..errors import UserError
from ..files import read_json, whole_file
from ..models import PRESETS
from ..recipe import without_paths
from .machine import cpu_name
from .page import write_page
from .peers import PEERS

REFERENCE_LENGTH = 4.0  # s: of the comparisons, and the longest of training steps
EXPORTED = ("tiny-sepformer-xs", "tiny-sepformer-s")  # as ONNX files
FLAGS = "avx2 avx512f avx512_bf16 avx512_vnni avx_vnni amx_tile amx_bf16 amx_int8".split()


def benchmark(exp_dir, settings):
    """Measures what the settings ask for; writes a page into a folder.

    Args:
        exp_dir (str or Path): The folder; benchmark.md, benchmark.json and two plots come there.
        settings (dict): Keys of conf.yml: `bench_models`, `bench_lengths`, `bench_limit`, and for
            the speed of mixing those of the recipe.

    Returns:
        dict: The figures, as in benchmark.json.

    Raises:
        UserError: If there is no such model, or a length is none.
    """
    folder, settings = Path(exp_dir), dict(settings)
    asked = {key: settings.pop(key) for key in BENCHMARK}
    lengths, names = read_lengths(asked["bench_lengths"]), read_models(asked["bench_models"])
    about = {
        **describe_machine(),
        "lengths": lengths,
        "reference": max([n for n in lengths if n <= REFERENCE_LENGTH], default=lengths[0]),
        "limit": asked["bench_limit"],
        "models": [name for name in names if not missing_package(name)],
        "missing": {name: missing_package(name) for name in names if missing_package(name)},
    }
    for name, package in about["missing"].items():
        print(f"  {name} is left out: it needs the package {package}")
    wanted = tasks(about, settings)
    of_the_run = {"exp_dir": f"{folder}", "settings": settings}  # with paths, which are not kept
    figures = kept_figures(folder / "benchmark.json", about, wanted)
    for task in wanted:
        if key_of(task) not in figures:
            whole = {**task, **of_the_run} if task["kind"] == "mixing" else task
            figures[key_of(task)] = {"task": task, "rows": measure(whole)}
            with whole_file(folder / "benchmark.json") as part:
                content = {"about": about, "measured": list(figures.values())}
                part.write_text(json.dumps(content, indent=1) + "\n")
    measured = [figures[key_of(task)] for task in wanted]
    page = write_page(folder, about, measured)
    print(f"\n{page.read_text(encoding='utf-8')}\n  page: {page}")
    return {"about": about, "measured": measured}


def tasks(about, settings):
    """What is to be measured, one process each (list of dict)."""
    reference, limit = about["reference"], about["limit"]
    wanted = [{"kind": "machine"}]
    for name in about["models"]:
        common = {"name": name, "limit": limit}
        wanted.append({"kind": "inference", **common, "lengths": about["lengths"]})
        short = [length for length in about["lengths"] if length <= reference]
        wanted.append({"kind": "training", **common, "lengths": short})
        if name in PRESETS:
            wanted.append({"kind": "bf16", **common, "length": reference})
        if name in EXPORTED:
            wanted.append({"kind": "onnx", "name": name, "length": reference})
        if about["gpu"]:
            wanted.append({"kind": "gpu", "name": name, "length": reference})
    return [*wanted, {"kind": "mixing", "settings": without_paths(settings)}]


def measure(task):
    """Runs one measurement in a process of its own; says its figures as they come.

    Returns:
        list of dict: The figures; if the process fails, the last one is `failed` with the reason.
    """
    title, rows = f"  {task.get('name', 'machine'):24} {task['kind']:9}", []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path]))
    command = [sys.executable, "-m", f"{__package__}.measure", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    print(f"{title} {describe(rows[-1])}", flush=True)
        if process.returncode:
            rows.append({"failed": why(process.returncode, errors)})
            print(f"{title} {describe(rows[-1])}", flush=True)
    return rows


def why(status, errors):
    """The reason for which a process failed, in a sentence."""
    if status < 0:
        return f"killed by signal {-status}" + (", out of memory?" if status == -9 else "")
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else f"ended with status {status}"


def describe(row):
    """A figure as a few words for the screen."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "n_parameters" in row:
        return f"{row['n_parameters'] / 1e6:.2f} M parameters"
    if "macs_per_s" in row:
        return f"{row['macs_per_s'] / 1e9:.2f} GMAC for a second of audio"
    if "flops" in row:
        return f"{row['dtype']}: {row['flops'] / 1e9:.3g} GFLOP/s in matrix products"
    if "mixtures_per_s" in row:
        return f"{row['mixtures_per_s']:.0f} mixtures of {row['length']:g} s a second"
    if "step_s" in row:
        return f"{row['step_s']:.3f} s a step on {row['device']}{', compiled' * row['compiled']}"
    what = f"{row['length']:g} s of audio"
    if "skipped" in row:
        return f"{what}: not tried, it would take {row['skipped']}"
    return f"{what}{', ' + row['form'] if 'form' in row else ''}: {row['cpu_s']:.3g} CPU s"


def kept_figures(path, about, wanted):
    """The figures that were measured before on this machine with these versions, by `key_of`.

    Without those that failed, or were measured in another way than is wanted now.
    """
    machine = {key: about[key] for key in ("cpu", "cores", "gpu", "versions")}
    entry = {"task": {"kind": str}, "rows": [dict]}
    try:
        shape = {"about": dict.fromkeys(machine, object), "measured": [entry]}
        before = read_json(path, shape, "run stage 5 again")
    except UserError:  # none yet, or none of ours
        return {}
    if any(before["about"][key] != value for key, value in machine.items()):
        return {}
    wanted = {key_of(task): task for task in wanted}
    measured = {key_of(entry["task"]): entry for entry in before["measured"]}
    kept = {k: entry for k, entry in measured.items() if serves(entry, wanted.get(k))}
    if kept:
        print(f"  {len(kept)} measurements are from before; to make them anew, delete {path}")
    return kept


def serves(entry, task):
    """Whether an entry of figures has what a task would measure now, or is not asked for now."""
    if any("failed" in row for row in entry["rows"]):
        return False
    limited = any("skipped" in row for row in entry["rows"])
    before, now = (
        {key: value for key, value in one.items() if limited or key != "limit"}
        for one in (entry["task"], task or entry["task"])
    )
    return before == now


def key_of(task):
    """What a task measures: model, if any, and kind."""
    return task.get("name"), task["kind"]


def describe_machine():
    """Processor, its flags that matter, GPU and versions (dict)."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = re.search(r"(?:flags|Features)\s*: (.*)", text)
    present = flags[1].split() if flags else []
    packages = ("torch", "asteroid", "speechbrain", "onnxruntime")
    return {
        "cpu": cpu_name(),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {p: version(p) for p in packages if importlib.util.find_spec(p)},
    }


def missing_package(name):
    """The package that a peer needs and that is not installed, or None."""
    package = PEERS[name].package if name in PEERS else None
    return package if package and importlib.util.find_spec(package) is None else None


def read_models(text):
    """Names of models, separated by commas; ``all`` for every preset and peer (list of str).

    Examples:
        >>> read_models("tiny-sepformer-xs, conv-tasnet")
        ['tiny-sepformer-xs', 'conv-tasnet']
    """
    known = [*PRESETS, *PEERS]
    if text == "all":
        return known
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))  # each once
    for name in names:
        if name not in known:
            raise UserError(f"bench_models: there is no {name!r}; there are {', '.join(known)}")
    return names


def read_lengths(text):
    """Lengths in seconds, separated by commas, in ascending order (list of float).

    Examples:
        >>> read_lengths("4,1,16")
        [1.0, 4.0, 16.0]
    """
    try:
        lengths = sorted({float(length) for length in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or not all(0.01 <= length <= 3600 for length in lengths):  # NaN neither
        raise UserError(
            f"bench_lengths must be seconds from 0.01 to 3600, separated by commas, not {text!r}"
        )
    return lengths
