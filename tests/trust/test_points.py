"""What a gap in a score has meant in points of accuracy: planted lines are found, and intervals hold."""

import math

import numpy as np
import pytest

from jax_transfer.trust.evidence import make
from jax_transfer.trust.points import points_rows, pooled, prediction_rows, why_not


def planted(slopes, k=12, noise=0.0, scores=1, seed=0, **others):
    """Returns evidence in which accuracy is 0.5 + slope z + noise on each target, and z is the standardised score."""
    rng = np.random.default_rng(seed)
    accuracies, tables = {}, {f"s{i}": {} for i in range(scores)}
    for target, slope in enumerate(slopes):
        z = rng.normal(size=k)
        z = (z - z.mean()) / z.std()
        own = 0.5 + slope * z + noise * rng.normal(size=k)
        for name in range(k):
            accuracies[f"t{target}", f"m{name}"] = float(own[name])
            for i in range(scores):
                tables[f"s{i}"][f"t{target}", f"m{name}"] = float(3 + 7 * z[name]) * (i + 1)
    return make("finetune", accuracies, {**tables, **others})


def test_slopes_are_those_of_the_other_targets():
    slopes = (0.01, 0.02, 0.04, 0.06)
    rows = {row.target: row for row in points_rows(planted(slopes))}
    for i, own in enumerate(slopes):
        others = [slope for slope in slopes if slope != own]
        row = rows[f"t{i}"]
        assert (row.points, row.spread) == pytest.approx((np.mean(others), np.std(others, ddof=1)))
        assert row.gap == pytest.approx(7) and row.num_others == 3


def test_slope_is_the_least_squares_line():
    found = planted((0.03, 0.03, 0.03), noise=0.02)
    slopes = []
    for target in (1, 2):
        scores, accuracies = found.of(target, "s0")
        slopes.append(np.polyfit(scores, accuracies, 1)[0] * scores.std())
    assert points_rows(found)[0].points == pytest.approx(np.mean(slopes))


def test_a_target_gives_its_own_predictions_nothing_but_its_mean():
    found = planted((0.02, 0.03, 0.04, 0.05), noise=0.01, scores=2)
    changed = found.accuracies.copy()
    changed[1] = np.sort(changed[1])[::-1] + 0.1  # another order, and a mean that is 0.1 higher
    before = [row for row in prediction_rows(found) if row.target == "t1"]
    after = [row for row in prediction_rows(_with(found, changed)) if row.target == "t1"]
    for own, other in zip(before, after, strict=True):
        assert other.predicted - own.predicted == pytest.approx(0.1)
        assert other.high - other.low == pytest.approx(own.high - own.low)
    np.testing.assert_allclose(pooled(found)[1], pooled(_with(found, changed))[1])
    assert not np.allclose(pooled(found)[0], pooled(_with(found, changed))[0])


def _with(found, accuracies):
    values = {
        (t, c): float(accuracies[i, j]) for i, t in enumerate(found.targets) for j, c in enumerate(found.checkpoints)
    }
    scores = {
        name: {key: float(v) for key, v in zip(values, table.ravel(), strict=True)}
        for name, table in found.scores.items()
        if name != "average_rank"
    }
    return make("finetune", values, scores)


def test_exact_lines_predict_accuracies_exactly():
    for row in prediction_rows(planted((0.03,) * 4, scores=3)):
        assert (row.predicted, row.low, row.high) == pytest.approx((row.accuracy,) * 3)


def test_pooled_is_the_mean_of_the_lines():
    found = planted((0.01, 0.02, 0.06), scores=2, seed=4)
    scores, _ = found.of(0, "s0")
    z = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(pooled(found)[0], 0.04 * z)  # the mean slope of the others; both scores have the same z


# Slopes that are equal or differ between targets, and the noise around the lines.
KINDS = {"equal slopes": (0.0, 0.01), "different slopes": (0.02, 0.01), "different slopes alone": (0.02, 0.001)}


@pytest.mark.parametrize("num_targets", (3, 4, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_predictions_hold(kind, num_targets):
    (between, within), inside = KINDS[kind], []
    for seed in range(80 // num_targets):
        slopes = 0.03 + between * np.random.default_rng(seed).normal(size=num_targets)
        rows = prediction_rows(planted(slopes, 8, within, seed=seed))
        inside.append(np.mean([row.low <= row.accuracy <= row.high for row in rows]))
    assert 0.87 <= np.mean(inside) <= 1


def test_predictions_stay_accuracies():
    accuracies = {(t, c): a for t in "xyz" for c, a in zip("abcd", (0.999, 0.998, 0.99, 0.5), strict=True)}
    scores = {key: float(ord(key[1])) for key in accuracies}
    rows = prediction_rows(make("finetune", accuracies, {"s": {key: -v for key, v in scores.items()}}))
    assert rows and all(0 <= row.low <= row.predicted <= row.high <= 1 for row in rows)
    assert max(row.high for row in rows) == 1


def test_naive_lists_are_not_scores():
    sizes = {(f"t{t}", f"m{m}"): float(m) for t in range(3) for m in range(12)}
    rows = points_rows(planted((0.02, 0.03, 0.04), num_parameters=sizes))
    assert {row.score for row in rows} == {"s0"}
    assert "no score has a value" in why_not(planted((0.02, 0.03, 0.04), scores=0, num_parameters=sizes))


def test_too_few_targets_and_gaps_are_said():
    assert "at least 3 targets" in why_not(planted((0.02, 0.03))) and "there are 2" in why_not(planted((0.02, 0.03)))
    assert why_not(planted((0.02, 0.03, 0.04))) == ""
    gap = planted((0.02, 0.03, 0.04))
    gap.scores["s0"][1, 3] = math.nan
    assert "no score has a value" in why_not(gap) and points_rows(gap) == prediction_rows(gap) == []
    assert pooled(gap) is None
    equal = planted((0.02, 0.03, 0.0))
    assert "there are 2" in why_not(equal)  # a target on which all accuracies are equal teaches nothing


def test_a_target_may_lack_checkpoints():
    full = planted((0.02, 0.03, 0.04), scores=1)
    keys = [(t, c) for t in full.targets for c in full.checkpoints if (t, c) not in {("t0", "m0"), ("t1", "m5")}]
    table = {name: {} for name in ("accuracy", "s0")}
    for t, c in keys:
        i, j = full.targets.index(t), full.checkpoints.index(c)
        table["accuracy"][t, c], table["s0"][t, c] = float(full.accuracies[i, j]), float(full.scores["s0"][i, j])
    found = make("finetune", table["accuracy"], {"s0": table["s0"]})
    rows = prediction_rows(found)
    assert sorted((row.target, row.checkpoint) for row in rows) == sorted(keys)
    assert np.isnan(pooled(found)).sum() == 2 and np.isfinite(pooled(found)[found.expected]).all()
