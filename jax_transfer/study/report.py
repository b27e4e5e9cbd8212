"""The "report" stage: records how well each score ranks the checkpoints, and writes the page with all results."""

from collections.abc import Mapping, Sequence

from jax_transfer import devices
from jax_transfer.data.catalog import known_overlap
from jax_transfer.logs import log
from jax_transfer.report.page import write_report
from jax_transfer.results import Rows, TargetRow
from jax_transfer.study import settings
from jax_transfer.study.epochs import finetuned_snapshots
from jax_transfer.study.trust import judge_results
from jax_transfer.study.workspace import Workspace

NUM_NAMES = 10  # the number of class names that a row holds


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
    """Judges the scores of a study by the accuracies of each method, over all checkpoints that it should evaluate."""

    def expected(method: str, target: str) -> list[str]:
        tuned = method == "finetune"
        snapshots = finetuned_snapshots(work.config, work.snapshots, target) if tuned else work.snapshots
        return [snapshot.name for snapshot in snapshots]

    return judge_results(work.results, work.metrics, expected, work.config.scores)


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
