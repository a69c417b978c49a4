"""How well a model separates: metrics of every mixture, their summary, and examples to hear.

The model separates in the calling process while worker processes compute the metrics, of which
BSS-eval takes most.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .errors import UserError
from .files import make_folder, sweep, whole_file, whole_folder
from .summary import METRICS, SNR, SPARE, main_metric, summarise

SILENCE = 1e-4  # energy; SI-SDR adds 1e-8 to every energy, and means little below this
N_RANDOM = 2  # examples beside the worst, the median and the best mixture
BSS_TAPS = 512  # of the filters that BSS-eval fits, one for each source


def evaluate(model, dataset, out_dir, device="cpu", n_workers=None, seed=0):
    """Separates every mixture, and writes `metrics.csv`, `summary.json` and `examples/`.

    Args:
        model (torch.nn.Module): (batch, time) -> (batch, n_src, time), with a `sample_rate`.
        dataset: Map-style, with a `sample_rate`; `dataset[i]` is (mixture, sources), shaped
            (time,) and (n_src, time), of which there may be fewer than the model's;
            `dataset.describe(i)` is a dict with `mixture_id`, `speakers`, `genders` ("m", "f" or
            "unknown") and `productions` (str or None).
        out_dir (str or Path): Old results there stay until the new ones are complete.
        device (str): Where the model runs.
        n_workers (int, optional): Processes for the metrics: as many as usable cores by default,
            0 for none. A script that uses them needs `if __name__ == "__main__":`.
        seed (int): Of the bootstrap, and of the examples that are drawn at random.

    Returns:
        dict: The summary, see `summarise`.

    Raises:
        UserError: If model and dataset do not fit together, the model gives NaN, a worker dies,
            or `out_dir` cannot be written to.
    """
    if len(dataset) == 0:
        raise UserError("there is nothing to evaluate: the test set holds no mixture")
    if model.sample_rate != dataset.sample_rate:
        raise UserError(
            f"the model works at {model.sample_rate:g} Hz, the test set at "
            f"{dataset.sample_rate} Hz: take a test set at the model's sample rate"
        )
    out_dir = Path(out_dir)
    make_folder(out_dir)  # now rather than after an hour
    sweep(out_dir)
    modes = [(module, module.training) for module in model.modules()]
    model.to(device).eval()
    try:
        table = _measure_all(model, dataset, device, n_workers)
        examples = {
            f"{rank}_{table.mixture_id[i]}": separate(model, dataset, i, device)
            for rank, i in _ranks(table, seed)
        }
    finally:
        for module, was_training in modes:
            module.training = was_training
    summary = summarise(table, dataset.sample_rate, seed)
    with (  # the summary, first to be opened, is the last to take its place: then all is there
        whole_file(out_dir / "summary.json") as summary_file,
        whole_file(out_dir / "metrics.csv") as csv_file,
        whole_folder(out_dir / "examples") as folder,
    ):
        table.to_csv(csv_file, index=False, float_format="%.4f")
        summary_file.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        for name, signals in examples.items():
            _write_example(folder / example_name(name), round(dataset.sample_rate), *signals)
    return summary


def example_name(mixture_id):
    """What stands for the id of a mixture in the name of a folder (str)."""
    return re.sub(r"[^\w.-]", "_", mixture_id)


def separate(model, dataset, index, device="cpu"):
    """Separates one mixture of a dataset; the estimates come in the order of the sources.

    Args:
        model, dataset, device: As in `evaluate`, the model on the device and in eval mode.
        index (int): Of the mixture in the dataset.

    Returns:
        tuple of numpy.ndarray: Mixture (time,), sources (n_src, time) and estimates, in the order
        with the best mean SI-SDR; those that no source is left for come last.

    Raises:
        UserError: If the estimates are not finite, fewer than the sources, or of another length.
    """
    mixture, sources = dataset[index]
    name = dataset.describe(index)["mixture_id"]
    with torch.inference_mode():
        estimates = model(mixture[None].to(device)).float().cpu()
    if estimates.shape[1] < len(sources) or estimates.shape[2:] != sources.shape[1:]:
        raise UserError(
            f"mixture {name} has {len(sources)} sources of {len(mixture)} samples, but the model "
            f"gives {tuple(estimates.shape[1:])}: take a test set with its number of speakers"
        )
    if not estimates.isfinite().all():
        raise UserError(f"the model gives NaN or infinite samples for mixture {name}")
    return mixture.numpy(), sources.numpy(), _in_order(estimates[0], sources).numpy()


def _in_order(estimates, sources):
    """The estimates in the order of the sources, then those that are spare."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr

    pit = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    numbers, found = range(len(estimates)), []
    for chosen in itertools.combinations(numbers, len(sources)):
        loss, ordered = pit(estimates[None, chosen], sources[None], return_est=True)
        spare = [k for k in numbers if k not in chosen]
        found.append((float(loss), ordered[0], estimates[spare]))
    return torch.cat(min(found, key=lambda them: them[0])[1:])


