"""LogME against reference values and the plain fixed-point iteration in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from helpers import features
from helpers.features import C, as_features, reference_rows
from jax_transfer.analysis import SCORES, logme

JITTED = jax.jit(SCORES["logme"], static_argnums=1)


gaussians = functools.partial(features.gaussians, dtype=np.float32)


def hard_inputs():
    """Returns name -> (x, y), with the scales at which the evidence of LogME has several maxima."""
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
    """Returns the log evidence of Bayesian linear regression: of the marginal y ~ N(0, I / b + x x' / a), float64."""
    n = len(target)
    values, vectors = np.linalg.eigh(x @ x.T)
    variance = np.exp(-log_b) + np.maximum(values, 0) * np.exp(-log_a)
    return -0.5 * (n * np.log(2 * np.pi) + np.log(variance).sum() + ((vectors.T @ target) ** 2 / variance).sum())


def fixed_point_logme(x, y, num_classes, max_steps=100_000):
    """Runs the paper's iteration from a = b = 1 and returns the mean of evidence / n over the classes, in float64.

    a <- gamma / m'm, b <- (n - gamma) / |y - x m|^2, until log(a / b) changes by less than 1e-12 (relative), or until
    a / b is so large or small that the evidence equals its limit (a / b -> 0 if n directions interpolate the labels).
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
        if z @ z < 1e-25 * (target @ target):  # no feature helps: m'm = 0, and a is infinite after one step
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
            at_limit = log_t > np.log(s2[0]) + 30 if change > 0 else log_t < np.log(s2[-1]) - 30
            if at_limit or abs(change) <= 1e-12 * max(1, abs(log_t)):
                break
        else:
            raise AssertionError(f"no convergence after {max_steps} steps; the last one changed log t by {change}")
        # d/2 log a - 1/2 log|A|; a cancels in the directions in which no feature varies
        half_logs = 0.5 * n * np.log(b) - 0.5 * np.log1p(s2 * b / a).sum()
        values.append((half_logs - 0.5 * (b * residual + a * mm + n * np.log(2 * np.pi))) / n)
    return np.mean(values)


def assert_close(ours, expected, tolerance):
    """Compares relative to at least 0.1, since the score is a difference of terms near 1.4 = (1 + log 2 pi) / 2."""
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
    together = jax.jit(jax.vmap(lambda one: SCORES["logme"](one, C)))(stacked)
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
    original, scaled = (fixed_point_logme(np.asarray(v, np.float32), y, C) for v in (x, unit * x))
    assert abs(scaled - original) > 1e-3
    assert_close(score(unit * x, y), scaled, 1e-4)


def test_useless_features_score_as_pure_noise():
    y = np.arange(300) % 2
    column = np.where(np.arange(300) % 4 < 2, 1, -1)  # orthogonal to both classes
    expected = -0.5 * (np.log(0.5) + 1 + np.log(2 * np.pi))  # each class has power 1/2
    np.testing.assert_allclose(score(np.tile(column[:, None], (1, 24)), y), expected, rtol=1e-6)


def test_exact_fit_is_finite_and_large():
    y = np.arange(300) % C
    assert 5 < float(score(np.eye(24)[y], y)) < 100


@pytest.mark.parametrize("epoch", (2, 3, 5))
@pytest.mark.parametrize(("target", "num_classes"), (("mnist", 10), ("caltech101", 101)))
def test_equals_reference_values(reference_dir, target, num_classes, epoch):
    file = f"feat_ep{epoch}_{target}.npz"
    rows = {
        r["peer"]: r["value"]
        for r in reference_rows(reference_dir)
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
