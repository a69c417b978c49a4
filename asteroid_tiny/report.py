"""The page of an evaluation: one file, to be opened from disk, with table, plots and players.

It is made of what `evaluate` left in a folder, so that it can be made anew at any time.
"""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from .errors import UserError, printable
from .evaluation import example_name
from .files import whole_file
from .plots import Axes, loudest, side_by_side, spectrogram
from .summary import format_table, read_summary, units_of

STYLE = """
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.45 system-ui, sans-serif;
  color: #222; background: #fff; }
h1 { font-size: 1.5rem; margin: .3em 0; } h2 { font-size: 1.15rem; margin: 1.8em 0 .4em; }
h3 { font-size: 1rem; margin: 1.4em 0 .3em; } p { margin: .3em 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem),
  1fr)); } .grid.tracks { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; color: #555; }
svg, img, audio { display: block; width: 100%; } img { height: 7.5rem; border-radius: 3px; }
audio { height: 2.2rem; margin-top: .3rem; }
.note, footer { font-size: .85rem; color: #555; white-space: pre-line; }
footer { margin-top: 2.5em; border-top: 1px solid #ddd; padding-top: .6em; }
"""
WORDS, NUMBERS = ("mixture_id", "speakers", "genders"), ("input_si_sdr", "si_sdr", "si_sdr_i")
COLUMNS = {  # of the table: metric, title, digits
    "si_sdr_i": ("SI-SDRi", 2),
    "input_si_sdr": ("SI-SDR in", 2),
    "sdr_i": ("SDRi", 1),
    "sir": ("SIR", 1),
    "sar": ("SAR", 1),
    "input_stoi": ("STOI in", 2),
    "stoi": ("STOI", 2),
}


