"""Reads a table of accuracies and scores that somebody else made, as the evidence by which its scores are judged."""

import csv
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_transfer.records import InputError, printable
from jax_transfer.report.tables import listed
from jax_transfer.trust.evidence import AVERAGE_RANK, NAIVE, Evidence, make, trajectory_of
from jax_transfer.trust.points import POOLED

REQUIRED = ("target", "checkpoint", "accuracy")
OPTIONAL = ("spread", "seeds", "trajectory", "family")  # all other columns are scores or naive lists
COMPUTED = (AVERAGE_RANK, POOLED)  # from the other columns
OF_A_CHECKPOINT = ("trajectory", "family", *NAIVE)  # these do not depend on the target
USUAL_SEEDS = 3  # of an accuracy whose spread is given without their number
MOST_SEEDS = 1000
LARGEST = 1e100  # the squares of much larger numbers, as in a standard deviation, would overflow
NAMED = 3  # as many lines or names are listed
MANY = 12  # the same for the columns of a file


class Line(NamedTuple):
    """A line of a table: its number in the file, and the text of each column."""

    number: int
    cells: dict[str, str]


def read_table(path: pathlib.Path, method: str = "finetune") -> tuple[Evidence, list[str]]:
    """Reads a CSV file with a line for each target and checkpoint.

    Columns: target, checkpoint and accuracy, in [0, 1]; optionally spread (highest minus lowest accuracy over seeds),
    seeds (their number, 3 by default), trajectory (what pre-trained the checkpoint, for epochs of one pre-training; by
    default, names that end in "/" and their `last_epoch` are read so) and family (of its architecture; by default
    `evidence.family_by_name`). Every other column is a score, higher is better, or one of the lists in
    `evidence.NAIVE`; a score may have empty cells. Characters in names that cannot be printed are escaped.

    Args:
      path: the file, in UTF-8, with commas.
      method: what the accuracies are, a key of `report.tables.METHODS`.

    Returns:
      The evidence, and a sentence on each thing that makes it weaker than it could be.

    Raises:
      InputError: if the file cannot be read or has no lines, a column or an accuracy is missing, a number is text or
        out of range, a line occurs twice, a target has a single checkpoint, or two lines contradict each other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "table.csv"
    ...     _ = path.write_text("target,checkpoint,accuracy,logme\\npets,a,0.8,1.2\\npets,b,0.9,\\n")
    ...     evidence, notes = read_table(path)
    >>> evidence.accuracies.tolist(), notes[1]
    ([[0.8, 0.9]], 'logme has no value in 1 of 2 lines (b on pets), so it cannot be judged on pets.')
    """
    lines = _read(path)
    _check(lines, printable(path))
    where = printable(path)
    accuracies, scores = {}, {name: {} for name in lines[0].cells if name not in (*REQUIRED, *OPTIONAL)}
    spreads, seeds, trajectories, families = {}, {}, {}, {}
    for line in lines:
        target, checkpoint = line.cells["target"], line.cells["checkpoint"]
        key = (target, checkpoint)
        accuracies[key] = _number(where, line, "accuracy", 0, 1)
        number = _number(where, line, "seeds", 1, MOST_SEEDS, whole=True) if line.cells.get("seeds") else USUAL_SEEDS
        if line.cells.get("spread"):
            spreads[key], seeds[key] = _number(where, line, "spread", 0, 1), int(number)
        for names, column in ((trajectories, "trajectory"), (families, "family")):
            if line.cells.get(column):
                names[checkpoint] = line.cells[column]
        for name, values in scores.items():
            if line.cells[name]:
                values[key] = _number(where, line, name)
    for target, checkpoint in accuracies:
        epoch = scores.get("last_epoch", {}).get((target, checkpoint))
        is_epoch = epoch is not None and checkpoint.endswith(f"/{epoch:g}")  # "ViT-B/32" is none
        trajectories.setdefault(checkpoint, trajectory_of(checkpoint) if is_epoch else checkpoint)
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
        raise InputError(f"{where}: {single[0]} has a single checkpoint: at least two are needed to rank them.")
    return evidence, [*_notes(evidence, accuracies, scores)]


