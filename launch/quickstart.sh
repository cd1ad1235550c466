#!/usr/bin/env bash
# The whole weak-to-strong experiment on the embedded world, offline: bash launch/quickstart.sh [folder]
#
# Pretrains a ladder of three small language models, fine-tunes the weaker ones as supervisors, lets them label, trains
# students and ceilings, and reports: three seeds, on a CPU, in a few minutes. Makes .venv if there is none (or uses the
# active environment) and installs requirements.txt. Killed and started again, it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
root="${1:-runs/quickstart}"
case "$root" in /* | *://*) ;; *) root="$PWD/$root" ;; esac
w2s_env
w2s_install "$PYTHON"
cd "$W2S_ROOT"
exec "$PYTHON" -m w2s_jax.main --config=sweep:quickstart --workdir="$root"
