"""What is measured of each score over all targets: means, differences to a naive list, and lists apart."""

import math

import numpy as np
import pytest
import scipy.stats

from jax_transfer.analysis.agreement import draw_checkpoints, kendall, kendall_of_draws
from jax_transfer.records import InputError
from jax_transfer.trust.evidence import (
    baseline,
    expected_range,
    family_by_name,
    last_epochs,
    last_of_each,
    make,
    noise,
    trajectory_of,
)
from jax_transfer.trust.measure import ranking_rows, trust_rows

K, TARGETS = 12, ("a", "b", "c")
NAMES = [f"m{i}" for i in range(K)]


def keyed(table, targets=TARGETS, names=NAMES):
    """Returns {(target, checkpoint): value} of a table [t, k], or of one row for all targets, without NaN."""
    table = np.broadcast_to(table, (len(targets), len(names)))
    pairs = zip(targets, table, strict=True)
    return {(t, n): float(v) for t, row in pairs for n, v in zip(names, row, strict=True) if not math.isnan(v)}


def evidence(accuracies, **scores):
    targets, names = TARGETS[: len(accuracies)], NAMES[: len(accuracies[0])]
    scores = {name: keyed(values, targets, names) for name, values in scores.items()}
    return make("finetune", keyed(accuracies, targets, names), scores)


def by_score(rows):
    return {row.score: row for row in rows}


@pytest.fixture
def numbers():
    """Returns accuracies [3, 12], a good score, and a list."""
    rng = np.random.default_rng(0)
    accuracies = rng.uniform(0.5, 0.9, (3, K))
    return accuracies, accuracies + 0.1 * rng.normal(size=(3, K)), rng.permutation(K).astype(float)


def test_means_and_differences_equal_scipy(numbers):
    accuracies, score, sizes = numbers
    rows = by_score(trust_rows(evidence(accuracies, logme=score, num_parameters=sizes)))
    taus = {
        "logme": np.mean([scipy.stats.kendalltau(s, a).statistic for s, a in zip(score, accuracies, strict=True)]),
        "num_parameters": np.mean([scipy.stats.kendalltau(sizes, a).statistic for a in accuracies]),
    }
    for name, tau in taus.items():
        assert rows[name].kendall == pytest.approx(tau) and rows[name].baseline == "num_parameters"
    row = rows["logme"]
    assert row.difference == pytest.approx(taus["logme"] - taus["num_parameters"])
    assert row.difference_low < row.difference < row.difference_high
    weighted = [scipy.stats.weightedtau(s, a).statistic for s, a in zip(score, accuracies, strict=True)]
    assert row.weighted_kendall == pytest.approx(np.mean(weighted))
    assert math.isnan(rows["num_parameters"].difference) and (row.num_targets, row.num_checkpoints) == (3, K)


def test_interval_of_a_difference_is_a_paired_bootstrap(numbers):
    accuracies, score, sizes = numbers
    row = by_score(trust_rows(evidence(accuracies, logme=score, num_parameters=sizes)))["logme"]
    rng, found = np.random.default_rng(5), []
    for _ in range(250):
        drawn = rng.integers(0, K, K)
        pairs = [(scipy.stats.kendalltau(s[drawn], a[drawn]).statistic, scipy.stats.kendalltau(sizes[drawn], a[drawn])
                  .statistic) for s, a in zip(score, accuracies, strict=True)]  # fmt: skip
        found.append(np.mean([own - other for own, other in pairs]))
    low, high = np.quantile(found, (0.025, 0.975))
    assert (row.difference_low, row.difference_high) == pytest.approx((low, high), abs=0.08)


def test_interval_of_a_difference_covers_the_difference_of_the_population():
    """Scores and lists with the correlations 0.8 and 0.3 to accuracy have taus of 2 / pi asin(correlation)."""
    rng, inside, above = np.random.default_rng(2), 0, 0
    truth = 2 / math.pi * (math.asin(0.8) - math.asin(0.3))
    repeats = 80
    for _ in range(repeats):
        quality = rng.normal(size=K)
        accuracies = quality[None] + 0 * rng.normal(size=(3, K))
        score = 0.8 * accuracies + 0.6 * rng.normal(size=(3, K))
        sizes = 0.3 * quality + math.sqrt(1 - 0.09) * rng.normal(size=K)
        row = by_score(trust_rows(evidence(accuracies, logme=score, num_parameters=sizes)))["logme"]
        inside += row.difference_low <= truth <= row.difference_high
        above += row.difference_low > truth
    assert 0.89 <= inside / repeats <= 1 and above / repeats <= 0.06


def test_a_score_in_the_order_of_the_list_has_no_difference_and_no_interval(numbers):
    accuracies, _, sizes = numbers
    row = by_score(trust_rows(evidence(accuracies, same=np.exp(sizes), num_parameters=sizes)))["same"]
    assert row.difference == 0 and math.isnan(row.difference_low) and math.isnan(row.difference_high)


