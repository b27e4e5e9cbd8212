#!/usr/bin/env bash
# Runs the paper's toy experiment in full on one GPU, and records it in docs/results/cifar10_to_mnist.
#
#   tests/benchmarks/cifar10_to_mnist.sh [SECONDS]
#
# Stops after SECONDS (default: 570); run it again to resume. When the study is complete, it writes the rows, figures
# and a README with the command, the device and our numbers beside the paper's. You can set VARIANT (default: full),
# WORKDIR (default: runs/cifar10_to_mnist), OUTPUT, PYTHON and TFDS_DATA_DIR.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

python=${PYTHON:-python3}
variant=${VARIANT:-full}
workdir=${WORKDIR:-runs/cifar10_to_mnist}
config="configs/cifar10_to_mnist.py:$variant"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

timeout --signal=TERM --kill-after=20 "${1:-570}" \
  "$python" -m jax_transfer.main --config="$config" --workdir="$workdir"
code=$?
if [ "$code" -eq 124 ]; then
  echo "== stopped after ${1:-570} s: run the same command again to resume"
fi
[ "$code" -eq 0 ] || exit "$code"
"$python" tests/benchmarks/record_study.py "$workdir" "${OUTPUT:-docs/results/cifar10_to_mnist}" \
  --command="python -m jax_transfer.main --config=$config --workdir=$workdir" --note="${NOTE:-}"
