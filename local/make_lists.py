"""Stage 1: draws the validation and test mixtures of a run."""

from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error
from asteroid_tiny.preparation import make_lists

if __name__ == "__main__":
    with exit_on_user_error():
        make_lists(*open_run(__doc__))
