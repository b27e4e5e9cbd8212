"""The "report" stage: records how well each score ranks the checkpoints, and writes the page with all results."""

import math
from collections.abc import Mapping, Sequence

from jax_transfer import devices
from jax_transfer.data.catalog import known_overlap
from jax_transfer.logs import log
from jax_transfer.ranking.candidates import Candidate
from jax_transfer.report.best import accuracy_by, with_metrics
from jax_transfer.report.kinds import family_of
from jax_transfer.report.page import write_report
from jax_transfer.results import GRID, Rows, ScoreRow, TargetRow, TransferRow, is_plain, to_json_dict
from jax_transfer.study import settings
from jax_transfer.study.epochs import Saved, Snapshot, finetuned_snapshots
from jax_transfer.study.workspace import Workspace
from jax_transfer.trust.evidence import Evidence, make
from jax_transfer.trust.judge import judge

NUM_NAMES = 10  # the number of class names that a row holds
JUDGED = ("ranking", "trust", "checklist", "points", "predictions")  # the result files of `judge`


def run(work: Workspace, written_by: Mapping[str, Sequence[str]] | None = None) -> None:
    """Records how well each score ranks the checkpoints, then writes tables, figures and the page.

    Args:
      written_by: result file -> the stages that write it, see `write_report`.
    """
    record_targets(work)
    for name, rows in _judged(work).items():
        Rows(work.results, name).replace(rows)
    if devices.is_first_process():
        log.info("Report: %s", write_report(work.workdir, written_by or {}))


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return "report/index.html"


def _judged(work: Workspace) -> dict[str, list]:
    """Judges the scores by the accuracies of each method: result file -> rows, over all methods."""
    transfer, scored = (Rows(work.results, name).rows for name in ("transfer", "scores"))
    transfer = [row for row in transfer if row.split not in GRID and is_plain(row)]
    rows: dict[str, list] = {name: [] for name in JUDGED}
    if not scored:
        return rows
    for method in dict.fromkeys(row.method for row in transfer):
        for name, judged in judge(_evidence(work, method, transfer, scored)).items():
            rows[name] += judged
    return rows


def _evidence(work: Workspace, method: str, transfer: Sequence[TransferRow], scored: Sequence[ScoreRow]) -> Evidence:
    """Collects the accuracies of a method and all scores, over all checkpoints of the method, whether scored or not.

    Random initialisations are left out, see `trained`.
    """
    measured = with_metrics(map(to_json_dict, transfer), work.metrics)
    accuracies, spreads, seeds = {}, {}, {}
    for target in work.config.targets:
        tried = [row.checkpoint for row in transfer if (row.target, row.method) == (target, method)]
        if not tried or not any(row.target == target for row in scored):
            continue
        expected = finetuned_snapshots(work.config, work.snapshots, target) if method == "finetune" else work.snapshots
        points = accuracy_by("checkpoint", measured, target, method)
        names = list(dict.fromkeys((*(snapshot.name for snapshot in expected), *tried)))
        for name in trained(names, work.snapshots):
            key, point = (target, name), points.get(name)
            accuracies[key] = point.mean if point else math.nan
            if point and point.num_seeds > 1:
                spreads[key], seeds[key] = point.high - point.low, point.num_seeds
    # A score without any value, such as LEEP for models that have no classification head, also gets a row.
    scores = {score: {} for score in work.config.scores}
    for row in scored:
        scores.setdefault(row.score, {})[row.target, row.checkpoint] = row.value
    return make(
        method,
        accuracies,
        scores,
        spreads=spreads,
        num_seeds=seeds,
        trajectories={s.name: s.origin.pretraining.name for s in work.snapshots if isinstance(s.origin, Saved)},
        families={s.name: _family(work, s) for s in work.snapshots},
        metrics=work.metrics,
    )


def _family(work: Workspace, snapshot: Snapshot) -> str:
    """Returns the family of a checkpoint's architecture, with the images and the objective of its pre-training."""
    if isinstance(snapshot.origin, Saved):
        pretraining = snapshot.origin.pretraining
        model = work.models[pretraining.model]["name"]
        return f"{family_of(model)} {pretraining.source} {pretraining.objective}"
    return family_of(snapshot.name)


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
