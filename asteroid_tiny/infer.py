"""Asteroid's command asteroid-infer, for models of Asteroid and of this package alike."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from asteroid.dsp import LambdaOverlapAdd
from asteroid.models import BaseModel
from asteroid.scripts import asteroid_cli
from asteroid.utils.hub_utils import MODELS_URLS_HASHTABLE, SR_HASHTABLE

from .errors import UserError
from .hub import locate
from .models import Sepformer, TinySepformer, from_pretrained
from .separable import Separable, separate
from .weights import open_stored


def infer(argv):
    """Separates files.

    Args:
        argv (list of str): Options of asteroid-infer.

    Raises:
        UserError: If a file, an option or the model is wrong, or the folder for the output cannot
            be made.
    """
    ours = {
        "BaseModel": SimpleNamespace(from_pretrained=_load_any),
        "LambdaOverlapAdd": _overlap_add,
        "separate": separate,
    }
    theirs, words = {name: getattr(asteroid_cli, name) for name in ours}, sys.argv
    vars(asteroid_cli).update(ours)  # all else is left to it
    sys.argv = ["asteroid-tiny infer"]  # which its help and its errors begin with
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Could find any file", UserWarning)
            asteroid_cli.infer(argv)
    except UserWarning as error:
        raise UserError(f"there is no file {str(error).partition(' matched ')[2]}") from None
    except Exception as error:  # of audio files, of options; their readers raise anything
        told = " ".join(str(error).split())
        raise UserError(told or f"a file cannot be read: {type(error).__name__}") from None
    finally:
        vars(asteroid_cli).update(theirs)
        sys.argv = words


class _OverlapAdd(Separable, LambdaOverlapAdd):
    """With the checks of our models."""


def _overlap_add(nnet, window, **options):
    """Asteroid's overlap-add, its default window by SciPy's name."""
    return _OverlapAdd(nnet, window="hann" if window == "hanning" else window, **options)


def _load_any(pretrained_model_conf_or_path):
    """A model of this package or of Asteroid, with nothing in its file run."""
    name = pretrained_model_conf_or_path
    stored = open_stored(locate(MODELS_URLS_HASHTABLE.get(name, name)))
    if stored.model_name in (Sepformer.__name__, TinySepformer.__name__):
        return from_pretrained(Path(stored.where))
    conf = {
        "model_name": stored.model_name,
        "model_args": {"sample_rate": SR_HASHTABLE.get(name), **stored.model_args},
        "state_dict": {key: stored.read(key) for key in stored.shapes},
    }
    try:
        return BaseModel.from_pretrained(conf)
    except Exception as error:  # arguments and weights of strangers raise anything
        raise UserError(f"{name} is no model of Asteroid: {' '.join(str(error).split())}") from None
