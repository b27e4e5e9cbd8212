"""LogME against reference values and the plain fixed-point iteration in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jax_transfer.analysis import SCORES, logme
from jax_transfer.records import Features

C = 5
JITTED = jax.jit(SCORES["logme"], static_argnums=1)


def gaussians(n=300, d=24, separation=1.0, seed=0):
    """x [n, d] of C Gaussian classes, y [n] with every class present."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % C).astype(np.int32)
    x = separation * rng.normal(size=(C, d))[y] + rng.normal(size=(n, d))
    return x.astype(np.float32), y


def as_features(x, y):
    """Features whose source logits are a fixed linear map of the features."""
    x = np.asarray(x, np.float32)
    weights = np.random.default_rng(9).normal(size=(x.shape[-1], 7)).astype(np.float32)
    scale = np.maximum(np.abs(x).max(), 1e-30)
    return Features(jnp.asarray(x), jnp.asarray(x / scale @ weights), jnp.asarray(y, jnp.int32))


def hard_inputs():
    x, y = gaussians()
    clear, _ = gaussians(separation=2.0)
    wide, wide_y = gaussians(n=40, d=90, seed=1)
    rng = np.random.default_rng(2)
    single = np.where(y == 0, 1, y)
    single[0] = 0
    return {
        "plain": (x, y),
        "weak": (gaussians(separation=0.2)[0], y),
        "offset by 100": (x + 100, y),
        "offset by 1000": (x + 1000, y),
        "rank 6": (x[:, :6] @ rng.normal(size=(6, 24)), y),
        "duplicate columns": (np.tile(x[:, :8], (1, 3)), y),
        "zero columns": (x * (np.arange(24) % 2), y),
        "scales 1e-2 to 1e2": (x * np.logspace(-2, 2, 24), y),
        "scales 1e-3 to 1e3": (x * np.logspace(-3, 3, 24), y),
        "scales 1e-4 to 1e4": (clear * np.logspace(-4, 4, 24), y),
        "scales 1e-6 to 1e6": (clear * np.logspace(-6, 6, 24), y),
        "one nearly dead column": (x * np.where(np.arange(24) == 3, 1e-6, 1), y),
        "d > n": (wide, wide_y),
        "d > n, offset by 100": (wide + 100, wide_y),
        "d > n, rank 6": (wide[:, :6] @ rng.normal(size=(6, 90)), wide_y),
        "n = d": (wide[:, :40], wide_y),
        "tiny": (x * 1e-18, y),
        "huge": (x * 1e18, y),
        "constant": (np.full_like(x, 3.0), y),
        "zero": (np.zeros_like(x), y),
        "empty class": (x, np.where(y == 2, 3, y)),
        "one sample in a class": (x, single),
        "shuffled labels": (x, rng.permutation(y)),
    }


HARD = hard_inputs()
hard_inputs_by_name = pytest.mark.parametrize("case", list(HARD))


def evidence(log_a, log_b, x, target):
    """The log evidence of Bayesian linear regression, from the marginal y ~ N(0, I / b + x x' / a), float64."""
    n = len(target)
    values, vectors = np.linalg.eigh(x @ x.T)
    variance = np.exp(-log_b) + np.maximum(values, 0) * np.exp(-log_a)
    return -0.5 * (n * np.log(2 * np.pi) + np.log(variance).sum() + ((vectors.T @ target) ** 2 / variance).sum())


def fixed_point_logme(x, y, num_classes, max_steps=100_000):
    """Mean over occurring classes of the evidence / n where the paper's iteration from a = b = 1 ends, in float64.

    a <- gamma / m'm, b <- (n - gamma) / |y - x m|^2, step by step until log(a / b) changes by 1e-12 relative, or until
    it has run so far out that the evidence equals its limit: a / b -> inf, or -> 0 where n directions interpolate.
    """
    x = np.asarray(x, np.float64)
    n, d = x.shape
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    rank = int((s > s[0] * max(n, d) * 2e-16).sum())
    u, s2 = u[:, :rank], s[:rank] ** 2
    values = []
    for c in np.unique(y):
        target = (y == c).astype(np.float64)
        z = u.T @ target
        r0 = ((target - u @ z) ** 2).sum() if len(s2) < n else 0.0
        if z @ z < 1e-25 * (target @ target):  # no feature helps at all: m'm = 0, and a is infinite after one step
            values.append(-0.5 * (np.log(target @ target / n) + 1 + np.log(2 * np.pi)))
            continue
        a, b = 1.0, 1.0
        for _ in range(max_steps):
            t = a / b
            m = np.sqrt(s2) * z / (s2 + t)  # of V'm
            mm, residual = m @ m, r0 + ((z * t / (s2 + t)) ** 2).sum()
            gamma = (s2 / (s2 + t)).sum()
            a, b = gamma / mm, (n - len(s2) + (t / (s2 + t)).sum()) / residual
            log_t = np.log(a / b)
            change = log_t - np.log(t)
            out = log_t > np.log(s2[0]) + 30 if change > 0 else log_t < np.log(s2[-1]) - 30
            if out or abs(change) <= 1e-12 * max(1, abs(log_t)):
                break
        else:
            raise AssertionError(f"the iteration has not converged after {max_steps} steps, last of {change} in log t")
        # d/2 log a - 1/2 log|A|, in which a cancels for the directions without features
        half_logs = 0.5 * n * np.log(b) - 0.5 * np.log1p(s2 * b / a).sum()
        values.append((half_logs - 0.5 * (b * residual + a * mm + n * np.log(2 * np.pi))) / n)
    return np.mean(values)


