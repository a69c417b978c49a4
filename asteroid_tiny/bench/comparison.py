"""The comparison: models trained from scratch on the same batches, at equal budgets of training
steps and of device time.

A contender is a preset, a peer of another toolkit, or a variant of the run's own model: with one
thing changed (the ablation), or with the masker of another architecture. Each trains in a process
of its own until both budgets are used. Its learning rate rises and then stays, so that any point of
its curve is what a training that ends there would have given, and one training serves both budgets.
The points are measured on the validation list, of the weights as they are then; none is chosen, and
the test list is not used.

It lies in the folder ``comparison`` of a run::

    conf.yml                            its settings
    CONTENDER/checkpoints/, logs/       a training
    CONTENDER/result.json or error.txt  what came of it
    comparison.json, .md, .svg          figures, tables and curves of all contenders
"""

import json
import math
import multiprocessing
import os
import signal
import threading
import traceback
from pathlib import Path

import torch
from asteroid.masknn import DPRNN, TDConvNet

from ..config import OF_THE_MACHINE, PUBLICATION, begin_run
from ..cost import count_macs
from ..errors import UserError, sentence
from ..files import read_json, sweep, whole_file
from ..models import PRESETS, TinySepformer
from ..plots import COLOURS, Axes, side_by_side
from ..preparation import list_path, make_lists, open_list, open_training, prepare_speech
from ..recipe import build_model, without_paths
from ..summary import NUMBER, mean_interval
from ..tables import markdown
from .peers import PEERS, build_peer

#: The contenders of the group ``models``, with the sizes of their papers or recipes.
MODELS = (*PRESETS, "conv-tasnet", "dprnn")
BASE = "base"  # the run's own model, from which the other variants differ
VANILLA = "sepformer-layers"  # neither of the paper's two ideas
#: Asteroid's maskers that can stand in the run's own filterbank, with as many operations as the
#: masker of tiny-sepformer-xs: their networks' own depths, with fewer channels.
MASKERS = {
    "conv-tasnet-masker": (TDConvNet, dict(hid_chan=384, mask_act="relu")),
    "dprnn-masker": (DPRNN, dict(bn_chan=64, hid_size=96, chunk_size=64, mask_act="relu")),
}
#: The contenders of the group ``architectures``: with both ideas, one or none, and other maskers.
ARCHITECTURES = (BASE, "no-sharing", VANILLA, *MASKERS)
NOTES = """\
SI-SDRi in dB on {n_valid} validation mixtures, with its 95 % bootstrap interval over
speaker pairs. It tells how another list of mixtures may differ, not another seed of the training.
All contenders were trained from scratch on the same batches (seed {seed}; {batch_size} mixtures of
{segment:g} s a step) with AdamW at a rate of {lr:g}, which rises over the first tenth of the
{budget_steps} steps and then stays. GMAC are of a second of audio; "s a step" is the median; MB are
the most that a step holds beyond the loaded model. Times are of the device without the mixing and
the validations: by the clock on a GPU, the CPU time of all threads on a CPU. Measured on:
{measured_on}."""
#: Of a result.json.
RESULT = {
    **dict.fromkeys(("n_parameters", "macs_per_second", "step_seconds", "step_memory"), NUMBER),
    "device": str,
    "speakers": [list],
    "points": [
        {
            **dict.fromkeys(("steps", "seconds", "si_sdr_i"), NUMBER),
            **dict.fromkeys(("low", "high"), (*NUMBER, type(None))),
            "values": [NUMBER],
        }
    ],
}
MAY_CHANGE = (*OF_THE_MACHINE, *PUBLICATION, "contenders")  # between two starts of one comparison


def ablations(settings):
    """The contenders of the group ``ablation`` and what they change.

    Args:
        settings (dict): Of the run, whose model is the base.

    Returns:
        dict: Arguments of the model by name of the contender; none that would be the base again.

    Examples:
        >>> list(ablations({"preset": "tiny-sepformer-xs", "n_src": 2, "sample_rate": 8000}))
        ['base', 'no-sharing', 'no-convolution', 'sepformer-layers', 'kernel-3', 'kernel-31',
         'path-norm']
    """
    with torch.device("meta"):
        base = build_model(settings)
    if not isinstance(base, TinySepformer):
        return {BASE: {}}
    sizes = base.get_model_args()
    changes = {
        "sharing": {"share_layers": True},
        "no-sharing": {"share_layers": False},
        "no-convolution": {"attn_chan": sizes["bn_chan"]},
        VANILLA: {"attn_chan": sizes["bn_chan"], "share_layers": False, "path_norm": False},
        **{f"kernel-{size}": {"conv_kernel_size": size} for size in (3, 15, 31)},
        "path-norm": {"path_norm": True},
        "no-path-norm": {"path_norm": False},
    }
    return {BASE: {}} | {name: c for name, c in changes.items() if not c.items() <= sizes.items()}