def _read(path: pathlib.Path) -> list[Line]:
    """Returns the lines of the file that are not empty."""
    where, numbered = printable(path), []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            numbered += ((reader.line_num, [printable(cell.strip()) for cell in row]) for row in reader)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); expected a CSV file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: is not a CSV file in UTF-8 ({error}): save it as such.") from error
    numbered = [(number, row) for number, row in numbered if any(row)]
    if not numbered:
        raise InputError(f"{where}: is empty; expected the columns {listed(REQUIRED)}, and those of scores.")
    columns = numbered[0][1]
    if missing := [name for name in REQUIRED if name not in columns]:
        raise InputError(
            f"{where}: the column{'s' * (len(missing) > 1)} {listed(missing)} {'are' if len(missing) > 1 else 'is'} "
            f"missing; {listed(REQUIRED)} are needed, in lower case and separated by commas. The columns are "
            f"{_some([name[:40] for name in columns], MANY)}."
        )
    if "" in columns:
        raise InputError(f"{where}: column {columns.index('') + 1} has no name: name or remove it.")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"{where}: column {twice[0]} occurs twice: rename or remove one.")
    if computed := [name for name in columns if name in COMPUTED]:
        raise InputError(f"{where}: column {computed[0]} is computed from the others: rename or remove it.")
    for number, row in numbered[1:]:
        if len(row) != len(columns):
            raise InputError(
                f"{where}, line {number}: has {len(row)} cells, and there are {len(columns)} columns: leave a missing "
                "value empty between its commas."
            )
    if len(numbered) == 1:
        raise InputError(f"{where}: has no lines below its header: expected one for each target and checkpoint.")
    return [Line(number, dict(zip(columns, row, strict=True))) for number, row in numbered[1:]]


def _check(lines: list[Line], where: str) -> None:
    """Checks that each line names a target and a checkpoint and has an accuracy, and that no two contradict."""
    seen, known = {}, {}
    for number, cells in lines:
        if missing := [name for name in REQUIRED if not cells[name]]:
            raise InputError(f"{where}, line {number}: {listed(missing)} is empty: fill it in, or remove the line.")
        checkpoint, key = cells["checkpoint"], (cells["target"], cells["checkpoint"])
        if key in seen:
            raise InputError(
                f"{where}, line {number}: {checkpoint} on {cells['target']} is in line {seen[key]} already: remove one."
            )
        seen[key] = number
        for name in OF_A_CHECKPOINT:
            if cells.get(name):
                value, first = known.setdefault((checkpoint, name), (cells[name], number))
                if value != cells[name] and not (name in NAIVE and _value(value) == _value(cells[name])):
                    raise InputError(
                        f"{where}, line {number}: {name} of {checkpoint} is {cells[name]}, but {value} in line "
                        f"{first}: it cannot depend on the target, so correct one."
                    )


def _value(text: str) -> float | str:
    """Returns the number that a cell holds, so that 1e6 and 1000000 are the same, or its text."""
    try:
        return float(text)
    except ValueError:
        return text


def _number(
    where: str, line: Line, column: str, lowest: float = -LARGEST, highest: float = LARGEST, whole: bool = False
) -> float:
    """Returns the number in a cell."""
    text, cell = line.cells[column], f"{where}, line {line.number}: {column}"
    kind = "a whole number" if whole else "a number"
    among = f"{kind} from {lowest:g} to {highest:g}" if highest < LARGEST else "a number below 1e100"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not lowest <= value <= highest or (whole and value != int(value)):
        is_score = column not in (*REQUIRED, *OPTIONAL)
        hint = " Divide percentages by 100." if highest == 1 and 1 < value <= 100 else ""
        hint = " Leave it empty if it is missing, and remove columns that are not scores." if is_score else hint
        raise InputError(f"{cell} is {text[:40]!r}: expected {among}.{hint}")
    return value


def _notes(evidence: Evidence, accuracies: dict, scores: dict[str, dict]) -> Iterator[str]:
    """Yields a sentence on each thing that makes the evidence weaker than it could be."""
    if len(evidence.targets) == 1:
        yield (
            f"{evidence.targets[0]} is the only target: there is no list by rank on other targets, and no gap in a "
            "score can be translated into accuracy."
        )
    for t, target in enumerate(evidence.targets):
        own = evidence.expected[t]
        if absent := [c for c, has in zip(evidence.checkpoints, own, strict=True) if not has]:
            yield (
                f"{target} lacks {_some(absent)}: it is judged by its other checkpoints, and there is no list by rank "
                "on other targets."
            )
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

    nested = [name for name in evidence.trajectories if evidence.trajectories.count(name) > 1]
    epochs = evidence.scores.get("last_epoch")
    if nested and (epochs is None or not np.isfinite(epochs[evidence.expected]).all()):
        yield (
            f"{_some(list(dict.fromkeys(nested)))} has several epochs, and last_epoch is not known for all: the lowest "
            "line in the table counts as the last epoch."
        )
    if np.isfinite(evidence.spreads).any():
        yield (
            "Spreads over seeds are used in the checklist alone; the rest of the page knows one accuracy for each line."
        )


def _some(names: list[str], most: int = NAMED) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
