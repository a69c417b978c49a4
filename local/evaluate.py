"""Stage 3: evaluates the model of a run."""

from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error
from asteroid_tiny.recipe import evaluate_model

if __name__ == "__main__":
    with exit_on_user_error():
        evaluate_model(*open_run(__doc__))
