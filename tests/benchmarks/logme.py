"""Compares LogME of a trajectory: one vmapped compiled call against numpy with an SVD and a fit per checkpoint.

python tests/benchmarks/logme.py [--checkpoints=16 --n=5000 --d=512 --classes=100 --runs=3]

Prints one JSON line with the median seconds of alternating runs and their ratio (numpy / ours; goal: at least 2 on two
CPU cores). numpy uses float64 and the official fixed-point iteration.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer.analysis import logme


def numpy_logme(x, y, num_classes):
    """Computes LogME by the published fixed point (11 iterations, stop at 1e-3), with one SVD for all classes."""
    n, d = x.shape
    u, s, _ = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s2 = s**2
    evidences = []
    for c in range(num_classes):
        target = (y == c).astype(np.float64)
        z2 = (u.T @ target) ** 2
        r0 = (target**2).sum() - z2.sum()
        alpha, beta, lam = 1.0, 1.0, 1.0
        for _ in range(11):
            lam = alpha / beta
            gamma = (s2 / (s2 + lam)).sum()
            m2 = (s2 * z2 / (s2 + lam) ** 2).sum()
            residual = (z2 / (1 + s2 / lam) ** 2).sum() + r0
            alpha, beta = gamma / m2, (n - gamma) / residual
            if abs(alpha / beta - lam) / lam <= 1e-3:
                break
        evidence = d / 2 * np.log(alpha) + n / 2 * np.log(beta) - 0.5 * np.log(alpha + beta * s2).sum()
        evidences.append((evidence - beta / 2 * residual - alpha / 2 * m2 - n / 2 * np.log(2 * np.pi)) / n)
    return np.mean(evidences)


def relu_features(rng, checkpoints, n, d, num_classes):
    """Draws features like a network's: non-negative, with classes that separate better at each later checkpoint."""
    y = rng.integers(num_classes, size=n)
    means = rng.normal(size=(num_classes, d))
    x = [np.maximum(means[y] * k / checkpoints + rng.normal(size=(n, d)), 0) for k in range(1, checkpoints + 1)]
    return np.stack(x).astype(np.float32), y.astype(np.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("checkpoints", 16), ("n", 5000), ("d", 512), ("classes", 100), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):  # with a GPU: on both
        with jax.default_device(device):
            compare(flags, device.device_kind)


def compare(flags, device_kind):
    x, y = relu_features(np.random.default_rng(0), flags.checkpoints, flags.n, flags.d, flags.classes)
    x_device, y_device = jnp.asarray(x), jnp.asarray(y)
    ours = jax.jit(jax.vmap(lambda x, y: logme(x, y, flags.classes), in_axes=(0, None)))
    start = time.perf_counter()
    values = np.asarray(ours(x_device, y_device))
    first = time.perf_counter() - start
    seconds = {"ours": [], "numpy": []}
    for _ in range(flags.runs):
        start = time.perf_counter()
        values = np.asarray(ours(x_device, y_device))
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        expected = np.array([numpy_logme(one, y, flags.classes) for one in x])
        seconds["numpy"].append(time.perf_counter() - start)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    report = {
        "device": device_kind,
        "sizes": {k: v for k, v in vars(flags).items() if k != "runs"},
        "ours_seconds": round(medians["ours"], 3),
        "numpy_seconds": round(medians["numpy"], 3),
        "ratio": round(medians["numpy"] / medians["ours"], 2),
        "ours_first_call_seconds": round(first, 3),
        "largest_difference": float(np.max(np.abs(values - expected))),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
