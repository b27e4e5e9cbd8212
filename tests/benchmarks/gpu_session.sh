#!/usr/bin/env bash
# Runs everything that needs a GPU: the GPU tests, the benchmarks, and the study from CIFAR-10 to MNIST.
#
#   tests/benchmarks/gpu_session.sh [OUTPUT]
#
# OUTPUT (default: docs/results/benchmarks) receives the JSON of each benchmark and the log of each step. The study has
# its own script, cifar10_to_mnist.sh, which resumes where it stopped. PYTHON sets the interpreter (default: python3),
# TFDS_DATA_DIR the folder of the data sets, and TESTS_LIMIT, BENCHMARK_LIMIT and STUDY_LIMIT the seconds per step.
# A step that fails or runs out of time does not stop the next ones; the last lines list these steps, and the exit code
# is then 1.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

python=${PYTHON:-python3}
out=${1:-docs/results/benchmarks}
failed=()
mkdir -p "$out" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: runs the command and writes its output to the terminal and to OUTPUT/NAME.log.
step() {
  local name=$1 limit=$2 code=0
  shift 2
  echo "== $name: $*"
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.log" || code=$?
  if [ "$code" -ne 0 ]; then
    [ "$code" -eq 124 ] && code="124, the limit of $limit s"
    failed+=("$name (exit code $code)")
  fi
}

# The logs contain what the JSON lacks: the table, and the reasons for failures.
step gpu_tests "${TESTS_LIMIT:-240}" \
  env JAX_TRANSFER_TEST_GPU=1 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/test_gpu.py
for what in step18 step50 epoch; do
  step "train_$what" "${BENCHMARK_LIMIT:-420}" \
    "$python" tests/benchmarks/train_step.py --what "$what" --out "$out/train_$what.json"
done
for what in logme nleep probe spectral kmeans; do
  step "$what" "${BENCHMARK_LIMIT:-420}" "$python" "tests/benchmarks/$what.py" --runs=1
  # One JSON line for the GPU and one for the CPU, between messages of libraries.
  grep '^{' "$out/$what.log" >"$out/$what.jsonl" || failed+=("$what.jsonl: no result in $what.log")
done
step study "$((${STUDY_LIMIT:-1200} + 60))" tests/benchmarks/cifar10_to_mnist.sh "${STUDY_LIMIT:-1200}"

if [ "${#failed[@]}" -gt 0 ]; then
  echo "== failed:"
  printf '   %s\n' "${failed[@]}"
  exit 1
fi
echo "== all steps succeeded; results are in $out"
