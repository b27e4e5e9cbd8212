"""What the checklist finds, and what it does not."""

import math

import numpy as np
import pytest

from jax_transfer.analysis import weighted_kendall
from jax_transfer.analysis.concordance import kendall_w
from jax_transfer.report.trust import ELSEWHERE, verdict
from jax_transfer.trust.checklist import CHECKS, check_rows
from jax_transfer.trust.evidence import make
from jax_transfer.trust.judge import judge

NAMES = ("a", "b", "c", "d", "e", "f")
TARGETS = ("x", "y", "z")


def keyed(table, targets=TARGETS, names=NAMES):
    table = np.broadcast_to(table, (len(targets), len(names)))
    return {(t, n): float(v) for t, row in zip(targets, table, strict=True) for n, v in zip(names, row, strict=True)}


def found(check, accuracies, names=NAMES, targets=TARGETS, **options):
    scores = {name: keyed(values, targets, names) for name, values in options.pop("scores", {}).items()}
    rows = check_rows(make("finetune", keyed(accuracies, targets, names), scores, **options))
    return [row for row in rows if row.check == check]


RANDOM = np.random.default_rng(1).uniform(0.5, 0.9, (3, 6))


def test_headroom_is_missing_where_all_exceed_99_percent():
    full = RANDOM.copy()
    full[1] = np.linspace(0.991, 0.999, 6)
    (row,) = found("headroom", full)
    assert (row.subject, row.passed) == ("y", False) and row.value == pytest.approx(0.991)
    full[1, 0] = 0.99
    (row,) = found("headroom", full)
    assert row.passed and "99 % or less" in row.finding


def test_range_is_compared_with_the_noise_of_seeds():
    accuracies = np.linspace(0.5, 0.6, 6)
    for spread, passed in ((0.019, True), (0.021, False), (0.0, True)):
        spreads = keyed(spread)
        rows = found("noise", accuracies, spreads=spreads, num_seeds=dict.fromkeys(spreads, 3))
        assert [row.passed for row in rows] == [passed] * 3
        assert all("span 10.0 points" in row.finding and 0.4 < row.value <= 1 for row in rows)
    (row,) = found("noise", accuracies)
    assert row.passed is None and "x, y and z is unknown" in row.finding
    spreads = keyed(0.01, ("x",))
    known, unknown = found("noise", accuracies, spreads=spreads, num_seeds=dict.fromkeys(spreads, 3))
    assert known.passed and "on y and z is unknown" in unknown.finding


def test_equal_accuracies_do_not_span_more_than_noise():
    spreads = keyed(0.0)
    rows = found("noise", 0.5, spreads=spreads, num_seeds=dict.fromkeys(spreads, 3))
    assert [row.passed for row in rows] == [False] * 3


def test_sizes_are_compared():
    sizes = {"num_parameters": (1e6, 1e6, 1.5e6, 1e6, 1e6, 2e6), "forward_gflops": (1, 2, 3, 4, 5, 6)}
    parameters, work = found("size", RANDOM, scores=sizes)
    assert parameters.passed and (parameters.value, parameters.low, parameters.high) == (2, 1e6, 2e6)
    assert not work.passed and work.value == 6 and "6 times the smallest: size alone may decide" in work.finding
    (unknown,) = found("size", RANDOM, scores={"num_parameters": (math.nan, 1, 2, 3, 4, 5)})
    assert unknown.passed is None and "is not known for all checkpoints" in unknown.finding