def measure(mixture, sources, estimates, sample_rate):
    """The metrics of one mixture, averaged over its sources.

    Args:
        mixture (numpy.ndarray): (time,)
        sources, estimates (numpy.ndarray): (n_src, time), in the same order; of the estimates
            there may be more, which are spare.
        sample_rate (int): In Hz.

    Returns:
        dict: `input_<metric>` takes the mixture as the estimate, `<metric>_i` is the improvement;
        dB, but for STOI. NaN for what cannot be computed: everything if a source is silent, STOI
        and BSS-eval of less than some 0.4 s and 0.2 s, of a single source alone all that tells of
        the input. A silent estimate has no BSS-eval, but keeps SI-SDR's floor of -80 dB: it should
        not better a mean by its absence. `snr` is that of the estimates under one gain, with which
        the sum of all fits the mixture best, so that it tells of their levels beside each other,
        too. `spare_level` is that of the loudest spare estimate, if there is one, re the loudest
        estimate, -100 dB at least.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> sources, noise = rng.normal(size=(2, 2, 8000))
        >>> row = measure(sources.sum(0), sources, sources + 0.1 * noise, sample_rate=8000)
        >>> round(row["input_si_sdr"]), round(row["si_sdr"]), round(row["si_sdr_i"])
        (0, 20, 20)
    """
    from asteroid.metrics import get_metrics

    mixture, sources, estimates = (np.asarray(x, np.float64) for x in (mixture, sources, estimates))
    n_src, n_samples = sources.shape
    found, speaks = {}, (sources.var(axis=1) * n_samples > SILENCE).all()
    if speaks:
        groups = [["si_sdr"], ["stoi"]]  # one that fails must not take the others along
        if n_samples > 2 * n_src * BSS_TAPS:  # else its filters fit anything
            groups.append(["sdr", "sir", "sar"])
        for group in groups:
            with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # STOI warns and returns 1e-5
                with threadpool_limits(1, "blas"):  # more take twice the CPU time, and save none
                    estimated = estimates[:n_src]
                    found |= get_metrics(mixture, sources, estimated, sample_rate, group)
        if n_src == 1 and np.array_equal(mixture, sources[0]):  # there is nothing to improve
            found = {m: found[m] for m in found if not m.startswith("input_")}
        found |= {f"{m}_i": found[m] - found[f"input_{m}"] for m in found if f"input_{m}" in found}
    row = {m: x if math.isfinite(x := found.get(m, math.nan)) else math.nan for m in METRICS}
    snr = _snr(mixture, sources, estimates) if speaks else math.nan
    return {**row, SNR: snr, **_spare_level(estimates, n_src)}


def _snr(mixture, sources, estimates):
    total = estimates.sum(0)
    gain = total @ mixture / max(total @ total, 1e-12)
    errors = ((sources - gain * estimates[: len(sources)]) ** 2).sum(1)
    return float(np.mean(10 * np.log10((sources**2).sum(1) / np.maximum(errors, 1e-12))))


def _spare_level(estimates, n_src):
    powers = (estimates**2).sum(1)
    if len(powers) == n_src:
        return {}
    share = powers[n_src:].max() / max(powers.max(), 1e-12)
    return {SPARE: 10 * math.log10(max(share, 1e-10))}


