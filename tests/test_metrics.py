"""Metrics of one mixture, and means and intervals of those of many."""

import itertools

import numpy as np
import pandas as pd
import pytest
from pystoi import stoi

from asteroid_tiny.evaluation import measure
from asteroid_tiny.summary import (
    METRICS,
    format_table,
    is_summary,
    main_metric,
    mean_interval,
    summarise,
)

RNG = np.random.default_rng(0)


def test_the_snr_tells_of_levels_that_si_sdr_leaves_open():
    rng = np.random.default_rng(0)
    sources, noise = rng.normal(size=(2, 2, 8000))
    mixture, estimates = sources.sum(0), sources + 0.1 * noise
    exact, louder, uneven = (
        measure(mixture, sources, gains * estimates, 8000)
        for gains in (1, 5, np.array([[1], [10**-1.5]]))
    )
    assert exact["snr"] == pytest.approx(20, abs=0.2)
    assert louder["snr"] == pytest.approx(exact["snr"], abs=0.2)
    assert uneven["si_sdr"] == pytest.approx(exact["si_sdr"], abs=1e-3)
    assert uneven["snr"] == pytest.approx(10, abs=0.5)  # 20 and 0 dB


def test_stoi_is_that_of_the_sample_rate(clips):
    first, second, *_ = (clip[:16000] / 32768 for clip in clips.values())
    sources = np.stack([first, second])
    estimates = sources + 0.5 * sources[::-1]
    row = measure(sources.sum(0), sources, estimates, 8000)
    wanted = [stoi(source, estimate, 8000) for source, estimate in zip(sources, estimates)]
    assert row["stoi"] == pytest.approx(np.mean(wanted), abs=1e-4)


def test_bss_eval_is_left_out_where_its_filters_fit_anything():
    rng = np.random.default_rng(0)
    for length, there in ((1500, False), (2100, True)):
        sources, noise = rng.normal(size=(2, 2, length))
        row = measure(sources.sum(0), sources, sources + 0.1 * noise, 8000)
        assert np.isfinite([row[m] for m in ("sdr", "sir", "sar")]).all() == there
        assert np.isfinite(row["si_sdr"])


def test_the_snr_in_noise_is_of_estimates_that_sum_to_the_mixture():
    rng = np.random.default_rng(0)
    (first, second, noise) = rng.normal(size=(3, 1500))
    sources = np.stack([first, second])
    row = measure(sources.sum(0) + noise, sources, 3 * (sources + noise / 2), 8000)
    assert row["snr"] == pytest.approx(6.02, abs=0.2)


def test_of_several_spare_estimates_the_loudest_counts():
    source, *spare = np.random.default_rng(0).normal(size=(3, 8000))
    estimates = np.stack([source, 0.1 * spare[0], 0.01 * spare[1]])
    row = measure(source, source[None], estimates, 8000)
    assert row["spare_level"] == pytest.approx(-20, abs=0.5)


def test_of_a_single_speaker_in_noise_the_improvement_is_told():
    rng = np.random.default_rng(0)
    source, noise = rng.normal(size=(2, 1, 8000))
    row = measure((source + noise)[0], source, source + 0.1 * noise, 8000)
    assert row["input_si_sdr"] == pytest.approx(0, abs=0.5)
    assert row["si_sdr_i"] == pytest.approx(20, abs=0.5)


@pytest.mark.parametrize("faint", [1e-5 * RNG.normal(size=8000), np.full(8000, 0.5)])
def test_of_a_source_that_nobody_hears_there_are_no_numbers(faint):
    sources = np.stack([RNG.normal(size=8000), faint])  # a mere offset is no sound either
    row = measure(sources.sum(0), sources, sources + 0.1 * RNG.normal(size=(2, 8000)), 8000)
    assert np.isnan(list(row.values())).all()


