"""K-means against scikit-learn, its invariances and hard inputs, and means of groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jax_transfer.records import InputError
from jax_transfer.selection import clusters, group_means, kmeans


def blobs(n=600, d=8, num_blobs=12, spread=0.15, seed=0):
    """Returns x [n, d] of well separated blobs, and the blob of each row."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % num_blobs)
    return (rng.normal(size=(num_blobs, d))[y] + spread * rng.normal(size=(n, d))).astype(np.float32), y


def directions(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def same_partition(labels, others):
    pairs = np.unique(np.stack([labels, others]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_separated_blobs_are_found(metric):
    x, y = blobs()
    found = kmeans(x, 12, metric=metric)
    assert same_partition(np.asarray(found.labels), y)
    assert found.converged and found.iterations < 10
    assert found.labels.dtype == jnp.int32 and found.centers.dtype == jnp.float32


def test_objective_is_that_of_scikit_learn_on_data_without_clusters():
    x = np.random.default_rng(0).normal(size=(2_000, 6)).astype(np.float32) + 100
    ours = [kmeans(x, 40, metric="l2", seed=seed, tolerance=0) for seed in range(4)]
    theirs = [KMeans(40, n_init=1, random_state=seed, tol=0).fit(x.astype(float)).inertia_ for seed in range(4)]
    assert all(each.converged for each in ours)
    assert np.mean([each.inertia for each in ours]) < 1.005 * np.mean(theirs)
    assert min(each.inertia for each in ours) > 0.97 * min(theirs)


def test_iterations_from_the_same_centres_equal_those_of_scikit_learn(monkeypatch):
    x = np.random.default_rng(0).normal(size=(500, 5)).astype(np.float32)
    monkeypatch.setattr(clusters, "_start", lambda points, k, key: points[:k])
    jax.clear_caches()
    ours = kmeans(x, 20, metric="l2", tolerance=0)
    jax.clear_caches()
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 20), 500)
    theirs = KMeans(20, init=x[order[:20]].astype(float), n_init=1, tol=0, max_iter=500).fit(x.astype(float))
    np.testing.assert_allclose(ours.inertia, theirs.inertia_, rtol=1e-5)
    np.testing.assert_allclose(ours.centers, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)


@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_result_is_consistent(metric):
    x = np.random.default_rng(0).normal(size=(1_001, 6)).astype(np.float32)
    found = kmeans(x, 30, metric=metric)
    points, centers = (directions(x), np.asarray(found.centers)) if metric == "cosine" else (x, found.centers)
    distances = np.sum((points[:, None] - np.asarray(centers)[None]) ** 2, axis=2)
    np.testing.assert_array_equal(found.labels, distances.argmin(axis=1))
    np.testing.assert_allclose(found.inertia, distances.min(axis=1).sum(), rtol=1e-5)
    means = np.stack([points[np.asarray(found.labels) == c].mean(axis=0) for c in range(30)])
    means = directions(means) if metric == "cosine" else means
    assert np.abs(means - centers).max() < 0.1  # the next centres, near those of the labels at convergence
    if metric == "cosine":
        np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-6)


def test_cosine_ignores_lengths_and_l2_ignores_offset_and_scale():
    x, _ = blobs(spread=0.3)
    lengths = np.float32(10) ** np.random.default_rng(1).integers(-20, 18, size=(len(x), 1))
    np.testing.assert_array_equal(kmeans(x, 12).labels, kmeans(x * lengths, 12).labels)
    expected = kmeans(x, 12, metric="l2")
    for scale, offset in ((1, 1_000), (1e-15, 0), (1e25, 0)):
        changed = kmeans(x * np.float32(scale) + np.float32(offset), 12, metric="l2")
        assert same_partition(np.asarray(changed.labels), np.asarray(expected.labels))
        np.testing.assert_allclose(
            (np.sort(changed.centers, axis=0) - offset) / scale, np.sort(expected.centers, axis=0), atol=1e-3
        )


def test_a_seed_gives_the_same_clusters_and_another_gives_others():
    x = np.random.default_rng(0).normal(size=(500, 6))
    first, again, other = (kmeans(x, 20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.centers, again.centers)
    assert np.any(first.labels != other.labels)


@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_tiles_do_not_change_the_result(monkeypatch, metric):
    x = blobs(n=601, spread=0.6)[0] + (100 if metric == "l2" else 0)  # padding is far from the rows
    expected = kmeans(x, 12, metric=metric)
    monkeypatch.setattr(clusters, "TILE", {"cpu": 12 * 100})  # seven tiles, of which the last has padding
    found = kmeans(x, 12, metric=metric)
    assert found.iterations == expected.iterations > 5
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.centers, expected.centers, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-6)


def test_sums_on_accelerators_equal_those_on_a_cpu():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(3, 50, 4)).astype(np.float32), rng.integers(8, size=(3, 50))
    labels[1, 3] = 7
    scattered, product = (clusters._group_sums(jnp.asarray(x), jnp.asarray(labels), 7, way) for way in (False, True))
    np.testing.assert_allclose(scattered, product, atol=1e-5)
    np.testing.assert_allclose(product, np.stack([x[labels == c].sum(axis=0) for c in range(7)]), atol=1e-5)


