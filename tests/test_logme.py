"""Contract of every score in SCORES, and LogME against reference values and a float64 maximiser of the evidence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jax_transfer.analysis import SCORES, logme
from jax_transfer.records import Features

C = 5
JITTED = {name: jax.jit(score, static_argnums=1) for name, score in SCORES.items()}
LOGME = jax.jit(logme, static_argnums=2)


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
each_score = pytest.mark.parametrize("name", SCORES)


@each_score
def test_jit_equals_eager(name):
    features = as_features(*gaussians())
    np.testing.assert_allclose(JITTED[name](features, C), SCORES[name](features, C), rtol=1e-5)


@each_score
def test_vmap_equals_loop(name):
    each = [as_features(*gaussians(separation=s, seed=i)) for i, s in enumerate((0.3, 1.0, 2.0))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    together = jax.jit(jax.vmap(lambda features: SCORES[name](features, C)))(stacked)
    np.testing.assert_allclose(together, [JITTED[name](features, C) for features in each], rtol=1e-5)


@each_score
def test_invariant_to_sample_order(name):
    x, y = gaussians()
    order = np.random.default_rng(3).permutation(len(y))
    shuffled = JITTED[name](as_features(x[order], y[order]), C)
    np.testing.assert_allclose(shuffled, JITTED[name](as_features(x, y), C), rtol=1e-4)


@each_score
def test_invariant_to_class_names(name):
    x, y = gaussians()
    renamed = np.array([6, 2, 0, 7, 3])[y]  # and three classes that do not occur
    np.testing.assert_allclose(JITTED[name](as_features(x, renamed), 8), JITTED[name](as_features(x, y), C), rtol=1e-4)


@each_score
@hard_inputs_by_name
def test_finite_on_hard_inputs(name, case):
    assert np.isfinite(JITTED[name](as_features(*HARD[case]), C))


@each_score
def test_separable_beats_overlapping_beats_shuffled(name):
    x, y = gaussians(separation=3.0)
    separable = JITTED[name](as_features(x, y), C)
    overlapping = JITTED[name](as_features(gaussians(separation=0.5)[0], y), C)
    shuffled = JITTED[name](as_features(x, np.random.default_rng(4).permutation(y)), C)
    assert separable > overlapping > shuffled


def evidence(log_a, log_b, x, target):
    """The log evidence of Bayesian linear regression, from the marginal y ~ N(0, I / b + x x' / a), float64."""
    n = len(target)
    values, vectors = np.linalg.eigh(x @ x.T)
    variance = np.exp(-log_b) + np.maximum(values, 0) * np.exp(-log_a)
    return -0.5 * (n * np.log(2 * np.pi) + np.log(variance).sum() + ((vectors.T @ target) ** 2 / variance).sum())


def direct_logme(x, y, num_classes):
    """Mean over occurring classes of max over (a, b) of the evidence / n, by scipy from many starts, in float64.

    The eigenvectors come from an SVD of x, whose squares span the marginal's covariance; b is found in closed form, so
    that the search over a / b is one-dimensional: every start brackets one cell of a fine grid.
    """
    x = np.asarray(x, np.float64)
    n = len(y)
    u, s, _ = np.linalg.svd(x, full_matrices=True)
    rank = int((s > s[0] * max(x.shape) * 2e-16).sum())
    power = np.zeros(n)
    power[:rank] = s[:rank] ** 2

    def loss(log_t, z2):
        ratio = 1 + power / np.exp(log_t)  # variances in units of 1 / b
        noise = np.mean(z2 / ratio)  # the best 1 / b
        return 0.5 * (np.log(ratio).mean() + np.log(noise) + 1 + np.log(2 * np.pi))

    best = []
    for c in np.unique(y):
        z2 = (u.T @ (y == c)) ** 2
        if rank == 0:
            best.append(-loss(0.0, z2))
            continue
        grid = np.arange(2 * np.log(s[rank - 1]) - 20, 2 * np.log(s[0]) + 30, 0.1)
        losses = np.array([loss(log_t, z2) for log_t in grid])
        inner = [i for i in range(1, len(grid) - 1) if losses[i] <= min(losses[i - 1], losses[i + 1])]
        found = [
            scipy.optimize.minimize_scalar(loss, args=(z2,), bounds=(grid[i - 1], grid[i + 1]), method="bounded").fun
            for i in inner
        ]
        best.append(-min([*found, losses.min()]))
    return np.mean(best)


def test_direct_maximiser_agrees_with_the_evidence_in_two_variables():
    x, y = gaussians(n=80, d=10)
    x = x.astype(np.float64)
    found = []
    for c in range(C):
        target = (y == c).astype(np.float64)
        result = scipy.optimize.minimize(
            lambda p, target=target: -evidence(*p, x, target), (0.0, 0.0), method="Nelder-Mead", tol=1e-12
        )
        found.append(-result.fun / len(y))
    np.testing.assert_allclose(direct_logme(x, y, C), np.mean(found), rtol=1e-8)


@hard_inputs_by_name
def test_float32_equals_direct_maximiser(case):
    x, y = HARD[case]
    x = np.asarray(x, np.float32)
    np.testing.assert_allclose(JITTED["logme"](as_features(x, y), C), direct_logme(x, y, C), rtol=2e-5)


@hard_inputs_by_name
def test_float64_equals_direct_maximiser(case):
    x, y = HARD[case]
    x = np.asarray(x, np.float64)
    with jax.enable_x64(True):
        ours = LOGME(x, y, C)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, direct_logme(x, y, C), rtol=1e-7)


def test_graded_and_plain_inputs_share_one_batch():
    cases = [HARD["plain"], HARD["scales 1e-6 to 1e6"]]  # only the second needs the accurate decomposition
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[as_features(*case) for case in cases])
    together = jax.jit(jax.vmap(lambda features: SCORES["logme"](features, C)))(stacked)
    expected = [direct_logme(np.asarray(x, np.float32), y, C) for x, y in cases]
    np.testing.assert_allclose(together, expected, rtol=2e-5)


def score(x, y):
    return JITTED["logme"](as_features(x, y), C)


def test_invariant_to_the_unit_of_features():
    x, y = gaussians()
    np.testing.assert_allclose(score(100 * x, y), score(x, y), rtol=1e-5)


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
    ours = LOGME(jnp.asarray(x), jnp.asarray(y), num_classes)
    np.testing.assert_allclose(ours, rows["oracle (not a peer)"], rtol=1e-5)
    np.testing.assert_allclose(ours, rows["thuml/LogME"], rtol=3e-4)
    with jax.enable_x64(True):
        ours = LOGME(jnp.asarray(x.astype(np.float64)), jnp.asarray(y), num_classes)
    np.testing.assert_allclose(ours, rows["oracle (not a peer)"], rtol=1e-6)
