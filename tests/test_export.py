"""ONNX files: the same estimates as the model at any length, or no file."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime.quantization
import pytest
import soundfile as sf
import torch
from small import ratio_db, small

from asteroid_tiny import cli, example_mixture, export, from_pretrained
from asteroid_tiny.export import OnnxSeparator, export_onnx

SIZES = dict(n_filters=64, bn_chan=64, ff_hid=128, n_repeats=1, n_intra_layers=2, n_inter_layers=1)


@pytest.fixture(scope="module")
def speech(pack):
    from asteroid_tiny.data import SpeechDir

    valid = SpeechDir(pack / "valid", 8000)
    first, second, *_ = (keys[0] for keys in valid.by_speaker.values())
    return torch.from_numpy(valid.read(first)[:20000] + valid.read(second)[:20000])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = small(**SIZES).train()  # which drops nothing out
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return model, path, export_onnx(model, path)


@pytest.mark.parametrize("length", [1, 15, 100, 7001, 33333])
def test_estimates_are_those_of_the_model_at_any_length(exported, length):
    model, path, _ = exported
    mixture = torch.randn(length)
    with torch.no_grad():
        wanted = model(mixture)
    estimates = OnnxSeparator(path)(mixture)
    assert estimates.shape == wanted.shape == (2, length)
    torch.testing.assert_close(estimates, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_file_separates_as_models_do(exported, speech, refused):
    model, path, outcome = exported
    assert outcome["largest_error"] < 1e-3 and outcome["bytes"] == path.stat().st_size
    separator = OnnxSeparator(path, n_threads=1)
    batch = torch.stack([speech, speech.flip(0)])
    torch.testing.assert_close(
        separator.separate(batch[:, None]), model.separate(batch[:, None]), rtol=1e-3, atol=1e-4
    )
    assert separator(batch).shape == separator(batch[:, None]).shape == (2, 2, 20000)
    with refused("one channel, not 2"):
        separator(batch[None])


def test_a_file_in_use_can_be_copied_to_another_process(exported):
    separator = OnnxSeparator(exported[1], n_threads=1)
    copied = pickle.loads(pickle.dumps(separator))
    mixture = torch.randn(1, 800)
    assert torch.equal(copied(mixture), separator(mixture)) and copied.facts == separator.facts


def test_what_a_killed_export_left_is_swept(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(exported[1], part))
    monkeypatch.setattr(export, "check_lengths", lambda *_: 0.0)
    for name in (".model.deadbeef.9.part.onnx", ".model.deadbeef.9.part.int8.onnx"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    export_onnx(exported[0], tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_stays_in_training(exported):
    assert exported[0].training


def test_a_file_takes_silence_and_gradients_as_models_do(exported, refused):
    separator = OnnxSeparator(exported[1])
    assert separator.separate(torch.zeros(1, 1, 8000)).isfinite().all()
    assert separator(torch.randn(1, 800, requires_grad=True)).isfinite().all()
    with refused("NaN or infinite"):
        separator.separate(torch.full((1, 1, 8000), torch.nan))


def test_what_the_exporter_does_not_take_is_one_sentence(tmp_path, refused):
    with refused("exporter fails with this TinySepformer (", "takes none of one source"):
        export_onnx(small(n_src=1, **SIZES), tmp_path / "one.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_what_it_is(exported):
    model, path, _ = exported
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert facts["sample_rate"] == "8000" and facts["n_src"] == "2"
    assert facts["model"] == "TinySepformer"
    assert json.loads(facts["args"]) == json.loads(json.dumps(model.get_model_args()))
    assert OnnxSeparator(path).sample_rate == 8000


def test_a_file_says_what_another_model_is_and_no_more_of_its_making(
    exported, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(exported[1], part))
    monkeypatch.setattr(export, "check_lengths", lambda *_: 0.0)
    bank = dict(fb_name="stft", window=torch.hann_window(20))  # a tensor, which JSON has not
    model = small(n_src=3, sample_rate=16000, n_filters=20, kernel_size=20, stride=10, **bank)
    about = {"name": "mine", "licence": "mit", "folder": "/home/me"}
    export_onnx(model, tmp_path / "model.onnx", about=about)
    facts = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert facts["sample_rate"] == "16000" and facts["n_src"] == "3" and facts["shortest"] == "20"
    assert json.loads(facts["about"]) == {"name": "mine", "licence": "mit"}
    assert json.loads(facts["args"])["fb_name"] == "stft"


def test_a_file_tells_where_its_weights_are_from(tmp_path, capsys):
    packaged = "tiny-sepformer-xs_2spk_8k"
    cli.main(["export", packaged, "-o", str(tmp_path / "model.onnx")])
    capsys.readouterr()
    told = []
    for name in (packaged, tmp_path / "model.onnx"):
        cli.main(["info", str(name)])
        told.append(capsys.readouterr().out.splitlines())
    for title in ("trained on", "licence", "metrics"):
        texts = {line for lines in told for line in lines if line.startswith(title)}
        assert len(texts) == 1 and "not told" not in texts.pop()


def test_shared_layers_are_in_the_file_once(exported):
    model, path, _ = exported
    n_parameters = sum(p.numel() for p in model.parameters())
    weights = sum(torch.Size(t.dims).numel() for t in onnx.load(path).graph.initializer)
    assert weights < 1.5 * n_parameters


def test_weights_of_equal_bytes_but_another_shape_or_type_are_not_taken_for_each_other():
    zeros = {"a": np.zeros((2, 3), "f4"), "b": np.zeros((3, 2), "f4"), "c": np.zeros((2, 3), "i4")}
    zeros["d"] = zeros["a"]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in zeros.items()]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name} again"]) for name in zeros]
    graph = onnx.helper.make_graph(nodes, "zeros", [], [], weights)
    export.keep_weights_once(graph)
    assert [node.input[0] for node in graph.node] == ["a", "b", "c", "a"]
    assert {tensor.name for tensor in graph.initializer} == {"a", "b", "c"}


def test_a_file_may_differ_by_a_thousandth_and_silence_by_as_much(refused, monkeypatch):
    model, error = small(), [0.9e-3]
    monkeypatch.setattr(
        export, "OnnxSeparator", lambda *_, **__: lambda mixture: (1 + error[0]) * model(mixture)
    )
    with torch.no_grad():
        assert export.check_lengths(model, "model.onnx") == pytest.approx(0.9e-3, rel=0.01)
        error[0] = 1.1e-3
        with refused("disagrees with the model at 8000 samples"):
            export.check_lengths(model, "model.onnx")
    export.check_silence(lambda _: torch.tensor([-0.9e-3, 0]))
    with refused("does not leave silence silent"):
        export.check_silence(lambda _: torch.tensor([-1.1e-3, 0]))


def test_a_file_that_disagrees_is_not_kept(exported, tmp_path, refused, monkeypatch):
    _, path, _ = exported
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(path, part))
    torch.manual_seed(1)
    with refused("disagrees with the model at 8000 samples"):
        export_onnx(small(**SIZES), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_is_close_and_small_or_refused(exported, tmp_path, refused, speech, monkeypatch):
    model, path, _ = exported
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(path, part))
    monkeypatch.setattr(export, "MOST_SIZE", 0.8)  # of so small a model the graph is much
    outcome = export_onnx(model, tmp_path / "int8.onnx", "int8", speech)
    with torch.no_grad():
        wanted = model(speech)
    assert outcome["si_sdr"] > 20
    assert ratio_db(OnnxSeparator(tmp_path / "int8.onnx")(speech), wanted) > 15
    monkeypatch.setattr(export, "LEAST_DB", 1000.0)
    with refused("int8 would take", "nothing was kept"):
        export_onnx(model, tmp_path / "other.onnx", "int8", speech)
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize(
    "size, si_sdr, is_kept",
    [(340, (20.5, 20.5), True), (360, (30, 30), False), (300, (30, 19.5), False)],
)
def test_int8_is_kept_within_its_limits_alone(
    tmp_path, refused, monkeypatch, size, si_sdr, is_kept
):
    path, kinds = tmp_path / "model.onnx", onnxruntime.quantization.QuantType
    path.write_bytes(bytes(1000))
    sources, noise = torch.randn(2, 1, 2, 8000, generator=torch.Generator().manual_seed(0))
    noise = noise * 10 ** (-torch.tensor(si_sdr)[:, None] / 20)

    def quantize_dynamic(path, small, weight_type):
        assert weight_type == kinds.QUInt8, "others overflow on some CPUs"
        small.write_bytes(bytes(size))

    def separator(file, **_):
        return lambda mixture: mixture.any() * (sources + (file != path) * noise)

    package = SimpleNamespace(quantize_dynamic=quantize_dynamic, QuantType=kinds)
    monkeypatch.setattr(export, "_import", lambda _: package)
    monkeypatch.setattr(export, "make_small", lambda _: None)
    monkeypatch.setattr(export, "OnnxSeparator", separator)
    if is_kept:
        outcome = export.save_int8(path, 8000)
        assert outcome["size"] == size / 1000 and path.stat().st_size == size
        assert outcome["si_sdr"] == pytest.approx(min(si_sdr), abs=0.2)
    else:
        with refused(f"int8 would take {size / 1000:.2f}"):
            export.save_int8(path, 8000)
        assert path.stat().st_size == 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_packaged_weights_fit_int8(tmp_path):
    model = from_pretrained("tiny-sepformer-xs_2spk_8k")
    outcome = export_onnx(model, tmp_path / "int8.onnx", "int8")
    assert outcome["size"] <= 0.35 and outcome["si_sdr"] >= 20


@pytest.mark.parametrize("rate", [8000, 16000])
def test_without_speech_of_ones_own_int8_is_compared_on_the_bundled_mixture(rate):
    bundled, there = sf.read(example_mixture(), dtype="float32")
    mixture = export.real_mixture(rate)
    assert len(mixture) == pytest.approx(len(bundled) * rate / there, abs=2)
    assert ratio_db(mixture[:: rate // there], torch.from_numpy(bundled)) > 20


def test_torch_export_with_a_dynamic_length():
    model = small(**{**SIZES, "n_intra_layers": 1})
    dynamic = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.zeros(1, 16000),), dynamic_shapes=dynamic).module()
    for length in (5000, 12345, 24001):
        mixture = torch.randn(1, length)
        torch.testing.assert_close(program(mixture), model(mixture), rtol=1e-3, atol=1e-4)


def test_what_is_no_file_of_a_separator_is_refused(tmp_path, refused):
    with refused("none.onnx is missing"):
        OnnxSeparator(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with refused("text.onnx is no ONNX file"):
        OnnxSeparator(tmp_path / "text.onnx")


def test_int8_is_what_the_command_line_was_asked_for(exported, tmp_path, monkeypatch):
    model, path, _ = exported
    model.save(tmp_path / "model.pth")
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(path, part))
    monkeypatch.setattr(export, "MOST_SIZE", 0.8)
    command = ["export", str(tmp_path / "model.pth"), "--quantize", "int8"]
    cli.main([*command, "-o", str(tmp_path / "int8.onnx")])
    assert OnnxSeparator(tmp_path / "int8.onnx").facts["precision"] == "int8"
    assert (tmp_path / "int8.onnx").stat().st_size < 0.8 * path.stat().st_size


def test_a_name_without_the_suffix_is_refused(exported, tmp_path, capsys):
    exported[0].save(tmp_path / "model.pth")
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "model.pth"), "-o", str(tmp_path / "model.bin")])
    assert "name the file *.onnx" in capsys.readouterr().err
    assert not (tmp_path / "model.bin").exists()


def test_int8_that_is_close_but_not_small_is_refused(exported, tmp_path, refused, monkeypatch):
    model, path, _ = exported
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(path, part))
    monkeypatch.setattr(export, "MOST_SIZE", 0.01)
    monkeypatch.setattr(export, "LEAST_DB", 0.0)
    with refused("int8 would take", "nothing was kept"):
        export_onnx(model, tmp_path / "model.onnx", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_file_that_makes_sound_of_silence_is_not_kept(
    exported, tmp_path, refused, monkeypatch, quantize
):
    model, path, _ = exported
    monkeypatch.setattr(export, "save_fp32", lambda model, part: shutil.copy(path, part))
    monkeypatch.setattr(export, "MOST_SIZE", 0.8)
    monkeypatch.setattr(export, "SILENCE", -1.0)
    if quantize:
        monkeypatch.setattr(export, "check_lengths", lambda *_: 0.0)
    with refused("does not leave silence silent"):
        export_onnx(model, tmp_path / "model.onnx", quantize)
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_of_something_else_is_refused(exported, tmp_path, refused):
    file = onnx.load(exported[1])
    file.graph.input[0].name = "image"
    for node in file.graph.node:
        node.input[:] = ["image" if name == "mixture" else name for name in node.input]
    onnx.save(file, tmp_path / "other.onnx")
    with refused("other.onnx is no separator"):
        OnnxSeparator(tmp_path / "other.onnx")
    taken, given = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, None])
        for name in ("mixture", "estimates")
    )
    node = onnx.helper.make_node("Identity", ["mixture"], ["estimates"])
    graph = onnx.helper.make_graph([node], "channels", [taken], [given])
    version = {"opset_imports": file.opset_import, "ir_version": file.ir_version}
    onnx.save(onnx.helper.make_model(graph, **version), tmp_path / "channels.onnx")
    with refused("channels.onnx is no separator"):
        OnnxSeparator(tmp_path / "channels.onnx", sample_rate=8000)


def test_mixtures_without_samples_and_of_no_shape_are_taken_or_refused(exported, refused):
    separator = OnnxSeparator(exported[1])
    assert separator(torch.zeros(0)).shape == (2, 0)
    assert separator(torch.zeros(0, 800)).shape == (0, 2, 800)
    assert separator(torch.zeros(3, 1, 0)).shape == (3, 2, 0)
    with refused("no single number"):
        separator(torch.tensor(1.0))
