# Sourced by run.sh and tests/run.sh: sets $python, making .venv in the project's root if need be.
#
#   setup_python PYTHON EXTRAS    PYTHON: an interpreter of the user's own, or empty for .venv
#                                 EXTRAS: extras of setup.cfg to be installed, or empty
#
# .venv is made if there is none, and brought up to date if setup.cfg changed since.

fail() {
  echo "error: $*" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python from 3.10 on with its venv module was found; install one (python3-venv)"
}

# PESQ comes as C sources alone and nothing here calls it, but pb_bss_eval asks for it. Where there
# is no compiler, or Python's headers are missing, pip is told that it is there.
setup_pesq() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps pesq 2>/dev/null && return
  local info
  info=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pesq-0.dist-info
  mkdir -p "$info"
  printf '%s\n' 'Metadata-Version: 2.1' 'Name: pesq' 'Version: 0' \
    'Summary: stands in for PESQ, which could not be built here' > "$info/METADATA"
  echo pip > "$info/INSTALLER"
  printf 'pesq-0.dist-info/%s,,\n' METADATA INSTALLER RECORD > "$info/RECORD"
}

setup_python() {
  if [ -n "$1" ]; then
    python=$1
    command -v "$python" >/dev/null || fail "--python_path $python is no program"
    return
  fi
  python=$root/.venv/bin/python
  local target="$root${2:+[$2]}" state
  state="$(cksum < "$root/setup.cfg") ${2:-}"
  if [ -x "$python" ] && grep -sqxF "$state" "$root/.venv/installed"; then
    return
  fi
  if ! "$python" -c 'import pip' 2>/dev/null; then  # none, half made, or of a Python that is gone
    local base free
    base=$(find_python) || exit 2
    free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
    echo "Set-up: making .venv with PyTorch and its CUDA libraries. It downloads about 3 GB, takes"
    echo "7 GB of disk ($free GB are free) and a few minutes. README.md tells how to do with less."
    [ "$free" -ge 8 ] || fail "8 GB of free disk are needed in $root, there are $free"
    "$base" -m venv --clear "$root/.venv" || fail "python -m venv failed; install python3-venv"
  fi
  setup_pesq
  "$python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy \
    only-if-needed -e "$target" || fail "pip could not install the packages; see its words above"
  # what is installed with an extra serves without it as well
  { cksum < "$root/setup.cfg" | sed 's/$/ /'; echo "$state"; } > "$root/.venv/installed"
}