def test_nested_checkpoints_are_named():
    names = ("resnet18/c10/1", "resnet18/c10/5", "resnet50/c10/1", "resnet50/c10/5", "vit/c10/5", "mlp/c10/5")
    epochs, upgrades = found("nested", RANDOM, names)
    assert (epochs.value, upgrades.value) == (4, 2) and not epochs.passed
    assert "resnet18/c10/1, resnet18/c10/5 (epochs of one pre-training), and those of 1 other group" in epochs.finding
    assert "resnet18/c10/5, resnet50/c10/5 (by their names, upgrades of one family)" in upgrades.finding
    # Epochs of one architecture are no upgrades of each other, and other images make another family.
    (epochs,) = found(
        "nested", RANDOM, ("r18/c10/1", "r18/c10/5", "r50/c100/1", "r50/c100/5", "vit/c10/5", "mlp/c10/5")
    )
    assert "epochs of one pre-training" in epochs.finding
    assert found("nested", RANDOM) == []


def test_upgrades_differ_in_size_and_in_nothing_else():
    names = ("resnet50_moco", "resnet50_dino", "resnet18_moco", "ViT-B/32", "ViT-B/16", "mlp")
    sizes = {"num_parameters": (25e6, 25e6, 11e6, 88e6, 86e6, 1e6)}
    alone = {name: name for name in names}
    (upgrades,) = found("nested", RANDOM, names, scores=sizes, trajectories=alone)
    assert "resnet50_moco, resnet18_moco (upgrades of one family)." in upgrades.finding and upgrades.value == 2
    assert found("nested", RANDOM, names, scores={"num_parameters": (25e6,) * 6}, trajectories=alone) == []


def test_targets_that_agree_make_a_fixed_list_do():
    (alike,) = found("agreement of targets", np.linspace(0.5, 0.9, 6) + 0.001 * RANDOM)
    (different,) = found("agreement of targets", RANDOM)
    assert (alike.value, alike.passed) == (1, False)
    assert different.passed and different.value == pytest.approx(kendall_w(RANDOM))
    (fixed,) = found("fixed list", np.linspace(0.5, 0.9, 6) + 0.001 * RANDOM)
    assert (fixed.value, fixed.passed) == (1, False)
    taus = []
    for target, own in enumerate(RANDOM):
        ranks = [np.argsort(np.argsort(-row)) for i, row in enumerate(RANDOM) if i != target]
        taus.append(weighted_kendall(-np.mean(ranks, axis=0), own))
    (fixed,) = found("fixed list", RANDOM)
    assert (fixed.value, fixed.low, fixed.high) == pytest.approx((np.mean(taus), min(taus), max(taus)))
    assert f"lowest: {min(taus):.2f} on {TARGETS[int(np.argmin(taus))]}" in fixed.finding
    (single,) = found("agreement of targets", RANDOM[:1], targets=("x",))
    assert single.passed is None and "With one target" in single.finding


def test_a_checkpoint_that_decides_the_result_is_named():
    accuracies = np.array((0.5, 0.6, 0.7, 0.8, 0.85, 0.9))
    score = np.array((5.0, 4.0, 3.0, 2.0, 1.0, 9.0))  # wrong but for the best one
    (decided, right) = found("single checkpoints", accuracies, targets=("x",), scores={"s": score, "right": accuracies})
    without = [weighted_kendall(np.delete(score, i), np.delete(accuracies, i)) for i in range(6)]
    assert (decided.low, decided.high) == pytest.approx((min(without), max(without)))
    assert not decided.passed and f"most without f ({without[5]:.2f})" in decided.finding
    assert right.passed and "is 1.00, whichever checkpoint is left out" in right.finding


def test_single_checkpoints_are_over_the_targets_of_the_table():
    """A score that is constant on a target has no mean in the table, and none here."""
    score = RANDOM.copy()
    score[1] = 0
    rows = found("single checkpoints", RANDOM, scores={"s": score, "t": RANDOM})
    assert [row.subject for row in rows if row.subject in ("s", "t")] == ["t"]
    (few,) = found("single checkpoints", RANDOM[:, :3], NAMES[:3], scores={"s": RANDOM[:, :3]})
    assert few.passed is None and few.finding.startswith("Fewer than 4 checkpoints")