CASES = {  # a change to (accuracies, score, list) -> whether the score has a mean tau, and a difference
    "nothing": (lambda a, s, n: (a, s, n), True, True),
    "a missing score": (lambda a, s, n: (a, _with(s, math.nan), n), False, False),
    "a constant score": (lambda a, s, n: (a, 0 * s, n), False, False),
    "constant on one target": (lambda a, s, n: (a, np.stack([s[0], s[1], 0 * s[2]]), n), False, False),
    "equal accuracies on one target": (lambda a, s, n: (np.stack([a[0], a[1], 0 * a[2]]), s, n), True, True),
    "a constant list": (lambda a, s, n: (a, s, 0 * n), True, False),
    "a list with a gap": (lambda a, s, n: (a, s, np.where(n == 3, math.nan, n)), True, False),
    "one target": (lambda a, s, n: (a[:1], s[:1], n), True, True),
}


def _with(values, value):
    values = values.copy()
    values[0, 4] = value
    return values


@pytest.mark.parametrize("case", CASES)
def test_missing_and_constant_values(numbers, case):
    change, has_tau, has_difference = CASES[case]
    accuracies, score, sizes = change(*numbers)
    rows = by_score(trust_rows(evidence(accuracies, logme=score, num_parameters=sizes)))
    row = rows["logme"]
    assert math.isfinite(row.kendall) == has_tau
    assert math.isfinite(row.difference) == math.isfinite(row.difference_low) == has_difference
    used = [i for i, a in enumerate(accuracies) if np.ptp(a) > 0]
    assert row.num_targets == len(used)
    if has_tau:
        assert row.kendall == pytest.approx(np.mean([kendall(score[i], accuracies[i]) for i in used]))
    assert row.baseline == ("num_parameters" if has_difference or "score" in case or "constant on" in case else "")


def test_two_checkpoints_have_a_difference_and_no_interval():
    row = by_score(trust_rows(evidence([[0.5, 0.6]], logme=[1, 2], num_parameters=[2, 1])))["logme"]
    assert (row.kendall, row.difference) == (1, 2) and math.isnan(row.difference_low)


def test_targets_may_have_different_checkpoints(numbers):
    accuracies, score, sizes = numbers
    lacking = accuracies.copy()
    lacking[1, :4] = math.nan  # left out of the keys: these checkpoints do not belong to the target
    found = evidence(lacking, logme=score, num_parameters=sizes)
    assert "average_rank" not in found.scores and found.expected.sum(1).tolist() == [K, K - 4, K]
    row = by_score(trust_rows(found))["logme"]
    parts = [
        kendall(score[0], accuracies[0]),
        kendall(score[1, 4:], accuracies[1, 4:]),
        kendall(score[2], accuracies[2]),
    ]
    assert row.kendall == pytest.approx(np.mean(parts)) and math.isfinite(row.difference_low)
    draws, differences = draw_checkpoints(K), 0  # each draw holds the same checkpoints on all targets
    for i, own in enumerate((slice(0, K), slice(4, K), slice(0, K))):
        taus = [kendall_of_draws(s[own], accuracies[i, own], draws[:, own]) for s in (score[i], sizes)]
        differences = differences + (taus[0] - taus[1]) / 3
    expected = np.quantile(differences[np.isfinite(differences)], (0.025, 0.975))
    assert (row.difference_low, row.difference_high) == pytest.approx(expected)
    counts = {row.target: row.num_checkpoints for row in ranking_rows(found) if row.score == "logme"}
    assert counts == {"a": K, "b": K - 4, "c": K}


def test_an_accuracy_that_failed_leaves_its_checkpoint_without_an_average_rank(numbers):
    accuracies, *_ = numbers
    values = keyed(accuracies)
    values["b", "m3"] = math.nan
    found = make("finetune", values, {}).scores["average_rank"]
    assert np.isnan(found).sum() == 3 and np.isnan(found[:, 3]).all()


# --- lists apart


def trajectories():
    """Returns the evidence of three epochs, not in order, of each of three models, two of which are of one family."""
    names = [f"{model}/cifar10/{epoch}" for model in ("resnet18", "resnet50", "vit") for epoch in (10, 1, 5)]
    rng = np.random.default_rng(0)
    accuracies = rng.uniform(0.5, 0.9, (2, 9))
    lists = {
        "num_parameters": np.repeat((11.0, 25.0, 5.0), 3),
        "last_epoch": np.tile((10.0, 1.0, 5.0), 3),
        "logme": rng.normal(size=9),
    }
    keys = {name: keyed(values, ("a", "b"), names) for name, values in lists.items()}
    return make("finetune", keyed(accuracies, ("a", "b"), names), keys), accuracies, lists["logme"]


def test_names_of_a_study_tell_trajectories_and_families():
    found, *_ = trajectories()
    assert list(dict.fromkeys(found.trajectories)) == ["resnet18/cifar10", "resnet50/cifar10", "vit/cifar10"]
    assert list(dict.fromkeys(found.families)) == ["resnet#/cifar10", "vit/cifar10"]
    assert family_by_name("resnet50/cifar10") != family_by_name("resnet50/cifar100")
    assert trajectory_of("/5") == "/5" and trajectory_of("a/5x") == "a/5x" and family_by_name("") == ""


