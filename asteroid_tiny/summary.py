"""The summary of an evaluation: means of the metrics with intervals, and as a table.

The intervals are percentile bootstrap intervals (Efron & Tibshirani, *An Introduction to the
Bootstrap*, 1993) that draw speaker pairs, not mixtures: those of one pair are alike, and counting
each as news would promise too much.
"""

import textwrap

import numpy as np
import pandas as pd

from .errors import UserError
from .files import has_shape, read_json

# No SAR of the input: a sum of sources has no artifacts, its SAR is rounding noise near 280 dB.
METRICS = ("input_si_sdr", "si_sdr", "si_sdr_i", "input_sdr", "sdr", "sdr_i")
METRICS += ("input_sir", "sir", "sir_i", "sar", "input_stoi", "stoi", "stoi_i")
DRAWS, MIN_PAIRS = 2000, 3  # of the bootstrap
#: Measured too, `SPARE` where the model gives more estimates than there are sources.
SNR, SPARE = "snr", "spare_level"
#: What the bootstrap draws, by the number of speakers in a mixture; of more they are groups.
UNITS = {1: "speaker", 2: "speaker pair", 3: "speaker triple"}
GROUP = "speaker group"  # of more
NUMBER = (int, float)
COUNTS = dict.fromkeys(("n_mixtures", "n_speakers", "n_speaker_pairs"), int)
MEAN = {**dict.fromkeys(("mean", "low", "high"), (*NUMBER, type(None))), "n_missing": int}
#: Of a summary, as far as it is shown.
SHAPE = {
    **COUNTS,
    "sample_rate": NUMBER,
    "bootstrap": {"unit": str, "draws": int},
    "groups": {"all": dict},
}


def summarise(table, sample_rate, seed=0):
    """Means and 95 % bootstrap intervals of the metrics, for all mixtures and for groups of them.

    Args:
        table (pandas.DataFrame): `metrics.csv` as read by pandas.
        sample_rate (int): In Hz, to be noted.
        seed (int): Of the bootstrap.

    Returns:
        dict: Plain JSON. `groups` holds those of "all", "different gender", "same gender",
        "gender unknown" and "same production" that have mixtures; each counts `n_mixtures`,
        `n_speakers` and `n_speaker_pairs` (of three speakers: triples), and gives for each metric
        `mean`, `low`, `high` and `n_missing`. None stands for what cannot be given: a mean of
        nothing, an interval over fewer than 3 speaker pairs. `snr` and `spare_level` are there
        if the table has them.
    """
    table = table.assign(speakers=table.speakers.astype(str))  # one alone may be read as a number
    genders = table.genders.str.split().map(set)
    unknown = genders.map(lambda them: "unknown" in them)
    masks = {
        "all": pd.Series(True, table.index),
        "different gender": ~unknown & (genders.map(len) > 1),
        "same gender": ~unknown & (genders.map(len) == 1),
        "gender unknown": unknown,
        "same production": table.same_production.notna(),
    }
    groups = {name: _summarise(table[mask], seed) for name, mask in masks.items() if mask.any()}
    counts = {name: groups["all"][name] for name in ("n_mixtures", "n_speakers", "n_speaker_pairs")}
    unit = UNITS.get(len(table.speakers.iloc[0].split()), GROUP)
    bootstrap = {"unit": unit, "level": 0.95, "draws": DRAWS, "seed": seed}
    return {**counts, "sample_rate": sample_rate, "bootstrap": bootstrap, "groups": groups}


def _summarise(table, seed):
    speakers = table.speakers.str.split()
    pairs = speakers.map(lambda names: " ".join(sorted(names)))
    summary = {"n_mixtures": len(table), "n_speakers": speakers.explode().nunique()}
    summary["n_speaker_pairs"] = pairs.nunique()
    measured = [metric for metric in (*METRICS, SNR, SPARE) if metric in table]
    for metric, low, high in _intervals(table[measured], pairs, seed):
        n_missing = int(table[metric].isna().sum())
        mean = float(table[metric].mean()) if n_missing < len(table) else None
        summary[metric] = {"mean": mean, "low": low, "high": high, "n_missing": n_missing}
    return summary


def _intervals(values, pairs, seed):
    """Yields (metric, low, high): 95 % of the means when speaker pairs are drawn anew."""
    by_pair = values.groupby(pairs)
    sums, counts = by_pair.sum(), by_pair.count()  # of what is not missing
    n_pairs = len(sums)
    rng = np.random.default_rng(seed)
    times_drawn = rng.multinomial(n_pairs, np.full(n_pairs, 1 / n_pairs), size=DRAWS).astype(float)
    for metric in values:
        if (counts[metric] > 0).sum() < MIN_PAIRS:
            yield metric, None, None
        else:
            drawn = times_drawn @ counts[metric].to_numpy()
            means = (times_drawn @ sums[metric].to_numpy())[drawn > 0] / drawn[drawn > 0]
            yield metric, *np.percentile(means, (2.5, 97.5)).tolist()


