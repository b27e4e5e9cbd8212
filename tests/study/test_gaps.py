"""Rankings with missing values: they are reported, and nothing is ranked or averaged without them."""

import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.reports import Elements
from helpers.studies import TARGET, one_epoch_config
from jax_transfer import results
from jax_transfer.analysis import SCORES
from jax_transfer.records import Features
from jax_transfer.report import tables, trust
from jax_transfer.report.trust import INTERVAL, METRICS, SCORED, trust_note, trust_rows, trust_table
from jax_transfer.results import RankingRow, Rows, ScoreRow, TransferRow, read_rows, to_json_dict
from jax_transfer.study import pretrain as pretrain_stage
from jax_transfer.study import report as report_stage
from jax_transfer.study import scores as score_stage
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.finetune import FINETUNE_SCORES
from jax_transfer.trust.measure import ranking_row

OVER_ALL = [  # measures over all checkpoints
    *("pearson", "kendall", "weighted_kendall", "recall_at_1", "recall_at_3", "rel_at_1", "rel_at_3", "regret"),
    *("kendall_low", "kendall_high"),
]
finite = st.floats(0, 1).map(lambda x: round(x, 2))
missing = st.sampled_from((math.nan, math.inf, None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(finite | missing, finite | missing), min_size=2, max_size=14))
def test_measures_over_all_checkpoints_need_every_value(pairs):
    scores, accuracies = zip(*pairs, strict=True)
    row = ranking_row("t", "probe", "logme", scores, accuracies)
    scored = sum(tables.is_number(s) and tables.is_number(a) for s, a in pairs)
    assert (row.num_checkpoints, row.num_scored) == (len(pairs), scored)
    values = [getattr(row, column) for column in OVER_ALL]
    if scored < len(pairs):
        assert all(map(math.isnan, values))
    elif len(set(scores)) == len(set(accuracies)) == len(pairs):  # no ties
        assert all(map(math.isfinite, values[:-2]))


# --- a study


def write_rows(work, target, scores, accuracies):
    """Writes rows of scores {name: [k]} and accuracies {method: [k]}: NaN is a failure, and None means no row."""
    transfer = [
        TransferRow(
            s.name, work.epoch(s), target, method, 0, 0.1, a, a, 9, 9, 1.0, 1.0, "diverged" if math.isnan(a) else ""
        )
        for method, values in accuracies.items()
        for s, a in zip(work.snapshots, values, strict=True)
        if a is not None
    ]
    scored = [
        ScoreRow(s.name, work.epoch(s), target, name, v, 0.1, 1.0, 1.0, "failed" if math.isnan(v) else "")
        for name, values in scores.items()
        for s, v in zip(work.snapshots, values, strict=True)
        if v is not None
    ]
    for name, new in (("transfer", transfer), ("scores", scored)):
        rows = Rows(work.results, name)
        rows.replace([*(row for row in rows.rows if row.target != target), *new])


def workspace(tmp_path, **changes):
    changes = {"pretrain__epochs": 11, "trajectory__epochs": "all", "scores": ("logme", "leep"), **changes}
    return Workspace(one_epoch_config(**changes), tmp_path)


def read(work, name):
    return [json.loads(line) for line in (work.results / f"{name}.jsonl").read_text().splitlines()]


