"""Accuracy of linear classifiers as a score: its contract, the held-out images, and scikit-learn on the same split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from helpers.features import C, gaussians, hard_inputs
from jax_transfer.analysis import kendall, score_all
from jax_transfer.analysis.canonical import order_of_values
from jax_transfer.analysis.linear import linear_accuracy
from jax_transfer.analysis.split import stratified_fifth
from jax_transfer.data.subsets import stratified_split
from jax_transfer.records import Features

EPOCHS = (1, 5, None)
each_kind = pytest.mark.parametrize("epochs", EPOCHS, ids=("1 epoch", "5 epochs", "converged"))
HARD = hard_inputs()


def score(x, y, epochs, num_classes=C, seed=0, learning_rate=0.01, l2=1e-4, held_out=None):
    """Passes every argument each time, since a call that leaves out a default compiles another program."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    return linear_accuracy(x, y, num_classes, epochs, seed, learning_rate, 128, l2, held_out)


@each_kind
def test_jit_equals_eager(epochs):
    x, y = gaussians(separation=0.5)
    jitted = jax.jit(lambda x, y: linear_accuracy(x, y, C, epochs))(jnp.asarray(x, jnp.float32), y)
    assert jitted == score(x, y, epochs) and jitted.dtype == np.float32


@each_kind
def test_vmap_equals_loop(epochs):
    cases = [gaussians(separation=s, seed=i) for i, s in enumerate((0.3, 0.6, 2.0))] + [HARD["duplicate columns"]]
    x, y = (jnp.stack([jnp.asarray(case[i], dtype) for case in cases]) for i, dtype in enumerate((jnp.float32, int)))
    together = jax.jit(jax.vmap(lambda x, y: linear_accuracy(x, y, C, epochs)))(x, y)
    np.testing.assert_array_equal(together, [score(*case, epochs) for case in cases])


@each_kind
def test_invariant_to_sample_order_and_class_names(epochs):
    x, y = gaussians(separation=0.5)
    held_out = stratified_split(y)[1]
    expected, by_default = score(x, y, epochs, held_out=held_out), score(x, y, epochs)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        moved = np.argsort(order)[held_out]  # new positions of the same samples
        assert score(x[order], y[order], epochs, held_out=moved) == expected
        assert score(x[order], y[order], epochs, held_out=np.sort(moved)) == expected
        renamed = np.random.default_rng(seed).permutation(C)[y]
        assert score(x, renamed, epochs) == by_default


DUPLICATED = {  # name -> map of x after which samples are equal, across classes and across the split
    "all": lambda x: 0 * x + 1,
    "three kinds": lambda x: x[np.arange(len(x)) % 3],
    "pairs": lambda x: np.repeat(x[::2], 2, axis=0)[: len(x)],
    "zeros of both signs": lambda x: np.where(x > 0, 0.0, -0.0),
    "half precision": lambda x: (1 + 1e-3 * x).astype(np.float16),
}


@pytest.mark.parametrize("kind", DUPLICATED)
def test_invariant_to_order_of_equal_samples(kind):
    x, y = gaussians(separation=0.5)
    x = DUPLICATED[kind](x)
    held_out = stratified_split(y)[1]
    for epochs in EPOCHS:
        expected = score(x, y, epochs, held_out=held_out)
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(len(y))
            assert score(x[order], y[order], epochs, held_out=np.argsort(order)[held_out]) == expected
            renamed = np.random.default_rng(seed).permutation(C)[y]
            assert score(x, renamed, epochs, held_out=held_out) == expected


@each_kind
def test_accuracy_depends_only_on_held_out_images(epochs):
    """Held-out images that are moved to the mean of another class are all misclassified, and no other images count."""
    y = gaussians()[1]
    for held_out in (None, stratified_split(y)[1]):
        tested = np.asarray(stratified_fifth(y) if held_out is None else held_out)
        for seed in range(3):
            means = np.random.default_rng(seed).normal(size=(C, 24)) * 5
            x = means[y] + np.random.default_rng(seed + 9).normal(size=(len(y), 24))
            assert score(x, y, epochs, held_out=held_out) == 1
            x[tested] = means[(y[tested] + 1) % C]
            assert score(x, y, epochs, held_out=held_out) == 0


def test_ranks_checkpoints_two_points_apart():
    """With 40 test images drawn anew for each checkpoint the ranking fails: the standard deviation is 7 points."""
    rng, n = np.random.default_rng(0), 200
    accuracies = 0.6 + 0.02 * np.arange(12)
    ours, by_values = [], []
    for _ in range(5):
        y = rng.permutation(np.arange(n) % 2).astype(np.int32)
        luck = rng.uniform(size=n)  # images that are hard for one checkpoint are hard for the others
        own = 0.97 * luck + 0.03 * rng.uniform(size=(12, n))
        right = own < np.quantile(own, accuracies, axis=1)[np.arange(12), np.arange(12)][:, None]
        x = (np.where(right, 2 * y - 1, 1 - 2 * y)[..., None] + 0.1 * rng.normal(size=(12, n, 2))).astype(np.float32)
        stacked = Features(x, x, np.tile(y, (12, 1)))
        held_out = stratified_split(y)[1]
        ours.append(float(kendall(score_all("linear_converged", stacked, 2, held_out), accuracies)))
        drawn = [np.asarray(order_of_values(jnp.asarray(one)))[: len(held_out)] for one in x]
        values = [float(score(one, y, None, num_classes=2, held_out=rows)) for one, rows in zip(x, drawn, strict=True)]
        by_values.append(float(kendall(jnp.array(values), accuracies)))
    assert np.mean(ours) > 0.85 and np.mean(by_values) < 0.7


