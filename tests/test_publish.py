"""Publishing: the folder, its card, Asteroid's package, 16 bits, the command line, the zoo."""

import copy
import json

import asteroid
import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from asteroid.models import ConvTasNet
from asteroid.models.publisher import _populate_publishable, make_metadata_from_model
from conftest import DATA
from small import CLASSES, both_classes, small

from asteroid_tiny import cli, from_pretrained, hub, list_models
from asteroid_tiny.config import read_conf
from asteroid_tiny.publish import add_to_zoo, asteroid_package, is_published, publish, rounding_db
from asteroid_tiny.recipe import publish_model, recipe_defaults
from asteroid_tiny.weights import CONFIG, WEIGHTS


@pytest.fixture
def about(summary):
    return dict(
        name="a-model",
        data_name="Some Corpus (clean)",
        data_licence="CC BY-NC 4.0",
        data_url="https://example.org/corpus",
        licence="cc-by-sa-3.0",
        summary=summary,
        command="./run.sh --stage 0",
        training={"steps": 100, "hours": 1.25},
    )


def speech_of(clips):
    first, second = list(clips.values())[:2]
    return torch.from_numpy(first.astype(np.float32) + second) / 65536


@both_classes
def test_all_files_of_a_publish_folder_hold_the_same_model(model_class, tmp_path, about, clips):
    model, mixture = small(model_class), speech_of(clips)[None, :8000]
    folder = publish(model, tmp_path / "made" / "publish", about)
    plain = torch.load(folder / "model.pth", weights_only=True)  # as asteroid-upload does
    twins = [
        from_pretrained(folder),
        from_pretrained(folder / "pytorch_model.bin"),
        asteroid.models.BaseModel.from_pretrained(str(folder / "pytorch_model.bin")),
        asteroid.models.BaseModel.from_pretrained(copy.deepcopy(plain)),
    ]
    with torch.no_grad():
        assert all(torch.equal(twin.eval()(mixture), model(mixture)) for twin in twins)
    assert is_published(folder) and all(type(twin) is model_class for twin in twins)


def test_asteroid_upload_finds_what_it_needs(tmp_path, about):
    package = torch.load(publish(small(), tmp_path / "p", about) / "model.pth", weights_only=True)
    package = _populate_publishable(package, uploader="A. Nonym", git_username="nonym")
    metadata = make_metadata_from_model(package)
    assert "Some Corpus" in metadata["title"] and "CC BY-NC 4.0" in metadata["description"]
    assert "(Research only)" in package["infos"]["license_note"]
    assert f"{package['infos']['final_metrics']['si_sdr_imp']}" in metadata["description"]


@pytest.mark.parametrize(
    "licence, restricted",
    [
        ("CC BY 4.0", False),
        ("CC BY-NC 4.0", True),
        ("for non-commercial use", True),
        ("LDC User Agreement", True),
        ("research alone", True),
    ],
)
def test_data_that_may_not_be_sold_make_a_package_of_research(about, licence, restricted):
    metrics = {"si_sdr_i": 1.5}
    package = asteroid_package(small().serialize(), metrics, about | {"data_licence": licence})
    assert package["licenses"][0]["non_commercial"] is restricted
    assert package["infos"]["final_metrics"] == {"si_sdr_imp": 1.5}


def test_the_card_says_what_the_hub_and_a_reader_must_know(tmp_path, about):
    card = (publish(small(), tmp_path / "p", about) / "README.md").read_text()
    _, block, text = card.split("---\n", 2)
    metadata, text = yaml.safe_load(block), " ".join(text.split())
    assert metadata["license"] == "cc-by-sa-3.0" and metadata["library_name"] == "asteroid"
    assert metadata["datasets"] == ["Some-Corpus-clean"] and "asteroid" in metadata["tags"]
    (result,) = metadata["model-index"][0]["results"]
    mean = about["summary"]["groups"]["all"]["si_sdr_i"]["mean"]
    assert result["metrics"][0]["value"] == pytest.approx(mean, abs=1e-3)
    words = "CC BY-NC 4.0", "example.org/corpus", "100 steps", "1.25 h", f"{mean:.2f}", "8000 Hz"
    ends = "licence: CC BY-NC 4.0.", "The weights: cc-by-sa-3.0."
    for word in (*words, *ends, "./run.sh --stage 0", "Limits", 'from_pretrained("a-model")'):
        assert word in text, word


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data_licence=None), ["licence of the data", "--data_licence"]),
        (dict(data_name="", summary={}), ["and the metrics", "--data_name, --summary"]),
        (dict(licence=None), ["--licence"]),
        (dict(name="my model/1"), ["'my model/1'"]),
        (dict(summary=None), ["metrics", "--summary"]),
        (dict(summary={"n_mixtures": 3}), ["no summary of an evaluation"]),
    ],
    ids=str,
)
def test_nothing_is_published_without_licence_and_metrics(tmp_path, about, change, words, refused):
    with refused(*words):
        publish(small(), tmp_path / "p", {**about, **change})
    assert not list(tmp_path.iterdir())


