"""Measures of a representation against scikit-learn, numpy and torch, and on hard inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jax_transfer.analysis import (
    alignment,
    effective_rank,
    knn_accuracy,
    rankme,
    representation,
    singular_values,
    uniformity,
)
from jax_transfer.records import InputError

NUM_CLASSES = 3


def features(n=61, d=5, seed=0):
    """Returns features [n, d] that overlap between classes, with a norm from 0.1 to 100, and labels [n]."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, NUM_CLASSES, n)
    x = 2 * np.eye(d)[y] + generator.normal(size=(n, d))
    return (x * 10 ** generator.uniform(-1, 2, (n, 1))).astype(np.float32), y


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def vote(x, y, k):
    """Returns the leave-one-out accuracy; the larger sum of similarities wins among classes with equal votes."""
    similarities, right = unit(x) @ unit(x).T, []
    for i, similarity in enumerate(similarities):
        nearest = [j for j in np.argsort(-similarity) if j != i][:k]
        keys = [((y[nearest] == c).sum(), similarity[nearest][y[nearest] == c].sum()) for c in range(NUM_CLASSES)]
        right.append(max(range(NUM_CLASSES), key=keys.__getitem__) == y[i])
    return np.mean(right)


@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("k", [1, 4, 20, 100])
def test_knn_accuracy_equals_vote_sample_by_sample(k, rows, monkeypatch):
    monkeypatch.setattr(representation, "ROWS_AT_A_TIME", rows)
    representation._knn_accuracy.clear_cache()
    x, y = features()
    assert float(knn_accuracy(x, y, NUM_CLASSES, k)) == pytest.approx(expected := vote(x, y, k))
    assert expected > 0.4 or k == 100  # if all others vote, one's own class lacks a vote


@pytest.mark.parametrize("k", [1, 5])
def test_knn_accuracy_equals_scikit_learn(k):
    """scikit-learn breaks ties otherwise, but an odd number of neighbours of two classes has none."""
    x, y = features()
    y = np.minimum(y, 1)
    right = [
        KNeighborsClassifier(k, metric="cosine").fit(np.delete(x, i, 0), np.delete(y, i)).predict(x[i : i + 1])[0]
        == y[i]
        for i in range(len(x))
    ]
    assert float(knn_accuracy(x, y, 2, k)) == pytest.approx(np.mean(right))


