#!/usr/bin/env bash
# A sweep as SLURM array jobs: bash launch/slurm/sweep.sh [--config=sweep] [flags of w2s] --workdir=DIR
#
#   bash launch/slurm/sweep.sh --config.models=gpt2,gpt2-medium,gpt2-large --config.tasks=sciq --workdir=runs/sweep \
#       --config.slurm.partition=gpu --config.slurm.time=8:00:00 --config.slurm.gres=gpu --config.slurm.devices=8
#
# Ground truth first, then what is made from it, at last the report. DIR lies on a file system that the nodes share. Run it on a login
# node, and again to submit what failed or was cancelled: what is queued, running or done stays. --dry_run prints what would be
# submitted. `w2s status DIR` says how far it is and where the log of a failed run lies. --config=sweep --help lists config.slurm.*.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
case "${1:-}" in -h | --help) w2s_usage "${BASH_SOURCE[0]}"; exit ;; esac
[ -n "$(w2s_flag workdir "$@")" ] || w2s_fail "--workdir: is missing; expected the directory that the sweep is written to (see --help)"
command -v sbatch >/dev/null || w2s_fail "there is no sbatch on PATH; expected a login node of a SLURM cluster"
[ -n "$(w2s_flag config "$@")" ] || set -- --config=sweep "$@"
w2s_env
w2s_install "$PYTHON"
export PYTHONPATH="$W2S_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m w2s_jax.main "$@" --config.executor=slurm