def test_speech_of_ones_own_does_not_bear_the_name_of_the_recipes(refused):
    recipe = DATA.parent
    settings = read_conf(recipe.parents[2] / "local" / "conf.yml") | read_conf(recipe / "conf.yml")
    with refused("the speech in /mine", "--data_name and --data_licence"):
        publish_model(recipe / "exp" / "none", {**settings, "speech": "/mine"})
    with refused("the speech in /mine", "--data_licence"):
        publish_model(recipe / "exp" / "none", {**settings, "speech": "/mine", "data_name": "My"})


@pytest.mark.parametrize("rate", [8000, 16000])
def test_speech_of_ones_own_is_not_by_those_who_made_the_recipes(
    run_folder, summary, clips, monkeypatch, rate
):
    test_list = [(speech_of(clips), None)]
    monkeypatch.setattr("asteroid_tiny.recipe.open_list", lambda *_: test_list)
    exp_dir = run_folder("minispeech")
    (exp_dir / "results").mkdir(parents=True)
    (exp_dir / "results" / "summary.json").write_text(json.dumps(summary | {"sample_rate": rate}))
    (exp_dir / "training.json").write_text('{"steps": 90}')
    small(sample_rate=rate).save(exp_dir / "best_model.pth")
    changes = dict(
        sample_rate=rate, speech="/mine", init_from=None, batch_size=4, segment=3.0, half=True
    )
    settings = recipe_defaults(exp_dir) | changes
    publish_model(exp_dir, settings, given=dict(data_name="My talks", data_licence="CC0"))
    card = " ".join((exp_dir / "publish" / "README.md").read_text().split())
    assert "My talks; licence: CC0. It was trained for 90 steps on 0.3 h of mixtures." in card
    config = json.loads((exp_dir / "publish" / CONFIG).read_text())
    assert config["dtype"] == "float16" and config["sample_rate"] == rate
    named = f"tiny-sepformer-xs_2spk_{rate // 1000}k"
    assert named in list_models() and config["name"] == f"{named}_minispeech"
    publish_model(exp_dir, settings | dict(data_name="M", data_licence="CC0", data_author="Me"))
    assert "M by Me; licence: CC0" in (exp_dir / "publish" / "README.md").read_text()


def test_metrics_of_another_rate_are_no_metrics_of_the_model(tmp_path, about, refused):
    with refused("8000 Hz", "16000 Hz"):
        publish(small(sample_rate=16000), tmp_path / "p", about)
    with refused("mixtures of other than 3 speakers"):
        publish(small(n_src=3), tmp_path / "p", about)


def test_metrics_of_fewer_speakers_are_no_metrics_of_the_model(tmp_path, about, refused):
    summary = copy.deepcopy(about["summary"])
    summary["groups"]["all"]["spare_level"] = dict(mean=-30.0, low=None, high=None, n_missing=0)
    with refused("fewer speakers than 2"):
        publish(small(), tmp_path / "p", about | {"summary": summary})


def test_a_folder_with_other_files_is_left_alone(tmp_path, about, refused):
    (tmp_path / "thesis.tex").write_text("years of work")
    with refused(tmp_path, "holds other files"):
        publish(small(), tmp_path, about)
    for _ in range(2):  # one of ours is replaced, with what a killed `--onnx` left in it
        publish(small(), tmp_path / "p", about)
        (tmp_path / "p" / ".model.deadbeef.9.part.onnx").touch()
        assert is_published(tmp_path / "p")
    assert (tmp_path / "thesis.tex").exists()


def test_a_model_of_others_is_not_taken_for_one_of_ours(tmp_path, about, refused):
    for name in ("README.md", "model.safetensors", "vocab.txt"):
        (tmp_path / name).write_text("of another library")
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    for _ in range(2):
        with refused(tmp_path, "holds other files"):
            publish(small(), tmp_path, about)
        (tmp_path / "vocab.txt").unlink(missing_ok=True)
    ours = publish(small(), tmp_path / "p", about)
    (ours / ".git").mkdir()
    with refused(ours, "holds other files"):
        publish(small(), ours, about)