def test_rankme_equals_numpy_and_effective_rank():
    x, _ = features(40, 8)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert float(rankme(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert float(rankme(x)) == pytest.approx(float(effective_rank(singular_values(x))), rel=1e-4)
    assert float(rankme(x.T)) == pytest.approx(float(rankme(x)), rel=1e-4)


def test_alignment_and_uniformity_equal_numpy():
    (x, _), (y, _) = features(seed=1), features(seed=2)
    u, v = unit(x), unit(y)
    assert float(alignment(x, y)) == pytest.approx((np.linalg.norm(u - v, axis=1) ** 2).mean(), rel=1e-5)
    distances = ((u[:, None] - u) ** 2).sum(-1)[~np.eye(len(u), dtype=bool)]
    for t in (0.5, 2.0):
        assert float(uniformity(x, t)) == pytest.approx(np.log(np.exp(-t * distances).mean()), rel=1e-5)


def test_alignment_and_uniformity_equal_torch():
    """The published code of the paper: `torch.pdist` of normalised features."""
    torch = pytest.importorskip("torch")
    (x, _), (y, _) = features(seed=1), features(seed=2)
    u, v = (torch.nn.functional.normalize(torch.tensor(z), dim=1) for z in (x, y))
    assert float(alignment(x, y)) == pytest.approx(float((u - v).norm(dim=1).square().mean()), rel=1e-5)
    assert float(uniformity(x)) == pytest.approx(float(torch.pdist(u).square().mul(-2).exp().mean().log()), rel=1e-5)


MEASURES = {
    "knn_accuracy": lambda x, y: knn_accuracy(x, y, NUM_CLASSES),
    "rankme": lambda x, y: rankme(x),
    "alignment": lambda x, y: alignment(x, jnp.roll(x, 1, 1)),
    "uniformity": lambda x, y: uniformity(x),
}


@pytest.mark.parametrize("name", MEASURES)
def test_invariances(name):
    """Rotating, scaling and permuting change nothing, nor do the names of classes, jit and vmap."""
    measure, (x, y) = MEASURES[name], features()
    expected = float(measure(x, y))
    order = np.random.default_rng(3).permutation(len(x))
    assert float(measure(x[order], y[order])) == pytest.approx(expected, rel=1e-5)
    assert float(measure(1e-30 * x, y)) == pytest.approx(expected, rel=1e-4)
    assert float(measure(x, (y + 1) % NUM_CLASSES)) == pytest.approx(expected)
    if name != "alignment":  # MEASURES rolls the features of its second view
        rotation = np.linalg.qr(np.random.default_rng(4).normal(size=(5, 5)))[0].astype(np.float32)
        assert float(measure(x @ rotation, y)) == pytest.approx(expected, rel=1e-4)
    values = jax.jit(jax.vmap(measure))(jnp.stack([x, x[::-1]]), jnp.stack([y, y[::-1]]))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


HARD = {
    "constant": np.ones((30, 4)),
    "zero": np.zeros((30, 4)),
    "zero rows": np.concatenate([np.zeros((5, 4)), np.eye(4)]),
    "huge": 3e38 * (features()[0] / np.abs(features()[0]).max()),
    "tiny": 1e-38 * np.eye(4),
    "two": np.eye(2),
    "wide": np.eye(3, 50),
}
BOUNDS = {"knn_accuracy": (0, 1), "rankme": (1, 50), "alignment": (0, 4), "uniformity": (-8, 0)}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("case", HARD)
def test_hard_features_give_numbers_in_range(case, name):
    x = HARD[case].astype(np.float32)
    value, (low, high) = float(MEASURES[name](x, np.zeros(len(x), int))), BOUNDS[name]
    assert low - 1e-5 <= value <= high + 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", MEASURES)
def test_features_that_are_not_finite_give_nan(name, bad):
    x, y = features()
    x[3, 1] = bad
    assert np.isnan(float(MEASURES[name](x, y)))


def test_collapsed_features_have_rank_one_and_no_spread():
    x = 5 * np.ones((40, 6), np.float32)
    assert float(rankme(x)) == pytest.approx(1, abs=1e-4)
    assert float(uniformity(x)) == pytest.approx(0, abs=1e-5) and float(alignment(x, x)) == 0


def test_few_samples_one_class_and_absent_classes():
    x, y = features(10)
    assert float(knn_accuracy(x, np.zeros(10, int), 2)) == 1
    assert float(knn_accuracy(x, y, 1000, k=3)) == float(knn_accuracy(x, y, NUM_CLASSES, k=3))
    assert float(knn_accuracy(x, y, NUM_CLASSES, k=9)) == float(knn_accuracy(x, y, NUM_CLASSES, k=10**6))


def test_errors_say_what_was_expected():
    x, y = features()
    with pytest.raises(InputError, match="one sample: expected at least two"):
        knn_accuracy(x[:1], y[:1], NUM_CLASSES)
    with pytest.raises(InputError, match="one sample: expected at least two"):
        uniformity(x[:1])
    with pytest.raises(InputError, match="differ: expected features of two views"):
        alignment(x, x[:-1])
    with pytest.raises(InputError, match="k is 0"):
        knn_accuracy(x, y, NUM_CLASSES, k=0)
    with pytest.raises(InputError, match="t is 0"):
        uniformity(x, t=0)


def test_similarities_are_computed_in_blocks():
    """Ten thousand samples need a tenth of the memory of all pairs."""
    x, y = jax.ShapeDtypeStruct((10_000, 64), np.float32), jax.ShapeDtypeStruct((10_000,), np.int32)
    pairs = 4 * 10_000**2
    for compiled in (
        representation._knn_accuracy.lower(x, y, 10, 20).compile(),
        representation._uniformity.lower(x, 2.0).compile(),
    ):
        assert compiled.memory_analysis().temp_size_in_bytes < pairs / 10