def write_report(results, title, credits="", curves=()):
    """Writes `report.html` into a folder of results.

    Args:
        results (str or Path): Folder with `metrics.csv`, `summary.json` and `examples/`.
        title (str): What was evaluated.
        credits (str): Whom the licences of the audio ask to name.
        curves (list of str): Pictures of the training as SVG.

    Returns:
        Path: The page.

    Raises:
        UserError: If there are no results, or the page cannot be written.
    """
    results = Path(results)
    summary = read_summary(results / "summary.json")
    kinds = {**dict.fromkeys(WORDS, str), **dict.fromkeys(NUMBERS, float)}
    empty = dict.fromkeys(NUMBERS, [""])  # NA is a word like others
    table = _read_table(
        results / "metrics.csv",
        dtype=kinds,
        usecols=[*kinds],
        keep_default_na=False,
        na_values=empty,
    )
    measured = table[table.si_sdr_i.notna()]  # none of single speakers
    plots = [plot(measured) for plot in (_histogram, _against_input, _by_genders) if len(measured)]
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>SI-SDRi is the improvement over the mixture in dB, the mean of "
        f"{summary['n_mixtures']} mixtures of {summary['n_speakers']} speakers at "
        f"{summary['sample_rate'] / 1000:g} kHz, with its 95 % interval.</p>",
        _table(summary),
        f'<p class="note">{html.escape(_notes(summary))}</p>',
        _figures("How much better", plots),
        _figures("Training", [(picture, "") for picture in curves]),
        "<h2>To see and hear</h2>",
        *(_example(folder, table) for folder in _in_order(results / "examples")),
        f"<footer>{html.escape(credits)}</footer>" if credits else "",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )
    with whole_file(results / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    return results / "report.html"


def _read_table(path, **options):
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise _broken(path, error, path.parent) from None


def _read_track(path):
    try:
        return soundfile.read(path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise _broken(path, error, path.parents[2]) from None


def _broken(path, error, folder):
    return UserError(
        f"{path} is missing or broken ({printable(error)}); delete {folder} and run again"
    )


def _table(summary):
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS.values())
    rows = []
    for name, group in summary["groups"].items():
        cells = [name]
        for metric, (_, digits) in COLUMNS.items():
            found = group[metric]
            cell = "-" if found["mean"] is None else f"{found['mean']:.{digits}f}"
            if metric == "si_sdr_i" and found["low"] is not None:
                cell = f"<b>{cell}</b> [{found['low']:.2f}, {found['high']:.2f}]"
            cells.append(cell)
        cells += [group["n_mixtures"], group["n_speaker_pairs"]]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head += f"<th>mixtures</th><th>{units_of(summary)}</th>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _notes(summary):
    lines = format_table(summary).splitlines()[len(summary["groups"]) + 1 :]
    return " ".join(lines)


def _figures(title, pictures):
    if not pictures:
        return ""
    figures = [
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for svg, caption in pictures
    ]
    return f'<h2>{title}</h2>\n<div class="grid">{"".join(figures)}</div>'


def _histogram(table):
    values = table.si_sdr_i.to_numpy()
    low, high = np.floor(values.min()), np.ceil(values.max() + 1e-9)
    edges = np.linspace(low, high, int(np.clip(high - low, 4, 30)) + 1)
    counts, _ = np.histogram(values, edges)
    axes = Axes(edges, [0, counts.max()], "SI-SDRi (dB)", "mixtures")
    axes.bars(edges, counts)
    worse = (values < 0).mean()
    return axes.svg(), f"{100 * worse:.0f} % of the mixtures became worse."


def _against_input(table):
    axes = Axes(table.input_si_sdr, table.si_sdr_i, "SI-SDR of the mixture (dB)", "SI-SDRi (dB)")
    kinds = table.genders.map(_kind)
    for colour, kind in enumerate(sorted(kinds.unique())):
        rows = table[kinds == kind]
        titles = [f"{i}: {x:.1f} dB" for i, x in zip(rows.mixture_id, rows.si_sdr_i)]
        axes.dots(rows.input_si_sdr, rows.si_sdr_i, titles, kind, colour)
    return axes.svg(), "Each mixture by how hard it was."


def _kind(genders):
    found = set(genders.split())
    return "unknown" if "unknown" in found else "same gender" if len(found) == 1 else "different"


def _by_genders(table):
    pairs = table.genders.map(lambda genders: " ".join(sorted(genders.split())))
    names = sorted(pairs.unique())
    axes = Axes(
        table.si_sdr_i, [], "SI-SDRi (dB)", "", y_names=[n.replace(" ", "+") for n in names]
    )
    for k, name in enumerate(names):
        rows = table[pairs == name]
        spread = 0.55 * ((np.arange(len(rows)) * 0.618) % 1 - 0.5)  # apart, and always alike
        titles = [f"{i}: {x:.1f} dB" for i, x in zip(rows.mixture_id, rows.si_sdr_i)]
        axes.dots(rows.si_sdr_i, k + spread, titles, colour=k % 4)
        median = rows.si_sdr_i.median()
        axes.upright(median, k - 0.4, k + 0.4, f"median {median:.1f} dB")
    return axes.svg(), "Each mixture by the genders of its speakers; strokes are medians."


def _in_order(folder):
    ranks = ("best", "median", "worst")
    folders = [path for path in folder.glob("*_*") if path.is_dir()]

    def place(path):
        rank = path.name.partition("_")[0]
        return (ranks.index(rank) if rank in ranks else len(ranks)), path.name

    return sorted(folders, key=place)


def _example(folder, table):
    """The spectrograms and players of one mixture, all in one scale of colours."""
    rank, _, name = folder.name.partition("_")
    rows = table[table.mixture_id.map(example_name) == name]
    about = ""
    if len(rows):
        row = rows.iloc[0]
        before = "" if np.isnan(row.input_si_sdr) else f"{row.input_si_sdr:.1f} → "
        about = f": SI-SDR {before}{row.si_sdr:.1f} dB, {row.speakers}"
    tracks = {path.stem: _read_track(path) for path in folder.glob("*.wav")}
    top = loudest(samples for samples, _ in tracks.values())
    titles = {"mixture": "mixture"}
    for prefix, title in (("s", "speaker"), ("estimate_", "estimate")):
        names = sorted(name for name in tracks if re.fullmatch(rf"{prefix}\d+", name))
        titles |= {name: f"{title} {name.removeprefix(prefix)}" for name in names}
    figures = [_track(title, *tracks[key], top) for key, title in titles.items()]
    return (
        f"<h3>{html.escape(rank)}{html.escape(about)}</h3>\n"
        f'<div class="grid tracks">{"".join(figures)}</div>'
    )


def _track(title, samples, sample_rate, top):
    flac = io.BytesIO()  # which all browsers play
    soundfile.write(flac, samples, sample_rate, format="FLAC", subtype="PCM_16")
    picture, sound = map(_encode, (spectrogram(samples, top), flac.getvalue()))
    return (
        f'<figure><figcaption>{title}</figcaption><img alt="spectrogram of {title}" '
        f'src="data:image/png;base64,{picture}"><audio controls preload="metadata" '
        f'src="data:audio/flac;base64,{sound}"></audio></figure>'
    )


def _encode(data):
    return base64.b64encode(data).decode()


def training_curves(exp_dir):
    """Loss, validation SI-SDR and learning rate of a training, from its CSV logs.

    Args:
        exp_dir (str or Path): Folder of the run.

    Returns:
        list of str: Pictures as SVG, none if there is no log.
    """
    logs = Path(exp_dir).glob("logs/*/metrics.csv")
    logs = sorted(logs, key=lambda log: (len(log.parent.name), log.parent.name))  # 2 before 10
    logs = [log for log in logs if log.stat().st_size]  # none of a run killed early
    tables = [_read_table(log, dtype=float) for log in logs]
    tables = [table for table in tables if {"step", "si_sdr"} <= {*table}]
    if not tables:
        return []
    log = pd.concat(tables)
    pictures = []
    trained, validated = (_series(log, name) for name in ("si_sdr", "val_si_sdr"))
    smooth = trained.rolling(25, min_periods=1).mean()
    both = [*smooth, *validated]
    axes = Axes(log.step, both, "step", "SI-SDR (dB), loss is its negative")
    axes.line(smooth.index, smooth, "training, mean of 25 entries", 0, faint=True)
    axes.line(validated.index, validated, "validation", 1)
    pictures.append(axes.svg())
    rates = [name for name in log if name.startswith("lr-")]
    if rates:
        rate = _series(log, rates[0])
        axes = Axes(log.step, [0, *(1e3 * rate)], "step", "learning rate (1/1000)")
        axes.line(rate.index, 1e3 * rate, colour=2)
        pictures.append(axes.svg())
    return pictures


def write_curves(exp_dir):
    """Writes `training.svg` into the folder of a run, if it was trained there."""
    pictures = training_curves(exp_dir)
    if pictures:
        with whole_file(Path(exp_dir) / "training.svg") as part:
            part.write_text(side_by_side(pictures), encoding="utf-8")


def _series(log, name):
    if name not in log:
        return pd.Series(dtype=float)
    return log.dropna(subset=name).groupby("step")[name].last()
