"""The contract of every score in SCORES; LEEP, NCE, H-score and TransRate against reference values and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.covariance

from helpers.features import C, as_features, gaussians, hard_inputs, reference_rows
from jax_transfer.analysis import SCORES, h_score, h_score_shrunk, leep, nce, transrate
from jax_transfer.records import Features

# Tested in test_linear.py, or different from another score only in a setting.
ELSEWHERE = ("mi_alpha_0.01", "mi_alpha_0.5", "mi_pca_alpha_0.01", "linear_1", "linear_5", "linear_converged")
LEARNED = ("mi_pca_alpha_0.5",)
# One ignores the labels; the other is a part of NCTI, which alone prefers posteriors that tell nothing.
NOT_BY_CLASS = ("effective_rank", "ncti_variability")
JITTED = {name: jax.jit(score, static_argnums=1) for name, score in SCORES.items() if name not in ELSEWHERE}


def plain(name, **options):
    """Returns `gaussians` in 24 dimensions; in 8 for N-LEEP, which compiles a branch per number of dimensions."""
    return gaussians(d=8 if name == "nleep" else 24, **options)


HARD = hard_inputs()
each_score = pytest.mark.parametrize("name", JITTED)
hard_inputs_by_name = pytest.mark.parametrize("case", list(HARD))


@each_score
def test_jit_equals_eager(name):
    features = as_features(*plain(name))
    np.testing.assert_allclose(JITTED[name](features, C), SCORES[name](features, C), rtol=1e-5)


@each_score
def test_vmap_equals_loop(name):
    cases = [gaussians(separation=s, seed=i) for i, s in enumerate((0.3, 1.0, 2.0))] + [HARD["duplicate columns"]]
    each = [as_features(*case) for case in cases]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    together = jax.jit(jax.vmap(lambda features: SCORES[name](features, C)))(stacked)
    np.testing.assert_allclose(together, [JITTED[name](features, C) for features in each], rtol=1e-5)


@each_score
def test_invariant_to_sample_order(name):
    x, y = plain(name)
    order = np.random.default_rng(3).permutation(len(y))
    shuffled = JITTED[name](as_features(x[order], y[order]), C)
    np.testing.assert_allclose(shuffled, JITTED[name](as_features(x, y), C), rtol=1e-4)


@each_score
def test_invariant_to_sample_order_with_given_held_out_samples(name):
    x, y = plain(name)
    order, held_out = np.random.default_rng(3).permutation(len(y)), np.arange(0, len(y), 5)
    moved = np.random.default_rng(4).permutation(np.argsort(order)[held_out])
    shuffled = JITTED[name](as_features(x[order], y[order]), C, moved)
    np.testing.assert_allclose(shuffled, JITTED[name](as_features(x, y), C, held_out), rtol=1e-4)
    if name not in LEARNED:
        np.testing.assert_allclose(shuffled, JITTED[name](as_features(x, y), C), rtol=1e-4)


@each_score
def test_invariant_to_class_names(name):
    x, y = plain(name)
    renamed = np.array([6, 2, 0, 7, 3])[y]  # three of the eight classes are missing
    np.testing.assert_allclose(JITTED[name](as_features(x, renamed), 8), JITTED[name](as_features(x, y), C), rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in JITTED if name not in ("h_score", "h_score_shrunk", "transrate", *LEARNED)]
)
@hard_inputs_by_name
def test_finite_on_hard_inputs(name, case):  # the other scores equal finite values on these inputs, see below
    score = SCORES[name] if name == "nleep" else JITTED[name]  # eager N-LEEP compiles only one branch
    assert np.isfinite(score(as_features(*HARD[case]), C))


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("case", ("constant", "d > n, offset by 100", "huge", "one class", "one sample in a class"))
def test_learned_scores_are_finite_on_hard_inputs(name, case):
    assert np.isfinite(JITTED[name](as_features(*HARD[case]), C))


@pytest.mark.parametrize("name", [name for name in JITTED if name not in NOT_BY_CLASS])
def test_separable_beats_overlapping_beats_shuffled(name):
    x, y = plain(name, separation=3.0)
    separable = JITTED[name](as_features(x, y), C)
    overlapping = JITTED[name](as_features(plain(name, separation=0.5)[0], y), C)
    shuffled = JITTED[name](as_features(x, np.random.default_rng(4).permutation(y)), C)
    assert separable > overlapping > shuffled


@each_score
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_non_finite_features_give_nan(name, bad):
    x, y = plain(name)
    features = as_features(x, y)
    features = Features(features.features.at[3, 4].set(bad), features.logits.at[3, 4].set(bad), features.labels)
    assert np.isnan(JITTED[name](features, C))


def centred(x):
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=0)
    x = x - x.mean(axis=0)
    return np.where(np.abs(x).max(axis=0) == 0, 0.0, x)


def class_means(x, y):
    means = np.zeros_like(x)
    for c in np.unique(y):
        means[y == c] = x[y == c].mean(axis=0)
    return means


def numpy_h_score(x, y):
    """Returns tr(pinv(cov f) cov g); unit variances do not change it and keep the cut-off of pinv harmless."""
    x = centred(x)
    x = x[:, np.abs(x).max(axis=0) > 0]
    if x.shape[1] == 0:
        return 0.0
    x = x / np.sqrt((x**2).mean(axis=0))
    covariance, between = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(class_means(x, y).T))
    return np.trace(np.linalg.pinv(covariance, rcond=1e-12, hermitian=True) @ between)


def numpy_h_score_shrunk(x, y):
    x = centred(x)
    if not np.any(x):
        return 0.0
    x = x / np.abs(x).max()
    fit = sklearn.covariance.LedoitWolf().fit(x)
    between = np.atleast_2d(np.cov(class_means(x, y).T))
    return (1 - fit.shrinkage_) * np.trace(np.linalg.solve(fit.covariance_, between))


def numpy_transrate(x, y, eps=1e-4):
    def rate(z):
        return 0.5 * np.log1p(np.linalg.svd(z, compute_uv=False) ** 2 / (len(z) * eps)).sum()

    z = centred(x)
    return rate(z) - sum(np.mean(y == c) * rate(z[y == c]) for c in np.unique(y))


def numpy_leep(p, y):
    p = np.asarray(p, np.float64)
    conditional = {c: p[y == c].sum(axis=0) / np.maximum(p.sum(axis=0), 1e-300) for c in np.unique(y)}
    return np.mean([np.log(conditional[c] @ row) for c, row in zip(y, p, strict=True)])


def numpy_nce(z, y):
    return np.mean([np.log(np.mean(y[z == a] == c)) for a, c in zip(z, y, strict=True)])


OF_FEATURES = {
    "h_score": (h_score, numpy_h_score),
    "h_score_shrunk": (h_score_shrunk, numpy_h_score_shrunk),
    "transrate": (transrate, numpy_transrate),
}
each_of_features = pytest.mark.parametrize("name", OF_FEATURES)


@each_of_features
@hard_inputs_by_name
def test_float32_equals_float64_numpy(name, case):
    (ours, expected), (x, y) = OF_FEATURES[name], HARD[case]
    # atol, since TransRate is a difference of rates of up to 1,000, and 0 for one class
    np.testing.assert_allclose(ours(jnp.asarray(x, jnp.float32), y, C), expected(x, y), rtol=1e-4, atol=1e-5)


@each_of_features
@hard_inputs_by_name
def test_float64_equals_float64_numpy(name, case):
    (ours, expected), (x, y) = OF_FEATURES[name], HARD[case]
    with jax.enable_x64(True):
        value = ours(jnp.asarray(x, jnp.float64), y, C)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, expected(x, y), rtol=1e-8, atol=1e-10)


def probabilities(confidence, n=400, s=12, seed=0):
    """Returns source probabilities [n, s], zero for the last class, and labels that depend on them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n).astype(np.int32)
    logits = confidence * rng.normal(size=(C, s))[y] + rng.normal(size=(n, s))
    logits[:, -1] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True), y


