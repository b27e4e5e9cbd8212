#!/usr/bin/env bash
# Runs a study on one host with one or several GPUs (one process uses all of them), and restarts it after a preemption.
#
#   launch/gpu_host.sh [--dry-run] [--restarts=K] --config=... --workdir=... [...]
#
#   --dry-run     print the command without running it
#   --restarts=K  restart after at most K crashes (default 3), and after every preemption (exit code 75)
#
# All other arguments are passed to python -m jax_transfer.main. PYTHON sets the interpreter (default python).
# SIGTERM and Ctrl-C are passed on as SIGTERM: the study saves its state and exits with 75. The same command resumes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run="" restarts=3
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --restarts=*) restarts=${1#*=} ;;
    -h | --help) help "$0" ;;
    *) break ;;
  esac
  shift
done
need_number --restarts "$restarts"
(($#)) || die "give the arguments of python -m jax_transfer.main: --config=... --workdir=..."

command=("${PYTHON:-python}" -m jax_transfer.main "$@")
if [[ -n $dry_run ]]; then
  quoted "${command[@]}"
else
  run_with_restarts "$restarts" "${command[@]}"
fi
