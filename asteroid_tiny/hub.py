"""Saving and loading of weights: whole files, and no code from strangers run.

Files are dictionaries as Asteroid stores models (`serialize`), read with ``weights_only=True``.
"""

from pathlib import Path

import torch

from .errors import UserError
from .files import whole_file


def save_whole(content, path):
    """`torch.save` that leaves a whole file or none.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.
    """
    with whole_file(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's zip writer reports a failed write
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_weights_only(path, map_location="cpu"):
    """`torch.load` that runs no code.

    Raises:
        UserError: If the file is missing, broken, or holds more than plain data and tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a broken zip, pickle or tensor raises anything
        raise UserError(
            f"{path} is broken or holds more than weights ({type(error).__name__}); delete it to "
            "go on without it"
        ) from None


def model_from_dict(conf, where, classes, **overrides):
    """The model that a dictionary of `serialize` describes.

    Args:
        conf (dict): With `model_name`, `model_args` and `state_dict`.
        where (str): What to call it in an error.
        classes (dict): The classes that may be built, by name.
        **overrides: Arguments of the model that differ from the stored ones.

    Raises:
        UserError: If something is missing, the class is another, or weights do not fit.
    """
    if not isinstance(conf, dict) or not {"model_name", "model_args", "state_dict"} <= set(conf):
        raise UserError(f"{where} is no stored model; model_name, model_args or state_dict lack")
    if conf["model_name"] not in list(classes):  # a list, as the name may not be hashable
        raise UserError(
            f"{where} holds a model of class {conf['model_name']!r}, not {' or '.join(classes)}"
        )
    try:
        model = classes[conf["model_name"]](**{**conf["model_args"], **overrides})
        model.load_state_dict(conf["state_dict"])
    except Exception as error:  # arguments and weights of strangers raise anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} does not fit its class: {what}") from None
    return model