@pytest.mark.parametrize("name", ["../planted", "/planted", None])
def test_the_name_that_a_folder_tells_is_no_path(tmp_path, about, monkeypatch, refused, name):
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    folder = publish(small(), tmp_path / "p", about)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "name": name}))
    with refused("a model is named by letters", repr(name)):
        add_to_zoo(folder)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "change", [{"sample_rate": None}, {"n_mixtures": None}, {"sample_rate": "fast"}]
)
def test_a_summary_that_is_none_is_refused(tmp_path, about, change, refused):
    with refused("no summary of an evaluation"):
        publish(small(), tmp_path / "p", {**about, "summary": {**about["summary"], **change}})


def test_16_bits_are_stored_where_they_serve_and_else_not(
    tmp_path, about, capsys, clips, monkeypatch
):
    model, speech = small(), speech_of(clips)[:16000]
    assert 40 < rounding_db(model, [speech]) < 90 and rounding_db(model) > 40
    folder = publish(model, tmp_path / "half", about, half=True, signals=[speech])
    assert "16 bits are stored" in capsys.readouterr().out
    assert json.loads((folder / CONFIG).read_text())["dtype"] == "float16"
    whole = publish(model, tmp_path / "whole", about)
    assert (folder / WEIGHTS).stat().st_size < 0.75 * (whole / WEIGHTS).stat().st_size
    for path in (folder, folder / "model.pth"):
        state = from_pretrained(path).state_dict()
        assert all(torch.equal(state[k], v.half().float()) for k, v in model.state_dict().items())
    forward = type(model).forward
    with monkeypatch.context() as patch:  # an output that nobody is in
        silent = torch.tensor([[1.0], [0.0]])
        patch.setattr(type(model), "forward", lambda self, wav: silent * forward(self, wav))
        assert 40 < rounding_db(model, [speech, 0 * speech]) < 90
    model.encoder.filterbank._filters.data[0] = 1e6  # more than 16 bits hold
    folder = publish(model, tmp_path / "half", about, half=True, signals=[speech])
    assert "32 bits are stored" in capsys.readouterr().out
    assert json.loads((folder / CONFIG).read_text())["dtype"] == "float32"


def test_weights_beyond_16_bits_are_not_stored_in_them(tmp_path, refused):
    model = small()
    model.masker.to_mask.weight.data.fill_(1e6)
    with refused("masker.to_mask.weight holds numbers that 16 bits cannot store"):
        model.save_pretrained(tmp_path / "m", half=True)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("db, dtype", [(39.9, "float32"), (40.1, "float16")])
def test_16_bits_are_stored_from_40_db_on(tmp_path, about, monkeypatch, db, dtype):
    monkeypatch.setattr("asteroid_tiny.publish.rounding_db", lambda *_: db)
    folder = publish(small(), tmp_path / "p", about, half=True)
    assert json.loads((folder / CONFIG).read_text())["dtype"] == dtype


def test_rounding_is_judged_by_the_worst_of_the_estimates(monkeypatch):
    noise, forward = 0.01 * torch.tensor([[1.0], [30.0]]) * torch.randn(2, 8000), []

    def noisy(self, wav):
        forward.append(wav.expand(2, -1) + noise * (len(forward) % 2))
        return forward[-1][None]

    monkeypatch.setattr(type(small()), "forward", noisy)
    assert rounding_db(small(), [torch.randn(8000)]) == pytest.approx(10.5, abs=1)


