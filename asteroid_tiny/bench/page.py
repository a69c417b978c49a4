"""The benchmark's page: tables as Markdown and two plots, of the figures that were measured."""

from ..files import whole_file
from ..models import PRESETS
from ..plots import Axes
from ..tables import markdown, number, percent
from .measure import BUDGET, MATRIX, MEMORY_SHARE, MOST_RUNS
from .peers import PEERS
from .published import quality_plot, quality_words

BASELINE, SMALL_PEER = "speechbrain-sepformer", "speechbrain-re-sepformer"
TITLES = {
    "speechbrain-sepformer": "SpeechBrain SepFormer",
    "speechbrain-re-sepformer": "SpeechBrain RE-SepFormer",
    "conv-tasnet": "Asteroid ConvTasNet",
    "dprnn": "Asteroid DPRNNTasNet",
    "dptnet": "Asteroid DPTNet",
    "sudormrf": "Asteroid SuDORMRFImproved",
}
LIMITS_NOTE = (
    "“not tried (..)” is what a measurement would take, in proportion to the next shorter length, "
    "where that is over the limit."
)


def write_page(folder, about, measured):
    """Writes benchmark.md, cost.svg and quality.svg.

    Args:
        folder (Path): Where to.
        about (dict): The machine and what was asked for, see `benchmark.benchmark`.
        measured (list of dict): Each a `task` and its `rows`.

    Returns:
        Path: The page.
    """
    figures = Figures(about, measured)
    counted = figures.counted()
    pictures = {"cost": cost_plot(figures), "quality": quality_plot(counted)}
    for name, picture in pictures.items():
        if picture:
            with whole_file(folder / f"{name}.svg") as part:
                part.write_text(picture, encoding="utf-8")
    sections = [
        introduction(figures),
        "## Inference\n\n" + inference_table(figures),
        "## Cost against length\n\n" + length_table(figures),
        pictures["cost"] and "![CPU seconds per second of audio against length](cost.svg)",
        "## Training step\n\n" + training_table(figures),
        "## Ratios to SpeechBrain's SepFormer\n\n" + ratio_table(figures),
        forms_table(figures) and "## Other forms\n\n" + forms_table(figures),
        gpu_table(figures) and "## On a GPU\n\n" + gpu_table(figures),
        "## Mixing on the fly\n\n" + mixing_words(figures),
        pictures["quality"]
        and "## Quality of the papers against cost\n\n" + quality_words(counted),
        failures(figures),
    ]
    with whole_file(folder / "benchmark.md") as part:
        part.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return folder / "benchmark.md"


class Figures:
    """The figures, to be asked by model, kind and length; what is not there is an empty row."""

    def __init__(self, about, measured):
        self.about = about
        self.models = about["models"]
        self.reference = about["reference"]
        self.longest = about["lengths"][-1]
        self.by_task = {(e["task"].get("name"), e["task"]["kind"]): e["rows"] for e in measured}

    def row(self, name, kind, **where):
        """The first row in which the keys have the values of `where` (dict)."""
        for row in self.by_task.get((name, kind), []):
            if all(row.get(key) == value for key, value in where.items()):
                return row
        return {}

    def at_reference(self, name, kind):
        return self.row(name, kind, length=self.reference)

    def size(self, name):
        """Parameters, bytes and operations of a model, which are of no length (dict)."""
        rows = [r for r in self.by_task.get((name, "inference"), []) if "length" not in r]
        return {key: value for row in rows for key, value in row.items()}

    def counted(self):
        """1e9 multiply-accumulates for a second of audio, by model (dict)."""
        sizes = {name: self.size(name) for name in self.models}
        return {n: s["macs_per_s"] / 1e9 for n, s in sizes.items() if "macs_per_s" in s}

    def ratio(self, name, kind, key, of=BASELINE, of_kind=None, of_key=None):
        """A figure at the reference length over that of another model, or None."""
        own = self.at_reference(name, kind).get(key)
        other = self.at_reference(of, of_kind or kind).get(of_key or key)
        return own / other if own and other else None

    def of_matrix_rate(self, name):
        """The fraction of the matrix products' rate that inference reaches, or None."""
        row, rate = self.at_reference(name, "inference"), self.row(None, "machine", dtype="float32")
        macs = self.size(name).get("macs_per_s")
        if not macs or "cpu_s" not in row or "flops" not in rate:
            return None
        return 2 * macs * row["length"] / row["cpu_s"] / rate["flops"]


