"""The "report" stage: records how well each score ranks the checkpoints, and writes the page with all results."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jax_transfer import devices
from jax_transfer.analysis.agreement import (
    kendall,
    kendall_interval,
    paired,
    pearson,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.choose import choose
from jax_transfer.data.catalog import known_overlap
from jax_transfer.logs import log
from jax_transfer.ranking.candidates import Candidate
from jax_transfer.records import METRICS
from jax_transfer.report.best import accuracy_by, with_metrics
from jax_transfer.report.page import write_report
from jax_transfer.results import GRID, RankingRow, Rows, TargetRow, is_plain, to_json_dict
from jax_transfer.study import settings
from jax_transfer.study.epochs import Snapshot, finetuned_snapshots
from jax_transfer.study.workspace import Workspace

NUM_NAMES = 10  # the number of class names that a row holds


def run(work: Workspace, written_by: Mapping[str, Sequence[str]] | None = None) -> None:
    """Records how well each score ranks the checkpoints, then writes tables, figures and the page.

    Args:
      written_by: result file -> the stages that write it, see `write_report`.
    """
    record_targets(work)
    Rows(work.results, "ranking").replace(_ranking(work))
    if devices.is_first_process():
        log.info("Report: %s", write_report(work.workdir, written_by or {}))


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return "report/index.html"


def _ranking(work: Workspace) -> list[RankingRow]:
    """Computes a row for each target, method and score, over all checkpoints of the method, whether scored or not.

    Random initialisations are left out, see `trained`.
    """
    transfer, scored = (Rows(work.results, name).rows for name in ("transfer", "scores"))
    transfer = [row for row in transfer if row.split not in GRID and is_plain(row)]
    measured = with_metrics(map(to_json_dict, transfer), work.metrics)
    ranking = []
    for target in work.config.targets:
        values = {}  # score -> checkpoint -> value
        for row in scored:
            if row.target == target:
                values.setdefault(row.score, {})[row.checkpoint] = row.value
        if (
            values
        ):  # a score without any value, such as LEEP for models that have no classification head, also gets a row
            values = {**{score: {} for score in work.config.scores}, **values}
        for method in dict.fromkeys(row.method for row in transfer if row.target == target):
            expected = (
                finetuned_snapshots(work.config, work.snapshots, target) if method == "finetune" else work.snapshots
            )
            tried = [row.checkpoint for row in transfer if (row.target, row.method) == (target, method)]
            names = trained(list(dict.fromkeys([*(snapshot.name for snapshot in expected), *tried])), work.snapshots)
            points = accuracy_by("checkpoint", measured, target, method)
            accuracies = [points[name].mean if name in points else math.nan for name in names]
            for score, value in values.items():
                scores = [value.get(name, math.nan) for name in names]
                ranking.append(ranking_row(target, method, score, scores, accuracies, work.metric(target)))
    return ranking


def trained(names: Sequence[str], snapshots: Sequence[Snapshot]) -> Sequence[str]:
    """Leaves out the names of random initialisations, which show what training from scratch gives.

    To rank them would be easy, and no score that needs a classification head could be compared. If fewer than two other
    checkpoints remain, all names are kept.

    >>> snapshots = [Snapshot(Candidate("random resnet18", None, "resnet18"), "random resnet18")]
    >>> trained(["1", "2", "random resnet18"], snapshots), trained(["1", "random resnet18"], snapshots)
    (['1', '2'], ['1', 'random resnet18'])
    """
    random = {s.name for s in snapshots if isinstance(s.origin, Candidate) and s.origin.path is None}
    rest = [name for name in names if name not in random]
    return rest if len(rest) > 1 else names


def record_targets(work: Workspace) -> None:
    """Writes results/targets.jsonl, so that the report can describe the targets without opening their data.

    Rows for targets that only an earlier run evaluated are kept.
    """
    new = []
    for target in work.config.targets:
        train, test = (work.source(target, split) for split in ("train", "test"))
        row = TargetRow(
            target,
            work.metric(target),
            train.num_classes,
            list(train.class_names[:NUM_NAMES]),
            len(train),
            len(test),
            list(dict.fromkeys((*train.notes, *test.notes, *_known_overlap(work, target)))),
        )
        new.append(row)
    rows = Rows(work.results, "targets")
    rows.replace([*new, *(row for row in rows.rows if row.target not in work.config.targets)])


def _known_overlap(work: Workspace, target: str) -> list[str]:
    """Returns what is known of images that a target shares with the source images that the study reuses."""
    reuses = settings.finetune_settings(work.config, target).reuse or "select" in work.config.stages
    return list(filter(None, [known_overlap(work.reused, target)])) if reuses else []


def ranking_row(
    target: str, method: str, score: str, scores: ArrayLike, accuracies: ArrayLike, metric: str = "accuracy"
) -> RankingRow:
    """Computes a row of `results/ranking.jsonl`: how well `score` predicts the accuracies of `method` on `target`.

    >>> row = ranking_row("tfds:mnist", "probe", "logme", scores=[0.1, 0.4, 0.3], accuracies=[0.7, 0.9, 0.8])
    >>> row.kendall, row.recall_at_1, row.num_scored
    (1.0, 1.0, 3)

    Args:
      scores, accuracies: [k], one for each checkpoint of the study; NaN (or None) if a checkpoint has none. If any is
        missing, the correlations, Recall@k, Rel@k and regret, which need all checkpoints, are NaN.
      metric: the metric of the accuracies, a key of `records.METRICS`.
    """
    choose(METRICS, metric, "metric")
    scores, accuracies = paired(scores, accuracies)
    low, high = kendall_interval(scores, accuracies)
    return RankingRow(
        target=target,
        method=method,
        score=score,
        pearson=pearson(scores, accuracies),
        kendall=kendall(scores, accuracies),
        weighted_kendall=weighted_kendall(scores, accuracies),
        recall_at_1=recall_at_k(scores, accuracies, 1),
        recall_at_3=recall_at_k(scores, accuracies, 3),
        rel_at_1=relative_accuracy_at_k(scores, accuracies, 1),
        rel_at_3=relative_accuracy_at_k(scores, accuracies, 3),
        num_checkpoints=len(scores),
        kendall_low=low,
        kendall_high=high,
        regret=regret(scores, accuracies),
        num_scored=int(np.sum(np.isfinite(scores) & np.isfinite(accuracies))),
        metric=metric,
    )
