"""Ranks the checkpoints of several studies together, from the result files of their working directories."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

from jax_transfer import devices, fields
from jax_transfer.fields import Listed, StudyConfig, to_json
from jax_transfer.logs import log
from jax_transfer.records import InputError
from jax_transfer.report.page import write_report
from jax_transfer.report.tables import listed
from jax_transfer.results import Rows, TargetRow, lock_workdir, write_atomically
from jax_transfer.study.stages import written_by
from jax_transfer.study.trust import judge_results

FILES = ("pretrain", "transfer", "scores", "checkpoints")  # the result files whose rows name a checkpoint


@dataclasses.dataclass(frozen=True)
class UnionFields:
    """Fields of configs/neucrab_union.py."""

    # The title of the page.
    name: str = "union"
    # Working directories of studies. One that has no results yet is left out.
    unite: Annotated[tuple[str, ...], Listed(filled=True, unique=True)] = ()


def default_config() -> StudyConfig:
    """Returns the config of a union with its default values.

    >>> default_config().unite
    ()
    """
    return fields.section(fields.schema(UnionFields()))


def run(config: StudyConfig, workdir: pathlib.Path) -> pathlib.Path:
    """Unites the results of several studies in a working directory, judges all scores anew, and writes the page.

    Nothing else is computed. Checkpoints are named "STUDY/CHECKPOINT", after the last part of the directory. Targets
    that a study has not evaluated are left out.

    Returns:
      The folder of the result files.

    Raises:
      InputError: if the config is not valid, no directory has results, or they share no target.
    """
    fields.check(config.to_dict(), fields.schema(UnionFields()), "config")
    folders = _named([pathlib.Path(path) for path in config.unite])
    present = {name: path for name, path in folders.items() if _has_results(path)}
    for name in folders.keys() - present.keys():
        log.warning("%s has no results yet: it is left out.", folders[name])
    if not present:
        raise InputError(f"config.unite: none of {listed([str(path) for path in folders.values()])} has results yet.")
    targets = _shared_targets(present)
    lock = lock_workdir(workdir)
    try:
        if devices.is_first_process():
            write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=1).encode())
        results = workdir / "results"
        for file in FILES:
            rows = [
                dataclasses.replace(row, checkpoint=f"{name}/{row.checkpoint}")
                for name, path in present.items()
                for row in Rows(path / "results", file).rows
                if getattr(row, "target", targets[0].target) in [row.target for row in targets]
            ]
            Rows(results, file).replace(rows)
        Rows(results, "targets").replace(targets)
        for file, rows in judge_results(results, {row.target: row.metric for row in targets}).items():
            Rows(results, file).replace(rows)
        if devices.is_first_process():
            log.info("Report: %s", write_report(workdir, written_by()))
    finally:
        lock.close()
    return results


def _has_results(path: pathlib.Path) -> bool:
    return all((path / "results" / f"{file}.jsonl").exists() for file in ("targets", "transfer"))


def _named(paths: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Names each directory by its last part.

    Raises:
      InputError: if two have the same last part.
    """
    names: dict[str, pathlib.Path] = {}
    for path in paths:
        name = path.resolve().name
        if name in names:
            raise InputError(
                f"config.unite: {names[name]} and {path} have the same last part, by which checkpoints are named."
            )
        names[name] = path
    return names


def _shared_targets(folders: dict[str, pathlib.Path]) -> list[TargetRow]:
    """Returns the targets that all studies have, and logs the others.

    Raises:
      InputError: if there are none, or two studies judge one by different metrics.
    """
    by_study = {
        name: {row.target: row for row in Rows(path / "results", "targets").rows} for name, path in folders.items()
    }
    first, *others = by_study.values()
    shared = [row for target, row in first.items() if all(target in rows for rows in others)]
    if not shared:
        raise InputError(f"config.unite: {listed(list(by_study))} share no target: there is nothing to rank together.")
    for row in shared:
        metrics = {name: rows[row.target].metric for name, rows in by_study.items()}
        if len(set(metrics.values())) > 1:
            raise InputError(
                f"config.unite: {row.target} is judged by {listed([f'{m} in {name}' for name, m in metrics.items()])}: "
                "set config.metrics of the studies alike, and run their report again."
            )
    left = dict.fromkeys(t for rows in by_study.values() for t in rows if t not in [row.target for row in shared])
    if left:
        log.warning("%s left out: not every study has evaluated it.", listed(list(left)))
    return shared
