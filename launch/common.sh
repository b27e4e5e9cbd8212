# shellcheck shell=bash
# Functions shared by the scripts in this folder. Source this file, do not run it. Works with Bash 3.2 (macOS).

# Exit codes of python -m jax_transfer.main. Any other code except 0 is a crash.
readonly USER_ERROR=2 # restarting would fail in the same way
readonly PREEMPTED=75 # received SIGTERM and saved the state: the same command resumes

say() { echo "${0##*/}: $*" >&2; }

die() {
  say "$@"
  exit "$USER_ERROR"
}

# Prints the comment at the top of a script as its --help.
help() {
  awk 'NR == 1 { next } !/^#/ { exit } { if (!sub(/^#SBATCH/, " ")) sub(/^# ?/, ""); print }' "$1"
  exit 0
}

need_number() {
  case $2 in '' | *[!0-9]*) die "$1=$2: expected a whole number" ;; esac
}

# Prints words on one line, quoted so that a shell reads the same words back.
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

# Runs a command, or prints it if dry_run is set.
run() {
  if [[ -n ${dry_run:-} ]]; then quoted "$@"; else "$@"; fi
}

child=""
stopping=""

# Passes SIGINT on as SIGTERM: background jobs of a script ignore SIGINT, and SIGTERM saves the state.
stop_child() {
  stopping=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}

# Runs a command, and restarts it after every preemption and after at most $1 crashes. Returns its last exit code, which
# is 75 only if this script itself was asked to stop.
run_with_restarts() {
  local allowed=$1 crashes=0 status
  shift
  trap stop_child TERM INT
  while true; do
    status=0
    "$@" &
    child=$!
    # The script was asked to stop before the child existed.
    [[ -z $stopping ]] || stop_child
    # A signal interrupts wait; the last wait returns the exit code of the command.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    child=""
    if [[ -n $stopping ]] || ((status == 0 || status == USER_ERROR)); then return "$status"; fi
    if ((status == PREEMPTED)); then
      say "preempted, state saved; restarting"
    elif ((crashes < allowed)); then
      crashes=$((crashes + 1))
      say "exit code $status: crash $crashes of at most $allowed; restarting"
    else
      say "exit code $status; no restarts left"
      return "$status"
    fi
    sleep "${RESTART_DELAY:-5}"
    [[ -z $stopping ]] || return "$PREEMPTED"
  done
}
