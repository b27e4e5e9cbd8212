#!/usr/bin/env bash
# A study on a Cloud TPU slice of one or many hosts, from here. launch/README.md has the whole way, step by step.
#
#   launch/tpu_vm.sh create   makes the slice and waits until it is ready
#   launch/tpu_vm.sh install  copies this clone to all workers, installs requirements-tpu.txt, mounts the storage
#   launch/tpu_vm.sh run ...  starts python -m jax_transfer.main ... on all workers and watches it; after a preemption
#                             it makes the slice again, installs and goes on. Ctrl-C ends the watching, not the run;
#                             the same command watches again.
#   launch/tpu_vm.sh logs     follows the log of worker 0 (--worker=I: of worker I)
#   launch/tpu_vm.sh status   the slice's state and each worker's
#   launch/tpu_vm.sh stop     the study saves and ends; the slice stays, and costs
#   launch/tpu_vm.sh delete   deletes the slice and its queued resource
#
# Options, each with the environment variable that sets it for all commands:
#   --name=NAME           TPU_NAME     jax-transfer by default
#   --zone=ZONE           TPU_ZONE     us-central2-b by default
#   --type=TYPE           TPU_TYPE     v4-32 by default
#   --version=VERSION     TPU_VERSION  tpu-ubuntu2204-base by default
#   --project=PROJECT     TPU_PROJECT  gcloud's own project by default
#   --spot                TPU_SPOT=1   cheap, and may be taken away at any time
#   --queued              TPU_QUEUED=1 ask by a queued resource: waits until there is a free slice
#   --mount-nfs=IP:/SHARE TPU_NFS      an NFS share (Filestore), at /mnt/nfs on all workers
#   --mount-bucket=NAME   TPU_BUCKET   a bucket through gcsfuse, at /mnt/bucket on all workers
# For run:
#   --restarts=K          restarts after a crash on a worker (default 3)
#   --env=NAME=VALUE      for the study's environment; may be repeated: --env=TFDS_DATA_DIR=/mnt/nfs/tfds
#   --poll=SECONDS        between two looks at the slice (default 60)
# For all: --dry-run prints the commands and does nothing.
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

# Runs a command line in the clone on all workers. ServerAlive: a worker that vanished meanwhile must not block.
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

# The slice's state in one word: READY, or MISSING, or what its queued resource or it says. Fails where gcloud does.
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
  # An active queued resource whose node is not listed is on its way to another state.
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
    now=$(state) || now="not known"
    case $now in
      READY) return ;;
      FAILED | MISSING)
        die "$name is $now; for the reason: gcloud compute tpus queued-resources describe $name ${where[*]}"
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
  # Joined by &&: where a failure is to be tried again, `set -e` does not hold.
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
  # Fails where there is no free slice.
  until create; do
    say "no slice to be had; trying again in $poll s"
    sleep "$poll"
  done
  wait_until_ready
}

# Ends with the study: its exit code, or 75 where it was stopped on purpose.
watch() {
  local now answers failed
  while true; do
    sleep "$poll"
    if ! now=$(state); then
      say "gcloud does not answer; the study goes on meanwhile"
      continue
    fi
    case $now in
      READY) ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "$name was preempted ($now); making it again"
        recreate
        begin_again
        continue
        ;;
      MISSING | STOPPED | FAILED)
        say "$name is $now: somebody took it away, so the watching ends"
        return 1
        ;;
      *)
        say "$name is $now; waiting"
        continue
        ;;
    esac
    if ! answers=$(on_workers launch/tpu_worker.sh status | grep '^status: '); then
      say "the workers do not answer; trying again in $poll s"
      continue
    fi
    failed=$(awk '$2 == "exit" && $3 != 0 && $3 != 75 { print $3; exit }' <<<"$answers")
    if [[ -n $failed ]]; then
      say "a worker ended with exit code $failed; its log says why: launch/tpu_vm.sh logs --worker=I. Ending the others"
      on_workers launch/tpu_worker.sh stop || true
      return "$failed"
    elif grep -q stopped <<<"$answers"; then
      say "stopped; the same command goes on"
      return "$PREEMPTED"
    elif grep -qE 'gone|exit 75' <<<"$answers"; then
      say "a worker was restarted; starting the study again"
      begin_again
    elif ! grep -qv 'exit 0' <<<"$answers"; then
      say "done"
      return 0
    fi
  done
}

# A new or rebooted worker has lost its mounts; a worker that still runs is left alone.
begin_again() {
  until install && start; do
    say "the workers are not ready; trying again in $poll s"
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
