"""The subcommands average, check, evaluate and export, as a user calls them."""

import json
import os

import pytest
import torch
from small import small

from asteroid_tiny import UserError, evaluation, from_pretrained
from asteroid_tiny.cli import main
from asteroid_tiny.data import SpeechDir, draw_list, read_list, write_list
from asteroid_tiny.export import OnnxSeparator


@pytest.fixture
def model(tmp_path):
    model = small(n_repeats=1)
    model.save(tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.fixture
def voices(make_dir, clips):
    return make_dir({f"a{i}": samples for i, samples in enumerate(clips.values())})


def status(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in argv])
    return caught.value.code


def test_average_writes_the_mean_of_models_of_one_kind(model, tmp_path, capsys):
    other, out = small(n_repeats=1), tmp_path / "mean.pth"
    other.save(tmp_path / "other.pth")
    left = tmp_path / ".mean.deadbeef.9.part.pth"  # by a killed process
    left.touch()
    os.utime(left, (0, 0))
    main(["average", str(model), str(tmp_path / "other.pth"), "-o", str(out)])
    assert not left.exists()
    first, mean = from_pretrained(model).state_dict(), from_pretrained(out).state_dict()
    second = other.state_dict()
    assert any(not torch.equal(first[key], second[key]) for key in first)
    for key in first:
        torch.testing.assert_close(mean[key], (first[key] + second[key]) / 2)
    assert status("average", model, "-o", out) == 2 and "there already" in capsys.readouterr().err
    small(n_repeats=2).save(tmp_path / "deeper.pth")
    assert status("average", model, tmp_path / "deeper.pth", "-o", tmp_path / "new.pth") == 2
    assert "cannot be averaged" in capsys.readouterr().err
    assert not (tmp_path / "new.pth").exists()


def test_check_names_what_is_wrong_and_exits_1(voices, capsys):
    main(["check", str(voices)])
    assert "nothing found" in capsys.readouterr().out
    (voices / "a2.wav").unlink()
    assert status("check", voices) == 1
    assert "1  missing" in capsys.readouterr().out


def test_check_takes_a_list(voices, tmp_path, capsys):
    mixtures = draw_list(SpeechDir(voices), 3, 2, 8000, seed=1)
    write_list(tmp_path / "list.csv", [*mixtures, mixtures[0]], 8000)
    assert status("check", tmp_path / "list.csv", "--speech", voices) == 1
    assert "2 times" in capsys.readouterr().out
    assert status("check", tmp_path / "list.csv") == 2
    assert "give --speech" in capsys.readouterr().err
    noisy = [mixture._replace(noise=mixture.sources[0]) for mixture in mixtures]
    write_list(tmp_path / "list.csv", noisy, 8000)
    listed = ("check", tmp_path / "list.csv", "--speech", voices)
    assert status(*listed) == 1 and "does not have noise" in capsys.readouterr().out
    main([*map(str, listed), "--noise", str(voices)])
    assert "nothing found" in capsys.readouterr().out


