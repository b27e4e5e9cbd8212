"""Compares K-means with scikit-learn's KMeans on the same vectors: time and inertia.

python tests/benchmarks/kmeans.py [--n=200000 --d=128 --clusters=2000 --runs=1 --plain]

Prints one JSON line with the median seconds of alternating runs, their ratio (scikit-learn / ours; goal: at least 2 on
two CPU cores) and the ratio of the mean inertias (ours / scikit-learn's; goal: at most 1.002). The vectors are like
embeddings: classes of a hundred on a sphere, with a spectrum that falls as a power law. Both sides minimise the same
objective, with their default number of iterations and tolerance. scikit-learn runs on all cores, with one start
(n_init=1) and Lloyd's algorithm, in float32. Only its start runs in float64, where it is ten times as fast; --plain
leaves it in float32, as `KMeans().fit(x)` does. `ratio_without_start` leaves scikit-learn's start out, but not ours.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans, kmeans_plusplus

from jax_transfer.selection import kmeans


def embeddings(rng, n, d):
    """Draws directions [n, d] of n / 100 classes; the variance of component j is proportional to 1 / j."""
    centres = rng.normal(size=(max(1, n // 100), d)).astype(np.float32)
    x = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, d)).astype(np.float32)
    x *= np.arange(1, d + 1, dtype=np.float32) ** -0.5
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def peer(x, k, seed, plain):
    """Returns (seconds of the start, seconds of Lloyd's iterations, fitted KMeans)."""
    began = time.perf_counter()
    centres, _ = kmeans_plusplus(x if plain else x.astype(np.float64), k, random_state=seed)
    started = time.perf_counter()
    fitted = KMeans(k, init=centres.astype(np.float32), n_init=1, algorithm="lloyd").fit(x)
    return started - began, time.perf_counter() - started, fitted


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("n", 200_000), ("d", 128), ("clusters", 2_000), ("runs", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--plain", action="store_true")
    flags = parser.parse_args()
    x = embeddings(np.random.default_rng(0), flags.n, flags.d)
    x_device = jnp.asarray(x)

    def ours(seed, **settings):
        return jax.block_until_ready(kmeans(x_device, flags.clusters, metric="l2", seed=seed, **settings))

    began = time.perf_counter()
    ours(0, max_iterations=1)
    first = time.perf_counter() - began  # compilation, the start and one iteration
    seconds = {"ours": [], "start": [], "iterations": []}
    results = {"ours": [], "peer": []}
    for seed in range(flags.runs):
        began = time.perf_counter()
        results["ours"].append(ours(seed))
        seconds["ours"].append(time.perf_counter() - began)
        start, iterations, fitted = peer(x, flags.clusters, seed, flags.plain)
        seconds["start"].append(start)
        seconds["iterations"].append(iterations)
        results["peer"].append(fitted)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    inertias = {
        "ours": float(np.mean([each.inertia for each in results["ours"]])),
        "peer": float(np.mean([each.inertia_ for each in results["peer"]])),
    }
    report = {
        "device": jax.devices()[0].device_kind,
        **vars(flags),
        "ours_seconds": round(medians["ours"], 1),
        "peer_start_seconds": round(medians["start"], 1),
        "peer_iterations_seconds": round(medians["iterations"], 1),
        "ratio": round((medians["start"] + medians["iterations"]) / medians["ours"], 2),
        "ratio_without_start": round(medians["iterations"] / medians["ours"], 2),
        "inertia_ratio": round(inertias["ours"] / inertias["peer"], 5),
        "ours_iterations": [int(each.iterations) for each in results["ours"]],
        "peer_iterations": [each.n_iter_ for each in results["peer"]],
        "ours_first_call_seconds": round(first, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