def _measure_all(model, dataset, device, n_workers):
    """One row a mixture, in the order of the dataset (pandas.DataFrame)."""
    jobs = (
        (i, *separate(model, dataset, i, device), dataset.sample_rate) for i in range(len(dataset))
    )
    if n_workers is None:
        n_workers = min(_n_usable_cores(), len(dataset))
    rows, improvements = [None] * len(dataset), []
    pace = 0.1 if sys.stderr.isatty() else 15  # seconds between two looks of the bar
    with tqdm(total=len(dataset), unit="mix", desc="Evaluation", mininterval=pace) as bar:
        for i, metrics in _in_workers(jobs, n_workers):
            about = dataset.describe(i)
            productions = set(about["productions"])
            rows[i] = {
                "mixture_id": about["mixture_id"],
                "speakers": " ".join(about["speakers"]),
                "genders": " ".join(about["genders"]),
                "same_production": productions.pop() if len(productions) == 1 else None,
                **metrics,
            }
            if math.isfinite(metrics["si_sdr_i"]):
                improvements.append(metrics["si_sdr_i"])
                bar.set_postfix_str(f"SI-SDRi {np.mean(improvements):.2f} dB", refresh=False)
            bar.update()
    return pd.DataFrame(rows)


def _job(index, *signals):
    return index, measure(*signals)


def _in_workers(jobs, n_workers):
    """Yields `_job(*job)` of all jobs as they end; only a few jobs are waiting at any time."""
    if n_workers == 0:
        yield from (_job(*job) for job in jobs)
        return
    # Not "fork", which a GPU does not survive; the fork server imports Asteroid once for all.
    method = "forkserver" if hasattr(os, "fork") else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["asteroid.metrics"])
    pool = ProcessPoolExecutor(n_workers, context, _start_worker)
    # Ctrl-C is for the main thread: it breaks off no start, and what this starts never gets it.
    no_ctrl_c = (signal.SIG_BLOCK, {signal.SIGINT})
    starter = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=no_ctrl_c)
    running = set()
    try:
        for job in jobs:
            running.add(starter.submit(_submitted, pool, job).result())
            is_full = len(running) >= 4 * n_workers
            done, running = wait(running, None if is_full else 0, FIRST_COMPLETED)
            yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that computes metrics died, often for lack of memory: run the evaluation "
            f"again with fewer workers than {n_workers}"
        ) from error
    finally:
        starter.shutdown()
        pool.shutdown(cancel_futures=True)


def _submitted(pool, job):
    try:
        return pool.submit(_job, *job)
    except OSError as error:
        mend = "run the evaluation again with fewer workers"
        if "AF_UNIX" in str(error):  # the fork server's socket is in a folder for temporary files
            mend = "set TMPDIR to a folder with a short path"
        raise UserError(f"no process to compute metrics can be started ({error}); {mend}") from None


def _start_worker():
    """One thread each; a worker does not outlive the main process."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _n_usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _ranks(table, seed):
    """The worst, the median and the best mixture of those that could be measured, and others."""
    order = table[main_metric(table)].dropna().sort_values(kind="stable").index
    if len(order):
        yield from (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1]))
        others = np.setdiff1d(order, order[[0, len(order) // 2, -1]])
        chosen = np.random.default_rng(seed).permutation(others)[:N_RANDOM]
        yield from ((f"random{k}", i) for k, i in enumerate(chosen, start=1))


def _write_example(folder, sample_rate, mixture, sources, estimates):
    """Writes wav files, all with the same gain: 1, or less where one of them would clip."""
    folder.mkdir()
    tracks = {"mixture": mixture}
    tracks |= {f"s{k}": source for k, source in enumerate(sources, start=1)}
    tracks |= {f"estimate_{k}": estimate for k, estimate in enumerate(estimates, start=1)}
    gain = 1 / max(1, *(np.abs(track).max() for track in tracks.values()))
    for name, track in tracks.items():
        wav = io.BytesIO()  # written from here, a full disk is an OSError that says so
        soundfile.write(wav, gain * track, sample_rate, format="WAV", subtype="PCM_16")
        (folder / f"{name}.wav").write_bytes(wav.getvalue())
