#!/usr/bin/env bash
# The recipe minispeech: the root's run.sh with the speech that comes with the repository.
exec "$(dirname "$0")/../../../run.sh" --recipe minispeech "$@"