def choose(settings):
    """The contenders that the settings ask for (list of str).

    Raises:
        UserError: If there is no such contender.
    """
    variants = [*ablations(settings), *MASKERS]
    groups = {
        "models": MODELS,
        "ablation": variants[: -len(MASKERS)],
        "architectures": [name for name in ARCHITECTURES if name in variants],
    }
    chosen = []
    for name in settings["contenders"].split(","):
        chosen += groups.get(name.strip(), [name.strip()])
    known = [*variants, *PRESETS, *PEERS]
    for name in chosen:
        if name not in known:
            raise UserError(
                f"there is no contender {name!r}; there are {', '.join(groups)}, which are "
                f"several, and {', '.join(known)}"
            )
    return list(dict.fromkeys(chosen))


def build_contender(name, settings):
    """The untrained model of a contender.

    Presets and peers have their own sizes, whatever the run's are.

    Args:
        name (str): One of those that `choose` gives.
        settings (dict): Of the run.
    """
    if name in PEERS:
        return build_peer(name, settings["n_src"], settings["sample_rate"])
    if name in PRESETS:
        kept = ("n_src", "sample_rate", "checkpoint_activations")
        return build_model({"preset": name, **{key: settings[key] for key in kept}})
    if name in MASKERS:
        model = build_model(settings)
        masker, sizes = MASKERS[name]
        model.masker = masker(model.encoder.n_feats_out, settings["n_src"], **sizes)
        return model
    return build_model({**settings, **ablations(settings)[name]})


def compare(exp_dir, settings):
    """Stage 6: trains the contenders, or continues to, and writes tables, figures and curves.

    Args:
        exp_dir (str or Path): Folder of the run; its lists are made if there are none.
        settings (dict): Of the run.

    Raises:
        UserError: If the settings do not fit those of a comparison that was begun there, or not
            one contender could be trained.
    """
    folder = Path(exp_dir) / "comparison"
    chosen = choose(settings)
    if settings["devices"] * settings["num_nodes"] > 1:
        raise UserError("contenders are compared on one device; leave --devices at 1")
    if not list_path(exp_dir, "valid").exists():
        prepare_speech(exp_dir, settings)
        make_lists(exp_dir, settings)
    settings = begin_run(folder, settings, settings, MAY_CHANGE)
    for name in chosen:
        if (folder / name / "result.json").exists():
            print(f"  {name}: done before")
            continue
        print(f"  {name}: training", flush=True)
        train_apart(exp_dir, settings, name)
        write_comparison(folder, settings)
    results = write_comparison(folder, settings)
    print(f"\n{(folder / 'comparison.md').read_text(encoding='utf-8')}\n  all of it: {folder}")
    if all("error" in result for result in results.values()):
        raise UserError("no contender could be trained; the table says why")


def train_apart(exp_dir, settings, name):
    """`train_contender` in a process of its own, which may fail; error.txt says why then."""
    error = Path(exp_dir) / "comparison" / name / "error.txt"
    error.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=_contend, args=(exp_dir, settings, name, error)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()  # inherits that, as Ctrl-C is for this process
    signal.signal(signal.SIGINT, before)
    try:
        process.join()
    except KeyboardInterrupt:
        process.kill()
        raise
    if process.exitcode < 0:
        killer = signal.Signals(-process.exitcode).name
        _write(error, f"it was ended by {killer}, often for lack of memory")
    if error.exists():
        print(f"  {name} failed: {error.read_text(encoding='utf-8')}", flush=True)


