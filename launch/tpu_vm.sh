#!/usr/bin/env bash
# A run on a TPU slice: bash launch/tpu_vm.sh --name=NAME --zone=ZONE [options] -- [flags of w2s] --workdir=gs://BUCKET/DIR
#
#   bash launch/tpu_vm.sh --name=w2s --zone=us-east5-a --type=v5p-32 --version=v2-alpha-tpuv5 --spot --delete -- \
#       --config=finetune --config.model=Qwen/Qwen-7B --config.mesh.fsdp=-1 --workdir=gs://bucket/qwen
#
# Makes the slice where there is none of that name (or uses it), copies this folder to every worker, installs it there, and runs the
# same command on all of them: together they are one run. Their output comes here; Ctrl-C lets the run save and ends it. The same command
# goes on where it was, also after a spot slice was taken away.
#
#   --name=NAME        of the TPU VM (and of its queued resource)
#   --zone=ZONE        e.g. us-east5-a; --project=ID where it is not gcloud's own
#   --type=TYPE        to make it: the accelerator type, e.g. v5litepod-16, v5p-32, v6e-8
#   --version=VERSION  to make it: the runtime, e.g. v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
#   --spot             to make it: cheaper, may be taken away
#   --queued           to make it: as a queued resource, waited for
#   --internal-ip      reach the workers by their internal addresses
#   --delete           delete it at the end, however that comes
#   --dry-run          print the commands instead
#
# Needs gcloud, logged in; its service account reads and writes the bucket.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
name="" zone="" type="" version="" dry="" delete="" queued=""
common=() create=() reach=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -h | --help) w2s_usage "${BASH_SOURCE[0]}"; exit ;;
    --name=?*) name="${1#*=}" ;;
    --zone=?*) zone="${1#*=}" ;;
    --project=?*) common+=("$1") ;;
    --type=?*) type="${1#*=}" ;;
    --version=?*) version="${1#*=}" ;;
    --spot) create+=("$1") ;;
    --queued) queued=yes ;;
    --internal-ip) reach+=("$1") ;;
    --delete) delete=yes ;;
    --dry-run) dry=yes ;;
    *) w2s_fail "$1: is no option; expected --name=NAME --zone=ZONE ... -- --config=NAME --workdir=gs://... (see --help)" ;;
  esac
  shift
done
[ -n "$name" ] || w2s_fail "--name: is missing; expected the name of a TPU VM (see --help)"
[ -n "$zone" ] || w2s_fail "--zone: is missing; expected the zone of the TPU VM, such as us-east5-a"
[ $# -gt 1 ] || w2s_fail "there are no flags of w2s after --; expected --config=NAME --workdir=gs://BUCKET/DIR (see --help)"
shift
case "$(w2s_flag workdir "$@")" in
  gs://?*) ;;
  *) w2s_fail "--workdir=$(w2s_flag workdir "$@"): expected gs://BUCKET/DIR; the disks of a TPU VM are its workers' own, and go with it" ;;
esac
[ -n "$dry" ] || command -v gcloud >/dev/null || w2s_fail "there is no gcloud on PATH; expected the Google Cloud CLI"
common+=(--zone="$zone" --quiet)

# gcloud's words, run or printed.
call() {
  if [ -n "$dry" ]; then
    { printf '%q ' gcloud compute tpus "$@" && echo; } >&2
  else
    gcloud compute tpus "$@"
  fi
}

ssh_all() { call tpu-vm ssh "$name" "${common[@]}" "${reach[@]}" --worker=all --command="$1"; }

folder="$(mktemp -d)"

# describe KIND FIELD: what gcloud says of the thing of this name; nothing where there is none.
describe() {
  [ -z "$dry" ] || return 0
  gcloud compute tpus "$1" describe "$name" "${common[@]}" --format="value($2)" 2>"$folder/problem" ||
    grep -qi 'not_found\|not found' "$folder/problem" || w2s_fail "gcloud: $(tail -n 1 "$folder/problem")"
}

remove() {
  if [ -n "$queued" ]; then
    call queued-resources delete "$name" "${common[@]}" --force
  else
    call tpu-vm delete "$name" "${common[@]}"
  fi
}

make() {
  local now="" last=""
  if [ -n "$queued" ]; then # it may have been asked for before
    now="$(describe queued-resources state.state)"
    case "$now" in
      FAILED | SUSPENDED) # as it is once its slice was taken away
        echo "the queued resource $name is $now: made anew" >&2
        remove
        now=""
        ;;
    esac
  fi
  if [ -z "$now" ]; then
    [ -n "$type" ] && [ -n "$version" ] || w2s_fail "--name=$name: there is no such TPU VM in $zone; expected --type and --version to make it"
    create+=(--accelerator-type="$type")
    there=yes
    if [ -z "$queued" ]; then
      call tpu-vm create "$name" "${common[@]}" "${create[@]}" --version="$version"
      return
    fi
    call queued-resources create "$name" "${common[@]}" "${create[@]}" --node-id="$name" --runtime-version="$version"
  fi
  there=yes
  while [ -z "$dry" ]; do
    now="$(describe queued-resources state.state)"
    if [ "$now" != "$last" ]; then echo "$(date +%T) queued resource $name: $now" >&2; fi
    last="$now"
    case "$now" in
      ACTIVE) break ;;
      "") w2s_fail "queued resource $name: is no longer there" ;;
      FAILED | SUSPENDED | SUSPENDING) w2s_fail "queued resource $name: $now (gcloud compute tpus queued-resources describe says why)" ;;
    esac
    sleep "${W2S_POLL:-30}"
  done
}

archive="$folder/w2s_jax.tar.gz"
there="" running=""
# shellcheck disable=SC2329 # a trap calls it
end() {
  rm -rf "$folder"
  if [ -n "$delete" ] && [ -n "$there" ]; then remove || echo "error: $name was not deleted, and goes on to cost" >&2; fi
}
# shellcheck disable=SC2329
stop() {
  trap '' INT TERM
  if [ -n "$running" ]; then
    echo "stopping: the run saves its state" >&2
    ssh_all "pkill -TERM -f [w]2s_jax.main || true"
    wait "$running" || true
  fi
  exit 130
}
trap end EXIT
trap stop INT TERM

found="$(describe tpu-vm state)"
case "$found" in
  READY) echo "using the TPU VM $name" >&2 ;;
  PREEMPTED | TERMINATED) # a spot slice that was taken away has to go before another can have its name
    echo "the TPU VM $name is $found: made anew" >&2
    remove
    make
    ;;
  "") make ;;
  *) w2s_fail "--name=$name: the TPU VM is $found, expected READY" ;;
esac
there=yes

tar -C "$W2S_ROOT" --exclude='./.venv*' --exclude=./.git --exclude=./runs --exclude=__pycache__ -czf "$archive" .
call tpu-vm scp "$archive" "$name:w2s_jax.tar.gz" "${common[@]}" "${reach[@]}" --worker=all
ssh_all "mkdir -p w2s_jax && tar -xzf w2s_jax.tar.gz -C w2s_jax && bash w2s_jax/launch/tpu_worker.sh --install"
# In the background, so that Ctrl-C reaches the workers and not only the connection to them.
ssh_all "bash w2s_jax/launch/tpu_worker.sh $(printf '%q ' "$@")" &
running=$!
status=0
wait "$running" || status=$?
exit "$status"