SCORE = np.arange(12) / 12
CASES = {  # missing scores and accuracies, then how many of 12 checkpoints have an accuracy and LogME, or LEEP
    "nothing": ({}, {}, 12, 12),
    "a failed score": ({3: math.nan}, {}, 12, 11),
    "missing scores": ({0: None, 7: None, 11: None}, {}, 12, 9),
    "no value of a score": (dict.fromkeys(range(12)), {}, 12, 0),
    "a failed fine-tuning": ({}, {5: math.nan}, 11, 11),
    "an unfinished fine-tuning": ({}, {11: None}, 11, 11),
    "both, for different checkpoints": ({2: None}, {4: math.nan}, 11, 10),
    "both, for one checkpoint": ({2: None}, {2: math.nan}, 11, 11),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_values_are_reported_and_not_ranked(tmp_path, case):
    missing_leep, missing_accuracies, *counts = CASES[case]
    work = workspace(tmp_path)
    leep = [missing_leep.get(i, float(SCORE[i])) for i in range(12)]
    tuned = [missing_accuracies.get(i, float(SCORE[i])) for i in range(12)]
    write_rows(work, TARGET, {"logme": list(SCORE), "leep": leep}, {"finetune": tuned})
    report_stage.run(work)
    rows = {row["score"]: row for row in read(work, "ranking")}
    names = {"logme": "LogME", "leep": "LEEP"}
    text = Elements((tmp_path / "report/index.html").read_text(encoding="utf-8")).text
    with open(tmp_path / "report/ranking.csv", newline="", encoding="utf-8") as file:
        lines = {line["score"]: line for line in csv.DictReader(file)}
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(trust_table(read(work, "ranking"), read(work, "scores"), "finetune"))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    for (score, name), count in zip(names.items(), counts, strict=True):
        row, columns = rows[score], [results.COLUMNS.get(c, c) for c in OVER_ALL]
        assert (row["num_checkpoints"], row["num_scored"]) == (12, count)
        assert all((row[c] is None) == (count < 12) for c in columns)
        assert all((lines[score][c] == "") == (count < 12) for c in columns)
        assert (f"{name} {count} of 12 scored" in text) == (count < 12)
        assert (f"{count} of 12 scored" in printed) == (min(counts) < 12)
    (cells,) = [c for c in trust_rows(read(work, "ranking"), read(work, "scores"), "finetune") if c["Score"] == "LEEP"]
    assert all((cells[title] == tables.EN_DASH) == (counts[1] < 12) for title in METRICS)
    assert cells.get(SCORED) == (f"{counts[1]} of 12" if min(counts) < 12 else None)


def test_a_random_initialisation_is_shown_and_not_ranked(tmp_path):
    """It has the second best accuracy, so that each score would rank worse with it."""
    work = workspace(tmp_path, checkpoints=("random:resnet10?width=8",))
    assert [s.name for s in work.snapshots][-1] == "random resnet10?width=8"
    scores = {"logme": [*SCORE, -1.0], "leep": [*SCORE, None]}
    write_rows(work, TARGET, scores, {"finetune": [*SCORE, 0.9]})
    report_stage.run(work)
    for row in read(work, "ranking"):
        assert (row["num_checkpoints"], row["num_scored"], row["recall@1"]) == (12, 12, 1.0)
        assert row["kendall"] == pytest.approx(1.0)
    assert "random resnet10" in (tmp_path / "report/index.html").read_text(encoding="utf-8")


def test_epochs_excluded_by_the_config_are_not_missing(tmp_path):
    """config.finetune.checkpoints leaves epochs out on purpose."""
    work = workspace(tmp_path, finetune__checkpoints="0,5,11")
    tuned = [float(SCORE[i]) if i in (0, 5, 11) else None for i in range(12)]
    write_rows(work, TARGET, {"logme": list(SCORE)}, {"finetune": tuned, "probe": list(SCORE)})
    report_stage.run(work)
    counts = {
        r["method"]: (r["num_scored"], r["num_checkpoints"]) for r in read(work, "ranking") if r["score"] == "logme"
    }
    assert counts == {"finetune": (3, 3), "probe": (12, 12)}


@pytest.mark.parametrize(("sizes", "expected"), [((9.0, 9.0), "last_epoch"), ((9.0, 20.0), "num_parameters")])
def test_scores_are_compared_with_size_if_it_differs_and_else_with_the_epoch(tmp_path, sizes, expected):
    """As in studies of one model, or of two."""
    work = workspace(tmp_path)
    lists = {"num_parameters": np.repeat(sizes, 6).tolist(), "last_epoch": list(map(float, range(12)))}
    write_rows(work, TARGET, {"logme": list(SCORE), **lists}, {"finetune": list(SCORE[::-1])})
    report_stage.run(work)
    rows = {row["score"]: row for row in read(work, "trust")}
    assert {row["baseline"] for row in rows.values()} == {expected}
    assert rows["logme"]["difference"] == pytest.approx(-1 - rows[expected]["kendall"])
    assert rows["logme"]["num_checkpoints"] == 12 and len(read(work, "checklist")) > 3


# --- means over targets


numbers = st.none() | st.floats(0.01, 1).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=4))
def test_all_scores_are_averaged_over_the_same_targets(values):
    """Values: [targets, scores]. A cell is the mean over all targets with a value of any score, or an en dash."""
    names = ("logme", "leep", "nce")
    rows = [
        to_json_dict(RankingRow(f"folder:/t{t}", "probe", name, *[v] * 7, 12, v, v, v, 12))
        for t, line in enumerate(values)
        for name, v in zip(names, line, strict=True)
    ]
    used = [line for line in values if any(v is not None for v in line)]
    cells = {row["Score"]: row for row in trust_rows(rows, [], "probe")}
    for i, name in enumerate(names):
        own = [line[i] for line in used]
        expected = f"{100 * np.mean(own):.2f}" if own and None not in own else tables.EN_DASH
        shown = {cells[tables.score_name(name)][title] for title in METRICS}
        assert shown == {expected} or {abs(float(s) - float(expected)) < 0.011 for s in shown} == {True}
        assert (cells[tables.score_name(name)][INTERVAL] == tables.EN_DASH) == (expected == tables.EN_DASH)
    note = trust_note(rows, [], "probe")
    left_out = [f"t{t}" for t, line in enumerate(values) if line not in used]
    if 0 < len(left_out) < len(values):
        assert f"No score has a value on {', '.join(left_out)}" in note
        assert f"are over {len(used)} of {len(values)} targets" in note
    else:
        assert "No score has" not in note


