"""Makes the example mixture, its picture, and figures of the packaged weights, from the pack.

    python egs/minispeech/TinySepformer/local/make_example.py

To be run again when packaged weights were replaced. It writes asteroid_tiny/zoo/example/ and into
each packaged model's config.json and card its SI-SDRi on the pack's test list.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT))

from asteroid_tiny import example_mixture, from_pretrained, list_models  # noqa: E402
from asteroid_tiny.data import SpeechDir, draw_list  # noqa: E402
from asteroid_tiny.data.mixing import Mixture, Source, render  # noqa: E402
from asteroid_tiny.files import whole_file  # noqa: E402
from asteroid_tiny.hub import ZOO  # noqa: E402
from asteroid_tiny.inspection import DEFAULT  # noqa: E402
from asteroid_tiny.plots import stacked_spectrograms  # noqa: E402
from asteroid_tiny.training import separation_loss  # noqa: E402

DATA = ROOT / "egs" / "minispeech" / "TinySepformer" / "data"
MIXTURE = Mixture(
    "example",
    40000,
    (
        Source("carlo-0014", 2720, 40000, 0, -7.411, 100),
        Source("ivrvoice_ru-0006", 6872, 40000, 0, -8.9, 100),
    ),
)
N_MIXTURES = 60  # the first of the 300 of the recipe's test list
SENTENCE = (
    "On the first {n} mixtures of the test list of the recipe `minispeech`, which has other "
    "languages and channels: SI-SDRi {value:.2f} dB."
)


def example():
    """The example mixture (torch.Tensor)."""
    return render(SpeechDir(DATA / "valid", 8000), MIXTURE)[0]


def improvement(model):
    """SI-SDRi in dB of a model on the first of the pack's test list, which is of 8 kHz."""
    ratio = round(model.sample_rate) // 8000
    speech, gains = SpeechDir(DATA / "test", 8000), []
    for mixture in draw_list(speech, 300, model.n_src, 32000, seed=202)[:N_MIXTURES]:
        mixed, sources = (signal[None] for signal in render(speech, mixture))
        with torch.no_grad():
            estimates = model(torch.from_numpy(resample_poly(mixed.numpy(), ratio, 1, axis=-1)))
        estimates = torch.from_numpy(resample_poly(estimates.numpy(), 1, ratio, axis=-1))
        unprocessed = mixed[:, None].expand_as(sources)
        gains.append(separation_loss(unprocessed, sources) - separation_loss(estimates, sources))
    return float(sum(gains) / len(gains))


def note(name, value):
    """Writes a figure into config.json and the card of a packaged model."""
    about, card = ZOO / name / "config.json", ZOO / name / "README.md"
    sentence = SENTENCE.format(n=N_MIXTURES, value=value)
    config = json.loads(about.read_text(encoding="utf-8"))
    config["minispeech"] = {"n_mixtures": N_MIXTURES, "si_sdr_i": round(value, 3)}
    text = re.sub(r"On the first \d+ mixtures [^\n]*\n\n", "", card.read_text(encoding="utf-8"))
    text = text.replace("## Limits\n", f"{sentence}\n\n## Limits\n")
    for path, content in ((about, json.dumps(config, indent=2) + "\n"), (card, text)):
        with whole_file(path) as part:
            part.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    mixture = example()
    with whole_file(example_mixture()) as part:
        soundfile.write(part, mixture.numpy(), 8000, subtype="PCM_16")
    with torch.no_grad():
        estimates = from_pretrained(DEFAULT)(mixture[None])[0]
    with whole_file(ZOO / "example" / "spectrograms.png") as part:
        part.write_bytes(stacked_spectrograms([np.asarray(s) for s in (mixture, *estimates)]))
    for name in list_models():
        value = improvement(from_pretrained(name))
        note(name, value)
        print(f"{name}: SI-SDRi {value:.2f} dB on {N_MIXTURES} mixtures of minispeech")
