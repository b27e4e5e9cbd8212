#!/usr/bin/env bash
# Runs a study in N processes on this machine: as N hosts would, on CPU devices with gloo collectives.
#
#   launch/local_processes.sh N [--dry-run] --config=... --workdir=... [...]
#
#   --dry-run  print the commands and do nothing
#
# All other arguments go to python -m jax_transfer.main. Process 0 writes as ever, the lines of the others begin with
# [process i]. SIGTERM and Ctrl-C reach all of them as SIGTERM: they save and exit with 75. When one fails, the others
# are ended too, and the exit code is the first failure's.
#
# Environment: PYTHON, the interpreter (default python); JAX_PLATFORMS (default cpu); PORT of the coordinator (default:
# a free one); GRACE, the seconds between SIGTERM and SIGKILL (default 30).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" ;; esac
count=${1:-}
need_number N "$count"
((count >= 1)) || die "N=$count: expected at least one process"
shift
dry_run=""
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
(($#)) || die "give the arguments of python -m jax_transfer.main: --config=... --workdir=..."

python=${PYTHON:-python}
grace=${GRACE:-30}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

if [[ -n $dry_run ]]; then
  port=${PORT:-PORT}
else
  free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
  port=${PORT:-$("$python" -c "$free_port")}
fi
shared=(-m jax_transfer.main "--coordinator_address=127.0.0.1:$port" "--num_processes=$count")
if [[ -n $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    echo "JAX_PLATFORMS=$JAX_PLATFORMS $(quoted "$python" "${shared[@]}" "--process_id=$i" "$@")"
  done
  exit 0
fi

pipes=$(mktemp -d)
running="" readers="" deadline="" worst=0
trap 'rm -rf "$pipes"; [[ -z $running ]] || kill -KILL $running 2>/dev/null || true' EXIT
trap 'stop' TERM INT

stop() {
  [[ -n $deadline ]] || deadline=$((SECONDS + grace))
  # shellcheck disable=SC2086
  [[ -z $running ]] || kill -TERM $running 2>/dev/null || true
}

prefix() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[process %s] %s\n' "$1" "$line"; done
}

# Sets running to those of its process ids that still run, and worst to the exit code to end with: that of the first
# to fail, where 75 gives way to any other.
look() {
  local pid still="" status
  for pid in $running; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=" $pid"
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if ((status != 0 && (worst == 0 || worst == PREEMPTED))); then worst=$status; fi
  done
  running=$still
}

for ((i = 0; i < count; i++)); do
  command=("$python" "${shared[@]}" "--process_id=$i" "$@")
  if ((i == 0)); then
    "${command[@]}" &
  else
    # Not `command | prefix`: the signals are for the command, and its exit code counts.
    mkfifo "$pipes/$i"
    (trap '' TERM INT && prefix "$i") <"$pipes/$i" &
    readers+=" $!"
    "${command[@]}" >"$pipes/$i" 2>&1 &
  fi
  running+=" $!"
done

while [[ -n $running ]]; do
  look
  if ((worst != 0)) && [[ -z $deadline && -n $running ]]; then
    say "a process ended with exit code $worst; ending the others"
    stop
  fi
  if [[ -n $deadline && -n $running ]] && ((SECONDS > deadline)); then
    # shellcheck disable=SC2086
    kill -KILL $running 2>/dev/null || true
  fi
  [[ -z $running ]] || sleep 0.2
done

# The last lines of the others; a worker that outlived its process may hold a pipe open, so not for ever.
for ((tries = 0; tries < 20; tries++)); do
  # shellcheck disable=SC2086
  kill -0 $readers 2>/dev/null || break
  sleep 0.1
done
# shellcheck disable=SC2086
[[ -z $readers ]] || kill -KILL $readers 2>/dev/null || true
exit "$worst"
