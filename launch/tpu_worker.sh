#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a TPU slice: bash launch/tpu_worker.sh --install | [flags of w2s]
#
# Finds Python 3.11 to 3.13 (Ubuntu 22.04, which the workers have, brings 3.10: apt installs 3.11), makes .venv, installs this package
# with jax for TPUs, and runs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case "${1:-}" in -h | --help) w2s_usage "${BASH_SOURCE[0]}"; exit ;; esac
if [ "${1:-}" = --install ] && [ "${W2S_INSTALL:-1}" != 0 ] && ! w2s_find python3.11 python3.12 python3.13 python3 >/dev/null; then
  sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv >/dev/null
fi
w2s_env
mapfile -t packages < <(w2s_extra "$PYTHON" tpu gcs)
w2s_install "$PYTHON" "${packages[@]}"
if [ "${1:-}" = --install ]; then exit; fi
export PYTHONPATH="$W2S_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m w2s_jax.main "$@"
