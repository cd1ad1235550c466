# shellcheck shell=bash
# What a job script of SLURM does: part of those that a sweep submits (w2s_jax/slurm.py), and of launch/slurm/run.sh.

# w2s_job RESTARTS COMMAND...: runs the command in every task of this job, and queues the job again where the tasks were told to stop.
#
# Before the time limit (--signal) and at a preemption SLURM sends SIGTERM to the tasks; they save their state and exit with 75. The job
# then queues again, RESTARTS times at most, and goes on from there. Where this script gets a SIGTERM as well, SLURM itself ends the job:
# one that was cancelled must stay so, and one that gives way to another is queued again by SLURM.
w2s_job() {
  local restarts="$1" count="${SLURM_RESTART_COUNT:-0}" job="$SLURM_JOB_ID" status=0 ended=""
  shift
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # the number of one of its tasks is the array's, too, and would queue all of them again
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  fi
  trap 'ended=yes' TERM # runs once srun is through: it must not be killed by what its tasks still have to answer
  srun --mpi=none --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} "$@" || status=$?
  if [ "$status" = 75 ] && [ -z "$ended" ]; then
    if [ "$count" -ge "$restarts" ]; then
      echo "error: stopped after $count restarts, as many as there may be; submit again to go on" >&2
    elif scontrol requeue "$job"; then
      echo "stopped, and queued again: restart $((count + 1)) of at most $restarts" >&2
      sleep 120 # SLURM ends this script
    else
      echo "error: stopped, and this cluster does not queue jobs again; submit again to go on" >&2
    fi
  fi
  return "$status"
}
