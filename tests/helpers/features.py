"""Synthetic features for the tests of scores and probes, and the reference values of scores."""

import json

import jax.numpy as jnp
import numpy as np

from jax_transfer.records import Features
from jax_transfer.transfer.probe import ProbeSettings

C = 5


def gaussians(n=300, d=24, separation=1.0, seed=0, dtype=np.float64):
    """Returns x [n, d] of C Gaussian classes, rounded to float32, and y [n] in which every class occurs."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % C).astype(np.int32)
    x = separation * rng.normal(size=(C, d))[y] + rng.normal(size=(n, d))
    return x.astype(np.float32).astype(dtype), y


def as_features(x, y):
    """Returns Features whose source logits are a fixed linear map of x."""
    x = np.asarray(x, np.float32)
    weights = np.random.default_rng(9).normal(size=(x.shape[-1], 7)).astype(np.float32)
    scale = np.maximum(np.abs(x).max(), 1e-30)
    return Features(jnp.asarray(x), jnp.asarray(x / scale @ weights), jnp.asarray(y, jnp.int32))


def reference_rows(reference_dir):
    """Returns the rows of values.json: scores computed with the code of other projects."""
    return json.loads((reference_dir / "values.json").read_text())["values"]


def hard_inputs():
    """Returns name -> (x float64, y). Rounded to float32, rank-deficient features have full rank (by 1e-7)."""
    x, y = gaussians()
    wide, wide_y = gaussians(n=40, d=90, seed=1)
    rng = np.random.default_rng(2)
    rank6 = x[:, :6] @ rng.normal(size=(6, 24))
    single = np.where(y == 0, 1, y)
    single[0] = 0
    graded = np.sort(np.minimum(rng.geometric(0.02, size=300) % 97 % 29, 4))  # classes below and above a block of 128
    return {
        "plain": (x, y),
        "weak": (gaussians(separation=0.2)[0], y),
        "offset by 100": (x + 100, y),
        "offset by 1000": (x + 1000, y),
        "rank 6": (rank6, y),
        "rank 6, offset by 100": (rank6 + 100, y),
        "duplicate columns": (np.tile(x[:, :8], (1, 3)), y),
        "nearly duplicate columns": (np.concatenate([x[:, :12], x[:, :12] + 1e-3 * x[:, 12:]], axis=1), y),
        "zero columns": (x * (np.arange(24) % 2), y),
        "scales 1e-3 to 1e3": (x * np.logspace(-3, 3, 24), y),
        "scales 1e-6 to 1e6": (x * np.logspace(-6, 6, 24), y),
        "scales 1e6 to 1e-6": (x * np.logspace(6, -6, 24), y),
        "scales 1e-3 to 1e3, offset by 100": (x * np.logspace(-3, 3, 24) + 100, y),
        "duplicate columns at scales 1e-4 to 1e4": (np.tile(x[:, :8], (1, 3)) * np.logspace(-4, 4, 24), y),
        "one nearly dead column": (x * np.where(np.arange(24) == 3, 1e-6, 1), y),
        "d > n": (wide, wide_y),
        "d > n, offset by 100": (wide + 100, wide_y),
        "d > n, scales 1e-4 to 1e4": (wide * np.logspace(-4, 4, 90), wide_y),
        "d > n, rank 6": (wide[:, :6] @ rng.normal(size=(6, 90)), wide_y),
        "n = d": (wide[:, :40], wide_y),
        "one column": (x[:, :1], y),
        "tiny": (x * 1e-18, y),
        "small": (x * 1e-3, y),
        "huge": (x * 1e18, y),
        "constant": (np.full_like(x, 0.1), y),
        "zero": (np.zeros_like(x), y),
        "empty class": (x, np.where(y == 2, 3, y)),
        "one sample in a class": (x, single),
        "classes of 1 to 250 samples": (x, graded),
        "one class": (x, np.zeros_like(y)),
        "shuffled labels": (x, rng.permutation(y)),
    }


PROBE_SETTINGS = ProbeSettings(epochs=20, batch_size=32, learning_rates=(0.01,), l2=(1e-3,))


def blobs(k=2, n=300, m=200, d=6, c=3, spread=0.7, seed=0):
    """Returns (x [k, n, d], y [n]) to train and (x [k, m, d], y [m]) to test; later feature sets are noisier."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(c, d))

    def sample(size):
        y = rng.integers(0, c, size).astype(np.int32)
        x = np.stack([centres[y] + spread * (i + 1) * rng.normal(size=(size, d)) for i in range(k)])
        return x.astype(np.float32), y

    return sample(n), sample(m)
