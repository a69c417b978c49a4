"""Stage 0: checks the speech of a run."""

from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error
from asteroid_tiny.preparation import prepare_speech

if __name__ == "__main__":
    with exit_on_user_error():
        prepare_speech(*open_run(__doc__))