@pytest.mark.parametrize("incomplete", (False, True))
@pytest.mark.parametrize("gflops", (1.5e-7, 0.083, 3.25e-12, 7.4e11))
def test_terminal_table_truncates_no_number(incomplete, gflops):
    rows, scored = [], []
    for score in (*SCORES, *FINETUNE_SCORES):
        one = RankingRow("t", "finetune", score, *[-1.0] * 7, 100, -1.0, -0.994, 0.104, 99 if incomplete else 100)
        rows.append(to_json_dict(one))
        scored.append(to_json_dict(ScoreRow("0", 0, "t", score, 0.5, 1.0, gflops, gflops, "", gflops)))
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(trust_table(rows, scored, "finetune"))
    printed = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed and max(map(len, printed.splitlines())) <= 80
    for cell in (cell for row in trust_rows(rows, scored, "finetune", terminal=True) for cell in row.values()):
        assert all(word in printed for word in cell.split())


def test_target_without_rows_of_a_score_counts_as_missing():
    row = RankingRow("folder:/a", "probe", "logme", *[0.5] * 7, 12, 0.1, 0.8, 0.0, 12)
    others = [dataclasses.replace(row, target=t, score=s) for t, s in (("folder:/b", "logme"), ("folder:/a", "nce"))]
    rows = [to_json_dict(r) for r in (row, *others)]
    cells = {r["Score"]: r for r in trust_rows(rows, [], "probe")}
    assert cells["LogME"]["Kendall"] == "50.00" and cells["LogME"][SCORED] == "24 of 24"
    assert cells["NCE"]["Kendall"] == tables.EN_DASH and cells["NCE"][SCORED] == "12 of 24"
    assert "NCE 12 of 24 scored" in trust_note(rows, [], "probe")


def test_rows_without_num_scored_count_as_complete(tmp_path):
    row = to_json_dict(RankingRow("a", "probe", "logme", *[0.5] * 7, 12, 0.1, 0.8, 0.0))
    old = {name: value for name, value in row.items() if name not in ("num_scored", "metric")}
    (tmp_path / "ranking.jsonl").write_text(json.dumps(old) + "\n")
    (read_again,) = read_rows(tmp_path / "ranking.jsonl")
    assert read_again["metric"] == "accuracy"
    (cells,) = trust.trust_rows([read_again], [], "probe")
    assert SCORED not in cells and cells["Kendall"] == "50.00"


# --- LEEP and NCE without a head over classes


@pytest.mark.parametrize("has_head", (True, False))
def test_head_scores_need_a_head_over_classes(tmp_path, monkeypatch, has_head):
    make = OBJECTIVES["supervised"]
    monkeypatch.setitem(OBJECTIVES, "other", lambda net, augment: make(net, augment)._replace(has_head=has_head))
    scores = ("logme", *(name for name, score in SCORES.items() if score.needs == "logits"))
    work = workspace(tmp_path, pretrain__objective="other", pretrain__epochs=1, scores=scores)
    monkeypatch.setattr(work, "gigaflops_per_image", lambda pretraining: 1.0)
    labels = work.source(TARGET, "train").labels
    normal = np.random.default_rng(0).normal(size=(len(labels), 80)).astype(np.float32)
    features = {"train": Features(normal[:, :64], normal[:, 64:], labels)}
    test = work.source(TARGET, "test").labels
    features["test"] = Features(normal[: len(test), :64], normal[: len(test), 64:], test)
    monkeypatch.setattr(work, "features", lambda snapshot, dataset, split: features[split])
    write_rows(work, TARGET, {}, {"probe": [0.5, 0.6]})
    score_stage.run(work)
    report_stage.run(work)
    found = [row for row in read(work, "scores") if row["score"] in scores]
    counts = {name: sum(row["score"] == name for row in found) for name in scores}
    assert counts == {"logme": 2, "leep": 2 * has_head, "nce": 2 * has_head}  # the untrained epoch 0 counts
    assert not any(row["error"] for row in found)
    ranked = [row for row in read(work, "ranking") if row["score"] in scores]
    scored = {row["score"]: (row["num_scored"], row["num_checkpoints"]) for row in ranked}
    assert scored == {"logme": (2, 2), "leep": (2 * has_head, 2), "nce": (2 * has_head, 2)}
    text = Elements((tmp_path / "report/index.html").read_text(encoding="utf-8")).text
    assert ("LEEP 0 of 2 scored" in text) != has_head and "What failed" not in text
    row = results.PretrainRow(0, math.nan, math.nan, 0.1, 1.0, 1.0, work.sources[0], "0", "resnet10")
    assert pretrain_stage._metadata(work, work.pretrainings[0], row)["has_head"] == has_head
