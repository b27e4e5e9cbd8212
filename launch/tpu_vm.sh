#!/usr/bin/env bash
# Runs a study on a Cloud TPU slice with one or several hosts. Run this on your own machine. launch/README.md describes
# every step.
#
#   launch/tpu_vm.sh create   create the slice and wait until it is ready
#   launch/tpu_vm.sh install  copy this clone to all workers, install requirements-tpu.txt, mount the storage
#   launch/tpu_vm.sh run ...  start python -m jax_transfer.main ... on all workers and watch it. After a preemption,
#                             recreate the slice, install and resume. Ctrl-C stops watching, not the run; the same
#                             command watches again.
#   launch/tpu_vm.sh logs     follow the log of worker 0 (or worker I with --worker=I)
#   launch/tpu_vm.sh status   print the state of the slice and of each worker
#   launch/tpu_vm.sh stop     save and stop the study; the slice remains and still costs money
#   launch/tpu_vm.sh delete   delete the slice and its queued resource
#
# Options, each with the environment variable that sets it for all commands:
#   --name=NAME           TPU_NAME     default: jax-transfer
#   --zone=ZONE           TPU_ZONE     default: us-central2-b
#   --type=TYPE           TPU_TYPE     default: v4-32
#   --version=VERSION     TPU_VERSION  default: tpu-ubuntu2204-base
#   --project=PROJECT     TPU_PROJECT  default: gcloud's project
#   --spot                TPU_SPOT=1   a spot slice: cheap, but may be preempted at any time
#   --queued              TPU_QUEUED=1 use a queued resource, which waits for a free slice
#   --mount-nfs=IP:/SHARE TPU_NFS      mount an NFS share (Filestore) at /mnt/nfs on all workers
#   --mount-bucket=NAME   TPU_BUCKET   mount a bucket with gcsfuse at /mnt/bucket on all workers
# For run:
#   --restarts=K          restarts after a crash on a worker (default 3)
#   --env=NAME=VALUE      set an environment variable of the study, such as TFDS_DATA_DIR=/mnt/nfs/tfds; repeatable
#   --poll=SECONDS        interval between checks of the slice (default 60)
# For all: --dry-run prints the commands without running them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"

verb=${1:-}
case $verb in
  create | install | run | logs | status | stop | delete) shift ;;
  '' | -h | --help) help "$0" ;;
  *) die "$verb: expected create, install, run, logs, status, stop or delete" ;;
esac

name=${TPU_NAME:-jax-transfer} zone=${TPU_ZONE:-us-central2-b} type=${TPU_TYPE:-v4-32}
version=${TPU_VERSION:-tpu-ubuntu2204-base} project=${TPU_PROJECT:-} spot=${TPU_SPOT:-} queued=${TPU_QUEUED:-}
nfs=${TPU_NFS:-} bucket=${TPU_BUCKET:-} restarts=3 poll=60 worker=0 dry_run=""
settings=()  # for the worker: restarts and environment
arguments=() # for jax_transfer.main
for argument in "$@"; do
  case $argument in
    --name=*) name=${argument#*=} ;;
    --zone=*) zone=${argument#*=} ;;
    --type=*) type=${argument#*=} ;;
    --version=*) version=${argument#*=} ;;
    --project=*) project=${argument#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --mount-nfs=*) nfs=${argument#*=} ;;
    --mount-bucket=*) bucket=${argument#*=} ;;
    --restarts=*) restarts=${argument#*=} ;;
    --env=*) settings+=("$argument") ;;
    --poll=*) poll=${argument#*=} ;;
    --worker=*) worker=${argument#*=} ;;
    --dry-run) dry_run=yes ;;
    -h | --help) help "$0" ;;
    *)
      [[ $verb == run ]] || die "$verb: unknown option $argument"
      arguments+=("$argument")
      ;;
  esac