def test_any_model_is_published_and_packaged_from_the_command_line(
    tmp_path, about, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "ZOO", tmp_path / "zoo")
    model = small()
    model.save(tmp_path / "model.pth")
    (tmp_path / "summary.json").write_text(json.dumps(about["summary"]))
    source, out = str(tmp_path / "model.pth"), str(tmp_path / "out")
    metrics = ["--summary", str(tmp_path / "summary.json")]
    options = ["publish", source, "--out", out, "--name", "a-model", "--data_name", "Corpus"]
    with pytest.raises(SystemExit) as left:
        cli.main([*options, *metrics])
    assert left.value.code == 2 and "--data_licence" in capsys.readouterr().err
    cli.main([*options, *metrics, "--data_licence", "CC0"])
    cli.main(["publish", out, "--zoo"])
    assert list_models()["a-model"]["training"]["data"]["licence"] == "CC0"
    with pytest.raises(SystemExit):
        cli.main(["publish", out, "--zoo"])
    assert "a-model is there already; publish with another --name" in capsys.readouterr().err
    assert "pytorch_model.bin" in (tmp_path / "out" / "README.md").read_text()
    card = (tmp_path / "zoo" / "a-model" / "README.md").read_text()
    assert "pytorch_model.bin" not in card and "Corpus" in card  # that file is not packaged
    twin = from_pretrained("a-model")
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "option", [["--name", "other"], ["--half"], ["--licence", "mit"], ["--out", "x"], ["--private"]]
)
def test_options_that_a_published_folder_does_not_take_are_refused(option, tmp_path, about, capsys):
    folder = publish(small(), tmp_path / "p", about)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as left:
        cli.main(["publish", str(folder), *option])
    assert left.value.code == 2 and f"{option[0]} has no effect" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_model_tells_of_its_training_is_published_again(tmp_path, about, capsys):
    publish(small(), tmp_path / "p", about)
    (tmp_path / "summary.json").write_text(json.dumps(about["summary"]))
    files = ["--out", str(tmp_path / "q"), "--summary", str(tmp_path / "summary.json")]
    args = ["publish", str(tmp_path / "p" / "model.safetensors"), "--name", "twin", *files]
    with pytest.raises(SystemExit):  # the licence of one corpus is not that of another
        cli.main([*args, "--data_name", "Another Corpus"])
    assert "--data_licence" in capsys.readouterr().err
    cli.main(args)
    before, after = (json.loads((tmp_path / x / CONFIG).read_text()) for x in "pq")
    assert after["training"]["steps"] == 100 and after["training"]["hours"] == 1.25
    assert after["training"]["data"] == before["training"]["data"]


@pytest.mark.parametrize("model_class", [*CLASSES, ConvTasNet])
def test_infer_separates_with_models_of_ours_and_of_asteroid(model_class, tmp_path, clips):
    if model_class is ConvTasNet:
        model = ConvTasNet(2, n_blocks=1, n_repeats=1, sample_rate=8000).eval()
        torch.save(model.serialize(), tmp_path / "model.pth")  # with TorchVersion, as Asteroid does
    else:
        model = small(model_class)
        model.save(tmp_path / "model.pth")
    sf.write(tmp_path / "talk.wav", speech_of(clips)[:4000].numpy(), 8000)
    cli.main(["infer", str(tmp_path / "model.pth"), "--files", str(tmp_path / "talk.wav")])
    made = tmp_path / "made" / "here"
    cli.main(
        [
            "infer",
            str(tmp_path / "model.pth"),
            "--files",
            str(tmp_path / "talk.wav"),
            "-o",
            str(made),
        ]
    )
    assert len(list(made.iterdir())) == 2
    with pytest.raises(SystemExit):
        cli.main(["infer", "none.pth", "--files", str(made), "-o", str(tmp_path / "unmade")])
    assert not (tmp_path / "unmade").exists()
    written = np.stack([sf.read(tmp_path / f"talk_est{i}.wav")[0] for i in (1, 2)])
    assert written.shape == (2, 4000) and np.abs(written).max() > 0
    mixture, _ = sf.read(tmp_path / "talk.wav", dtype="float32")
    expected = model.separate(mixture[None, None])
    assert np.allclose(written, expected[0], atol=1e-4)


def test_infer_adds_blocks_that_overlap(tmp_path, clips, capsys):
    small().save(tmp_path / "model.pth")
    sf.write(tmp_path / "talk.wav", speech_of(clips)[:6000].numpy(), 8000)
    sf.write(tmp_path / "silence.wav", np.zeros(6000), 8000)
    sf.write(tmp_path / "broken.wav", np.full(6000, np.nan), 8000, subtype="FLOAT")
    command = ["infer", str(tmp_path / "model.pth"), "-w", "2000", "--files"]
    cli.main([*command, str(tmp_path / "talk.wav"), str(tmp_path / "silence.wav")])
    talk, silence = (sf.read(tmp_path / f"{x}_est1.wav")[0] for x in ("talk", "silence"))
    assert len(talk) == len(silence) == 6000 and talk.any() and not silence.any()
    with pytest.raises(SystemExit):
        cli.main([*command, str(tmp_path / "broken.wav")])
    assert "NaN" in capsys.readouterr().err and not (tmp_path / "broken_est1.wav").exists()


