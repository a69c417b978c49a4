"""`Sepformer` is SepFormer: it loads and computes what SpeechBrain's does, and keeps less of it."""

import inspect
import shutil

import pytest
import torch
from small import n_parameters

from asteroid_tiny import Sepformer, TinySepformer, from_pretrained
from asteroid_tiny.bench.peers import build_peer
from asteroid_tiny.cost import saved_bytes

pytest.importorskip("speechbrain")
from speechbrain.inference.separation import SepformerSeparation
from speechbrain.lobes.models.dual_path import Dual_Path_Model
from speechbrain_peer import write_folder

SMALL = dict(num_layers=2, d_ffn=64, K=50)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # sepformer-wsj02mix, -wham, -whamr, -libri2mix
        dict(num_spks=3, num_layers=1),  # sepformer-wsj03mix, -libri3mix
        dict(sample_rate=16000, **SMALL),  # sepformer-whamr16k
        dict(num_spks=1, sample_rate=16000, **SMALL),  # sepformer-wham16k-enhancement
        dict(norm="gln", **SMALL),
        dict(norm="cln", kernel_size=20, stride=10, **SMALL),
    ],
    ids=str,
)
def test_a_folder_of_speechbrain_gives_its_outputs_on_speech(changes, tmp_path, clips):
    folder = write_folder(tmp_path / "published", **changes)
    peer = SepformerSeparation.from_hparams(str(folder), savedir=str(tmp_path / "cache"))
    model = Sepformer.from_speechbrain(folder).eval()
    assert model.sample_rate == changes.get("sample_rate", 8000)
    assert model.masker.n_src == changes.get("num_spks", 2)
    assert n_parameters(model) == sum(p.numel() for p in peer.mods.parameters())
    speech = sum(torch.from_numpy(clip[8000:]).float() / 32768 for clip in list(clips.values())[:2])
    # whole chunks; half of one more; whole strides; neither
    lengths = 8 * 250 + 8, 8 * 275 + 8, 8000, 4321
    for n_samples in lengths if changes else (4321,):  # the full size takes its time
        mixture = speech[None, :n_samples]
        with torch.inference_mode():
            ours, theirs = model(mixture), peer.separate_batch(mixture).transpose(1, 2)
        assert ours.shape == theirs.shape and theirs.abs().max() > 0
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def text_in(old, new):
    """Puts other text into hyperparams.yaml."""

    def change(folder):
        text = (folder / "hyperparams.yaml").read_text()
        assert old in text
        (folder / "hyperparams.yaml").write_text(text.replace(old, new))

    return change


def weights_in(name, change):
    def rewrite(folder):
        state = torch.load(folder / name, weights_only=True)
        change(state)
        torch.save(state, folder / name)

    return rewrite