def test_evaluate_measures_the_speakers_that_are_asked_for(model, voices, tmp_path, capsys):
    out = tmp_path / "out"
    main(["evaluate", str(model), str(voices), "-o", str(out), "-n", "2", "--segment", "1"]
         + ["--speakers", "a[01]"])  # fmt: skip
    summary = json.loads((out / "results" / "summary.json").read_text())
    assert summary["n_mixtures"] == 2 and summary["n_speakers"] == 2
    assert "SI-SDRi" in capsys.readouterr().out
    assert (out / "results" / "report.html").exists()
    assert status("evaluate", model, voices, "-o", out, "--speakers", "b*") == 2
    assert "has no speaker 'b*'" in capsys.readouterr().err
    assert status("evaluate", model, voices, "-o", out, "--seed", -1) == 2
    assert status("evaluate", model, voices, "-o", out, "--segment", "inf") == 2
    assert "--segment 0.01 to 3600" in capsys.readouterr().err
    for option in ("-n", "--segment"):
        assert status("evaluate", model, voices, "-o", tmp_path / "none", option, "0") == 2
        assert "--n_mixtures must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_evaluate_draws_the_overlap_and_the_speakers_that_are_asked_for(
    model, voices, tmp_path, capsys
):
    out, options = tmp_path / "out", ["-n", "2", "--segment", "1", "--seed", "3"]
    main(["evaluate", str(model), str(voices), "-o", str(out), "--overlap", "0.2", *options])
    speech = SpeechDir(voices)
    wanted = draw_list(speech, 2, 2, speech.sample_rate, seed=3, overlap_ratio=0.2)
    assert read_list(out / "list.csv", speech) == wanted
    main(["evaluate", str(model), str(voices), "-o", str(out), "--n_speakers", "1", *options])
    assert all(len(mixture.sources) == 1 for mixture in read_list(out / "list.csv", speech))
    assert "the loudest other one lies at" in " ".join(capsys.readouterr().out.split())
    results = out / "results" / "summary.json"
    assert json.loads(results.read_text())["groups"]["all"]["spare_level"]["mean"] <= 0
    words = ("--name", "n", "--data_name", "d", "--data_licence", "CC0", "--summary", results)
    assert status("publish", model, "--out", tmp_path / "p", *words) == 2
    assert "nothing is published without metrics" in capsys.readouterr().err
    kept = (out / "list.csv").read_text()
    bad = (model, voices, "-o", out, "--n_speakers", 1, "--overlap", 0.2)
    assert status("evaluate", *bad) == 2
    assert "--overlap has no effect with one speaker" in capsys.readouterr().err
    assert (out / "list.csv").read_text() == kept
    for option, value in (("--overlap", 1.1), ("--overlap", "nan"), ("--n_speakers", 3)):
        assert status("evaluate", model, voices, "-o", tmp_path / "none", option, value) == 2
        assert f"{option} must be from" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_evaluate_lets_mixtures_be_heard_in_other_surroundings(model, voices, tmp_path, capsys):
    options, noise = ["-n", "2", "--segment", "1"], ["--snr", "5"]
    ways = {"plain": [], "rooms": ["--reverb"], "noise": noise, "both": ["--reverb", *noise]}
    ways["recorded"] = [*noise, "--noise_dir", str(voices)]
    ways["microphone"] = ["--microphone"]
    lists, tables, inputs = [], [], {}
    for name, way in ways.items():
        out = tmp_path / name
        main(["evaluate", str(model), str(voices), "-o", str(out), *options, *way])
        lists.append((out / "list.csv").read_text())
        tables.append((out / "results" / "metrics.csv").read_text())
        summary = json.loads((out / "results" / "summary.json").read_text())
        inputs[name] = summary["groups"]["all"]["input_si_sdr"]["mean"]
    assert len(set(lists)) == 1 and len(set(tables)) == 6
    assert inputs["noise"] < inputs["plain"] - 1 and inputs["both"] < inputs["rooms"] - 1
    assert inputs["recorded"] < inputs["plain"] - 1
    assert status("evaluate", model, voices, "-o", tmp_path / "no", "--snr", "nan") == 2
    assert "--snr must be from" in capsys.readouterr().err and not (tmp_path / "no").exists()
    options = ("-o", tmp_path / "no", "--noise_dir", voices)
    assert status("evaluate", model, voices, *options) == 2
    assert "--noise_dir needs --snr" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert status("evaluate", model, voices, "-o", tmp_path / "no", "--noise_dir", "") == 2
    assert "--noise_dir needs the name" in capsys.readouterr().err