def test_every_finding_is_one_sentence_or_more_without_gaps():
    spreads = keyed(0.01)
    scores = {name: keyed(RANDOM) for name in ("logme", "num_parameters")}
    evidence = make("finetune", keyed(RANDOM), scores, spreads=spreads, num_seeds=dict.fromkeys(spreads, 3),
                    trajectories={"a": "run", "b": "run"})  # fmt: skip
    rows = check_rows(evidence)
    assert {row.check for row in rows} == set(CHECKS) - {"gaps in points"}  # the gaps are translated
    for row in rows:
        assert row.finding.endswith(".") and "nan" not in row.finding and "None" not in row.finding
        assert row.finding[0].isupper() or row.finding[0] in "xyz2"
        assert row.passed in (True, False, None) and type(row.value) in (float, type(None))


# --- the verdict


def judged(score, difference, low, high, baseline="num_parameters"):
    return {
        "method": "finetune", "score": score, "baseline": baseline, "kendall": (difference or 0) + 0.2,
        "difference": difference, "difference_low": low, "difference_high": high, "num_checkpoints": 12,
    }  # fmt: skip


LIST = judged("num_parameters", None, None, None)
AHEAD, BEHIND = judged("logme", 0.3, 0.1, 0.5), judged("leep", -0.3, -0.5, -0.1)
UNCLEAR, SAME = judged("nce", 0.1, -0.1, 0.3), judged("mine", 0.0, None, None)
NONE = judged("leep", None, None, None)
VERDICTS = {
    "one ahead": (
        [LIST, AHEAD],
        ["LogME earned its cost: it orders the checkpoints better than the list by number of"],
    ),
    "two ahead": (
        [LIST, AHEAD, {**AHEAD, "score": "leep"}],
        ["LogME and LEEP earned their cost: they order", "Each of the 2 scores compared has a chance of one in forty"],
    ),
    "none ahead": (
        [LIST, UNCLEAR, NONE],
        ["No score earned its cost: the one score does not order", "Taking the largest"],
    ),
    "two unclear": ([LIST, UNCLEAR, SAME], ["none of 2 scores orders the checkpoints better"]),
    "the same order": ([LIST, SAME], ["No score earned its cost"]),
    "behind": ([LIST, BEHIND], ["No score earned its cost", "LEEP does worse than the list by number of parameters"]),
    "no values": ([LIST, NONE], ["cannot be said: no score has a value for every checkpoint"]),
    "no list": ([judged("logme", None, None, None, "")], ["cannot be said: there is no list to compare with"]),
    "another list ahead": (
        [LIST, AHEAD, judged("forward_gflops", 0.35, 0.1, 0.5), judged("average_rank", 0.9, 0.8, 1)],
        [
            "LogME earned its cost",
            "no score orders them better than the list by work of a forward pass, which needs no"
            " data of the target either: its tau is 55, that of the best score, LogME, 50.",
        ],
    ),
    "other lists behind": ([LIST, AHEAD, judged("last_epoch", 0.2, 0.1, 0.3)], ["LogME earned its cost"]),
    "no scores": ([LIST, judged("average_rank", 0.3, 0.1, 0.5)], ["There are no scores here"]),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict_says_whether_a_score_earned_its_cost(case):
    rows, expected = VERDICTS[case]
    sentences = verdict(rows, "finetune")
    assert all(part in " ".join(sentences) for part in expected)
    assert (ELSEWHERE in sentences) == (case != "no scores")
    assert ("That list was not fixed beforehand" in " ".join(sentences)) == (case == "another list ahead")
    assert verdict(rows, "probe") == []


def test_judge_adds_pooled_scores():
    rng = np.random.default_rng(0)
    evidence = make("finetune", keyed(RANDOM), {"s": keyed(RANDOM + 0.1 * rng.normal(size=(3, 6)))})
    files = judge(evidence)
    assert {row.score for row in files["ranking"]} == {"s", "average_rank", "pooled"}
    assert {row.score for row in files["points"]} == {"s"} and len(files["predictions"]) == 18