def test_the_gain_of_the_snr_is_that_of_all_estimates_the_spare_ones_too():
    source = RNG.normal(size=(1, 8000))
    row = measure(source[0], source, 3 * np.concatenate([source, source]), 8000)
    assert row["snr"] == pytest.approx(6.02, abs=0.01)  # half of it is in the other


def test_a_spare_estimate_may_be_silent():
    source = RNG.normal(size=(1, 8000))
    row = measure(source[0], source, np.concatenate([source, 0 * source]), 8000)
    assert row["spare_level"] == -100


def made_up(n_speakers, n_per_pair=5, scale=1.0):
    """A table of metrics in which every speaker pair has a level of its own."""
    rng = np.random.default_rng(1)
    rows = []
    for a, b in itertools.combinations(range(n_speakers), 2):
        level = rng.normal()
        for turn in range(n_per_pair):
            speakers = f"s{a} s{b}" if turn % 2 else f"s{b} s{a}"
            values = {m: scale * (level + 0.1 * rng.normal()) for m in METRICS}
            about = {"mixture_id": f"{a}-{b}-{turn}", "speakers": speakers, "genders": "m f"}
            rows.append({**about, "same_production": None, **values})
    return pd.DataFrame(rows)


def test_single_speakers_whose_ids_are_numbers_are_counted(tmp_path):
    table = made_up(4, n_per_pair=2)
    table["speakers"], table["genders"] = [19, 26] * (len(table) // 2), "m"
    table.to_csv(tmp_path / "metrics.csv")
    summary = summarise(pd.read_csv(tmp_path / "metrics.csv"), 8000)
    assert summary["n_speakers"] == 2 and summary["bootstrap"]["unit"] == "speaker"


def test_intervals_hold_the_mean_repeat_and_narrow_with_more_pairs():
    widths = []
    for n_speakers in (4, 8, 16):
        table = made_up(n_speakers)
        summary = summarise(table, 8000, seed=3)
        assert summary == summarise(table, 8000, seed=3)
        assert summary != summarise(table, 8000, seed=4)
        found = summary["groups"]["all"]["si_sdr_i"]
        assert found["mean"] == pytest.approx(table.si_sdr_i.mean())
        assert found["low"] < found["mean"] < found["high"]
        widths.append(found["high"] - found["low"])
    assert widths == sorted(widths, reverse=True)


def test_an_interval_is_of_95_percent():
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = mean_interval(list(values), [(f"a{i}", f"b{i}") for i in range(400)])
    half = 1.96 * values.std() / 20
    assert high - low == pytest.approx(2 * half, rel=0.07)
    assert [mean - low, high - mean] == pytest.approx([half, half], rel=0.09)


def test_an_interval_is_of_the_mean_of_mixtures_however_many_a_pair_has():
    speakers = [("a", "b")] * 200 + [(f"c{i}", f"d{i}") for i in range(5)]
    mean, low, high = mean_interval([10.0] * 200 + [0.0] * 5, speakers)
    assert mean == pytest.approx(9.76, abs=0.01) and low <= mean <= high


def test_a_mean_is_of_mixtures_however_many_a_pair_has():
    table = pd.concat([made_up(4), made_up(2, n_per_pair=40)], ignore_index=True)
    found = summarise(table, 8000)["groups"]["all"]
    assert found["n_speaker_pairs"] == 6 and found["n_mixtures"] == 70
    for metric in METRICS:
        assert found[metric]["mean"] == pytest.approx(table[metric].mean())


def test_more_mixtures_of_the_same_pairs_do_not_narrow_the_interval():
    few, many = (summarise(made_up(5, n), 8000)["groups"]["all"]["stoi"] for n in (2, 100))
    assert many["high"] - many["low"] > 0.8 * (few["high"] - few["low"])


def test_an_interval_is_of_what_could_be_computed_however_few_pairs_that_are():
    speakers = [(f"a{i}", f"b{i}") for i in range(20)]  # draws without any of three are left out
    mean, low, high = mean_interval([1.0, 2.0, 3.0] + [np.nan] * 17, speakers)
    assert mean == 2 and 1 <= low < 2 < high <= 3


def test_no_interval_over_one_or_two_pairs():
    table = made_up(3)
    for n_pairs in (1, 2):
        summary = summarise(table[: 5 * n_pairs], 8000)
        assert summary["n_speaker_pairs"] == n_pairs
        assert summary["groups"]["all"]["sdr"]["low"] is None
        assert "[too few pairs]" in format_table(summary)


@pytest.mark.parametrize("more, unit", [("third", "triple"), ("third fourth", "group")])
def test_three_speakers_are_counted_as_triples_and_four_as_groups(more, unit):
    table = made_up(4)
    table.speakers += f" {more}"
    text = " ".join(format_table(summarise(table, 8000)).split())
    n_speakers = 4 + len(more.split())
    assert f"n {unit}s" in text and f"6 speaker {unit}s (made of {n_speakers} speakers)" in text
    assert "pairs" not in text


def test_each_number_of_the_table_is_in_its_column():
    table = made_up(5, n_per_pair=3)
    for k, metric in enumerate([*METRICS, "snr"], 1):
        table[metric] = 11.0 * k
    table["si_sdr_i"] += made_up(5, n_per_pair=3).si_sdr_i
    table.loc[0, "stoi_i"] = np.nan
    found = summarise(table, 8000)["groups"]["all"]["si_sdr_i"]
    values = dict(zip([*METRICS, "snr"], range(11, 200, 11)))
    lines = format_table(summarise(table, 8000)).splitlines()
    wanted = [
        ("n", "30"),
        ("pairs", "10"),
        ("SI-SDR in", f"{values['input_si_sdr']}.00"),
        ("SI-SDRi [95 % interval]", "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found)),
        *((name, f"{values[m]}.0") for name, m in (("SDRi", "sdr_i"), ("SIR", "sir"))),
        ("SAR", f"{values['sar']}.0"),
        ("STOI in -> out", f"{values['input_stoi']}.00 -> {values['stoi']}.00"),
    ]
    names, cells = zip(*wanted)
    assert lines[0].split() == " ".join(names).split()
    assert lines[1].split() == ["all", *" ".join(cells).split()]
    notes = " ".join(lines[3:])
    assert f"their SNR is {values['snr']}.00 dB" in notes
    assert notes.endswith("cannot be computed: stoi_i 1.")


@pytest.mark.parametrize("spoilt", [{}, {"mean": "much"}, 5.0])
def test_a_summary_whose_further_means_are_spoilt_is_none(spoilt):
    summary = summarise(made_up(4).assign(snr=5.0, spare_level=-20.0), 8000)
    assert is_summary(summary)
    for key in ("snr", "spare_level"):
        whole = {**summary["groups"]["all"], key: spoilt}
        assert not is_summary({**summary, "groups": {"all": whole}})


def test_mixtures_are_ranked_by_the_improvement_though_some_have_none():
    table = made_up(3)
    table.loc[0, "si_sdr_i"] = np.nan
    assert main_metric(table) == "si_sdr_i"
    assert main_metric(table.assign(si_sdr_i=np.nan)) == "si_sdr"


@pytest.mark.parametrize("scale", [1.0, 40.0, -40.0])
def test_the_table_fits_a_screen(scale):
    table = made_up(40, n_per_pair=2, scale=scale)
    table.loc[::2, "genders"] = "unknown m"
    table.loc[::3, ["stoi", "stoi_i"]] = np.nan
    table[["stoi", "input_stoi"]] = 0.5
    text = format_table(summarise(table, 8000))
    assert max(map(len, text.splitlines())) <= 100
    for words in ("different gender", "gender unknown", "780 speaker pairs", "40 speakers"):
        assert words in " ".join(text.split())
