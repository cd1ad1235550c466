#!/usr/bin/env bash
# One run as a SLURM job: bash launch/slurm/run.sh [options of sbatch] -- [flags of w2s] --workdir=DIR
#
#   bash launch/slurm/run.sh --gres=gpu:1 --time=8:00:00 -- --config=finetune --config.model=gpt2 --workdir=runs/gpt2
#   bash launch/slurm/run.sh --nodes=2 --ntasks-per-node=1 --gres=gpu:8 -- --config=finetune --config.model=Qwen/Qwen-72B \
#       --workdir=runs/qwen
#
# Several tasks are several processes of the one run (one a node, with all its GPUs, is what serves best). The flags are checked
# before the job is submitted. Told to stop ($W2S_GRACE seconds, 120, before the time limit; when it gives way to another job) the run
# saves its state and is queued again, $W2S_RESTARTS times (50) at most. The log is DIR/slurm-JOB.out (where DIR is gs://: ./slurm-JOB.out).
# $W2S_SETUP is a line of shell before the run: 'module load cuda'.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in -h | --help) w2s_usage "${BASH_SOURCE[0]}"; exit ;; esac
  options+=("$1")
  shift
done
[ $# -gt 1 ] || w2s_fail "there are no flags of w2s after --; expected [options of sbatch] -- --config=NAME --workdir=DIR (see --help)"
shift
workdir="$(w2s_flag workdir "$@")"
workdir="${workdir/#"~/"/$HOME/}" # as w2s itself reads it
[ -n "$workdir" ] || w2s_fail "--workdir: is missing after --; expected the directory that the run is written to"
command -v sbatch >/dev/null || w2s_fail "there is no sbatch on PATH; expected a login node of a SLURM cluster"
w2s_env
w2s_install "$PYTHON"
export PYTHONPATH="$W2S_ROOT${PYTHONPATH:+:$PYTHONPATH}"
case " ${options[*]:-}" in
  *" --dependency"* | *" -d"*) ;; # it may need what is not there yet
  *) "$PYTHON" -m w2s_jax.main "$@" --dry_run || exit $? ;;
esac
case "$workdir" in
  *://*) log="$PWD/slurm-%j.out" ;;
  *) mkdir -p "$workdir" && log="$(cd "$workdir" && pwd)" && log="${log//%/%%}/slurm-%j.out" ;;
esac
words="$(printf '%q ' "$PYTHON" -m w2s_jax.main "$@")"
job="$(
  {
    printf '#!/bin/bash\nexport PYTHONPATH=%q\n%s\n' "$PYTHONPATH" "${W2S_SETUP:-}"
    cat "$W2S_ROOT/w2s_jax/job.sh"
    printf 'w2s_job %q %s\n' "${W2S_RESTARTS:-50}" "$words"
  } | sbatch --parsable --job-name="w2s-$(basename "$workdir")" --output="$log" --open-mode=append --requeue \
    --signal="TERM@${W2S_GRACE:-120}" --chdir="$PWD" ${options[@]+"${options[@]}"}
)"
echo "job $job; log: ${log//%j/$job}; cancel: scancel ${job%%;*}"
