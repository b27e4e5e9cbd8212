"""The last stage of a study: how well each score ranks the checkpoints, and the page that shows it all."""

import math
from collections.abc import Mapping, Sequence

from jax_transfer import devices
from jax_transfer.analysis import ranking_row
from jax_transfer.logs import Rows, log
from jax_transfer.records import RankingRow, TargetRow, to_json_dict
from jax_transfer.report.best import accuracy_by, with_metrics
from jax_transfer.report.page import write_report
from jax_transfer.workspace import Workspace

NUM_NAMES = 10  # how many names of classes a row holds


def report(work: Workspace, written_by: Mapping[str, Sequence[str]] | None = None) -> None:
    """Records how well each score ranks the checkpoints, then writes tables, figures and the page.

    Args:
      written_by: result file -> the stages that write it; see `write_report`.
    """
    record_targets(work)
    Rows(work.results, "ranking").replace(_ranking(work))
    if devices.is_first_process():
        log.info("Report: %s", write_report(work.workdir, written_by or {}))


def _ranking(work: Workspace) -> list[RankingRow]:
    """A row a target, method and score: against all checkpoints that the method is to evaluate, scored or not."""
    transfer, scored = (Rows(work.results, name).rows for name in ("transfer", "scores"))
    read = with_metrics(map(to_json_dict, transfer), work.metrics)
    found = []
    for target in work.config.targets:
        values = {}
        for row in scored:
            if row.target == target:
                values.setdefault(row.score, {})[row.checkpoint] = row.value
        if values:  # a score that no checkpoint has, such as LEEP without a head over classes, is shown without values
            values = {**{score: {} for score in work.config.scores}, **values}
        for method in dict.fromkeys(row.method for row in transfer if row.target == target):
            expected = work.tuned_snapshots(target) if method == "finetune" else work.snapshots
            tried = [row.checkpoint for row in transfer if (row.target, row.method) == (target, method)]
            names = list(dict.fromkeys([*(snapshot.name for snapshot in expected), *tried]))
            points = accuracy_by("checkpoint", read, target, method)
            accuracies = [points[name].mean if name in points else math.nan for name in names]
            for score, value in values.items():
                given = [value.get(name, math.nan) for name in names]
                found.append(ranking_row(target, method, score, given, accuracies, work.metric(target)))
    return found


def record_targets(work: Workspace) -> None:
    """Writes results/targets.jsonl: what the report needs to know of the targets, for it does not open their data.

    Rows of targets that an earlier run evaluated stay as they are.
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
            list(dict.fromkeys((*train.notes, *test.notes))),
        )
        new.append(row)
    rows = Rows(work.results, "targets")
    rows.replace([*new, *(row for row in rows.rows if row.target not in work.config.targets)])
