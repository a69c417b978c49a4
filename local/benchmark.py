"""Stage 5: measures the presets and their peers."""

from asteroid_tiny.bench.benchmark import benchmark
from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():
        benchmark(*open_run(__doc__))
