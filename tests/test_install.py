"""The package as users install it: a wheel, not a link to this folder; set-up on bare machines."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from small import small

ROOT = Path(__file__).resolve().parents[1]
TRY = """
import sys
import asteroid, torch, asteroid_tiny
assert "site" in asteroid_tiny.__file__, asteroid_tiny.__file__
model = asteroid.models.get("TinySepformer").from_preset("tiny-sepformer-xs")
assert asteroid_tiny.from_pretrained("a-model").masker.n_src == 2
print(tuple(model(torch.zeros(1, 4000)).shape))
assert "torch._dynamo" not in sys.modules, "imports torch.compile, which takes a second"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "asteroid_tiny"):
        subprocess.run(["cp", "-R", ROOT / name, source], check=True)
    small().save_pretrained(source / "asteroid_tiny" / "zoo" / "a-model")  # a packaged model
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(pip, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_code_and_no_speech(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "asteroid_tiny/data/mixing.py" in names
    assert "asteroid_tiny/zoo/a-model/model.safetensors" in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"asteroid-tiny = asteroid_tiny.cli:main" in zipfile.ZipFile(wheel).read(entry_points)
    assert not [name for name in names if name.endswith(".ogg") or name.startswith("egs")]
    assert wheel.stat().st_size < 25_000_000  # mostly packaged weights


@pytest.mark.parametrize("package", ["torch", "torchaudio"])
def test_it_asks_for_the_one_release_that_is_tested(package, wheel):
    files = zipfile.ZipFile(wheel)
    metadata = files.read(next(name for name in files.namelist() if name.endswith("/METADATA")))
    wanted = f"Requires-Dist: {package}=={version(package).split('+')[0]}"
    assert wanted in metadata.decode().splitlines()


def test_what_the_wheel_installs_can_be_used(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2, 4000)"


def test_without_pythons_venv_module_nothing_is_half_made(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cksum", "grep", "df", "awk"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    done = subprocess.run(
        ["bash", "-c", f"root={tmp_path}; . {ROOT}/local/setup.sh; setup_python '' test; echo on"],
        capture_output=True,
        text=True,
        env={"PATH": str(tools)},
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no Python from 3.10 on with its venv module")
    assert not (tmp_path / ".venv").exists()


def test_pesq_that_cannot_be_built_is_stood_in_for(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    commands = f"""
        python={python}
        . {ROOT}/local/setup.sh
        setup_pesq && setup_pesq
        $python -m pip install --no-index 'pesq>=0' && $python -m pip check
        ! $python -c 'import pesq' 2> /dev/null && $python -m pip uninstall -y pesq
    """
    done = subprocess.run(
        ["bash", "-ec", commands],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "already satisfied: pesq" in done.stdout and "uninstalled pesq-0" in done.stdout
    assert not list(tmp_path.rglob("pesq*"))
