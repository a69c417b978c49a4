#!/usr/bin/env bash
# Sets up .venv and runs the tests: ./tests/run.sh [options of pytest]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/local/setup.sh"
setup_python "" test
cd "$root"
exec "$python" -m pytest "$@"