def test_taus_apart_are_those_of_the_last_epochs():
    found, accuracies, score = trajectories()
    assert last_epochs(found).checkpoints == ("resnet18/cifar10/10", "resnet50/cifar10/10", "vit/cifar10/10")
    row = by_score(trust_rows(found))["logme"]
    last = [0, 3, 6]
    expected = np.mean([kendall(score[last], own[last]) for own in accuracies])
    assert row.kendall_epochs == pytest.approx(expected) and (row.num_epochs, row.num_families) == (3, 2)
    assert math.isnan(row.kendall_families)  # of two checkpoints


def test_largest_of_a_family_is_taken_among_last_epochs():
    names = ("resnet18", "resnet50", "densenet121", "densenet201", "vit")
    sizes = np.array((11.0, 25.0, 8.0, 20.0, 5.0))
    accuracies, score = np.array([[0.5, 0.6, 0.7, 0.9, 0.8]]), np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    table = {"num_parameters": keyed(sizes, ("a",), names), "logme": keyed(score, ("a",), names)}
    row = by_score(trust_rows(make("finetune", keyed(accuracies, ("a",), names), table)))["logme"]
    assert (row.num_epochs, row.num_families) == (5, 3)
    assert row.kendall_families == pytest.approx(kendall([5, 4, 3], [0.6, 0.9, 0.8]))


def test_last_of_each_ignores_missing_values():
    names = ("a", "b", "c", "d")
    missing = evidence([[0.1, 0.2, 0.3, 0.4]], last_epoch=[math.nan, 2, 1, math.nan])
    assert last_of_each(missing, ("x", "x", "x", "y"), "last_epoch").tolist() == [False, True, False, True]
    assert last_of_each(missing, ("x", "y", "x", "y"), "nothing").tolist() == [False, False, True, True]
    with pytest.raises(InputError, match="2 groups for 4 checkpoints"):
        last_of_each(missing, names[:2], "last_epoch")


def test_baseline_is_the_first_list_that_orders_all_checkpoints():
    accuracies, same, order = [[0.5, 0.6, 0.7]], [3, 3, 3], [1, 2, 3]
    assert baseline(evidence(accuracies, num_parameters=order, last_epoch=order)) == "num_parameters"
    assert baseline(evidence(accuracies, num_parameters=same, last_epoch=order)) == "last_epoch"
    assert baseline(evidence(accuracies, num_parameters=[1, 2, math.nan], last_epoch=order)) == "last_epoch"
    assert baseline(evidence(accuracies, num_parameters=same, source_accuracy=order)) == "source_accuracy"
    assert baseline(evidence(accuracies, num_parameters=same, static=order)) == "static"
    assert baseline(evidence(accuracies, num_parameters=same, logme=order)) is None


# --- noise


def test_noise_is_that_of_a_mean_over_seeds():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 20):
        drawn = 0.02 * rng.normal(size=(400, seeds))
        names = [str(i) for i in range(400)]
        found = make(
            "finetune",
            keyed(0.5, ("a",), names),
            {},
            spreads=keyed(np.ptp(drawn, axis=1), ("a",), names),
            num_seeds={("a", name): seeds for name in names},
        )
        assert noise(found, 0) == pytest.approx(0.02 / math.sqrt(seeds), rel=0.05)
        assert expected_range(seeds) == pytest.approx(
            np.mean(np.ptp(rng.normal(size=(40000, seeds)), axis=1)), rel=0.02
        )
    assert math.isnan(noise(evidence([[0.5, 0.6]]), 0))


def test_taus_of_earlier_epochs_and_of_equal_sizes_are_those_of_these_checkpoints_alone():
    rng = np.random.default_rng(5)
    names = [f"net{i}/c/{epoch}" for i in range(4) for epoch in (3, 6)]
    sizes = np.repeat((1e6, 1.2e6, 1.5e6, 9e6), 2)
    accuracies, score = rng.uniform(size=(2, 8)), rng.normal(size=(2, 8))

    def keyed(table):
        return {(t, n): v for t, own in zip("xy", np.broadcast_to(table, (2, 8)), strict=True)
                for n, v in zip(names, own, strict=True)}  # fmt: skip

    scores = {"logme": keyed(score), "num_parameters": keyed(sizes), "last_epoch": keyed(np.tile((3, 6), 4))}
    row = by_score(trust_rows(make("finetune", keyed(accuracies), scores)))["logme"]
    for name, chosen in {"earlier": slice(0, 8, 2), "sizes": slice(0, 6)}.items():
        expected = np.mean([kendall(s[chosen], a[chosen]) for s, a in zip(score, accuracies, strict=True)])
        assert getattr(row, f"kendall_{name}") == pytest.approx(expected)
    assert (row.num_earlier, row.num_sizes, row.num_families) == (4, 6, 1)