done
need_number --restarts "$restarts"
need_number --poll "$poll"
if [[ $verb == run ]] && ((${#arguments[@]} == 0)); then
  die "run: give the arguments of python -m jax_transfer.main: --config=... --workdir=..."
fi

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

nodes() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
queue() { run gcloud compute tpus queued-resources "$@" "${where[@]}"; }

# Runs a command in the clone on all workers. ServerAliveInterval keeps a vanished worker from blocking.
on_workers() {
  nodes ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 "--command=cd jax_transfer && $(quoted "$@")"
}

create() {
  local flags=("--accelerator-type=$type")
  [[ -z $spot ]] || flags+=(--spot)
  if [[ -n $queued ]]; then
    queue create "$name" "--node-id=$name" "${flags[@]}" "--runtime-version=$version"
  else
    nodes create "$name" "${flags[@]}" "--version=$version"
  fi
}

delete() {
  if [[ -n $queued ]]; then queue delete "$name" --force --quiet; else nodes delete "$name" --quiet; fi
}

# Prints the state of the slice in one word: READY, MISSING, or the state of its queued resource or node. Fails if
# gcloud fails.
state() {
  local found
  if [[ -n $queued ]]; then
    found=$(queue list '--format=value(name.basename(),state.state)' | awk -v name="$name" '$1 == name { print $2 }')
    if [[ $found != ACTIVE ]]; then
      echo "${found:-MISSING}"
      return
    fi
  fi
  found=$(nodes list '--format=value(name.basename(),state)' | awk -v name="$name" '$1 == name { print $2 }')
  # An active queued resource without a listed node is changing its state.
  if [[ -n $queued ]]; then echo "${found:-CHANGING}"; else echo "${found:-MISSING}"; fi
}

show_state() {
  [[ -z $queued ]] || queue list '--format=value(name.basename(),state.state)'
  nodes list '--format=value(name.basename(),state)'
}

wait_until_ready() {
  local now
  if [[ -n $dry_run ]]; then
    show_state
    return
  fi
  while true; do
    now=$(state) || now="unknown"
    case $now in
      READY) return ;;
      FAILED | MISSING)
        die "$name is $now; to see why, run gcloud compute tpus queued-resources describe $name ${where[*]}"
        ;;
    esac
    say "$name is $now; waiting"
    sleep "$poll"
  done
}

install() {
  local archive options=()
  archive=${TMPDIR:-/tmp}/jax_transfer.tar.gz
  [[ -z $nfs ]] || options+=("--nfs=$nfs")
  [[ -z $bucket ]] || options+=("--bucket=$bucket")
  # Joined by && because `set -e` has no effect in a retried command.
  run tar -czf "$archive" -C "$root" --exclude=__pycache__ \
    jax_transfer configs launch pyproject.toml requirements-tpu.txt README.md LICENSE &&
    nodes scp "$archive" "$name:jax_transfer.tar.gz" --worker=all &&
    nodes ssh "$name" --worker=all '--command=mkdir -p jax_transfer && tar -xzf jax_transfer.tar.gz -C jax_transfer' &&
    on_workers launch/tpu_worker.sh install ${options[@]+"${options[@]}"}
}

start() {
  on_workers launch/tpu_worker.sh start "--restarts=$restarts" ${settings[@]+"${settings[@]}"} \
    --distributed "${arguments[@]}"
}

recreate() {
  until delete || [[ $(state || true) == MISSING ]]; do sleep "$poll"; done
  # Fails if no slice is free.
  until create; do
    say "no slice available; retrying in $poll s"
    sleep "$poll"
  done
  wait_until_ready
}

# Watches until the study ends. Returns its exit code, or 75 if it was stopped on request.
watch() {
  local now answers failed
  while true; do
    sleep "$poll"
    if ! now=$(state); then
      say "gcloud does not respond; the study continues"
      continue
    fi
    case $now in
      READY) ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "$name was preempted ($now); recreating it"
        recreate
        restart
        continue
        ;;
      MISSING | STOPPED | FAILED)
        say "$name is $now: it was stopped or deleted by hand; no longer watching"
        return 1
        ;;
      *)
        say "$name is $now; waiting"
        continue
        ;;
    esac
    if ! answers=$(on_workers launch/tpu_worker.sh status | grep '^status: '); then
      say "the workers do not respond; retrying in $poll s"
      continue
    fi
    failed=$(awk '$2 == "exit" && $3 != 0 && $3 != 75 { print $3; exit }' <<<"$answers")
    if [[ -n $failed ]]; then
      say "a worker failed with exit code $failed; stopping the others. See its log: launch/tpu_vm.sh logs --worker=I"
      on_workers launch/tpu_worker.sh stop || true
      return "$failed"
    elif grep -q stopped <<<"$answers"; then
      say "stopped; run the same command again to resume"
      return "$PREEMPTED"
    elif grep -qE 'gone|exit 75' <<<"$answers"; then
      say "a worker was restarted; restarting the study"
      restart
    elif ! grep -qv 'exit 0' <<<"$answers"; then
      say "done"
      return 0
    fi
  done
}

# Installs everything again, because a new or rebooted worker has lost its mounts. A running worker is not affected.
restart() {
  until install && start; do
    say "the workers are not ready; retrying in $poll s"
    sleep "$poll"
    case $(state || true) in PREEMPTED | TERMINATED | SUSPENDED | MISSING) return ;; esac
  done
}

case $verb in
  create)
    create
    wait_until_ready
    ;;
  install) install ;;
  run)
    start
    if [[ -n $dry_run ]]; then
      show_state
      on_workers launch/tpu_worker.sh status
      echo "# after a preemption:"
      recreate
      install
      start
    else
      watch
    fi
    ;;
  logs) nodes ssh "$name" "--worker=$worker" '--command=tail -n 100 -F jax_transfer.log' ;;
  status)
    show_state
    on_workers launch/tpu_worker.sh status
    ;;
  stop) on_workers launch/tpu_worker.sh stop ;;
  delete) delete ;;
esac
