#!/usr/bin/env bash
# Runs a study in N processes on this machine, like N hosts, on CPU devices with gloo collectives.
#
#   launch/local_processes.sh N [--dry-run] --config=... --workdir=... [...]
#
#   --dry-run  print the commands without running them
#
# All other arguments are passed to python -m jax_transfer.main. The output of process 0 is unchanged; the lines of the
# others begin with [process i]. SIGTERM and Ctrl-C reach all processes as SIGTERM: they save and exit with 75. If one
# process fails, the others are stopped too, and the exit code is that of the first failure.
#
# Environment: PYTHON, the interpreter (default python); JAX_PLATFORMS (default cpu); PORT, the coordinator's port
# (default: a free one); GRACE, the seconds between SIGTERM and SIGKILL (default 30).
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

# Removes finished processes from running, and sets worst to the exit code of the first failure. Any other exit code
# takes precedence over 75.
check_processes() {
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
    # Not `command | prefix`: signals must reach the command, and its exit code is needed.
    mkfifo "$pipes/$i"
    (trap '' TERM INT && prefix "$i") <"$pipes/$i" &
    readers+=" $!"
    "${command[@]}" >"$pipes/$i" 2>&1 &
  fi
  running+=" $!"
done

while [[ -n $running ]]; do
  check_processes
  if ((worst != 0)) && [[ -z $deadline && -n $running ]]; then
    say "a process failed with exit code $worst; stopping the others"
    stop
  fi
  if [[ -n $deadline && -n $running ]] && ((SECONDS > deadline)); then
    # shellcheck disable=SC2086
    kill -KILL $running 2>/dev/null || true
  fi
  [[ -z $running ]] || sleep 0.2
done

# Wait for the last lines of the others, but not for ever: a child of a process may keep its pipe open.
for ((tries = 0; tries < 20; tries++)); do
  # shellcheck disable=SC2086
  kill -0 $readers 2>/dev/null || break
  sleep 0.1
done
# shellcheck disable=SC2086
[[ -z $readers ]] || kill -KILL $readers 2>/dev/null || true
exit "$worst"
