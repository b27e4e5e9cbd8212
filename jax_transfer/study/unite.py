"""Ranks the checkpoints of several studies together, from the result files of their working directories."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated

from jax_transfer import devices, fields
from jax_transfer.fields import Listed, StudyConfig, to_json
from jax_transfer.logs import log
from jax_transfer.records import InputError
from jax_transfer.report.kinds import is_random
from jax_transfer.report.page import write_report
from jax_transfer.report.tables import counted, listed, method_name, target_names
from jax_transfer.results import (
    GRID,
    ROWS,
    Rows,
    TargetRow,
    TransferRow,
    from_json_dict,
    is_plain,
    lock_workdir,
    read_rows,
    write_atomically,
)
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

    Nothing else is computed, and the studies are only read, so one may still run. Checkpoints are named
    "STUDY/CHECKPOINT", after the last part of the directory. Targets that a study has not evaluated are left out. What
    is missing is logged and stands on the page.

    Returns:
      The folder of the result files.

    Raises:
      InputError: if the config is not valid, no directory has results, they share no target, or `workdir` holds the
        results of a study.
    """
    fields.check(config.to_dict(), fields.schema(UnionFields()), "config")
    folders = _named([pathlib.Path(path) for path in config.unite])
    _check_workdir(workdir, folders)
    present = {name: path for name, path in folders.items() if _has_results(path)}
    notes = [f"{path} has no results yet: it is left out." for name, path in folders.items() if name not in present]
    if not present:
        raise InputError(f"config.unite: none of {listed([str(path) for path in folders.values()])} has results yet.")
    targets, left = _shared_targets(present)
    if left:
        is_, it = ("is", "it") if len(left) == 1 else ("are", "them")
        notes.append(f"{listed(left)} {is_} left out: not every study has evaluated {it}.")
    lock = lock_workdir(workdir)
    try:
        results, shared = workdir / "results", [row.target for row in targets]
        united = {file: _united(present, file, shared) for file in FILES}
        expected = _expected(united)
        notes += _gaps(united, expected, list(present), shared)
        for note in notes:
            log.warning(note)
        if devices.is_first_process():
            written = json.dumps({**to_json(config), "notes": notes}, indent=1, ensure_ascii=False)
            write_atomically(workdir / "config.json", written.encode())
        for file, rows in {**united, "targets": targets}.items():
            Rows(results, file).replace(rows)
        metrics = {row.target: row.metric for row in targets}
        judged = judge_results(results, metrics, lambda method, target: expected.get(method, ()))
        for file, rows in judged.items():
            Rows(results, file).replace(rows)
        if devices.is_first_process():
            log.info("Report: %s", write_report(workdir))
    finally:
        lock.close()
    return results


def _check_workdir(workdir: pathlib.Path, folders: Mapping[str, pathlib.Path]) -> None:
    """Checks that no results of a study are overwritten.

    Raises:
      InputError: if the directory is one of those to unite, or holds anything but an earlier union.
    """
    if workdir.resolve() in [path.resolve() for path in folders.values()]:
        raise InputError(f"--workdir={workdir} is also in config.unite: choose another one.")
    config, results = workdir / "config.json", workdir / "results"
    try:
        is_union = not (config.exists() or results.exists()) or "unite" in json.loads(config.read_bytes())
    except (OSError, TypeError, ValueError):
        is_union = False
    if not is_union:
        raise InputError(f"--workdir={workdir} holds the results of a study, which would be lost: choose another one.")


def _united(folders: Mapping[str, pathlib.Path], file: str, targets: Sequence[str]) -> list:
    """Returns the rows of a result file of all studies on some targets, with the names of the union."""
    return [
        dataclasses.replace(row, checkpoint=f"{name}/{row.checkpoint}")
        for name, path in folders.items()
        for row in _read(path, file)
        if getattr(row, "target", targets[0]) in targets
    ]


def _read(folder: pathlib.Path, file: str) -> list:
    """Returns the rows of a result file of a study, if it exists, without changing it: the study may be running."""
    path = folder / "results" / f"{file}.jsonl"
    return [from_json_dict(ROWS[file][0], row) for row in read_rows(path)] if path.exists() else []


def _study(row) -> str:
    """Returns the study of a united row."""
    return row.checkpoint.partition("/")[0]


def _results(united: Mapping[str, list]) -> list[TransferRow]:
    """Returns the united rows of results/transfer.jsonl by which scores are judged."""
    return [row for row in united["transfer"] if row.split not in GRID and is_plain(row)]


def _expected(united: Mapping[str, list]) -> dict[str, list[str]]:
    """Returns method -> the checkpoints that should have an accuracy by it on every target.

    These are all evaluated checkpoints of the studies that have any accuracy by the method, so that an unfinished study
    has missing values. Random initialisations, which are not ranked, may be missing.
    """
    random = {row.checkpoint for row in united["checkpoints"] if is_random(row.path)}
    rows = _results(united)
    evaluated = dict.fromkeys(row.checkpoint for row in (*rows, *united["scores"]) if row.checkpoint not in random)
    studies: dict[str, set[str]] = {}
    for row in rows:
        studies.setdefault(row.method, set()).add(_study(row))
    return {
        method: [name for name in evaluated if name.partition("/")[0] in having] for method, having in studies.items()
    }


def _gaps(
    united: Mapping[str, list], expected: Mapping[str, Sequence[str]], studies: Sequence[str], targets: Sequence[str]
) -> list[str]:
    """Says which studies have no accuracy by a method that others have, and which lack some."""
    names = target_names(targets)
    known = {(row.method, row.target, row.checkpoint) for row in _results(united) if math.isfinite(row.accuracy)}
    notes = []
    for method, checkpoints in expected.items():
        for study in studies:
            own = [name for name in checkpoints if name.startswith(f"{study}/")]
            if not own:
                notes.append(
                    f"{study} has no {method_name(method)} accuracies: its checkpoints are not ranked by them."
                )
            for target in targets:
                if lacking := sum((method, target, name) not in known for name in own):
                    notes.append(
                        f"{study}: {lacking} of {counted(len(own), 'checkpoint')} without {method_name(method)} "
                        f"accuracy on {names[target]}, so no score is judged by it there."
                    )
    return notes


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


def _shared_targets(folders: Mapping[str, pathlib.Path]) -> tuple[list[TargetRow], list[str]]:
    """Returns the targets that all studies have, and the names of the others.

    Raises:
      InputError: if there are none, or two studies judge one by different metrics.
    """
    by_study = {name: {row.target: row for row in _read(path, "targets")} for name, path in folders.items()}
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
    everywhere = [row.target for row in shared]
    return shared, list(dict.fromkeys(t for rows in by_study.values() for t in rows if t not in everywhere))
