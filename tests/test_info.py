"""`asteroid-tiny info`, and what a model tells of itself."""

import pytest
import torch
from small import n_parameters, small

from asteroid_tiny import cli
from asteroid_tiny.weights import told


def test_info_tells_what_a_model_is(separator, capsys):
    cli.main(["info", str(separator)])
    text = capsys.readouterr().out
    for words in (
        f"{n_parameters(small()):,} parameters",
        "2, at 8000 Hz",
        "GMAC a second",
        "MB of tensors for 4 s",
    ):
        assert words in text


@pytest.mark.parametrize(
    "about",
    [
        {"training": "Libri2Mix"},
        {"training": None},
        {"training": {"data": "Libri2Mix"}},
        {"metrics": 12.3},
        {"metrics": {"si_sdr_i": "12.3 dB", "stoi": 0.9}},
    ],
    ids=str,
)
def test_whatever_a_model_tells_of_itself_it_is_told_and_used(about, tmp_path, capsys, talks):
    small().save_pretrained(tmp_path / "told", **about)
    cli.main(["info", str(tmp_path / "told")])
    assert "trained on      not told" in capsys.readouterr().out
    path = sorted(talks.glob("*.wav"))[0]
    cli.main(["separate", str(path), "-m", str(tmp_path / "told"), "-o", str(tmp_path / "o")])
    assert len(list((tmp_path / "o").iterdir())) == 2


@pytest.mark.parametrize("fb_name", ["param_sinc", "torch_stft"])
def test_info_tells_of_models_with_any_filterbank(fb_name, tmp_path, capsys):
    small(fb_name=fb_name).save(tmp_path / "model.pth")
    cli.main(["info", str(tmp_path / "model.pth")])
    text = capsys.readouterr().out
    assert "operations" in text and ("GMAC" in text or "not counted with this" in text)


def test_the_receptive_field_is_all_that_the_model_is_given_as_info_says(separator, capsys):
    cli.main(["info", str(separator)])
    assert "receptive field all that it is given" in capsys.readouterr().out
    mixture = torch.randn(1, 8000, requires_grad=True)
    small()(mixture)[0, 0, :100].sum().backward()
    assert mixture.grad.abs().min() > 0


def test_the_memory_that_info_tells_grows_with_the_length(separator):
    from asteroid_tiny.inspection import open_model, peak_memory

    network, _ = open_model(separator)
    short, long = (peak_memory(network, seconds) for seconds in (1, 4))
    n_bytes = 4 * 16 * 8000 / 8  # of one second of frames inside the masker
    assert short > 4 * n_bytes and 3 < long / short < 5


def test_numbers_of_strangers_are_numbers():
    metrics = {"si_sdr_i": 10**400, "sdr_i": True, "stoi": float("nan"), "sdr": 5.0}
    training = {"steps": 5, "hours": "many", "minutes": None, "device": 1, "init_from": "x"}
    kept = told({"metrics": metrics, "training": training})
    assert kept == {"metrics": {"sdr": 5.0}, "training": {"steps": 5}}


def test_words_of_strangers_are_words():
    data = {"name": 3, "licence": "CC0", "url": None}
    assert told({"licence": ["mit"], "training": {"data": data}}) == {
        "training": {"data": {"licence": "CC0", "url": None}}
    }
    assert told({"licence": "mit"}) == {"licence": "mit"}


def test_info_tells_times_in_the_units_that_it_names(tmp_path, capsys):
    small(kernel_size=32, stride=8, chunk_size=100).save(tmp_path / "model.pth")
    cli.main(["info", str(tmp_path / "model.pth")])
    text = capsys.readouterr().out
    assert "4 ms every 1 ms" in text  # 32 and 8 samples at 8000 Hz
    assert "chunks          0.10 s" in text  # 99 hops of 1 ms and a frame
