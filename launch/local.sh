#!/usr/bin/env bash
# A sweep over the devices of this machine: bash launch/local.sh [--config=sweep] [flags of w2s] --workdir=DIR
#
#   bash launch/local.sh --config.models=gpt2,gpt2-medium,gpt2-large --config.tasks=sciq,boolq --workdir=runs/sweep
#
# One run a GPU (a TPU chip, or --config.slots=N runs at once on a CPU), the longest first, each as soon as what it reads is done; runs
# whose model is split over devices wait for all of them. Makes .venv if there is none (or uses the active environment) and installs
# what is needed, jax for CUDA too where there are NVIDIA GPUs. Ctrl-C stops all runs; the same command goes on where they were.
# `w2s status DIR` says which run is where, and where the log of a failed one lies.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case "${1:-}" in -h | --help) w2s_usage "${BASH_SOURCE[0]}"; exit ;; esac
[ -n "$(w2s_flag workdir "$@")" ] || w2s_fail "--workdir: is missing; expected the directory that the sweep is written to (see --help)"
[ -n "$(w2s_flag config "$@")" ] || set -- --config=sweep "$@"
w2s_env
extra="$(w2s_accelerator "$PYTHON")"
mapfile -t packages < <(if [ -n "$extra" ]; then w2s_extra "$PYTHON" "$extra"; fi)
w2s_install "$PYTHON" "${packages[@]}"
export PYTHONPATH="$W2S_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m w2s_jax.main "$@" --config.executor=devices