def assert_close(ours, expected, tolerance):
    """Relative, but to at least 0.1: the score is a difference of terms of 1/2 (1 + log 2 pi) = 1.4 and may cancel."""
    assert abs(float(ours) - expected) <= tolerance * max(abs(expected), 0.1), (float(ours), expected)


def test_reference_iteration_maximises_the_evidence():
    x, y = gaussians(n=80, d=10)
    x = x.astype(np.float64)
    found = []
    for c in range(C):
        target = (y == c).astype(np.float64)
        result = scipy.optimize.minimize(
            lambda p, target=target: -evidence(*p, x, target), (0.0, 0.0), method="Nelder-Mead", tol=1e-12
        )
        found.append(-result.fun / len(y))
    np.testing.assert_allclose(fixed_point_logme(x, y, C), np.mean(found), rtol=1e-8)


@hard_inputs_by_name
def test_float32_equals_fixed_point(case):
    x, y = HARD[case]
    x = np.asarray(x, np.float32)
    assert_close(JITTED(as_features(x, y), C), fixed_point_logme(x, y, C), 1e-4)


@hard_inputs_by_name
def test_float64_equals_fixed_point(case):
    x, y = HARD[case]
    x = np.asarray(x, np.float64)
    with jax.enable_x64(True):
        ours = logme(x, y, C)
    assert ours.dtype == np.float64
    assert_close(ours, fixed_point_logme(x, y, C), 1e-6)


def test_vmap_over_graded_and_plain_inputs_equals_fixed_point():
    cases = [HARD["plain"], HARD["scales 1e-6 to 1e6"]]  # only the second needs the accurate decomposition
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[as_features(*case) for case in cases])
    together = jax.jit(jax.vmap(lambda features: SCORES["logme"](features, C)))(stacked)
    expected = [fixed_point_logme(np.asarray(x, np.float32), y, C) for x, y in cases]
    np.testing.assert_allclose(together, expected, rtol=2e-5)


def score(x, y):
    return JITTED(as_features(x, y), C)


def test_invariant_to_scale_if_evidence_has_one_maximum():
    x, y = gaussians()
    np.testing.assert_allclose(score(100 * x, y), score(x, y), rtol=1e-5)


@pytest.mark.parametrize("unit", (1e-3, 1e3))
def test_scale_selects_among_several_maxima(unit):
    x, y = HARD["scales 1e-3 to 1e3"]
    here, there = (fixed_point_logme(np.asarray(v, np.float32), y, C) for v in (x, unit * x))
    assert abs(there - here) > 1e-3
    assert_close(score(unit * x, y), there, 1e-4)


def test_useless_features_score_as_pure_noise():
    y = np.arange(300) % 2
    column = np.where(np.arange(300) % 4 < 2, 1, -1)  # orthogonal to both classes
    expected = -0.5 * (np.log(0.5) + 1 + np.log(2 * np.pi))  # each class has power 1/2
    np.testing.assert_allclose(score(np.tile(column[:, None], (1, 24)), y), expected, rtol=1e-6)


def test_exact_fit_is_finite_and_large():
    y = np.arange(300) % C
    assert 5 < float(score(np.eye(24)[y], y)) < 100


def test_nan_features_give_nan():
    x, y = gaussians()
    x[3, 4] = np.nan
    assert np.isnan(score(x, y))


@pytest.mark.parametrize("epoch", (2, 3, 5))
@pytest.mark.parametrize(("target", "num_classes"), (("mnist", 10), ("caltech101", 101)))
def test_equals_reference_values(reference_dir, target, num_classes, epoch):
    file = f"feat_ep{epoch}_{target}.npz"
    rows = json.loads((reference_dir / "values.json").read_text())["values"]
    rows = {
        r["peer"]: r["value"]
        for r in rows
        if r["data"] == file and ("LogME().fit" in r["function"] or "fixed" in r["function"])
    }
    saved = np.load(reference_dir / "features" / file)
    x, y = saved["features"], saved["labels"]
    ours = logme(jnp.asarray(x), jnp.asarray(y), num_classes)
    np.testing.assert_allclose(ours, rows["oracle (not a peer)"], rtol=1e-5)
    np.testing.assert_allclose(ours, rows["thuml/LogME"], rtol=3e-4)
    with jax.enable_x64(True):
        ours = logme(jnp.asarray(x.astype(np.float64)), jnp.asarray(y), num_classes)
    np.testing.assert_allclose(ours, rows["oracle (not a peer)"], rtol=1e-6)
