#!/usr/bin/env bash
# The recipe librimix: the root's run.sh with LibriMix, mixed on the fly from LibriSpeech.
exec "$(dirname "$0")/../../../run.sh" --recipe librimix "$@"
