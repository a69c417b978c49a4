"""Corpora that come mixed: folders ``mix``, ``s1``, ``s2``, ... of files with the same names.

Their sources become the recordings of a Kaldi data dir, from which training can mix afresh; source
k of mixture NAME is utterance ``NAME_sk``. Their mixtures become a mixture list: sums of whole
sources, as `check_sums` confirms on some of them. ``noise``, if there is such a folder, becomes a
data dir of its own, with the names of the mixtures.
"""

import numpy as np

from ..errors import UserError
from .kaldi import NoiseDir, decode, write_dir
from .mixing import Mixture, Source

N_CHECKED = 20  # mixtures of a split whose sums are checked
#: What the corpora are made for: sample rates and numbers of sources.
BOTH = {"sample_rate": (8000, 16000), "n_src": (2, 3)}


def check_values(settings, corpus, **allowed):
    """Refuses settings with other values than those that a corpus has.

    Args:
        settings (dict): The settings.
        corpus (str): Its name.
        **allowed: Tuples of values, by setting.

    Raises:
        UserError: If there is one.
    """
    for key, values in allowed.items():
        if settings[key] not in values:
            there = " or ".join(map(str, values))
            raise UserError(f"{key} must be {there} for {corpus}, not {settings[key]}")


def write_split(root, target, names, speakers_of, spk2gender=None):
    """Writes the data dir of the sources of a split.

    Args:
        root (Path): The folder with ``s1``, ``s2`` and so on.
        target (Path): The data dir.
        names (list of str): The mixtures, names of files without ``.wav``.
        speakers_of (callable): Gives the speakers of a name, one a source.
        spk2gender (dict, optional): Genders, for the table.

    Raises:
        UserError: If a source is missing.
    """
    tables = {"wav.scp": {}, "utt2spk": {}, "spk2gender": spk2gender or {}}
    for name in names:
        for k, speaker in enumerate(speakers_of(name), 1):
            tables["wav.scp"][f"{name}_s{k}"] = find(root / f"s{k}" / f"{name}.wav")
            tables["utt2spk"][f"{name}_s{k}"] = speaker
    write_dir(target, tables)


def write_noise(root, target, names):
    """Writes the data dir of the noises of a split, see `write_split`."""
    wavs = {name: find(root / "noise" / f"{name}.wav") for name in names}
    write_dir(target, {"wav.scp": wavs, "utt2spk": dict.fromkeys(wavs, "noise")}, NoiseDir)


def find(path):
    """The absolute path (str) of a file, or a `UserError` if it is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the corpus is not complete")
    return str(path.absolute())


def mixtures(speech, noise=None):
    """The mixtures of a data dir that `write_split` wrote (list of `Mixture`).

    Args:
        speech (SpeechDir): The data dir.
        noise (NoiseDir, optional): That of `write_noise`; the mixtures have none without it.

    Raises:
        UserError: If the sources of a mixture, or its noise, differ in length: one is cut short.
    """
    sources = {}
    for key in sorted(speech.utterances):
        sources.setdefault(key.rpartition("_s")[0], []).append(whole(speech, key))
    found = []
    for name, parts in sources.items():
        shortest, *_, longest = sorted(parts, key=lambda source: source.length)
        if shortest.length < longest.length:
            raise UserError(
                f"{speech.wavs[shortest.utterance]} has {shortest.length} samples, of another "
                f"source of the mixture there are {longest.length}; it is cut short, or not padded"
            )
        hiss = whole(noise, name) if noise else None
        if hiss and hiss.length != longest.length:
            raise UserError(
                f"{noise.wavs[name]} has {hiss.length} samples, the sources of the mixture have "
                f"{longest.length}; it is cut short, or not of this mixture"
            )
        found.append(Mixture(name, longest.length, tuple(parts), hiss))
    return found


def whole(speech, key):
    """A whole utterance as it is (`Source`)."""
    return Source(key, 0, speech.utterances[key].length, 0, 0.0)


def check_sums(root, mix, names, parts):
    """Compares some mixtures with the sums of their parts.

    Args:
        root (Path): The folder of a split.
        mix (str): Its folder of mixtures.
        names (list of str): Its mixtures.
        parts (list of str): The folders of what is summed.

    Returns:
        float: The largest difference, in steps of 16-bit quantisation. Rounding alone gives up to
        one for each part and one for the sum.

    Raises:
        UserError: If they differ in length.
    """
    worst = 0.0
    for name in names[:: max(1, len(names) // N_CHECKED)][:N_CHECKED]:
        tracks = [read(root / folder / f"{name}.wav") for folder in (mix, *parts)]
        lengths = sorted({len(track) for track in tracks})
        if len(lengths) > 1:
            raise UserError(
                f"{root / mix / name}.wav and its {', '.join(parts)} have between {lengths[0]} and "
                f"{lengths[-1]} samples; one of them is cut short"
            )
        mixture, *summands = tracks
        worst = max(worst, float(np.abs(mixture - sum(summands)).max()))
    return worst


def report_sums(root, mix, names, parts):
    """Says it if some mixtures are not the sums of their parts, see `check_sums`."""
    worst = check_sums(root, mix, names, parts)
    if worst > len(parts) + 1:
        print(
            f"  note: in {root / mix} mixtures differ by up to {worst:.0f} steps of 16 bits from "
            "the sums of their sources, which are used"
        )


def report_count(split, count, official):
    """Says it if a split has another number of mixtures than the official one."""
    if count != official:
        print(f"  note: {split} has {count} mixtures, the official corpus has {official}")


def read(path):
    """Samples of a file in steps of 16-bit quantisation (float64).

    Raises:
        UserError: If it is missing, broken or not mono.
    """
    samples = decode(find(path))
    if samples.ndim > 1:
        raise UserError(f"{path} has {samples.shape[1]} channels; it must be mono")
    return samples.astype(np.float64) * (1 if samples.dtype == np.int16 else 32768)