def test_infer_says_in_one_line_what_is_wrong(tmp_path, capsys):
    small().save(tmp_path / "model.pth")
    sf.write(tmp_path / "talk.wav", np.zeros(1000), 16000)
    (tmp_path / "notes.txt").write_text("no sound")
    for model, file, words in [
        ("model.pth", "talk.wav", "sampling rate"),
        ("none.pth", "talk.wav", "none.pth is missing"),
        ("model.pth", "none at all.wav", f"there is no file {tmp_path}/none at all.wav"),
        ("model.pth", "notes.txt", "a file cannot be read"),
    ]:
        with pytest.raises(SystemExit) as left:
            cli.main(["infer", str(tmp_path / model), "--files", str(tmp_path / file)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and line.startswith("error: ") and words in line


def test_help_names_every_command_and_option(capsys):
    for argv, words in [
        (["--help"], ["publish", "infer"]),
        (["publish", "--help"], ["--data_licence", "--push", "--zoo"]),
        (["infer", "--help"], ["usage: asteroid-tiny infer", "--ola-window", "--resample"]),
    ]:
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 0
        told = capsys.readouterr().out
        assert all(word in told for word in words)


def test_private_and_only_what_is_public_goes_to_the_hub(tmp_path, about, monkeypatch, capsys):
    import huggingface_hub

    asked = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo, **options):
            asked.update(options)

        def upload_folder(self, **options):
            asked.update(options)
            return type("Commit", (), {"commit_url": ""})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = publish(small(), tmp_path / "p", about)
    cli.main(["publish", str(folder), "--push", "me/model", "--private"])
    assert asked["private"] is True and "model.pth" not in asked["allow_patterns"]
    with pytest.raises(SystemExit):
        cli.main(["publish", str(folder), "--push", ""])
    assert "'' is no name on the hub" in capsys.readouterr().err


def test_a_card_tells_whose_data_it_began_with_and_whom_to_thank(tmp_path, about):
    start = {"name": "base", "data": {"name": "Base Corpus", "licence": "CC BY-NC 4.0"}}
    about |= dict(training={"steps": 5, "hours": 1, "init_from": start}, data_author="A. Nonym",
                  credits="read by B. Reader", licence="My Own Licence 1")  # fmt: skip
    about["training"] |= {"device": "CPU", "minutes": 90}
    card = (publish(small(), tmp_path / "p", about) / "README.md").read_text()
    words = " ".join(card.split())
    assert "began with the weights of base, which were trained on Base Corpus (CC BY-NC" in words
    assert "by A. Nonym; licence" in words and "read by B. Reader" in words
    assert "trained for 5 steps on 1 h of mixtures, in 1.5 h on a CPU." in words
    assert "license: other license_name: my-own-licence-1" in words


def test_rounding_is_judged_by_the_worst_signal_and_leaves_the_mode(clips):
    model = small().train()
    speech = torch.from_numpy(np.stack(list(clips.values()))[:, :8000] / np.float32(32768))
    ratios = [rounding_db(model, [one]) for one in speech]
    assert len(set(ratios)) > 1 and rounding_db(model, speech) == pytest.approx(min(ratios))
    assert model.training
    rounding_db(model.eval(), speech[:1])
    assert not model.training


def test_half_command_and_licence_reach_what_is_published(tmp_path, about, capsys):
    small().save_pretrained(tmp_path / "m", licence="mit")
    (tmp_path / "summary.json").write_text(json.dumps(about["summary"]))
    command = ["publish", str(tmp_path / "m" / "model.safetensors"), "--out", str(tmp_path / "p")]
    command += ["--name", "n", "--data_name", "d", "--data_licence", "CC0", "--half"]
    command += ["--summary", str(tmp_path / "summary.json"), "--command", "make it"]
    cli.main(command)
    config = json.loads((tmp_path / "p" / CONFIG).read_text())
    assert config["dtype"] == "float16" and config["licence"] == "mit"
    card = (tmp_path / "p" / "README.md").read_text()
    assert "Made with `make it`" in card and "name: d, test" in card
    cli.main([*command, "--licence", "cc-by-4.0", "--test_name", "Other Speech"])
    card = (tmp_path / "p" / "README.md").read_text()
    assert "name: Other Speech" in card and "type: Other-Speech" in card and "\n- d\n" in card
    assert json.loads((tmp_path / "p" / CONFIG).read_text())["licence"] == "cc-by-4.0"