def test_evaluate_that_fails_leaves_the_list_of_the_results(model, voices, tmp_path, monkeypatch):
    options = [str(model), str(voices), "-o", str(tmp_path / "out"), "--segment", "1"]
    main(["evaluate", *options, "-n", "2"])
    kept = (tmp_path / "out" / "list.csv").read_text()

    def fail(*_):
        raise UserError("a recording is broken")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert status("evaluate", *options, "-n", "3") == 2
    assert (tmp_path / "out" / "list.csv").read_text() == kept


def test_ctrl_c_is_told_without_a_traceback(model, voices, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    assert status("evaluate", model, voices, "-o", tmp_path, "-n", "1", "--segment", "1") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_export_writes_a_file_that_separate_takes(model, voices, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    main(["export", str(model), "-o", str(file)])
    assert "largest_error" in capsys.readouterr().out
    out = tmp_path / "separated"
    main(["separate", str(voices / "a1.wav"), "-m", str(file), "-o", str(out)])
    assert len(list(out.glob("a1_est*.wav"))) == 2
    capsys.readouterr()
    main(["info", str(file)])
    text = capsys.readouterr().out
    assert "TinySepformer, an ONNX file" in text and "2, at 8000 Hz" in text
    assert status("export", file, "-o", tmp_path / "again.onnx") == 2
    assert "is an ONNX file already" in capsys.readouterr().err


def test_publish_adds_an_onnx_file_that_agrees(model, voices, tmp_path):
    main(["evaluate", str(model), str(voices), "-o", str(tmp_path / "out"), "-n", "2"]
         + ["--segment", "1"])  # fmt: skip
    summary = tmp_path / "out" / "results" / "summary.json"
    main(["publish", str(model), "--out", str(tmp_path / "p"), "--name", "n", "--onnx"]
         + ["--data_name", "d", "--data_licence", "CC0", "--summary", str(summary)])  # fmt: skip
    mixture = torch.randn(1, 5000)
    with torch.no_grad():
        wanted = from_pretrained(tmp_path / "p")(mixture)
    torch.testing.assert_close(OnnxSeparator(tmp_path / "p" / "model.onnx")(mixture), wanted,
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_help_names_every_subcommand(capsys):
    assert status("--help") == 0
    text = capsys.readouterr().out
    for name in "separate infer info check evaluate average export publish demo".split():
        assert f"  {name}" in text


def test_check_looks_for_the_rate_and_the_length_that_are_asked_for(voices, capsys):
    for option, value, kind in (("--sample_rate", 16000, "rate"), ("--shortest", 5, "short")):
        assert status("check", voices, option, value) == 1
        assert f"4  {kind}" in capsys.readouterr().out
    for option, value in (("--sample_rate", 0), ("--shortest", "nan"), ("--speech", "nowhere")):
        assert status("check", voices, option, value) == 2
        assert option in capsys.readouterr().err
    listed = ("check", voices / "wav.scp", "--speech", voices)
    assert status(*listed, "--shortest", 9) == 2
    assert "--shortest has no effect on a list" in capsys.readouterr().err


def test_a_mean_tells_the_licence_and_the_data_that_its_models_agree_in(tmp_path, capsys):
    data = {"name": "Corpus", "licence": "CC BY 4.0"}
    for name, other in (("a", {}), ("b", {}), ("c", {"licence": "mit"})):
        about = {"licence": "cc-by-4.0", "training": {"data": data, "steps": 5}} | other
        small().save_pretrained(tmp_path / name, **about)
    for names, licence in (("ab", "cc-by-4.0"), ("ac", "not told")):
        mean = tmp_path / f"{names}.pth"
        main(["average", *(str(tmp_path / name) for name in names), "-o", str(mean)])
        main(["info", str(mean)])
        told = capsys.readouterr().out
        assert f"licence         {licence}" in told and "trained on      Corpus" in told


def test_a_name_of_two_lines_is_told_whole(tmp_path, capsys):
    assert status("info", tmp_path / "a\nb.pth") == 2
    assert f"error: {tmp_path}/a?b.pth" in capsys.readouterr().err
