#!/usr/bin/env bash
# Sets up .venv and runs the tests: ./tests/run.sh [options of pytest]
#
# In a process a core, up to four; one after another with -n 0.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/local/setup.sh"
setup_python "" test
cd "$root"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