def introduction(figures):
    """What was measured, on what and how."""
    about = figures.about
    rates = []
    for dtype in ("float32", "bfloat16"):
        if row := figures.row(None, "machine", dtype=dtype):
            rows = "" if row.get("size", MATRIX) == MATRIX else f" ({row['size']} rows)"
            rates.append(f"{row['flops'] / 1e9:.3g} GFLOP/s in {dtype}{rows}")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    text = (
        f"{about['cpu']}, {about['cores']} cores; {' '.join(about['flags']) or 'no vector flags'}; "
        f"{about['gpu'] or 'no GPU'}; {versions}.\n"
        f"One thread multiplies matrices of {MATRIX} rows at {' and '.join(rates) or '?'}.\n\n"
        "Mixtures of two speakers at 8 kHz, one at a time, on one thread, untrained weights. CPU s "
        "are those of the process, of the fastest of several runs: at least two up to 4 s of "
        f"audio, and more until they have taken {BUDGET:g} s or are {MOST_RUNS}. Memory is the "
        "peak over the loaded model. GMAC are 1e9 multiply-accumulates for a second of audio, "
        f"counted in matrix products and convolutions. Limits: {about['limit']:g} s for a run and "
        f"{MEMORY_SHARE * 100:.0f} % of the available memory; {LIMITS_NOTE}"
    )
    recipes = "\n".join(
        f"- {title(name)}: {PEERS[name].recipe}" for name in figures.models if name in PEERS
    )
    missing = "".join(
        f"\nLeft out: {title(name)}, since {package} is not installed.\n"
        for name, package in about["missing"].items()
    )
    return f"# Benchmark\n\n{text}\n{missing}\n{recipes}".rstrip()


def inference_table(figures):
    """Sizes and a forward pass at the reference length."""
    rows = []
    for name in figures.models:
        size, row = figures.size(name), figures.at_reference(name, "inference")
        rows.append(
            {
                "model": title(name),
                "parameters, M": scaled(size, "n_parameters", 1e6),
                "state, MB": scaled(size, "state_bytes", 1e6),
                "GMAC/s": scaled(size, "macs_per_s", 1e9),
                "CPU s": cell(row, "cpu_s"),
                "wall s": cell(row, "wall_s"),
                "real-time factor": scaled(row, "cpu_s", figures.reference),
                "peak, MB": scaled(row, "peak_bytes", 1e6),
                "of matrix rate": percent(figures.of_matrix_rate(name)),
            }
        )
    note = (
        f"{figures.reference:g} s of audio. “of matrix rate”: the share of the matrix products' "
        "rate above that the counted operations reach. PyTorch leaves LSTMs and convolutions to "
        "another library than linear layers, which can be faster."
    )
    return f"{note}\n\n{markdown(rows)}"


def length_table(figures):
    """CPU seconds per second of audio at every length."""
    rows = []
    for name in figures.models:
        row = {"model": title(name)}
        for length in figures.about["lengths"]:
            row[f"{length:g} s"] = scaled(
                figures.row(name, "inference", length=length), "cpu_s", length
            )
        rows.append(row | {ratio_title(figures): number(growth(figures, name))})
        longest = figures.row(name, "inference", length=figures.longest)
        rows[-1][f"peak at {figures.longest:g} s, MB"] = scaled(longest, "peak_bytes", 1e6)
    return f"CPU seconds per second of audio.\n\n{markdown(rows)}"


