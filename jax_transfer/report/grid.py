"""Describes the grids of settings: which settings were tried for each target and method, and which were chosen.

The file results/transfer.jsonl holds results and the points of grids, see `results.TransferRow.split`. The report reads
the points here and in the table of all rows only.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jax_transfer.report.tables import EN_DASH, counted, is_number, method_name, showable, target_names, way_name
from jax_transfer.results import GRID, PLAIN, TEST, TEST_GRID, Row

# What an accuracy is if its settings were chosen on the test images (G in "Ranking Neural Checkpoints").
SWEPT = "best of the sweep on the test images"
# Column -> its name in a sentence.
SETTINGS = {"learning_rate": "learning rate", "weight_decay": "weight decay", "source_weight": "source weight"}
FEW = 3  # as many checkpoints are named instead of counted

Setting = tuple[float | None, ...]  # the values of SETTINGS


def is_result(row: Row) -> bool:
    """Returns whether a row of results/transfer.jsonl is a result, and not a point of a grid of settings.

    >>> is_result({"split": "test"}), is_result({"split": "validation"})
    (True, False)
    """
    return row.get("split", TEST) not in GRID


def swept(transfer_rows: Iterable[Row]) -> set[tuple[str, str]]:
    """Returns each (target, method) whose settings were chosen on the test images.

    Their accuracies are optimistic, since the test images chose the settings. They are called `SWEPT` wherever shown.

    >>> swept([{"target": "a", "method": "finetune", "split": "test_grid"}])
    {('a', 'finetune')}
    """
    return {(row["target"], row["method"]) for row in transfer_rows if row.get("split") == TEST_GRID}


def swept_note(pairs: Iterable[tuple[str, str]], target: str, methods: Iterable[str]) -> str:
    """Returns a sentence that names the methods of a target whose settings were chosen on the test images, else "".

    >>> swept_note({("a", "finetune")}, "a", ["probe", "finetune"])
    ' FT: best of the sweep on the test images.'
    """
    pairs = set(pairs)
    names = [method_name(method) for method in methods if (target, method) in pairs]
    return f" {', '.join(names)}: {SWEPT}." if names else ""


def swept_words(pairs: Iterable[tuple[str, str]], method: str, names: dict[str, str]) -> str:
    """Returns the words that qualify the accuracies of a method, in brackets; "" if no settings were chosen on test.

    Args:
      pairs: the value of `swept`.
      method: name of the method.
      names: target -> display name, for all targets whose accuracies are meant.

    >>> swept_words({("a", "finetune")}, "finetune", {"a": "mnist", "b": "pets"})
    ' (best of the sweep on the test images of mnist)'
    """
    pairs = set(pairs)
    on_test = [name for target, name in names.items() if (target, method) in pairs]
    if not on_test:
        return ""
    return f" ({SWEPT})" if len(on_test) == len(names) else f" ({SWEPT} of {', '.join(on_test)})"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of settings of one target and method, and of one way of fine-tuning.

    Attributes:
      objective, selection: as in `results.TransferRow`.
      tried: the settings in the grid, in ascending order.
      chosen: chosen setting -> the checkpoints for which it was chosen.
      on_test: whether the settings were chosen on the test images.
      num_points: number of trained grid points, over all checkpoints and seeds.
      num_diverged: number of those without an accuracy.
    """

    target: str
    method: str
    objective: str
    selection: str | None
    tried: list[Setting]
    chosen: dict[Setting, list[str]]
    on_test: bool
    num_points: int
    num_diverged: int

    @property
    def name(self) -> str:
        """The name of the method, or of the way of fine-tuning if it reuses source data."""
        return method_name(self.method) if self.objective == PLAIN else way_name(self.objective, self.selection)

    def values(self, i: int) -> list[float]:
        """Returns the values of the i-th of SETTINGS in the grid, in ascending order."""
        return sorted({value for setting in self.tried if (value := setting[i]) is not None})

    def at_edge(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yields (name of the setting, "smallest" or "largest", checkpoints) where a chosen value lies at the edge.

        No edge: the only value of the grid, and 0, since no smaller value exists.
        """
        for i, name in enumerate(SETTINGS.values()):
            values = self.values(i)
            for edge, value in {"smallest": min(values, default=0), "largest": max(values, default=0)}.items():
                found = [c for setting, names in self.chosen.items() if setting[i] == value for c in names]
                if len(values) > 1 and value != 0 and found:
                    yield name, edge, list(dict.fromkeys(found))


def grids(transfer_rows: Sequence[Row]) -> list[Grid]:
    """Collects the grids of a study, in order of appearance.

    >>> row = {"target": "a", "method": "probe", "checkpoint": "5", "error": "", "weight_decay": None}
    >>> points = [{**row, "split": "validation", "learning_rate": rate} for rate in (0.01, 0.1)]
    >>> (grid,) = grids([*points, {**row, "split": "test", "learning_rate": 0.1}])
    >>> grid.tried, grid.chosen
    ([(0.01, None, None), (0.1, None, None)], {(0.1, None, None): ['5']})
    """
    found = []
    for key in dict.fromkeys(_key(row) for row in transfer_rows if not is_result(row)):
        own = [row for row in transfer_rows if _key(row) == key]
        points, chosen = [row for row in own if not is_result(row)], {}
        for row in own:
            if is_result(row) and not row["error"]:
                chosen.setdefault(_setting(row), {})[row["checkpoint"]] = None
        found.append(
            Grid(
                *key,
                sorted({_setting(row) for row in points}, key=lambda s: [(v is not None, v or 0) for v in s]),
                {setting: list(names) for setting, names in chosen.items()},
                any(row["split"] == TEST_GRID for row in points),
                len(points),
                sum(bool(row["error"]) for row in points),
            )
        )
    return found


def _key(row: Row) -> tuple[str, str, str, str | None]:
    """Returns the target, method, objective and selection of a row."""
    return row["target"], row["method"], row.get("objective", PLAIN), row.get("selection")


def _setting(row: Row) -> Setting:
    """Returns the settings of a row, without the last digits, in which float32 differs from the config."""
    return tuple(float(f"{row[name]:.6g}") if is_number(row.get(name)) else None for name in SETTINGS)


def grid_rows(transfer_rows: Sequence[Row]) -> list[Row]:
    """Formats `grids` for the page: one dict per grid, column title -> text.

    >>> row = {"target": "a", "method": "probe", "checkpoint": "5", "error": "", "weight_decay": None}
    >>> points = [{**row, "split": "validation", "learning_rate": rate} for rate in (0.01, 0.1)]
    >>> (cells,) = grid_rows([*points, {**row, "split": "test", "learning_rate": 0.1}])
    >>> cells["Settings tried"], cells["Chosen"]
    ('learning rate 0.01, 0.1 (2 settings)', 'learning rate 0.1: 5')
    """
    names = target_names(row["target"] for row in transfer_rows)
    return [
        {
            "Target": names[grid.target],
            "Method": grid.name,
            "Settings tried": f"{_tried(grid)} ({counted(len(grid.tried), 'setting')})",
            "Chosen on": "the test images" if grid.on_test else "validation images",
            "Chosen": "; ".join(f"{_words(grid, s)}: {_who(c)}" for s, c in _most_first(grid)) or EN_DASH,
            "Diverged": f"{grid.num_diverged} of {grid.num_points}",
        }
        for grid in grids(transfer_rows)
    ]


def _most_first(grid: Grid) -> list[tuple[Setting, list[str]]]:
    """Returns the chosen settings, that of the most checkpoints first."""
    return sorted(grid.chosen.items(), key=lambda pair: -len(pair[1]))


def grid_sentences(transfer_rows: Sequence[Row]) -> Iterator[str]:
    """Yields what to think of the choices: which lie at the edge of their grid, and which the test images made.

    >>> row = {"target": "a", "method": "probe", "checkpoint": "5", "error": "", "weight_decay": None}
    >>> points = [{**row, "split": "validation", "learning_rate": rate} for rate in (0.01, 0.1)]
    >>> for sentence in grid_sentences([*points, {**row, "split": "test", "learning_rate": 0.1}]):
    ...     print(sentence)
    a, FE: the chosen learning rate is the largest of the grid for 5; a wider grid might do better.
    """
    names = target_names(row["target"] for row in transfer_rows)
    for grid in grids(transfer_rows):
        subject = f"{names[grid.target]}, {grid.name}"
        if grid.on_test:
            yield (
                f"{subject}: the accuracies are the {SWEPT}. As these images chose the settings, they say what is "
                "possible, not what to expect on other images."
            )
        for name, edge, checkpoints in grid.at_edge():
            who = _who(checkpoints)
            yield f"{subject}: the chosen {name} is the {edge} of the grid for {who}; a wider grid might do better."


def choice_note(transfer_rows: Sequence[Row]) -> str:
    """Explains which seeds choose the settings, and what this means for a mean over seeds.

    >>> choice_note([])
    'Fine-tuning chooses its setting with the first seed, by accuracy, and trains the other seeds with it. ...'
    """
    text = (
        "Fine-tuning chooses its setting with the first seed, by accuracy, and trains the other seeds with it. A probe"
        " chooses a setting for each seed, also by accuracy."
    )
    if not swept(transfer_rows):
        return text
    return (
        f"{text} So with several seeds, a mean over seeds that is called the {SWEPT} is the mean of the chosen settings"
        " and not the best mean of all settings."
    )


def _tried(grid: Grid) -> str:
    """Lists the values of each setting in a grid."""
    values = {name: grid.values(i) for i, name in enumerate(SETTINGS.values())}
    return "; ".join(f"{name} {', '.join(f'{v:g}' for v in found)}" for name, found in values.items() if found)


def _words(grid: Grid, setting: Setting) -> str:
    """Describes a chosen setting by the values of which the grid has several, or by all if it has one of each."""
    given = [(i, name) for i, name in enumerate(SETTINGS.values()) if setting[i] is not None]
    several = [(i, name) for i, name in given if len(grid.values(i)) > 1]
    return ", ".join(f"{name} {setting[i]:g}" for i, name in several or given) or EN_DASH


def _who(checkpoints: Sequence[str]) -> str:
    """Names a few checkpoints, or counts more of them."""
    return ", ".join(map(showable, checkpoints)) if len(checkpoints) <= FEW else counted(len(checkpoints), "checkpoint")
