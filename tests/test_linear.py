"""Accuracy of linear classifiers as a score: contract, scikit-learn's classifier on the same split, order of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from test_scores import C, gaussians, hard_inputs

from jax_transfer.analysis.canonical import canonical
from jax_transfer.analysis.linear import linear_accuracy

EPOCHS = (1, 5, None)
each_kind = pytest.mark.parametrize("epochs", EPOCHS, ids=("1 epoch", "5 epochs", "converged"))
HARD = hard_inputs()


def score(x, y, epochs, num_classes=C, seed=0, learning_rate=0.01, l2=1e-4):
    """Every argument is given each time: a default that is left out is one more program to compile."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    return linear_accuracy(x, y, num_classes, epochs, seed=seed, learning_rate=learning_rate, l2=l2)


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
def test_order_of_samples_and_names_of_classes_change_nothing(epochs):
    x, y = gaussians(separation=0.5)
    expected = score(x, y, epochs)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        assert score(x[order], y[order], epochs) == expected
        renamed = np.random.default_rng(seed).permutation(C)[y]
        assert score(x, renamed, epochs) == expected


@each_kind
def test_classes_that_do_not_occur_change_nothing(epochs):
    x, y = gaussians(separation=0.5)
    assert score(x, np.array([6, 2, 0, 7, 3])[y], epochs, num_classes=8) == score(x, y, epochs)


@pytest.mark.parametrize("epochs", (1, None), ids=("1 epoch", "converged"))
@pytest.mark.parametrize("case", [name for name in HARD if name not in ("n = d", "one column")])
def test_hard_inputs_give_an_accuracy(epochs, case):
    assert 0 <= score(*HARD[case], epochs) <= 1


@each_kind
@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x + 100, lambda x: 1e6 * x, lambda x: 1e18 * x, lambda x: 1e-18 * x]
)
def test_separable_features_are_separated_wherever_they_lie(epochs, change):
    x, y = gaussians(separation=3.0)
    assert score(change(x), y, epochs) > 0.95


@each_kind
def test_separable_beats_overlapping_beats_shuffled_which_is_chance(epochs):
    x, y = gaussians(n=2000, separation=3.0)
    overlapping, shuffled = gaussians(n=2000, separation=0.3)[0], np.random.default_rng(4).permutation(y)
    chance = score(x, shuffled, epochs)
    assert score(x, y, epochs) > score(overlapping, y, epochs) + 0.1 > chance + 0.2
    assert chance == pytest.approx(1 / C, abs=0.08)  # 400 samples held out: four standard deviations


def test_more_epochs_are_not_worse_where_there_is_something_to_learn():
    x, y = gaussians(n=2000, separation=0.4)
    first, fifth, twentieth = (score(x, y, epochs, learning_rate=1e-3) for epochs in (1, 5, 20))
    assert first <= fifth <= twentieth and first < twentieth


@pytest.mark.parametrize("l2", (1e-4, 1e-2))
@pytest.mark.parametrize("separation", (0.3, 0.6))
def test_converged_equals_scikit_learn_on_the_same_split(separation, l2):
    x, y = gaussians(n=2000, separation=separation)
    x_ordered, y_ordered, _ = (np.asarray(a) for a in canonical(jnp.asarray(x, jnp.float32), jnp.asarray(y), C))
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(3))[0], len(y)))
    held_out, rows = order[:400], order[400:]
    x_ordered = (x_ordered - x_ordered[rows].mean(0)) / x_ordered[rows].std(0).max()
    peer = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-8, max_iter=5000).fit(x_ordered[rows], y_ordered[rows])
    expected = peer.score(x_ordered[held_out], y_ordered[held_out])
    assert 0.4 < expected < 0.98
    assert score(x, y, None, seed=3, l2=l2) == pytest.approx(expected, abs=0.01)


@each_kind
def test_the_seed_chooses_the_split(epochs):
    x, y = gaussians(separation=0.5)
    assert len({float(score(x, y, epochs, seed=seed)) for seed in range(5)}) > 1


def test_labels_of_held_out_samples_do_not_leak():
    y = np.random.default_rng(0).permutation(np.arange(200) % 2)  # as many features as the fit needs to know each label
    wide = np.random.default_rng(1).normal(size=(200, 400))
    assert score(wide, y, None, num_classes=2) < 0.75


@each_kind
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_features_that_are_not_finite_give_nan(epochs, bad):
    x, y = gaussians()
    x[3, 4] = bad
    assert np.isnan(score(x, y, epochs))