def _contend(exp_dir, settings, name, error_file):
    parent = multiprocessing.parent_process()  # it does not outlive that
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        train_contender(exp_dir, settings, name)
    except UserError as error:
        _write(error_file, sentence(error))
    except Exception as error:
        traceback.print_exc()
        _write(error_file, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _write(path, text):
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def train_contender(exp_dir, settings, name):
    """Trains a contender until both budgets are used, or continues to; writes result.json.

    Args:
        exp_dir (str or Path): Folder of the run.
        settings (dict): Of the run.
        name (str): One of those that `choose` gives.
    """
    from ..training import build_system, build_trainer, fit  # late: Lightning takes seconds
    from .milestones import Points

    folder = Path(exp_dir) / "comparison" / name
    conf = {
        **settings,
        "steps_per_epoch": math.ceil(settings["budget_steps"] / settings["budget_points"]),
        "warmup_steps": settings["budget_steps"] // 10,
        "cooldown_steps": 0,
    }
    torch.manual_seed(settings["seed"])
    model = build_contender(name, settings)
    with torch.device("meta"):
        shapes = build_contender(name, settings)
    macs = count_macs(shapes)
    system = build_system(model, open_training(exp_dir, settings), None, conf)
    points = Points(open_list(exp_dir, settings, "valid"), conf, steps_of_points(conf))
    sweep(folder / "checkpoints")
    trainer = build_trainer(folder, conf, [points], max_epochs=-1, limit_val_batches=0)
    fit(trainer, system, folder)
    result = {
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs_per_second": macs,
        **points.result(),
    }
    _write(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_comparison(folder, settings):
    """Writes what the contenders have come to: comparison.json, .md and .svg.

    Args:
        folder (Path): With a folder for each contender.
        settings (dict): Of the comparison.

    Returns:
        dict: By contender what its result.json holds, or "error".
    """
    groups = {"models": [*PRESETS, *PEERS], "variants": [*ablations(settings), *MASKERS]}
    results = {}
    for name in (name for names in groups.values() for name in names):
        for path in (folder / name / "result.json", folder / name / "error.txt"):
            if path.exists():
                results[name] = _read_result(path)
                break
    groups = {group: [n for n in names if n in results] for group, names in groups.items()}
    groups = {group: names for group, names in groups.items() if names}
    whole = {"settings": without_paths(settings), "groups": groups, "contenders": results}
    pictures = [draw({name: results[name] for name in names}) for names in groups.values()]
    texts = {
        "json": json.dumps(whole, indent=1, allow_nan=False) + "\n",
        "svg": side_by_side(pictures),
        "md": format_comparison(whole),
    }
    for suffix, text in texts.items():
        _write(folder / f"comparison.{suffix}", text)
    return results


def _read_result(path):
    if path.suffix == ".txt":
        return {"error": path.read_text(encoding="utf-8")}
    return read_json(path, RESULT, "run stage 6 again")


def format_comparison(whole):
    """The tables of a comparison, and what a reader must know of them.

    Args:
        whole (dict): As comparison.json holds it.

    Returns:
        str: Markdown.
    """
    settings, results = whole["settings"], whole["contenders"]
    devices = {result["device"] for result in results.values() if "device" in result}
    parts = ["# Comparison"]
    parts += [NOTES.format(measured_on="; ".join(sorted(devices)) or "nothing yet", **settings)]
    for group, names in whole["groups"].items():
        base = results.get(BASE) if group == "variants" else None
        rows = [_row(name, results[name], settings, base) for name in names]
        titles = list(dict.fromkeys(title for row in rows for title in row))
        table = markdown([{title: row.get(title, "") for title in titles} for row in rows])
        parts += [f"## {group.capitalize()}", table]
    return "\n\n".join(parts) + "\n"


def _row(name, result, settings, base):
    """A row of the table: texts by column; with a base the difference to it."""
    if "error" in result:
        return {"": name, "parameters": f"failed: {result['error']}"}
    row = {
        "": name,
        "parameters": f"{result['n_parameters']:,}",
        "GMAC/s": f"{result['macs_per_second'] / 1e9:.2f}",
        "s a step": f"{result['step_seconds']:.3g}",
        "MB": f"{result['step_memory'] / 1e6:.0f}",
    }
    at_steps, in_time = budget_points(result, settings)
    for point in at_steps:
        row[f"{point['steps']} steps"] = _cell(point["si_sdr_i"], point["low"], point["high"])
    if in_time:
        cell = _cell(in_time["si_sdr_i"], in_time["low"], in_time["high"])
        row[f"{settings['budget_minutes']:g} min"] = f"{cell} ({in_time['steps']} steps)"
    if base and "error" not in base and base is not result:
        other = budget_points(base, settings)[0][-1]
        difference = [a - b for a, b in zip(at_steps[-1]["values"], other["values"])]
        row[f"against base at {other['steps']} steps"] = _cell(
            *mean_interval(difference, result["speakers"]), sign="+"
        )
    return row


def _cell(mean, low, high, sign=""):
    interval = "" if low is None else f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"{mean:{sign}.2f}{interval}"


def steps_of_points(settings):
    """At how many steps a contender is measured (set of int)."""
    count = settings["budget_points"]
    return {round(k * settings["budget_steps"] / count) for k in range(1, count + 1)}


def budget_points(result, settings):
    """The points of a contender at shares of the steps, and that where the time was used.

    Args:
        result (dict): As result.json holds it.
        settings (dict): Of the comparison.

    Returns:
        tuple: List of points, and a point; None without a budget of time.
    """
    steps = steps_of_points(settings)
    seconds = 60 * settings["budget_minutes"]
    in_time = [point for point in result["points"] if point["seconds"] >= seconds]
    at_steps = [point for point in result["points"] if point["steps"] in steps]
    return at_steps, in_time[0] if seconds else None


def draw(results):
    """SI-SDRi against device time, of the contenders of a group (SVG as text)."""
    curves = {name: result["points"] for name, result in results.items() if "points" in result}
    points = [point for curve in curves.values() for point in curve]
    bounds = [p[key] for p in points for key in ("low", "high", "si_sdr_i") if p[key] is not None]
    minutes = [point["seconds"] / 60 for point in points] or [1, 10]
    room = [max(bounds, default=1) * 1.25]  # for the names
    axes = Axes(minutes, [*bounds, *room], "device time (min)", "SI-SDRi (dB)", log="x")
    for k, (name, curve) in enumerate(curves.items()):
        colour = k % len(COLOURS)
        xs, ys = [p["seconds"] / 60 for p in curve], [p["si_sdr_i"] for p in curve]
        axes.line(xs, ys, name, colour)
        titles = [f"{name}, {p['steps']} steps: {p['si_sdr_i']:.2f} dB" for p in curve]
        axes.dots(xs, ys, titles, colour=colour)
        for x, p in zip(xs, curve):
            if p["low"] is not None:
                axes.upright(x, p["low"], p["high"], colour=colour)
    return axes.svg()
