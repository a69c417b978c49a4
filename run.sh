#!/usr/bin/env bash
# Trains and evaluates Tiny-Sepformer: ./run.sh --stage 0
#
#   --stage N         first stage (0): 0 speech, 1 mixture lists, 2 training, 3 evaluation,
#                     4 publication, 5 benchmark of the presets and their peers (needs no other),
#                     6 comparison of models trained at equal budgets
#   --stop_stage N    last stage (3, or N of --stage if that is later)
#   --recipe NAME     folder under egs/ (minispeech)
#   --tag NAME        name of the run, its folder is egs/RECIPE/TinySepformer/exp/TAG
#                     (default: made of preset, sources and rate; for stage 5, benchmark)
#   --id LIST         GPUs to use, as in CUDA_VISIBLE_DEVICES: 0 or 0,1
#   --python_path P   Python of an environment of your own (default: makes and uses .venv)
#   --help            this text
#
# Every stage can be run again: it continues where it was stopped, or says that it is done.
set -euo pipefail

root=$(cd "$(dirname "$0")" && pwd)
. "$root/local/setup.sh"

stage=0 stop_stage= recipe=minispeech tag= id= python_path=
settings=()

list_settings() {  # every key: told of by conf.yml, with the value of the recipe's file, the last
  awk '/^  [a-z_]+:/ {
    key = $1; sub(/:$/, "", key)
    value = $0; sub(/^ *[a-z_]+: */, "", value); sub(/ *#.*/, "", value)
    if (!(key in default_)) order[n++] = key
    if (index($0, "#") && !(key in told)) told[key] = substr($0, index($0, "#") + 2)
    default_[key] = value
  }
  END { for (i = 0; i < n; i++)
    printf "  --%-24s %s (%s)\n", order[i], told[order[i]], default_[order[i]] }' "$@"
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) name=help ;;
    --*=*) name=${1%%=*} value=${1#*=}; shift; set -- "$name" "$value" "$@"; continue ;;
    --?*) name=${1#--} ;;
    *) fail "$1 is no option; ./run.sh --help lists them" ;;
  esac
  [ "$name" = help ] || [ $# -gt 1 ] || fail "option $1 needs a value"
  case $name in
    help) help=1; shift; continue ;;
    stage | stop_stage)
      case $2 in '' | *[!0-9]*) fail "--$name must be a stage from 0 to 6, not '$2'" ;; esac
      [ "$2" -le 6 ] || fail "--$name must be a stage from 0 to 6, not '$2'"
      eval "$name=\$2" ;;
    python_path) [ -n "$2" ] || fail "option $1 needs a value"; python_path=$2 ;;
    recipe | tag | id) eval "$name=\$2" ;;
    *) settings+=("--$name" "$2") ;;
  esac
  shift 2
done

recipe_conf=$root/egs/$recipe/TinySepformer/conf.yml
[ -f "$recipe_conf" ] || fail "there is no recipe '$recipe'; there are: $(ls "$root/egs" | xargs)"
if [ -n "${help:-}" ]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0"
  echo "Settings of recipe $recipe, with their defaults:"
  list_settings "$root/local/conf.yml" "$recipe_conf"
  exit
fi
for ((i = 0; i < ${#settings[@]}; i += 2)); do
  grep -qh "^  ${settings[i]#--}:" "$root/local/conf.yml" "$recipe_conf" ||
    fail "there is no option ${settings[i]}; ./run.sh --help lists them"
done
case $tag in */* | .* | *::*) fail "--tag '$tag' must be a plain name" ;; esac
[ ${#tag} -le 60 ] || fail "--tag must be a name of at most 60 characters"
[ -n "$stop_stage" ] || stop_stage=$((stage > 3 ? stage : 3))
[ "$stage" -le "$stop_stage" ] || fail "--stop_stage $stop_stage comes before --stage $stage"
[ "$stage" -ne 5 ] || tag=${tag:-benchmark}  # which is no run of a model
[ -z "$id" ] || export CUDA_VISIBLE_DEVICES=$id

case $python_path in
  /* | '') ;;
  */*) python_path=$PWD/$python_path ;;
esac
setup_python "$python_path" ""
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONWARNINGS=ignore
exp=$("$python" "$root/local/configure.py" "$recipe" "$tag" ${settings[@]+"${settings[@]}"})

begin() {  # begin N TITLE: whether stage N is asked for; says so
  [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] && echo "Stage $1: $2"
}

if begin 0 "speech"; then
  "$python" "$root/local/prepare_speech.py" "$exp"
fi
if begin 1 "mixture lists"; then
  "$python" "$root/local/make_lists.py" "$exp"
fi
if begin 2 "training"; then
  "$python" "$root/local/train.py" "$exp"
fi
if begin 3 "evaluation"; then
  "$python" "$root/local/evaluate.py" "$exp"
fi
if begin 4 "publication"; then
  "$python" "$root/local/publish.py" "$exp"
fi
if begin 5 "benchmark"; then
  "$python" "$root/local/benchmark.py" "$exp"
fi
if begin 6 "comparison"; then
  "$python" "$root/local/compare.py" "$exp"
fi