@pytest.mark.parametrize("metric", ("cosine", "l2"))
def test_no_cluster_is_empty(monkeypatch, metric):
    x, _ = blobs(n=200, spread=0.5)
    monkeypatch.setattr(clusters, "_start", lambda points, k, key: jnp.tile(points[:1], (k, 1)))  # all in one place
    jax.clear_caches()
    for max_iterations in (1, 100):
        found = kmeans(x, 40, metric=metric, max_iterations=max_iterations)
        assert np.bincount(found.labels, minlength=40).min() >= 1
    jax.clear_caches()


def test_duplicates_leave_no_cluster_empty():
    x = np.concatenate([np.ones((300, 3)), np.random.default_rng(0).normal(size=(20, 3))]).astype(np.float32)
    found = kmeans(x, 21, metric="l2")
    assert sorted(np.bincount(found.labels).tolist()) == [1] * 20 + [300]
    assert found.inertia < 1e-8 and found.converged


def test_as_many_clusters_as_rows_and_a_single_cluster():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for metric in ("cosine", "l2"):
        each = kmeans(x, 50, metric=metric)
        assert sorted(each.labels.tolist()) == list(range(50)) and each.inertia < 1e-6
    one = kmeans(x, 1, metric="l2")
    np.testing.assert_allclose(one.centers[0], x.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(one.inertia, ((x - x.mean(axis=0)) ** 2).sum(), rtol=1e-5)


def test_opposite_vectors_keep_a_direction():
    found = kmeans(np.array([[1.0, 0], [-1, 0], [1, 0], [-1, 0]]), 1)
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1)
    assert kmeans(np.array([[1.0], [-1.0], [3.0], [-3.0]]), 2).inertia == 0


def test_too_few_iterations_are_said_not_to_converge():
    x = np.random.default_rng(0).normal(size=(1_000, 8))
    few, enough = (kmeans(x, 30, max_iterations=n) for n in (2, 100))
    assert not few.converged and few.iterations == 2
    assert enough.converged and 2 < enough.iterations < 100
    assert enough.inertia < few.inertia


def test_jit_equals_eager():
    x, _ = blobs()
    jitted = jax.jit(lambda x: kmeans(x, 12))(x)
    np.testing.assert_array_equal(jitted.labels, kmeans(x, 12).labels)


def test_a_million_vectors_take_three_times_their_memory():
    n, d, k = 1_000_000, 128, 2_000
    x, key = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    for backend, metric in (("cpu", "l2"), ("gpu", "cosine")):
        settings = clusters._tiling(n, k, backend)
        lowered = clusters._kmeans.lower(x, key, 100, 1e-5, num_clusters=k, metric=metric, **settings)
        memory = lowered.compile().memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert total < 3 * n * d * 4 + 0.6e9


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    (
        ([[1.0, 2.0], [math.nan, 0.0]], {}, r"x\[1\] holds NaN \(1 of 2 rows do\)"),
        ([[1.0, 2.0], [0.0, 0.0]], {}, r"x\[1\] is a zero vector"),
        ([[1.0, 2.0], [3.0, 4.0]], {"num_clusters": 3}, "num_clusters = 3, but x has 2 rows"),
        ([[1.0, 2.0]] * 5 + [[3.0, 4.0]], {"num_clusters": 3, "metric": "l2"}, "x has only 2 different rows"),
        ([[1.0, 2.0], [2.0, 4.0], [3.0, 4.0]], {"num_clusters": 3}, "x has only 2 different directions"),
        ([[1.0, 2.0]], {"num_clusters": 0}, "num_clusters is 0"),
        ([[1.0, 2.0]], {"metric": "euclidean"}, "Unknown metric: 'euclidean'.*Valid: cosine, l2"),
        ([[1.0, 2.0]], {"tolerance": -1}, "tolerance is -1: expected a fraction"),
        ([[1.0, 2.0]], {"max_iterations": 0}, "max_iterations is 0"),
        ([[1.0, 2.0]], {"seed": "a"}, "seed is 'a'"),
        ([1.0, 2.0], {}, r"x has the shape \[2\]: expected \[n, d\]"),
    ),
)
def test_wrong_arguments_are_refused(x, settings, message):
    with pytest.raises(InputError, match=message) as error:
        kmeans(np.array(x), **{"num_clusters": 1} | settings)
    assert "\n" not in str(error.value)


def test_group_means_equal_the_mean_of_each_group(monkeypatch):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(1_003, 5)).astype(np.float32), rng.integers(10, size=1_003)
    labels[labels == 3] = 4
    expected = [x[labels == c].mean(axis=0) if c != 3 else np.full(5, np.nan) for c in range(10)]
    for tile in (clusters.TILE, {"cpu": 1_000}):
        monkeypatch.setattr(clusters, "TILE", tile)
        means, counts = group_means(x, labels, 10)
        np.testing.assert_allclose(means, expected, atol=1e-6)
        np.testing.assert_array_equal(counts, np.bincount(labels, minlength=10))


def test_group_means_refuse_labels_out_of_range():
    with pytest.raises(InputError, match="labels holds the label 2"):
        group_means(np.ones((3, 2)), np.array([0, 1, 2]), 2)
    with pytest.raises(InputError, match="labels holds 2 labels: expected 3"):
        group_means(np.ones((3, 2)), np.array([0, 1]), 2)