LABELS = {
    "balanced": np.arange(300) % 5,
    "sorted": np.sort(np.arange(200) % 8),
    "long tail": np.repeat(np.arange(7), (100, 60, 30, 11, 7, 3, 1)),
    "singletons": np.concatenate([np.zeros(40, int), np.arange(1, 9)]),
    "all different": np.arange(12),
    "pairs": np.arange(40) // 2,
    "one class": np.zeros(23, int),
    "two samples": np.array([0, 1]),
}


@pytest.mark.parametrize("case", LABELS)
def test_split_holds_out_a_fifth_and_depends_only_on_labels(case):
    y = LABELS[case].astype(np.int32)
    held_out = np.asarray(stratified_fifth(y))
    assert len(set(held_out.tolist())) == len(held_out) == max(1, round(len(y) / 5)) and (np.diff(held_out) > 0).all()
    together = jax.jit(jax.vmap(stratified_fifth))(np.stack([y, y[::-1]]))
    np.testing.assert_array_equal(together[0], held_out)
    np.testing.assert_array_equal(stratified_fifth(np.random.default_rng(0).permutation(50)[y]), held_out)
    counts, tested = np.bincount(y), np.bincount(y[held_out], minlength=y.max() + 1)
    if case not in ("all different", "two samples", "pairs"):  # in those cases only the total is a fifth
        assert (np.abs(tested - counts / 5) <= 1 + (case == "singletons")).all()
        assert not tested[counts == 1].any()


def test_held_out_positions_follow_no_pattern():
    held_out = np.asarray(stratified_fifth(np.arange(400) % 4))
    assert len(np.unique(np.diff(held_out))) > 5 and abs(held_out.mean() - 200) < 40


@each_kind
def test_missing_classes_do_not_change_the_accuracy(epochs):
    x, y = gaussians(separation=0.5)
    assert score(x, np.array([6, 2, 0, 7, 3])[y], epochs, num_classes=8) == score(x, y, epochs)


@pytest.mark.parametrize("epochs", (1, None), ids=("1 epoch", "converged"))
@pytest.mark.parametrize("case", [name for name in HARD if name not in ("n = d", "one column")])
def test_hard_inputs_give_a_valid_accuracy(epochs, case):
    assert 0 <= score(*HARD[case], epochs) <= 1


@each_kind
@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x + 100, lambda x: 1e6 * x, lambda x: 1e18 * x, lambda x: 1e-18 * x]
)
def test_separable_features_are_separated_at_any_offset_and_scale(epochs, change):
    x, y = gaussians(separation=3.0)
    assert score(change(x), y, epochs) > 0.95


@each_kind
def test_separable_beats_overlapping_beats_shuffled_at_chance(epochs):
    x, y = gaussians(n=2000, separation=3.0)
    overlapping, shuffled = gaussians(n=2000, separation=0.3)[0], np.random.default_rng(4).permutation(y)
    chance = score(x, shuffled, epochs)
    assert score(x, y, epochs) > score(overlapping, y, epochs) + 0.1 > chance + 0.2
    assert chance == pytest.approx(1 / C, abs=0.08)  # 400 samples held out: four standard deviations


def test_more_epochs_are_not_worse_on_learnable_features():
    x, y = gaussians(n=2000, separation=0.4)
    first, fifth, twentieth = (score(x, y, epochs, learning_rate=1e-3) for epochs in (1, 5, 20))
    assert first <= fifth <= twentieth and first < twentieth


@pytest.mark.parametrize("l2", (1e-4, 1e-2))
@pytest.mark.parametrize("separation", (0.3, 0.6))
def test_converged_equals_scikit_learn_on_the_same_split(separation, l2):
    x, y = gaussians(n=2000, separation=separation)
    held_out = np.asarray(stratified_fifth(y))
    rows = np.setdiff1d(np.arange(len(y)), held_out)
    z = (x - x[rows].mean(0)) / x[rows].std(0).max()
    peer = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-8, max_iter=5000).fit(z[rows], y[rows])
    expected = peer.score(z[held_out], y[held_out])
    assert 0.4 < expected < 0.98
    assert score(x, y, None, seed=3, l2=l2) == pytest.approx(expected, abs=0.01)


@each_kind
def test_seed_changes_the_batches_but_not_the_split(epochs):
    x, y = gaussians(separation=0.5)
    found = {float(score(x, y, epochs, seed=seed)) for seed in range(5)}
    assert (len(found) > 1) == (epochs is not None)


def test_held_out_labels_do_not_leak():
    y = np.random.default_rng(0).permutation(np.arange(200) % 2)  # enough features to fit every label
    wide = np.random.default_rng(1).normal(size=(200, 400))
    assert score(wide, y, None, num_classes=2) < 0.75


@each_kind
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_non_finite_features_give_nan(epochs, bad):
    x, y = gaussians()
    x[3, 4] = bad
    assert np.isnan(score(x, y, epochs))