PRELU, LAYER = "prelu.weight", "dual_mdl.1.intra_mdl.mdl.layers.0.norm1.norm.weight"
MISFITS = {
    "no yaml": (lambda folder: (folder / "hyperparams.yaml").unlink(), "hyperparams.yaml is miss"),
    "no weights": (lambda folder: (folder / "decoder.ckpt").unlink(), "decoder.ckpt is missing"),
    "yaml broken": (text_in("modules:", "modules: ["), "is no YAML"),
    "another network": (text_in("path.Dual_Path_Model", "path.Other"), "no Dual_Path_Model"),
    "another stack": (text_in("path.SBTransformerBlock", "path.SBRNNBlock"), "SBTransformerBlock"),
    "no skip": (text_in("skip_around_intra: true", "skip_around_intra: false"), "skip_around"),
    "post-norm": (text_in("norm_before: true", "norm_before: false"), "norm_before is False"),
    "another activation": (
        text_in("norm_before: true", "norm_before: true\n  activation: gelu"),
        "activation is 'gelu'",
    ),
    "another attention": (
        text_in("norm_before: true", "norm_before: true\n  attention_type: RelPosMHAXL"),
        "attention_type is 'RelPosMHAXL'",
    ),
    "positions of chunks": (
        text_in("skip_around", "use_global_pos_enc: true\n  skip_around"),
        "use_global_pos_enc is True",
    ),
    "default of norm_before": (text_in("  norm_before: true\n", ""), "norm_before is False"),
    "linear layers": (text_in("  linear_layer_after_inter_intra: false\n", ""), "linear_layer"),
    "no positions": (text_in("use_positional_encoding: true", "x: 1"), "use_positional_encoding"),
    "norm": (text_in("norm: ln", "norm: bn"), "norm is 'bn'"),
    "modules lack": (text_in("modules:", "others:"), "lacks 'modules'"),
    "reference to itself": (text_in("num_spks: 2", "num_spks: 2\nx: !ref <x>"), None),
    "rate": (text_in("sample_rate: 8000", "sample_rate: fast"), "sample_rate"),
    "surplus": (weights_in("masknet.ckpt", lambda s: s.update(x=torch.ones(1))), "no place for x"),
    "lacking": (weights_in("masknet.ckpt", lambda s: s.pop(PRELU)), "masker.prelu.weight"),
    "layer lacks": (weights_in("masknet.ckpt", lambda s: s.pop(LAYER)), "attention_norm.weight"),
    "NaN": (weights_in("masknet.ckpt", lambda s: s[PRELU].fill_(torch.nan)), "NaN"),
    "no dictionary": (lambda folder: torch.save([1], folder / "encoder.ckpt"), "no SepFormer"),
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("speechbrain") / "small", **SMALL)


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_one_sentence(misfit, small_folder, tmp_path, refused):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    change, words = MISFITS[misfit]
    change(folder)
    if words is None:  # harmless
        return Sepformer.from_speechbrain(folder)
    with refused(folder, words):
        Sepformer.from_speechbrain(folder)


def test_two_kinds_of_stacks_with_other_heads_are_refused(small_folder, tmp_path, refused):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    path = folder / "hyperparams.yaml"
    path.write_text(path.read_text().replace("nhead: 8", "nhead: 4", 1))
    with refused(folder, "differ in their heads"):
        Sepformer.from_speechbrain(folder)


def test_what_the_yaml_leaves_out_is_as_speechbrain_has_it(small_folder, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    for line in ("  K: 50\n", "  norm: ln\n"):
        text_in(line, "")(folder)
    defaults = inspect.signature(Dual_Path_Model).parameters
    masker = Sepformer.from_speechbrain(folder).masker
    assert masker.chunk_size == defaults["K"].default
    assert defaults["norm"].default == "ln" and masker.norm.norm_type == "gLN"


def test_tags_in_the_yaml_are_not_executed(small_folder, tmp_path, refused):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    boom = tmp_path / "boom"
    text_in(
        "sample_rate:", f"x: !apply:os.mkdir [{boom}]\ny: !!python/name:os.system\nsample_rate:"
    )(folder)
    with refused(folder, "is no YAML"):  # PyYAML's own tags for Python
        Sepformer.from_speechbrain(folder)
    text_in("y: !!python/name:os.system\n", "y: !name:os.system\n")(folder)
    Sepformer.from_speechbrain(folder)
    assert not boom.exists()


def test_it_can_be_stored_as_a_model_of_this_package(small_folder, tmp_path):
    model = Sepformer.from_speechbrain(str(small_folder)).eval()
    model.save_pretrained(tmp_path)
    twin, mixture = from_pretrained(tmp_path).eval(), torch.randn(1, 999)
    with torch.no_grad():
        assert torch.equal(twin(mixture), model(mixture))


@pytest.mark.slow
def test_less_is_kept_for_backward_than_speechbrain_keeps():
    n_samples = 16000  # of which the chunks are more than the taps of the convolution
    peer = saved_bytes(build_peer("speechbrain-sepformer"), n_samples)
    assert saved_bytes(Sepformer.from_preset("sepformer"), n_samples) <= 0.45 * peer
    assert saved_bytes(TinySepformer.from_preset("tiny-sepformer-s"), n_samples) <= 0.43 * peer
    for model_class, preset in [(Sepformer, "sepformer"), (TinySepformer, "tiny-sepformer-s")]:
        lean = model_class.from_preset(preset, checkpoint_activations=True)
        assert saved_bytes(lean, n_samples) <= 0.12 * peer
