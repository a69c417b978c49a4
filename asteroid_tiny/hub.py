"""Where models come from: files, the packaged model zoo, web addresses, the Hugging Face hub.

`locate` turns a name into a file or folder on this machine. What is downloaded from an address is
kept by the checksum of its content, never by a file name, so that the same name on two servers, or
new content under an old address, cannot be mistaken for each other; the hub's client does the like.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import urllib.parse
import warnings
from pathlib import Path

from .download import digest_of, fetch, identify
from .errors import UserError, printable
from .files import reason, temporary_folder, whole_file
from .weights import CONFIG, WEIGHTS, read_config

ZOO = Path(__file__).parent / "zoo"
PICKLED = "pytorch_model.bin"  # the one file that plain Asteroid takes from the hub
MODEL_SUFFIXES = (".pth", ".bin", ".ckpt", ".safetensors", ".onnx")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def example_mixture():
    """Path of a mixture of two real speakers that comes with the package (str).

    Examples:
        >>> example_mixture().endswith("mixture.flac")
        True
    """
    return str(ZOO / "example" / "mixture.flac")


def list_models():
    """The models that come with this package and need no network.

    Returns:
        dict: The content of config.json by name: `model_name`, `n_src`, `sample_rate`,
        `n_parameters`, `training`, `metrics`, `licence` and more.
    """
    return {name: read_config(folder / CONFIG) for name, folder in _packaged().items()}


def _packaged():
    """Folders of the packaged models by name; a hidden one is of a process that was killed."""
    return {path.parent.name: path.parent for path in sorted(ZOO.glob(f"[!.]*/{CONFIG}"))}


def locate(name):
    """The file or folder that a name stands for, downloaded if need be.

    Args:
        name (str or Path): Tried in this order: an existing path, a name of `list_models`, a URL,
            an id on the hub.

    Returns:
        Path: For `weights.open_stored`.

    Raises:
        UserError: If there is nothing of that name, or it cannot be fetched.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise UserError(f"{name!r} names no model; see asteroid_tiny.list_models()")
    path, name = Path(name), str(name)
    packaged = _packaged()
    if name.startswith(("http://", "https://")):
        return _from_url(name)
    try:
        there = path.exists()
    except OSError as error:  # of a name too long, a folder closed to us
        raise UserError(f"{printable(name)} cannot be read: {reason(error)}") from None
    if there:
        if name in packaged:
            warnings.warn(
                f"{name} is both a path here and a packaged model; the path is taken (for the "
                "packaged one, call from another folder)"
            )
        return path
    if name in packaged:
        return packaged[name]
    if path.suffix in MODEL_SUFFIXES or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is missing")
    repo, _, revision = name.partition("@")
    if HUB_ID.fullmatch(repo):
        return _from_hub(repo, revision or None)
    there = f"there are {', '.join(packaged)}" if packaged else "there are none"
    raise UserError(
        f"{name} is neither a file or folder, nor a packaged model ({there}), an address "
        "(https://..), or a model on the hub (user/repo)"
    )


def cache_dir():
    """Folder of what was downloaded from addresses; ``ASTEROID_CACHE`` names another parent."""
    parent = os.environ.get("ASTEROID_CACHE") or "~/.cache/torch/asteroid"
    try:
        return Path(parent).expanduser() / "asteroid_tiny"
    except RuntimeError:
        raise UserError("there is no home to keep downloads in; set ASTEROID_CACHE") from None


def _from_url(url):
    """A file from the web; without a checksum the server is asked whether it is still the same."""
    url, _, fragment = url.partition("#")
    if fragment and not re.fullmatch("sha256=[0-9a-fA-F]{64}", fragment):
        raise UserError(f"behind {url}# may stand sha256= and 64 hexadecimal digits")
    sha256 = fragment.removeprefix("sha256=").lower() or None
    suffix = Path(urllib.parse.urlparse(url).path).suffix
    if suffix == ".safetensors":
        return _pair_from_url(url, sha256)
    if sha256 is not None:
        return fetch(url, cache_dir() / sha256 / f"model{suffix}", sha256)
    validator = identify(url)
    if validator is not None:
        return fetch(url, cache_dir() / _digest(f"{url} {validator}") / f"model{suffix}")
    with _scratch() as folder:  # nothing tells whether it has changed: fetched every time
        new = fetch(url, folder / f"model{suffix}")
        kept = cache_dir() / digest_of(new) / new.name
        kept.parent.mkdir(exist_ok=True)
        os.replace(new, kept)
    return kept


def _pair_from_url(url, sha256):
    """`model.safetensors` with the `config.json` beside it, which has its checksum."""
    query = urllib.parse.urlsplit(url).query  # which may hold the leave to read
    address = urllib.parse.urljoin(url, f"{CONFIG}?{query}" if query else CONFIG)
    with temporary_folder() as folder:
        path = fetch(address, Path(folder) / CONFIG)
        config, content = read_config(path, where=address), path.read_bytes()
    told = config["sha256"]
    if not re.fullmatch("[0-9a-f]{64}", told):
        raise UserError(f"{address} gives {printable(told)!r} for a sha256, which it is not")
    if sha256 not in (None, told):
        raise UserError(f"{address} says that the sha256 is {told}, not {sha256}")
    kept = cache_dir() / _digest(content) / WEIGHTS
    if not kept.exists():
        with whole_file(kept.with_name(CONFIG)) as part:
            part.write_bytes(content)
    return fetch(url, kept, config["sha256"])


@contextlib.contextmanager
def _scratch():
    """A folder inside the cache, for as long as it is needed."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{cache_dir()} could not be written: {reason(error)}") from None


def _digest(content):
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()


def _from_hub(repo, revision):
    """Our two files from one commit of a repository on the hub, or else Asteroid's."""
    from huggingface_hub import errors, hf_hub_download

    with hub_errors(repo, revision):
        try:
            config = Path(hf_hub_download(repo, CONFIG, revision=revision))
            commit = config.parent.name  # both of one commit, whatever is pushed meanwhile
            return Path(hf_hub_download(repo, WEIGHTS, revision=commit))
        except errors.EntryNotFoundError:  # not there; or not in the cache, without network
            return Path(hf_hub_download(repo, PICKLED, revision=revision))


@contextlib.contextmanager
def hub_errors(repo, revision=None):
    """Turns what the hub's client raises into a `UserError`."""
    from huggingface_hub import errors

    try:
        yield
        return
    except UserError:
        raise
    except errors.GatedRepoError:
        hint = "asks for consent: give it on its page, then log in here with `hf auth login`"
    except errors.RepositoryNotFoundError:
        hint = "does not exist on the hub, or is private: log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        hint = f"has no revision {revision!r} on the hub"
    except errors.LocalEntryNotFoundError:
        hint = "is not in the cache, and the hub cannot be reached"
    except errors.EntryNotFoundError:
        hint = f"holds neither {WEIGHTS} with {CONFIG} nor {PICKLED}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        login = "; the token is missing or refused: log in with `hf auth login`"
        hint = f"is refused by the hub with status {status}{login if status in (401, 403) else ''}"
    except errors.HFValidationError as error:
        hint = f"is no name on the hub: {' '.join(str(error).split())}"
    except Exception as error:  # of the disk, or of the client's HTTP library
        while error.__cause__ is not None:
            error = error.__cause__
        told = reason(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        hint = f"could not be transferred: {' '.join(told.split())}"
    where = f"{repo}@{revision}" if revision else repo
    raise UserError(f"{where} {hint}") from None
