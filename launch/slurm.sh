#!/usr/bin/env bash
# Runs a study on the nodes of a Slurm job, one process per node. Submit it from the root of the clone:
#
#   sbatch [SBATCH OPTIONS] launch/slurm.sh [--restarts=K] --config=... --workdir=... [...]
#   launch/slurm.sh --dry-run --config=... --workdir=...      print the srun command; works outside of Slurm
#
#   --restarts=K  restart after at most K crashes (default 3)
#
# All other arguments are passed to python -m jax_transfer.main. --workdir must be on a file system shared by all nodes.
# One process uses all GPUs of its node. PYTHON sets the interpreter (default python). Two minutes before the time
# limit, the study saves its state and the job is requeued, until the study is done. Options given to sbatch override these:
#
#SBATCH --job-name=jax_transfer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail
# Slurm runs a copy of this file in another folder.
here=${SLURM_SUBMIT_DIR:+$SLURM_SUBMIT_DIR/launch}
here=${here:-$(dirname "${BASH_SOURCE[0]}")}
if [[ ! -f $here/common.sh ]]; then
  echo "slurm.sh: $here/common.sh not found; submit from the root of the clone: sbatch launch/slurm.sh ..." >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

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

# Under Slurm, JAX gives each process only the GPU of its local rank by default.
if [[ ${SLURM_NTASKS_PER_NODE:-} == 1 && ${SLURM_GPUS_ON_NODE:-0} -gt 1 ]]; then
  export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))}
fi
# Since Slurm 22.05, srun does not inherit this from sbatch: the process would get a single core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# --kill-on-bad-exit: if one node fails, stop the others, which would wait for it.
command=(srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m jax_transfer.main --distributed "$@")
if [[ -n $dry_run ]]; then
  for name in JAX_LOCAL_DEVICE_IDS SRUN_CPUS_PER_TASK; do
    [[ -z ${!name:-} ]] || echo "export $name=${!name}"
  done
  quoted "${command[@]}"
  exit 0
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "not running in a Slurm job: use sbatch launch/slurm.sh ..., or --dry-run"

# SIGUSR1 announces the time limit; SIGTERM comes from scancel or a preemption.
time_limit=""
trap 'time_limit=yes; stop_child' USR1
status=0
run_with_restarts "$restarts" "${command[@]}" || status=$?

if ((status == PREEMPTED)) && [[ -n $time_limit ]]; then
  say "state saved before the time limit; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
elif ((status == PREEMPTED)); then
  # Slurm is about to kill a cancelled job, or to requeue a preempted one, which must still be running.
  say "state saved; waiting for Slurm to end or requeue the job"
  sleep "${GRACE:-300}" &
  wait $! || true
fi
exit "$status"
