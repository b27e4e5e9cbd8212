"""Compares spectral components with numpy's full decomposition, on a whole data set and on its batches.

    python tests/benchmarks/spectral.py [--n=20000 --d=512 --batches=156 --runs=3]

Our call returns both components. numpy returns the three factors, which would still have to be multiplied. Prints one
JSON line for each case, with median seconds. For results on two CPU cores, see docs/results/benchmarks.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer.analysis.spectral import batched_spectral_components, spectral_components


def relu_features(n, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 64)) @ rng.normal(size=(64, d)) + 0.5 * rng.normal(size=(n, d))
    return np.maximum(x, 0).astype(np.float32)


def timed(function, *arguments):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


def compare(name, ours, x, peer_x, runs, device_kind):
    x = jnp.asarray(x)
    first, _ = timed(ours, x)
    seconds = {"ours": [], "peer": []}
    for _ in range(runs):
        elapsed, found = timed(ours, x)
        seconds["ours"].append(elapsed)
        elapsed, (_, s, _) = timed(lambda: np.linalg.svd(peer_x, full_matrices=False))
        seconds["peer"].append(elapsed)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    report = {
        "name": name,
        "device": device_kind,
        "shape": list(peer_x.shape),
        "ours_seconds": round(medians["ours"], 3),
        "peer_seconds": round(medians["peer"], 3),
        "ratio": round(medians["peer"] / medians["ours"], 2),
        "ours_first_call_seconds": round(first, 3),
        "largest_relative_difference": float(f"{np.max(np.abs(np.asarray(found.singular_values) / s - 1)):.2g}"),
    }
    print(json.dumps(report), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("n", 20000), ("d", 512), ("batches", 156), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    x = relu_features(max(flags.n, 128 * flags.batches), flags.d)
    whole, rows = x[: flags.n], x[: 128 * flags.batches]
    for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):  # with a GPU: on both
        with jax.default_device(device):
            compare("whole", spectral_components, whole, whole, flags.runs, device.device_kind)
            batches = rows.reshape(flags.batches, 128, flags.d)
            compare("batches", batched_spectral_components, rows, batches, flags.runs, device.device_kind)


if __name__ == "__main__":
    main()
