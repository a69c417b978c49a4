"""Stage 6: trains contenders at equal budgets and compares them."""

from asteroid_tiny.bench.comparison import compare
from asteroid_tiny.config import open_run
from asteroid_tiny.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():
        compare(*open_run(__doc__))
