#!/usr/bin/env bash
# The recipe wsj0-mix: the root's run.sh with WSJ0-2mix or WSJ0-3mix, --speech DIR.
exec "$(dirname "$0")/../../../run.sh" --recipe wsj0-mix "$@"