def mean_interval(values, speakers, seed=0):
    """The mean of a metric over mixtures, with its 95 % bootstrap interval over speaker pairs.

    Args:
        values (list of float): One a mixture.
        speakers (list of tuple of str): Who speaks in each mixture.
        seed (int): Of the bootstrap.

    Returns:
        tuple of float: Mean, low and high; None for both bounds of fewer than 3 speaker pairs.

    Examples:
        >>> mean, low, high = mean_interval([1, 2, 3], [("a", "b"), ("b", "a"), ("c", "a")])
        >>> mean, low, high
        (2.0, None, None)
    """
    pairs = pd.Series([" ".join(sorted(names)) for names in speakers])
    table = pd.DataFrame({"value": values}, dtype=float)
    ((_, low, high),) = _intervals(table, pairs, seed)
    return float(table.value.mean()), low, high


def is_summary(found):
    """Whether plain data are what `summarise` gives, as far as it is shown."""
    if not has_shape(found, SHAPE) or found["bootstrap"]["unit"] not in (*UNITS.values(), GROUP):
        return False
    groups = list(found["groups"].values())
    if not has_shape(groups, [{**COUNTS, **dict.fromkeys(METRICS, MEAN)}]):
        return False
    return has_shape([g[key] for g in groups for key in (SNR, SPARE) if key in g], [MEAN])


def read_summary(path):
    """A summary.json of an evaluation.

    Raises:
        UserError: If it is missing or broken.
    """
    summary = read_json(path, dict, "run stage 3")
    if not is_summary(summary):
        raise UserError(f"{path} is no summary of an evaluation; delete it and run stage 3")
    return summary


def main_metric(table):
    """What mixtures are ranked by (str): SI-SDRi, or of single speakers, which have none, SI-SDR.

    Args:
        table (pandas.DataFrame): `metrics.csv` as read by pandas.
    """
    return "si_sdr_i" if table.si_sdr_i.notna().any() else "si_sdr"


def format_table(summary):
    """The summary as a plain-text table of at most 100 columns.

    Args:
        summary (dict): What `evaluate` returns.

    Returns:
        str: One line a group; under it how the intervals were made, and what is missing.
    """
    rows, units = [], units_of(summary)
    for group in summary["groups"].values():
        low, high = (_cell(group, "si_sdr_i", 2, bound) for bound in ("low", "high"))
        interval = f"[too few {units}]" if low == "-" else f"[{low}, {high}]"
        if group["si_sdr_i"]["mean"] is None:
            interval = ""
        row = {"n": group["n_mixtures"], units: group["n_speaker_pairs"]}
        row["SI-SDR in"] = _cell(group, "input_si_sdr", 2)
        row["SI-SDRi [95 % interval]"] = f"{_cell(group, 'si_sdr_i', 2)} {interval}"
        row |= {m.upper().replace("_I", "i"): _cell(group, m, 1) for m in ("sdr_i", "sir", "sar")}
        row["STOI in -> out"] = f"{_cell(group, 'input_stoi', 2)} -> {_cell(group, 'stoi', 2)}"
        rows.append(row)
    table = pd.DataFrame(rows, index=list(summary["groups"])).to_string()
    return "\n".join([table, *textwrap.wrap(" ".join(_notes(summary)), 99)])


def _notes(summary):
    """Sentences under the table."""
    whole, n_speakers = summary["groups"]["all"], summary["n_speakers"]
    unit, draws = (summary["bootstrap"][key] for key in ("unit", "draws"))
    single = unit == UNITS[1]
    if SPARE in whole:
        level, low, high = (_cell(whole, SPARE, 1, what) for what in ("mean", "low", "high"))
        interval = "" if low == "-" else f" [{low}, {high}]"
        yield (
            "The model gives more estimates than there are speakers: those of speakers have an "
            f"SI-SDR of {_cell(whole, 'si_sdr', 2)} dB, the loudest other one lies at {level} dB"
            f"{interval} re the loudest of all."
        )
    if whole.get(SNR, {}).get("mean") is not None:
        snr = _cell(whole, SNR, 2)
        yield f"With one gain for all estimates of a mixture their SNR is {snr} dB."
    yield "All in dB but STOI. Intervals: percentile bootstrap over the"
    if single:
        yield f"{n_speakers} speakers, drawn {draws} times."
    else:
        yield (
            f"{summary['n_speaker_pairs']} {unit}s (made of {n_speakers} speakers), drawn {draws} "
            f"times; {units_of(summary)} share speakers, so new speakers may differ by more."
        )
    missing = {m: whole[m]["n_missing"] for m in ("si_sdr_i", "sdr_i", "stoi_i")}
    if any(missing.values()) and not single:
        told = ", ".join(f"{m} {n}" for m, n in missing.items() if n)
        yield f"Mixtures that no mean counts, since it cannot be computed: {told}."


def units_of(summary):
    """What the bootstrap draws: "speakers", "pairs", "triples" or "groups" (str)."""
    return f"{summary['bootstrap']['unit'].split()[-1]}s"


def _cell(group, metric, digits, what="mean"):
    value = group[metric][what]
    return "-" if value is None else f"{value:.{digits}f}"
