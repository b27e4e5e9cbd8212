"""NCTI against numpy in float64 and against scikit-learn's discriminant analysis, and its three parts together."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from helpers.features import C, gaussians, hard_inputs
from jax_transfer.analysis import ncti, ncti_geometry, ncti_nearest, ncti_variability
from jax_transfer.analysis.classwise import by_class
from jax_transfer.records import InputError

PARTS = (ncti_variability, ncti_geometry, ncti_nearest)


def ours(x, y, num_classes=C):
    return [float(part(jnp.asarray(x, jnp.float32), y, num_classes)) for part in PARTS]


def components_and_shrinkage(x):
    pca = PCA(min(64, *x.shape), svd_solver="full")
    z = pca.fit_transform(np.asarray(x, np.float64))
    shrinkage = np.exp(-pca.explained_variance_[:32].sum())
    return z, shrinkage if shrinkage > 1e-10 else 0


def nuclear(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum()


def numpy_ncti(x, y):
    """Returns the three parts from the inverse of the within-class covariance and an orthonormal basis of the means."""
    z, a = components_and_shrinkage(x)
    classes = np.unique(y)
    means = np.stack([z[y == c].mean(0) for c in classes])
    residual = z - means[np.searchsorted(classes, y)]
    within = residual.T @ residual / len(z)
    within = (1 - a) * within + a * np.trace(within) / len(within) * np.eye(len(within))
    root = np.linalg.cholesky(np.linalg.inv(within))  # root' z has the covariance 1 within the classes
    distances = ((z[:, None] @ root - means @ root) ** 2).sum(-1)
    log_p = np.log([np.sum(y == c) for c in classes]) - distances / 2
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    spanned = np.linalg.qr(root.T @ (means[1:] - means[0]).T)[0]
    variability = -np.log(sum(nuclear(p[y == c]) for c in classes))
    return variability, nuclear(z @ root @ spanned), p[np.arange(len(y)), np.searchsorted(classes, y)].mean()


def case(n=300, d=24, num_classes=C, separation=1.0, scale=1.0):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(n) % num_classes)
    x = separation * rng.normal(size=(num_classes, d))[y] + rng.normal(size=(n, d)) * np.linspace(0.3, 1.5, d)
    return (scale * x).astype(np.float32), y


CASES = {
    "24 features": case(),
    "weak": case(separation=0.1),
    "shrunk a little": case(scale=0.5),
    "shrunk by a half": case(scale=0.1),
    "shrunk almost completely": case(scale=0.001),
    "more features than components": case(d=100),
    "more components than variances, shrunk": case(d=60, scale=0.1),
    "more classes than features": case(d=10, num_classes=20),
    "offset by 100": (case()[0] + 100, case()[1]),
    "empty class": (case()[0], np.where(case()[1] == 2, 3, case()[1])),
    "classes of 1 to 250 samples": hard_inputs()["classes of 1 to 250 samples"],
}


@pytest.mark.parametrize("name", CASES)
def test_parts_equal_float64_numpy(name):
    x, y = CASES[name]
    np.testing.assert_allclose(ours(x, y, max(C, y.max() + 1)), numpy_ncti(x, y), rtol=1e-4)


@pytest.mark.parametrize("name", ["24 features", "weak", "shrunk by a half", "empty class"])
def test_parts_equal_scikit_learn(name):
    """The release of the paper: LDA of the principal components; with shrinkage, its directions are not ours."""
    x, y = CASES[name]
    z, a = components_and_shrinkage(x)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=a or None).fit(z, y)
    p, classes = lda.predict_proba(z), np.unique(y)
    variability, geometry, nearest = ours(x, y)
    np.testing.assert_allclose(variability, -np.log(sum(nuclear(p[y == c]) for c in classes)), rtol=1e-4)
    np.testing.assert_allclose(nearest, p[np.arange(len(y)), np.searchsorted(classes, y)].mean(), rtol=1e-4)
    discriminant = lda.transform(z)
    expected = nuclear(discriminant - discriminant.mean(0))
    np.testing.assert_allclose(geometry, expected, rtol=0.02 if a else 1e-4)


def test_rounding_errors_are_no_features():
    """Whitening would make them as large as the features."""
    x, y = case()
    constant = 100 + 1e-5 * np.random.default_rng(1).normal(size=(len(y), 30))
    np.testing.assert_allclose(ours(np.concatenate([x, constant], 1), y), ours(x, y), rtol=1e-3)
    rank6 = x[:, :6] @ np.random.default_rng(2).normal(size=(6, 24))  # with float32 rounding, of rank 24
    np.testing.assert_allclose(ours(rank6 + 1000, y), numpy_ncti(rank6[:, :6], y), rtol=1e-3)


def test_collapsed_features_are_the_best():
    x, y = case(separation=3.0)
    means = np.stack([x[y == c].mean(0) for c in range(C)])
    variability, geometry, nearest = ours(means[y], y)
    assert nearest == pytest.approx(1) and geometry > ours(x, y)[1]
    assert variability == pytest.approx(-np.log(sum(np.sqrt(np.bincount(y)))), rel=1e-5)


def test_classes_in_which_nothing_varies_are_told_apart():
    _, geometry, nearest = ours([[1.0], [1.0], [0.0], [0.0]], np.array([0, 0, 1, 1]), 2)
    assert nearest == 1 and geometry > 1000


def test_constant_features_have_the_posteriors_of_chance():
    x, y = case()
    variability, geometry, nearest = ours(np.ones_like(x), y)
    share = np.bincount(y) / len(y)
    assert geometry == 0 and nearest == pytest.approx((share**2).sum())
    assert variability == pytest.approx(-np.log(np.linalg.norm(share) * sum(np.sqrt(np.bincount(y)))), rel=1e-5)


def test_combination_prefers_informative_features():
    y = gaussians()[1]
    features = [gaussians(separation=s)[0] for s in (3.0, 1.0, 0.5)]
    features += [features[0][np.random.default_rng(4).permutation(len(y))], np.ones((len(y), 24))]
    parts = np.array([ours(x, y) for x in features])
    assert parts[-1, 0] == parts[:, 0].max()  # the first part alone prefers constant features
    assert np.argsort(-ncti(*parts.T))[:2].tolist() == [0, 1]


def test_combination_is_the_sum_of_the_scaled_parts():
    parts = np.random.default_rng(0).normal(size=(3, 7)) * [[1], [100], [0.01]]
    scaled = [(p - p.min()) / (p.max() - p.min()) for p in parts]
    # The release subtracts log sum_c |P_c|, scaled in the same way.
    negated = (-parts[0] - (-parts[0]).min()) / np.ptp(parts[0])
    np.testing.assert_allclose(ncti(*parts), scaled[1] + scaled[2] - negated)
    np.testing.assert_allclose(ncti(*(5 * parts + 3)), ncti(*parts))
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_allclose(ncti(*parts[:, order]), ncti(*parts)[order])
    assert ncti([1, 2], [3, 3], [0, 1]).tolist() == [-1, 1] and ncti([1], [2], [3]).tolist() == [0]
    assert ncti([], [], []).tolist() == []


@pytest.mark.parametrize("missing", [None, np.nan, -np.inf])
@pytest.mark.parametrize("part", range(3))
def test_one_missing_part_leaves_no_combination(part, missing):
    parts = [[1.0, 2.0, 3.0] for _ in PARTS]
    parts[part][1] = missing
    assert np.isnan(ncti(*parts)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2, 3], [1, 2]), r"variability \[2\] and geometry \[3\] do not match"),
        (([1, 2], [1, 2], [[1, 2]]), r"variability \[2\] and nearest \[1, 2\] do not match"),
        (([1, 2], [1, 2], ["a", "b"]), r"nearest is \['a', 'b'\]: expected a list of real numbers"),
    ],
)
def test_combination_names_the_invalid_argument(arguments, message):
    with pytest.raises(InputError, match=message):
        ncti(*arguments)


@pytest.mark.parametrize("n", [5, 32, 33, 200])
def test_by_class_equals_a_loop_over_classes(n):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)).astype(np.float32), np.minimum(rng.geometric(0.5, n), 6)
    found, counts = by_class(
        lambda rows, count: jnp.sum(rows**2) + count, jnp.asarray(x), jnp.asarray(y), jnp.arange(8)
    )
    assert counts.tolist() == [np.sum(y == c) for c in range(8)]
    np.testing.assert_allclose(found, [np.sum(x[y == c] ** 2) + np.sum(y == c) for c in range(8)], rtol=1e-5)