def ratio_title(figures):
    return f"{figures.longest:g} s / {figures.reference:g} s"


def growth(figures, name):
    """Cost per second of audio at the longest length over that at the reference, or None."""
    long = figures.row(name, "inference", length=figures.longest).get("cpu_s")
    short = figures.at_reference(name, "inference").get("cpu_s")
    return long / figures.longest / (short / figures.reference) if long and short else None


def training_table(figures):
    """Time and memory of a training step."""
    lengths = [length for length in figures.about["lengths"] if length <= figures.reference]
    rows = []
    for name in figures.models:
        row = {"model": title(name)}
        for length in lengths:
            row[f"{length:g} s: CPU s"] = cell(
                figures.row(name, "training", length=length), "cpu_s"
            )
        last = figures.at_reference(name, "training")
        row["wall s"] = cell(last, "wall_s")
        row["peak, MB"] = scaled(last, "peak_bytes", 1e6)
        row["saved, MB"] = scaled(last, "saved_bytes", 1e6)
        row["saved, checkpointed, MB"] = scaled(last, "checkpointed_bytes", 1e6)
        rows.append(row)
    note = (
        "Forward, SI-SDR loss, backward and a step of AdamW. Wall time and memory at "
        f"{figures.reference:g} s. “saved”: unique bytes that autograd keeps for the backward "
        "pass, the same on any device; checkpointed: those at the end of forward and those of the "
        "largest segment that is recomputed (presets alone can)."
    )
    return f"{note}\n\n{markdown(rows)}"


def ratio_table(figures):
    """The presets, and the small peer, relative to SpeechBrain's SepFormer."""
    if BASELINE not in figures.models:
        return "SpeechBrain's SepFormer was not measured."
    rows = []
    for name in figures.models:
        if name not in (*PRESETS, SMALL_PEER):
            continue
        sizes = [figures.size(n).get("state_bytes") for n in (name, BASELINE)]
        saved = dict(of_kind="training", of_key="saved_bytes")
        ratios = {
            "inference": figures.ratio(name, "inference", "cpu_s"),
            "bf16": figures.ratio(name, "bf16", "cpu_s", of_kind="inference"),
            "training step": figures.ratio(name, "training", "cpu_s"),
            "saved": figures.ratio(name, "training", "saved_bytes"),
            "saved, checkpointed": figures.ratio(name, "training", "checkpointed_bytes", **saved),
            "peak": figures.ratio(name, "inference", "peak_bytes"),
            "state": sizes[0] / sizes[1] if all(sizes) else None,
        }
        rows.append({"model": title(name), **{key: number(r, 2) for key, r in ratios.items()}})
    note = (
        f"At {figures.reference:g} s, in CPU seconds and bytes; below 1 is less than SpeechBrain's "
        "SepFormer takes. bf16 is compared with its fp32."
    )
    return f"{note}\n\n{markdown(rows)}"


def forms_table(figures):
    """The presets in fp32, bf16, ONNX and int8 side by side."""
    rows = []
    for name in (name for name in figures.models if name in PRESETS):
        forms = {form: figures.row(name, "onnx", form=form) for form in ("fp32", "int8")}
        rows.append(
            {
                "model": title(name),
                "PyTorch fp32": cell(figures.at_reference(name, "inference"), "cpu_s"),
                "PyTorch bf16": cell(figures.at_reference(name, "bf16"), "cpu_s"),
                "ONNX fp32": cell(forms["fp32"], "cpu_s"),
                "ONNX int8": cell(forms["int8"], "cpu_s"),
                "fp32 file, MB": scaled(forms["fp32"], "bytes", 1e6),
                "int8 file, MB": scaled(forms["int8"], "bytes", 1e6),
                "int8 to fp32, dB": cell(forms["int8"], "si_sdr"),
            }
        )
    note = (
        f"CPU seconds for {figures.reference:g} s of audio; bf16 by autocast, ONNX in onnxruntime. "
        "“int8 to fp32”: SI-SDR of the estimates of a real mixture, with untrained weights."
    )
    return rows and f"{note}\n\n{markdown(rows)}"


