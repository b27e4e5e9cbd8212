"""Agreement over targets, over pairs and over draws, against plain loops and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from jax_transfer.analysis.agreement import (
    draw_checkpoints,
    fidelity,
    kendall_of_draws,
    weighted_kendall,
    weighted_kendall_without_each,
)
from jax_transfer.analysis.concordance import attainable_kendall, average_ranks, kendall_w
from jax_transfer.records import InputError

RNG = np.random.default_rng(0)
# Values with and without ties: the number of levels among 9 checkpoints.
LEVELS = (2, 4, 1000)


def values(levels, shape=(9,), seed=0):
    return np.random.default_rng(seed).integers(0, levels, shape) / levels


@pytest.mark.parametrize("levels", LEVELS)
def test_kendall_w_equals_friedmans_statistic(levels):
    table = values(levels, (5, 9), seed=levels)
    friedman = scipy.stats.friedmanchisquare(*table.T).statistic  # = t (k - 1) W, corrected for ties
    assert kendall_w(table) == pytest.approx(friedman / (5 * 8), abs=1e-12)


def test_kendall_w_is_1_for_equal_orders_and_undefined_where_nothing_is_ordered():
    order = RNG.permutation(7)
    assert kendall_w([order, 3.0 * order + 1, np.exp(order)]) == pytest.approx(1)
    undefined = ([[1, 2, 3]], [[1], [2]], [[1, 1], [2, 2]], [[1, 2], [1, math.nan]], [[1, 2], [None, 3]])
    assert all(math.isnan(kendall_w(table)) for table in undefined)
    with pytest.raises(InputError, match="a row for each target"):
        kendall_w([1, 2, 3])


@pytest.mark.parametrize("levels", LEVELS)
def test_average_ranks_leave_the_target_out(levels):
    table = values(levels, (4, 6), seed=levels)
    found = average_ranks(table)
    for target in range(4):
        others = [scipy.stats.rankdata(-row) for i, row in enumerate(table) if i != target]
        np.testing.assert_allclose(found[target], -np.mean(others, axis=0))
        changed = table.copy()
        changed[target] = -table[target]
        np.testing.assert_array_equal(average_ranks(changed)[target], found[target])


def test_average_ranks_are_missing_where_an_accuracy_is():
    found = average_ranks([[0.1, 0.2, 0.3], [0.1, None, 0.3]])
    assert np.isnan(found).tolist() == [[False, True, False]] * 2
    assert np.isnan(average_ranks([[0.1, 0.2]])).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("top", (None, 3, 99))
def test_fidelity_equals_scipy_over_pairs(levels, top):
    scores, accuracies = RNG.normal(size=9), values(levels)
    best = sorted(accuracies)[-3] if top == 3 else -1
    pairs = [(i, j) for i, j in itertools.combinations(range(9), 2) if max(accuracies[i], accuracies[j]) >= best]
    gaps = [[abs(x[i] - x[j]) for i, j in pairs] for x in (scores, accuracies)]
    expected = scipy.stats.pearsonr(*gaps).statistic, scipy.stats.spearmanr(*gaps).statistic
    assert fidelity(scores, accuracies, top) == pytest.approx(expected)


def test_fidelity_is_undefined_without_different_gaps():
    for scores, accuracies in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 4]), ([1, 2, None], [1, 2, 4]), ([1], [1])):
        assert all(map(math.isnan, fidelity(scores, accuracies)))
    with pytest.raises(InputError, match="at least 1"):
        fidelity([1, 2, 3], [1, 2, 3], top=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_tau_of_draws_equals_scipy_on_repeated_checkpoints(levels):
    scores, accuracies = values(levels, seed=1), values(levels)
    draws = draw_checkpoints(9, 200, seed=3)
    for tau, draw in zip(kendall_of_draws(scores, accuracies, draws), draws.astype(int), strict=True):
        drawn = np.repeat(np.arange(9), draw)
        expected = scipy.stats.kendalltau(scores[drawn], accuracies[drawn]).statistic
        assert tau == pytest.approx(expected, nan_ok=True)


def test_draws_are_of_equal_chance_and_the_same_in_every_call():
    draws = draw_checkpoints(5, 4000)
    assert (draws.sum(1) == 5).all() and np.abs(draws.mean(0) - 1).max() < 0.06
    assert draws is draw_checkpoints(5, 4000) and not draws.flags.writeable
    assert not np.array_equal(draws, draw_checkpoints(5, 4000, seed=1))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("k", (2, 3, 9))
def test_weighted_tau_without_each_equals_a_loop(levels, k):
    scores, accuracies = values(levels, (k,), seed=1), values(levels, (k,), seed=2)
    expected = [weighted_kendall(np.delete(scores, i), np.delete(accuracies, i)) for i in range(k)]
    np.testing.assert_allclose(weighted_kendall_without_each(scores, accuracies), expected, atol=1e-12)


def test_weighted_tau_without_each_is_undefined_if_a_value_is_missing():
    assert np.isnan(weighted_kendall_without_each([1, 2, math.nan], [1, 2, 3])).tolist() == [True] * 3


# --- the tau that noise allows


def test_attainable_tau_equals_that_of_the_truth_in_a_simulation():
    rng = np.random.default_rng(1)
    for noise in (0.01, 0.03, 0.06):
        estimated, found = [], []
        for seed in range(60):
            truth = 0.7 + 0.05 * rng.normal(size=20)
            measured = truth + noise * rng.normal(size=20)
            estimated.append(attainable_kendall(measured, noise, 200, seed))
            found.append(scipy.stats.kendalltau(truth, measured).statistic)
        assert np.mean(estimated) == pytest.approx(np.mean(found), abs=0.07)


def test_attainable_tau_falls_with_noise():
    accuracies = 0.7 + 0.05 * RNG.normal(size=10)
    taus = [attainable_kendall(accuracies, noise) for noise in (0, 0.005, 0.01, 0.02, 0.04, 0.08)]
    assert taus[0] == 1 and taus == sorted(taus, reverse=True) and len(set(taus)) == 6 and taus[-1] < 0.3
    assert attainable_kendall([0.5, 0.5, 0.6], 0) == 1  # equal accuracies stay equal
    assert math.isnan(attainable_kendall([0.5, 0.5], 0.1)) and math.isnan(attainable_kendall([0.5, 0.6], math.nan))
    assert math.isnan(attainable_kendall([0.5, None], 0.1))
