#!/usr/bin/env bash
# Runs every test: bash launch/test.sh [pytest's arguments]
#
# The test files are shared out to processes, one a core up to 4 (each takes 3 to 4 GB); W2S_TEST_WORKERS says how many, 0 = none but this.
# Makes .venv if there is none (or uses the active environment), installs what is needed, then ruff and pytest.
# With CI=true or W2S_ALL_PYTHONS=1 the quick tests also run on the oldest and the newest supported Python found here.
# SLURM's tests run where it is installed; with CI=true or W2S_SLURM=1 Debian's is installed where that can be done (root, apt).
# PyTorch is only the reference in parity tests: where it cannot be installed, those skip. W2S_TORCH=0 leaves it out.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$W2S_ROOT"

w2s_env
# The extra `test` of pyproject.toml but torch, which may fail to install, and what needs it: pip would bring another torch along.
mapfile -t extra < <("$PYTHON" -c '
import tomllib
for name in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"]:
    print(name)')
packages=() torch="" on_torch=()
for name in "${extra[@]}"; do
  case "$name" in
    torch*) torch="$name" ;;
    peft*|accelerate*) on_torch+=("$name") ;;
    *) packages+=("$name") ;;
  esac
done
w2s_install "$PYTHON" "${packages[@]}"
if [ "${W2S_TORCH:-1}" = 1 ] && [ "${W2S_INSTALL:-1}" != 0 ] && ! "$PYTHON" -c 'import torch' >/dev/null 2>&1; then
  echo "installing $torch (CPU)" >&2
  # The CPU build sorts above PyPI's CUDA build, where its index can be reached.
  "$PYTHON" -m pip install --quiet --retries 1 --timeout 30 --extra-index-url https://download.pytorch.org/whl/cpu "$torch" ||
    echo "no PyTorch: the tests that compare with it will skip" >&2
fi
if [ "${W2S_INSTALL:-1}" != 0 ] && "$PYTHON" -c 'import torch' >/dev/null 2>&1 && ! "$PYTHON" -c 'import peft' >/dev/null 2>&1; then
  "$PYTHON" -m pip install --quiet --retries 1 --timeout 30 --no-deps "${on_torch[@]}" ||
    echo "no peft: the tests that compare with it will skip" >&2
fi

if [ "${W2S_INSTALL:-1}" != 0 ] && { [ "${CI:-}" = true ] || [ "${W2S_SLURM:-}" = 1 ]; } && ! command -v sbatch >/dev/null && [ "$(id -u)" = 0 ] &&
  command -v apt-get >/dev/null; then
  echo "installing slurm-wlm and munge" >&2
  { timeout 300 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y slurm-wlm munge; } >/dev/null 2>&1 ||
    echo "no SLURM: its tests will skip" >&2
fi

if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
  # What one Python compiled the next one need not: half of the quick tests' time. Empty at first, so that nothing old is tested.
  JAX_COMPILATION_CACHE_DIR="$(mktemp -d)"
  trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
  export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
fi

status=0
"$PYTHON" -m ruff check . || status=1
cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')"
workers=(-n "${W2S_TEST_WORKERS:-$((cores < 4 ? cores : 4))}" --dist loadfile)
"$PYTHON" -m pytest "${workers[@]}" "$@" || status=1

if [ "${CI:-}" = true ] || [ "${W2S_ALL_PYTHONS:-}" = 1 ]; then
  used="$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
  oldest="$(w2s_find python3.11 python3.12 python3.13)" || oldest=""
  newest="$(w2s_find python3.13 python3.12 python3.11)" || newest=""
  for other in $(printf '%s\n' "$oldest" "$newest" | sort -u); do
    version="$("$other" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
    if [ "$version" = "$used" ]; then continue; fi
    folder="$W2S_ROOT/.venv-$version"
    w2s_works "$folder/bin/python" || w2s_venv "$other" "$folder"
    w2s_install "$folder/bin/python" "${packages[@]}"
    echo "quick tests on $version" >&2
    "$folder/bin/python" -m pytest "${workers[@]}" -q -m quick || status=1
  done
fi
exit "$status"