def gpu_table(figures):
    """A training step on a GPU."""
    rows = []
    for name in figures.models:
        row, compiled = (figures.row(name, "gpu", compiled=flag) for flag in (False, True))
        if row:
            rows.append(
                {
                    "model": title(name),
                    "step, ms": scaled(row, "step_s", 1e-3),
                    "compiled, ms": scaled(compiled, "step_s", 1e-3),
                    "peak, MB": scaled(row, "peak_bytes", 1e6),
                    "largest batch": f"{row['largest_batch']}" if "largest_batch" in row else "-",
                }
            )
    note = (
        f"Training under bf16 autocast, mixtures of {figures.reference:g} s, one at a time: mean "
        "of ten steps by CUDA events, the same with torch.compile, peak of allocated memory, "
        "largest batch that fits."
    )
    return rows and f"{note}\n\n{markdown(rows)}"


def mixing_words(figures):
    """How fast mixtures are made against how fast training takes them."""
    row = figures.row(None, "mixing")
    if "mixtures_per_s" not in row:
        return "Not measured, which needs the speech of the recipe (stage 0)."
    supply = row["mixtures_per_s"] * row["length"]
    rows = []
    for name in figures.models:
        seconds = figures.at_reference(name, "training").get("cpu_s")
        demand = figures.reference / seconds if seconds else None
        rows.append(
            {
                "model": title(name),
                "trains on, s of audio/s": number(demand),
                "mixer is faster by": number(supply / demand if demand else None),
            }
        )
    return (
        f"One core mixes {row['mixtures_per_s']:.0f} mixtures of {row['length']:g} s a second, "
        f"{supply:.0f} s of audio, as the recipe trains. Training on one core takes:\n\n"
        + markdown(rows)
    )


def cost_plot(figures):
    """CPU seconds per second of audio against length (SVG)."""
    lines = {}
    for name in figures.models:
        rows = [figures.row(name, "inference", length=n) for n in figures.about["lengths"]]
        rows = [row for row in rows if "cpu_s" in row]
        if rows:
            lines[name] = [r["length"] for r in rows], [r["cpu_s"] / r["length"] for r in rows]
    if not lines:
        return None
    xs, ys = (sum((list(line[i]) for line in lines.values()), []) for i in (0, 1))
    axes = Axes(xs, ys, "length (s)", "CPU seconds per second of audio", log="xy", right=135)
    colours = {name: 0 if name in PRESETS else 1 for name in lines}
    for name, (x, y) in lines.items():
        axes.line(x, y, colour=colours[name])
    ends = [(x[-1], y[-1]) for x, y in lines.values()]
    names = [title(name).strip("`") for name in lines]
    axes.words(*zip(*ends), names, colours.values())
    return axes.svg()


def failures(figures):
    """What failed and why."""
    lines = [
        f"- {title(name) if name else 'machine'}, {kind}: {row['failed']}"
        for (name, kind), rows in figures.by_task.items()
        for row in rows
        if "failed" in row and name in (*figures.models, None)
    ]
    return "## What failed\n\n" + "\n".join(lines) if lines else None


def title(name):
    """How a model is called in the tables: a preset by its name."""
    return TITLES.get(name, f"`{name}`" if name in PRESETS else name)


def cell(row, key):
    """A figure of a row as text, or why there is none."""
    if row.get(key) is not None:
        return number(row[key])
    return f"not tried ({row['skipped']})" if "skipped" in row else "-"


def scaled(row, key, unit):
    """As `cell`, in another unit."""
    return number(row[key] / unit) if row.get(key) is not None else cell(row, key)