@pytest.mark.parametrize("confidence", (0.1, 1.0, 4.0, 100.0))
@pytest.mark.parametrize("labels", ("all classes", "empty class", "one sample in a class"))
def test_leep_and_nce_equal_float64_numpy(confidence, labels):
    p, y = probabilities(confidence)
    if labels != "all classes":
        y = np.where(y == 2, 1, y)
    if labels == "one sample in a class":
        y[7] = 2
    z, sources = p.argmax(axis=1), p.shape[1]
    np.testing.assert_allclose(leep(jnp.asarray(p, jnp.float32), y, C), numpy_leep(p, y), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(nce(z, y, sources, C), numpy_nce(z, y), rtol=1e-4, atol=1e-12)
    with jax.enable_x64(True):
        np.testing.assert_allclose(leep(jnp.asarray(p), y, C), numpy_leep(p, y), rtol=1e-8, atol=1e-14)
        np.testing.assert_allclose(nce(z, y, sources, C), numpy_nce(z, y), rtol=1e-8, atol=1e-14)
        assert leep(jnp.asarray(p), y, C).dtype == nce(z, y, sources, C).dtype == np.float64


def test_nce_is_precise_for_almost_determined_labels():
    y = np.arange(50_000) % C
    z = y.copy()
    z[0] = 1  # one of 10,001 differs: log(10,000 / 10,001) has four digits in float32
    expected = (10_000 * np.log(10_000 / 10_001) + np.log(1 / 10_001)) / 50_000
    np.testing.assert_allclose(nce(z, y, C, C), expected, rtol=1e-6)


def test_leep_of_one_hot_predictions_equals_nce():
    p, y = probabilities(1.0)
    z, sources = p.argmax(axis=1), p.shape[1]
    np.testing.assert_allclose(leep(jax.nn.one_hot(z, sources), y, C), nce(z, y, sources, C), rtol=1e-6)


def test_h_score_is_invariant_to_linear_maps_and_shifts():
    x, y = gaussians()
    mapped = x @ np.random.default_rng(6).normal(size=(24, 24)) + 10
    values = [h_score(jnp.asarray(v, jnp.float32), y, C) for v in (x, mapped)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


def test_h_score_ignores_rounding_noise():
    x, y = gaussians()
    bias = 100 + 1e-5 * np.random.default_rng(7).normal(size=(len(y), 24))  # two or three float32 values around 100
    both = np.concatenate([x, bias], axis=1)
    np.testing.assert_allclose(h_score(jnp.asarray(both, jnp.float32), y, C), numpy_h_score(x, y), rtol=1e-4)


@pytest.mark.parametrize("eps", (1e-6, 1e-4, 1.0))
def test_transrate_equals_numpy_for_any_eps(eps):
    x, y = gaussians()
    ours = transrate(jnp.asarray(x, jnp.float32), y, C, eps=eps)
    np.testing.assert_allclose(ours, numpy_transrate(x, y, eps), rtol=1e-4)


# score -> its row of values.json: peer, start of the function's name, part of the settings.
ROWS = {
    "leep": ("thuml/LogME", "LEEP", "float64"),
    "nce": ("tllib", "negative_conditional_entropy", ""),
    "h_score": ("tllib", "h_score", "float64"),
    "h_score_shrunk": ("tllib", "regularized_h_score", ""),
    "transrate": ("oracle (not a peer)", "transrate with class weights", ""),
}


@pytest.mark.parametrize("epoch", (2, 3, 5))
@pytest.mark.parametrize(("target", "num_classes"), (("mnist", 10), ("caltech101", 101)))
@pytest.mark.parametrize("name", ROWS)
def test_equals_reference_values(reference_dir, name, target, num_classes, epoch):
    file, (peer, function, settings) = f"feat_ep{epoch}_{target}.npz", ROWS[name]
    rows = [row for row in reference_rows(reference_dir) if row["data"] == file and row["peer"] == peer]
    (expected,) = (r["value"] for r in rows if r["function"].startswith(function) and settings in r["settings"])
    saved = np.load(reference_dir / "features" / file)
    y = saved["labels"]

    def value(dtype):
        x, p = jnp.asarray(saved["features"], dtype), jnp.asarray(saved["probs"], dtype)
        if name == "leep":
            return leep(p, y, num_classes)
        if name == "nce":
            return nce(jnp.argmax(p, axis=1), y, p.shape[1], num_classes)
        return OF_FEATURES[name][0](x, y, num_classes)

    np.testing.assert_allclose(value(jnp.float32), expected, rtol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(value(jnp.float64), expected, rtol=1e-8)
