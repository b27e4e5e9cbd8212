# shellcheck shell=bash
# What the scripts beside it share; sourced, not run. Bash 3.2, which macOS has, is enough.

# Exit codes of python -m jax_transfer.main. Any other but 0 is a crash.
readonly USER_ERROR=2 # another start would fail in the same way
readonly PREEMPTED=75 # SIGTERM came and the state was saved: the same command goes on from there

say() { echo "${0##*/}: $*" >&2; }

die() {
  say "$@"
  exit "$USER_ERROR"
}

# The comment at the head of a script is its --help.
help() {
  awk 'NR == 1 { next } !/^#/ { exit } { if (!sub(/^#SBATCH/, " ")) sub(/^# ?/, ""); print }' "$1"
  exit 0
}

need_number() {
  case $2 in '' | *[!0-9]*) die "$1=$2: expected a whole number" ;; esac
}

# The words on one line, quoted such that a shell reads the same words back.
quoted() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs a command, or prints it where dry_run is set.
run() {
  if [[ -n ${dry_run:-} ]]; then quoted "$@"; else "$@"; fi
}

child=""
stopping=""

# SIGINT goes on as SIGTERM: a background job of a script ignores SIGINT, and SIGTERM saves the state.
stop_child() {
  stopping=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

# Runs a command, again after a preemption, and again after at most $1 crashes. Returns its last exit code; 75 only
# where this script itself was asked to stop.
run_with_restarts() {
  local allowed=$1 crashes=0 status
  shift
  trap stop_child TERM INT
  while true; do
    status=0
    "$@" &
    child=$!
    # Asked to stop before there was a child to tell.
    [[ -z $stopping ]] || stop_child
    # A signal ends a wait early; the last wait returns what the command itself did.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    child=""
    if [[ -n $stopping ]] || ((status == 0 || status == USER_ERROR)); then return "$status"; fi
    if ((status == PREEMPTED)); then
      say "preempted with its state saved; starting it again"
    elif ((crashes < allowed)); then
      crashes=$((crashes + 1))
      say "exit code $status: crash $crashes; starting it again ($allowed restarts at most)"
    else
      say "exit code $status; no restart is left"
      return "$status"
    fi
    sleep "${RESTART_DELAY:-5}"
    [[ -z $stopping ]] || return "$PREEMPTED"
  done
}
