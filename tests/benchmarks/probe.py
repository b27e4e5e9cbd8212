"""Compares the converged probe: one compiled call for all checkpoints and regularisations against a scikit-learn loop.

python tests/benchmarks/probe.py [--small] [--checkpoints=16 --n=2000 --d=512 --classes=10 --runs=3] [--power-law]

Prints one JSON line with the median seconds of alternating runs, their ratio (scikit-learn / ours; goal: at least 10 on
two CPU cores), and a comparison of the objectives (mean cross-entropy + l2/2 ||w||^2, in float64) and test accuracies.
Both sides get the same standardised float32 features. With a tolerance of 1e-6, scikit-learn's objectives are still up
to a few percent above ours for well separated classes, so the ratio is a low estimate; a smaller --tol makes it slower.
--power-law uses features with a badly conditioned covariance.
"""

import argparse
import json
import statistics
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from logme import relu_features
from nleep import power_law_features, timed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from jax_transfer.transfer.softmax_regression import ProbeSettings, converged

L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SMALL = {"checkpoints": 2, "n": 300, "d": 32, "classes": 5}


def features(flags):
    """Returns features x [k, 2n, d], standardised by the first n rows, and labels y [2n]."""
    rng = np.random.default_rng(0)
    if flags.power_law:
        each = [
            power_law_features(np.random.default_rng(0), 2 * flags.n, flags.d, flags.classes, decay)
            for decay in np.linspace(0.25, 1.25, flags.checkpoints)
        ]
        x, y = np.stack([x for x, _ in each]), each[0][1]
    else:
        x, y = relu_features(rng, flags.checkpoints, 2 * flags.n, flags.d, flags.classes)
    scale = x[:, : flags.n].std(1, keepdims=True)
    scale = scale.max(2, keepdims=True) if flags.power_law else scale
    return ((x - x[:, : flags.n].mean(1, keepdims=True)) / scale).astype(np.float32), y


def peer(x, y, l2, tolerance):
    """Fits scikit-learn's L-BFGS; returns weights [d, c], biases [c] and the number of iterations."""
    fitted = LogisticRegression(C=1 / (l2 * len(y)), tol=tolerance, max_iter=10_000).fit(x, y)
    return {"w": fitted.coef_.T, "b": fitted.intercept_}, int(fitted.n_iter_[0])


def objective_and_accuracy(weights, x, y, n, l2):
    logits = x.astype(np.float64) @ np.asarray(weights["w"], np.float64) + np.asarray(weights["b"], np.float64)
    shifted = logits[:n] - logits[:n].max(1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(n), y[:n]]).mean()
    objective = loss + 0.5 * l2 * np.sum(np.asarray(weights["w"], np.float64) ** 2)
    return objective, np.mean(logits[n:].argmax(1) == y[n:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("checkpoints", 16), ("n", 2000), ("d", 512), ("classes", 10), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--power-law", action="store_true")
    parser.add_argument("--small", action="store_true")
    flags = parser.parse_args()
    if flags.small:
        vars(flags).update(SMALL)
    warnings.simplefilter("ignore", ConvergenceWarning)
    for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):  # with a GPU: on both
        with jax.default_device(device):
            compare(flags, device.device_kind)


def compare(flags, device_kind):
    x, y = features(flags)
    n, rows = flags.n, np.arange(flags.n)
    x_device, y_device, l2 = jnp.asarray(x[:, :n]), jnp.asarray(y[:n]), jnp.asarray(L2)

    @jax.jit
    @jax.vmap
    def fit(x):
        return converged(x, y_device, rows, l2, jax.random.key(0), flags.classes, ProbeSettings())

    def ours():
        return jax.block_until_ready(fit(x_device))

    def peers():
        return [[peer(one[:n], y[:n], value, flags.tol) for value in L2] for one in x]

    def results(weights):
        """Computes objectives and accuracies [k, v] of weights(checkpoint, candidate)."""
        each = [
            [objective_and_accuracy(weights(i, j), one, y, n, value) for j, value in enumerate(L2)]
            for i, one in enumerate(x)
        ]
        return np.moveaxis(np.array(each), -1, 0)

    first, fitted = timed(ours)
    fitted = jax.device_get(fitted)
    objectives, accuracies = results(lambda i, j: jax.tree.map(lambda leaf: leaf[i, j], fitted))
    seconds = {"ours": [], "peer": []}
    for _ in range(flags.runs):
        seconds["ours"].append(timed(ours)[0])
        elapsed, expected = timed(peers)
        seconds["peer"].append(elapsed)
    peer_objectives, peer_accuracies = results(lambda i, j: expected[i][j][0])
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    report = {
        "device": device_kind,
        "sizes": {name: getattr(flags, name) for name in SMALL},
        "features": "power law" if flags.power_law else "relu",
        "ours_seconds": round(medians["ours"], 3),
        "peer_seconds": round(medians["peer"], 3),
        "ratio": round(medians["peer"] / medians["ours"], 2),
        "ours_first_call_seconds": round(first, 3),
        "peer_tolerance": flags.tol,
        "peer_iterations": sum(iterations for one in expected for _, iterations in one),
        "largest_excess_of_our_objective": float(f"{np.max(objectives / peer_objectives - 1):.2g}"),
        "largest_excess_of_peer_objective": float(f"{np.max(peer_objectives / objectives - 1):.2g}"),
        "largest_difference_of_accuracy": round(float(np.abs(accuracies - peer_accuracies).max()), 4),
        "mean_accuracies": {
            "ours": round(float(accuracies.mean()), 4),
            "peer": round(float(peer_accuracies.mean()), 4),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
