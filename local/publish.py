"""Stage 4: writes the publish folder of a run."""

from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error
from asteroid_tiny.recipe import publish_model

if __name__ == "__main__":
    with exit_on_user_error():
        publish_model(*open_run(__doc__))
