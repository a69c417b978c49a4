"""Stage 2: trains the model of a run, or continues to."""

from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error
from asteroid_tiny.recipe import train_model

if __name__ == "__main__":
    with exit_on_user_error():
        train_model(*open_run(__doc__))
