"""Reads a table of accuracies and scores that somebody else made, as the evidence by which its scores are judged."""

import csv
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_transfer.records import InputError, printable
from jax_transfer.report.tables import listed
from jax_transfer.trust.evidence import Evidence, make

REQUIRED = ("target", "checkpoint", "accuracy")
OPTIONAL = ("spread", "seeds", "trajectory", "family")  # all other columns are scores or naive lists
USUAL_SEEDS = 3  # of an accuracy whose spread is given without their number
NAMED = 3  # as many lines or names are listed


class Line(NamedTuple):
    """A line of a table: its number in the file, and the text of each column."""

    number: int
    cells: dict[str, str]


def read_table(path: pathlib.Path, method: str = "finetune") -> tuple[Evidence, list[str]]:
    """Reads a CSV file with a line for each target and checkpoint.

    Columns: target, checkpoint and accuracy, in [0, 1]; optionally spread (highest minus lowest accuracy over seeds),
    seeds (their number, 3 by default), trajectory (what pre-trained the checkpoint, for epochs of one pre-training) and
    family (of its architecture; by default read from its name). Every other column is a score, higher is better, or one
    of the lists in `evidence.NAIVE`; a score may have empty cells.

    Args:
      path: the file, in UTF-8, with commas.
      method: what the accuracies are, a key of `report.tables.METHODS`.

    Returns:
      The evidence, and a sentence on each thing that makes it weaker than it could be.

    Raises:
      InputError: if the file cannot be read or has no lines, a column or an accuracy is missing, a number is text or
        out of range, a line occurs twice, or a target has a single checkpoint.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "table.csv"
    ...     _ = path.write_text("target,checkpoint,accuracy,logme\\npets,a,0.8,1.2\\npets,b,0.9,\\n")
    ...     evidence, notes = read_table(path)
    >>> evidence.accuracies.tolist(), notes[1]
    ([[0.8, 0.9]], 'logme has no value in 1 of 2 lines (b on pets), so it cannot be judged on pets.')
    """
    lines = _read(path)
    _check(lines, path)
    accuracies, scores = {}, {name: {} for name in lines[0].cells if name not in (*REQUIRED, *OPTIONAL)}
    spreads, seeds, trajectories, families = {}, {}, {}, {}
    for line in lines:
        target, checkpoint = line.cells["target"], line.cells["checkpoint"]
        key = (target, checkpoint)
        accuracies[key] = _number(path, line, "accuracy", highest=1.0)
        if line.cells.get("spread"):
            spreads[key] = _number(path, line, "spread", highest=1.0)
            seeds[key] = int(_number(path, line, "seeds", 2.0, 1000.0)) if line.cells.get("seeds") else USUAL_SEEDS
        for names, column in ((trajectories, "trajectory"), (families, "family")):
            if line.cells.get(column):
                names[checkpoint] = line.cells[column]
        for name, values in scores.items():
            if line.cells[name]:
                values[key] = _number(path, line, name, -math.inf, math.inf)
    evidence = make(
        method,
        accuracies,
        scores,
        spreads=spreads,
        num_seeds=seeds,
        trajectories=trajectories,
        families=families,
    )
    single = [t for t, own in zip(evidence.targets, evidence.expected, strict=True) if own.sum() < 2]
    if single:
        raise InputError(f"{path}: {single[0]} has a single checkpoint: at least two are needed to rank them.")
    return evidence, [*_notes(evidence, accuracies, scores)]


def _read(path: pathlib.Path) -> list[Line]:
    """Returns the lines of the file that are not empty."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a CSV file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a CSV file in UTF-8 ({error}): save it as such.") from error
    columns = [name.strip() for name in rows[0]] if rows else []
    if missing := [name for name in REQUIRED if name not in columns]:
        has = f" It has {', '.join(map(printable, columns))}." if columns else " It is empty."
        raise InputError(f"{path}: there is no column {listed(missing)}; {listed(REQUIRED)} are needed.{has}")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"{path}: column {printable(twice[0])!r} occurs twice: rename or remove one.")
    lines = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(columns):
            raise InputError(f"{path}, line {number}: has {len(row)} cells, and there are {len(columns)} columns.")
        lines.append(Line(number, dict(zip(columns, (cell.strip() for cell in row), strict=True))))
    if not lines:
        raise InputError(f"{path}: has no lines below its header: expected one for each target and checkpoint.")
    return lines


def _check(lines: list[Line], path: pathlib.Path) -> None:
    """Checks that each line names a target and a checkpoint and has an accuracy, and that no two are of the same."""
    seen = {}
    for number, cells in lines:
        if missing := [name for name in REQUIRED if not cells[name]]:
            raise InputError(f"{path}, line {number}: {listed(missing)} is empty: fill it in, or remove the line.")
        key = (cells["target"], cells["checkpoint"])
        if key in seen:
            raise InputError(
                f"{path}, line {number}: {printable(key[1])} on {printable(key[0])} is in line {seen[key]} already: "
                "remove one."
            )
        seen[key] = number


def _number(path: pathlib.Path, line: Line, column: str, lowest: float = 0.0, highest: float = math.inf) -> float:
    """Returns the number in a cell."""
    text, where = line.cells[column], f"{path}, line {line.number}: {printable(column)}"
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where} is {printable(text)!r}: expected a number.") from None
    if not math.isfinite(value) or not lowest <= value <= highest:
        percent = " Divide percentages by 100." if highest == 1.0 and 1 < value <= 100 else ""
        among = f"a number from {lowest:g} to {highest:g}" if math.isfinite(highest) else "a finite number"
        raise InputError(f"{where} is {printable(text)}: expected {among}.{percent}")
    return value


def _notes(evidence: Evidence, accuracies: dict, scores: dict[str, dict]) -> Iterator[str]:
    """Yields a sentence on each thing that makes the evidence weaker than it could be."""
    if len(evidence.targets) == 1:
        yield (
            f"{evidence.targets[0]} is the only target: no list from other targets can be compared, and no gap in a "
            "score translated into accuracy."
        )
    for t, target in enumerate(evidence.targets):
        own = evidence.expected[t]
        if absent := [c for c, has in zip(evidence.checkpoints, own, strict=True) if not has]:
            yield f"{target} lacks {_some(absent)}: it is judged by the others, and no fixed list is compared."
        if not np.ptp(evidence.accuracies[t, own]):
            yield f"All accuracies on {target} are equal, so no score can be judged on it."
    for name, values in scores.items():
        missing = [key for key in accuracies if key not in values]
        if missing:
            targets = _some(list(dict.fromkeys(target for target, _ in missing)))
            where = _some([f"{checkpoint} on {target}" for target, checkpoint in missing])
            yield (
                f"{name} has no value in {len(missing)} of {len(accuracies)} lines "
                f"({where}), so it cannot be judged on {targets}."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
