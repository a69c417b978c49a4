#!/usr/bin/env bash
# The recipe own: the root's run.sh with speech of your own, --speech DIR.
exec "$(dirname "$0")/../../../run.sh" --recipe own "$@"
