"""Ranking metrics: against scipy, against values computed by hand, and their properties."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_transfer.analysis import (
    kendall,
    kendall_interval,
    pearson,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.records import InputError
from jax_transfer.results import RankingRow
from jax_transfer.trust.measure import ranking_row

CORRELATIONS = {"pearson": pearson, "kendall": kendall, "weighted_kendall": weighted_kendall}
METRICS = {
    **CORRELATIONS,
    "recall@1": lambda s, a: recall_at_k(s, a, 1),
    "recall@3": lambda s, a: recall_at_k(s, a, 3),
    "rel@1": lambda s, a: relative_accuracy_at_k(s, a, 1),
    "rel@3": lambda s, a: relative_accuracy_at_k(s, a, 3),
    "regret": regret,
}
pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 6)), min_size=2, max_size=7)


def brute_force_best(scores, gains, k):
    """Returns the best gain among the k highest scores, averaged over all orders of tied scores."""
    best = []
    for order in itertools.permutations(range(len(scores))):
        top = sorted(order, key=lambda i: -scores[i])[:k]
        best.append(max(gains[i] for i in top))
    return np.mean(best)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_scipy(seed):
    rng = np.random.default_rng(seed)
    scores, accuracies = rng.integers(0, 5, 12).astype(float), rng.integers(0, 5, 12) / 10
    assert pearson(scores, accuracies) == pytest.approx(scipy.stats.pearsonr(scores, accuracies).statistic)
    assert kendall(scores, accuracies) == pytest.approx(scipy.stats.kendalltau(scores, accuracies).statistic)
    weighted = scipy.stats.weightedtau(scores, accuracies).statistic
    assert weighted_kendall(scores, accuracies) == pytest.approx(weighted)


def test_metrics_equal_hand_computed_values():
    scores, accuracies = [4.0, 3.0, 2.0, 1.0], [0.8, 0.9, 0.5, 0.6]
    assert pearson(scores, accuracies) == pytest.approx(0.5 / math.sqrt(5 * 0.1))  # means 2.5 and 0.7
    assert kendall(scores, accuracies) == pytest.approx((4 - 2) / 6)
    # weights 1/r + 1/q of the six pairs, ranks from 1; (1, 2) and (3, 4) are discordant in both rankings
    total = sum(1 / r + 1 / q for r, q in itertools.combinations((1, 2, 3, 4), 2))
    assert weighted_kendall(scores, accuracies) == pytest.approx(1 - 2 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / total)
    assert recall_at_k(scores, accuracies, 1) == 0.0
    assert recall_at_k(scores, accuracies, 2) == 1.0
    assert relative_accuracy_at_k(scores, accuracies, 1) == pytest.approx(0.8 / 0.9)
    assert relative_accuracy_at_k(scores, accuracies, 2) == 1.0
    assert regret(scores, accuracies) == pytest.approx(0.1)


def test_weighted_kendall_penalises_errors_at_the_top():
    accuracies = [0.9, 0.8, 0.7, 0.6]
    assert weighted_kendall([3, 4, 2, 1], accuracies) < weighted_kendall([4, 3, 1, 2], accuracies)


def test_tied_scores_give_the_mean_over_tie_orders():
    assert recall_at_k([1, 1, 1, 0], [0.9, 0.5, 0.6, 0.7], 1) == pytest.approx(1 / 3)
    assert recall_at_k([1, 1, 1, 0], [0.9, 0.5, 0.6, 0.7], 2) == pytest.approx(2 / 3)
    assert relative_accuracy_at_k([1, 1], [0.8, 0.4], 1) == pytest.approx(0.75)
    assert regret([1, 1], [0.8, 0.4]) == pytest.approx(0.2)
    assert recall_at_k([1, 2], [0.9, 0.9], 1) == 1.0  # both are best checkpoints


@settings(max_examples=40, deadline=None)
@given(pairs, st.integers(1, 7))
def test_top_k_metrics_equal_brute_force_over_tie_orders(values, k):
    scores, accuracies = zip(*values, strict=True)
    best = max(accuracies)
    recall = brute_force_best(scores, [float(a == best) for a in accuracies], k)
    assert recall_at_k(scores, accuracies, k) == pytest.approx(recall)
    assert relative_accuracy_at_k(scores, accuracies, k) == pytest.approx(
        brute_force_best(scores, accuracies, k) / best
    )
    assert regret(scores, accuracies) == pytest.approx(best - brute_force_best(scores, accuracies, 1))


@settings(max_examples=60, deadline=None)
@given(pairs, st.randoms(use_true_random=False))
def test_invariant_to_checkpoint_order_and_increasing_maps(values, random):
    shuffled = random.sample(values, len(values))
    for name, metric in METRICS.items():
        expected = metric(*zip(*values, strict=True))
        assert type(expected) is float
        scores, accuracies = zip(*shuffled, strict=True)
        assert metric(scores, accuracies) == pytest.approx(expected, nan_ok=True), name
        stretched = [5 * s - 2 for s in scores] if name == "pearson" else [math.exp(s) for s in scores]
        assert metric(stretched, accuracies) == pytest.approx(expected, nan_ok=True), name


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_metrics_are_in_range_and_monotone_in_k(values):
    scores, accuracies = zip(*values, strict=True)
    for metric in CORRELATIONS.values():
        value = metric(scores, accuracies)
        assert math.isnan(value) or -1 - 1e-12 <= value <= 1 + 1e-12
    for metric in (recall_at_k, relative_accuracy_at_k):
        by_k = [metric(scores, accuracies, k) for k in range(1, len(scores) + 2)]
        assert all(0 <= a <= b + 1e-12 for a, b in itertools.pairwise(by_k))
        assert by_k[-1] == pytest.approx(1.0)
    assert regret(scores, accuracies) >= 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3).map(lambda v: round(v, 3)), min_size=2, max_size=8, unique=True))
def test_perfect_scores_give_one_and_reversed_minus_one(accuracies):
    reverse = [-a for a in accuracies]
    for name, metric in CORRELATIONS.items():
        assert metric(accuracies, accuracies) == pytest.approx(1.0), name
        assert metric(reverse, accuracies) == pytest.approx(-1.0), name
    assert recall_at_k(accuracies, accuracies, 1) == 1.0
    assert regret(accuracies, accuracies) == 0.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scores", ([], [1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]))
def test_undefined_metrics_are_nan_without_warnings(metric, scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(METRICS[metric](scores, [0.5, 0.6, 0.7][: len(scores)]))


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_correlation_with_constant_input_is_nan(correlation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(CORRELATIONS[correlation]([1.0, 1.0, 1.0], [0.1, 0.2, 0.3]))
        assert math.isnan(CORRELATIONS[correlation]([1.0, 2.0, 3.0], [0.3, 0.3, 0.3]))


def test_bootstrap_interval_equals_resampling_with_scipy():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=12)
    accuracies = scores + rng.normal(size=12)
    draws = [rng.integers(0, 12, 12) for _ in range(3000)]
    taus = [scipy.stats.kendalltau(scores[i], accuracies[i]).statistic for i in draws]
    np.testing.assert_allclose(kendall_interval(scores, accuracies), np.quantile(taus, [0.025, 0.975]), atol=0.03)
    assert kendall_interval(scores, accuracies) == kendall_interval(scores, accuracies)


def test_bootstrap_interval_contains_tau_and_narrows_with_checkpoints():
    rng = np.random.default_rng(1)
    widths = []
    for k in (10, 40, 160):
        scores = rng.normal(size=k)
        accuracies = scores + rng.normal(size=k)
        low, high = kendall_interval(scores, accuracies)
        assert -1 <= low <= kendall(scores, accuracies) <= high <= 1
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]
    assert kendall_interval(range(10), range(10)) == (1.0, 1.0)
    assert all(map(math.isnan, kendall_interval(range(9), range(9))))  # too few: perfect agreement may be luck
    assert all(map(math.isnan, kendall_interval([1.0, 1.0], [1.0, 2.0])))


def test_error_names_lists_of_different_lengths():
    with pytest.raises(InputError, match=r"scores \[2\] and accuracies \[3\]"):
        pearson([1, 2], [1, 2, 3])


def test_ranking_row_holds_each_metric():
    scores, accuracies = [0.1, 0.4, 0.3, 0.2], [0.5, 0.7, 0.9, 0.6]
    row = ranking_row("mnist", "probe", "logme", scores, accuracies)
    assert row == RankingRow(
        "mnist",
        "probe",
        "logme",
        pearson(scores, accuracies),
        kendall(scores, accuracies),
        weighted_kendall(scores, accuracies),
        0.0,
        1.0,
        relative_accuracy_at_k(scores, accuracies, 1),
        1.0,
        4,
        *kendall_interval(scores, accuracies),
        regret(scores, accuracies),
        4,
    )
