"""A small corpus, laid out as LibriSpeech, WHAM! and LibriMix's metadata, of embedded speech."""

import csv
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

PARTS = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}
WHAM_PARTS = {"train": "tr", "valid": "cv", "test": "tt"}
RATE = 16000


def make_corpus(root, clips):
    """A folder with LibriSpeech, wham_noise and metadata, as LibriMix's scripts find them."""
    rng = np.random.default_rng(0)
    for n, (split, part) in enumerate(PARTS.items()):
        utterances = write_speech(root / "LibriSpeech" / part, 100 + 10 * n, clips)
        noises = write_noises(root / "wham_noise", WHAM_PARTS[split], rng)
        for n_src in (2, 3):
            folder = root / "metadata" / f"Libri{n_src}Mix"
            folder.mkdir(parents=True, exist_ok=True)
            write_metadata(folder / f"libri{n_src}mix_{part}.csv", utterances, noises, n_src, rng)
    speakers = ["; a comment | of | it"] + [f"{s} | {'FM'[s % 2]} | part" for s in range(100, 123)]
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text("\n".join(speakers))
    return root


def write_speech(folder, first_speaker, clips):
    """Three speakers with two utterances each, of odd lengths, at 16 kHz; gives their paths."""
    paths = []
    for i, clip in enumerate(list(clips.values())[:3]):
        for k, length in enumerate((20001 - 1234 * i, 25677 + 777 * i)):
            samples = resample_poly(clip[16000 * k :] / 32768, 2, 1)[:length]
            speaker = first_speaker + i
            path = folder / f"{speaker}" / "7" / f"{speaker}-7-{k:04d}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, 0.2 * samples, RATE)  # mixtures must not clip
            paths.append(path.relative_to(folder.parent).as_posix())
    return paths


def write_noises(folder, part, rng):
    """Noises of two channels, one long and one short; gives their paths."""
    (folder / part).mkdir(parents=True)
    names = []
    for name, length in (("long_1.5_x", 40000), ("short_-0.5_y", 17001)):
        noise = 0.02 * rng.standard_normal((length, 2)).cumsum(0) / np.sqrt(length)
        noise += 0.01 * rng.standard_normal((length, 2))
        sf.write(folder / part / f"{name}.wav", noise, RATE)
        names.append(f"{part}/{name}.wav")
    return names


def write_metadata(path, utterances, noises, n_src, rng):
    header = ["mixture_ID"]
    for i in range(1, n_src + 1):
        header += [f"source_{i}_path", f"source_{i}_gain"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "noise_path", "noise_gain"])
        for noise in noises:
            speakers = rng.permutation(3)[:n_src]
            chosen = [utterances[2 * s + rng.integers(2)] for s in speakers]
            row = ["_".join(Path(utterance).stem for utterance in chosen)]
            for utterance in chosen:
                row += [utterance, rng.uniform(0.3, 1.6)]
            writer.writerow([*row, noise, rng.uniform(0.3, 4)])
