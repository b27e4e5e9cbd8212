"""Compares N-LEEP with scikit-learn's PCA and GaussianMixture, at the same number of components and likelihood.

python tests/benchmarks/nleep.py [--small] [--runs=3] [--peer-float32]

Prints one JSON line per size with the median seconds of alternating runs, their ratio (scikit-learn / ours; goal: at
least 2 on two CPU cores), and the mean log-likelihood of both mixtures. scikit-learn runs in float64, because it raises
in float32 if a component has fewer samples than dimensions; --peer-float32 runs it in float32 anyway.
"""

import argparse
import json
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from jax_transfer.analysis.leep import leep
from jax_transfer.analysis.mixture import fit_mixture
from jax_transfer.analysis.nleep import nleep, pca

SIZES = {"wide labels": (5_000, 512, 100), "wide features": (10_000, 2_048, 10)}
SMALL = {"small": (1_000, 64, 10)}


def power_law_features(rng, n, d, num_classes, decay=1.25):
    """Draws features whose j-th principal variance is proportional to j^-decay, with a fifth of it between classes.

    The root mean square of the standard deviations is 0.3.
    """
    y = rng.permutation(np.arange(n) % num_classes)
    x = np.sqrt(0.2) * rng.normal(size=(num_classes, d))[y] + np.sqrt(0.8) * rng.normal(size=(n, d))
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    variances = np.arange(1, d + 1) ** -decay
    x = x * np.sqrt(variances / variances.mean()) * 0.3 @ rotation
    return x.astype(np.float32), y.astype(np.int32)


def peer(x, y, num_classes, seed):
    """Returns scikit-learn's score, mixture and reduced features, with the settings of the paper."""
    reduced = PCA(n_components=0.8).fit_transform(x)
    mixture = GaussianMixture(5 * num_classes, random_state=seed).fit(reduced)
    probs = mixture.predict_proba(reduced)
    value = float(leep(jnp.asarray(probs, jnp.float32), jnp.asarray(y), num_classes))
    return value, mixture, reduced


def ours(x, y, num_classes, seed):
    return float(nleep(x, y, num_classes, seed=seed))


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def compare(name, n, d, num_classes, runs, peer_dtype, device_kind):
    x, y = power_law_features(np.random.default_rng(0), n, d, num_classes)
    x_device, y_device = jnp.asarray(x), jnp.asarray(y)
    first, _ = timed(ours, x_device, y_device, num_classes, 0)
    seconds, values = {"ours": [], "peer": []}, {"ours": [], "peer": []}
    likelihoods, iterations = {"ours": [], "peer": []}, {"ours": [], "peer": []}
    for seed in range(runs):
        elapsed, value = timed(ours, x_device, y_device, num_classes, seed)
        seconds["ours"].append(elapsed)
        values["ours"].append(value)
        elapsed, (value, mixture, reduced) = timed(peer, x.astype(peer_dtype), y, num_classes, seed)
        seconds["peer"].append(elapsed)
        values["peer"].append(value)
        likelihoods["peer"].append(mixture.score(reduced))
        iterations["peer"].append(mixture.n_iter_)
        fitted = fit_mixture(jnp.asarray(reduced, jnp.float32), 5 * num_classes, jax.random.key(seed))  # not timed
        likelihoods["ours"].append(float(fitted.log_likelihood))
        iterations["ours"].append(int(fitted.iterations))
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    report = {
        "name": name,
        "device": device_kind,
        "n": n,
        "d": d,
        "classes": num_classes,
        "components": 5 * num_classes,
        "dimension": int(pca(x_device).dimension),
        "ours_seconds": round(medians["ours"], 3),
        "peer_seconds": round(medians["peer"], 3),
        "ratio": round(medians["peer"] / medians["ours"], 2),
        "ours_first_call_seconds": round(first, 3),
    }
    for label, results in (("nleep", values), ("log_likelihood", likelihoods), ("iterations", iterations)):
        report |= {f"{who}_{label}": round(float(np.mean(result)), 4) for who, result in results.items()}
    print(json.dumps(report), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer-float32", action="store_true")
    flags = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):  # with a GPU: on both
        with jax.default_device(device):
            for name, sizes in (SMALL if flags.small else SIZES).items():
                peer_dtype = np.float32 if flags.peer_float32 else np.float64
                compare(name, *sizes, flags.runs, peer_dtype, device.device_kind)


if __name__ == "__main__":
    main()
