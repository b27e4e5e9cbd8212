"""The section of the report on few-shot classifiers: tables like Table 4 of the paper, and which checkpoint to choose.

"Towards Inadequately Pre-trained Models in Transfer Learning" (Deng et al., ICCV 2023), Table 4.
"""

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.figure import Figure

from jax_transfer.records import METRICS
from jax_transfer.report import tables
from jax_transfer.report.best import Point, label_of, trajectories
from jax_transfer.report.figures import Drawing, plot_points
from jax_transfer.report.markup import escape
from jax_transfer.report.style import PRETRAINING_STYLES, STYLE, WIDTH, cut, epoch_axis, legend_above, percent_axis
from jax_transfer.report.tables import EN_DASH, is_number, percent
from jax_transfer.results import Row

METHODS = {
    "imprinting": "Imprinting after tuning on the seen classes",
    "imprinting_frozen": "Imprinting without tuning",
    "prototypes": "Prototypes of all classes",
}
EXPLAINED = {
    "imprinting": "Each checkpoint is tuned on the seen classes with a classifier of cosines; the weights of an unseen "
    "class are the mean direction of its N images.",
    "imprinting_frozen": "Frozen features; the weights of a seen class are the mean direction of all its training "
    "images, those of an unseen class of N of them.",
    "prototypes": "Frozen features; the weights of every class are the mean direction of N of its training images.",
}
SEEN_ALONE = "Seen alone"
SEEN, AMONG_ALL, AMONG_UNSEEN, ALL = "Seen classes", "unseen", "unseen_only", "all"


def section(rows: Sequence[Row], paper: Sequence[Row]) -> Iterator[str | list[Drawing]]:
    """Yields the HTML of the section, and figures; nothing without rows.

    Args:
      rows: the rows of results/fewshot.jsonl.
      paper: the entries of `config.paper`, of which those of few-shot classifiers are shown.
    """
    names = tables.target_names(row["target"] for row in rows)
    for (target, method, metric), own in groups(rows).items():
        yield f"<h3>{escape(names[target])}: {escape(METHODS.get(method, method))}</h3>"
        yield f'<p class="quiet">{escape(conditions(own, metric))} {escape(EXPLAINED.get(method, ""))}</p>'
        has_seen = own[0]["num_seen"] > 0
        theirs = [entry for entry in paper if entry["target"] == target] if method == "imprinting" else []
        if chosen := choice_rows(own) if has_seen else []:
            yield "<p>Chosen by the accuracy on the seen classes, which needs no image of an unseen class:</p>"
            yield tables.to_html(chosen)
        if has_seen:
            yield (
                f"<p>Accuracy on unseen classes, among all classes. {SEEN_ALONE}: accuracy on the seen classes, among "
                "these alone, before any other is imprinted.</p>"
            )
        table, bold = shots_table(own, column_of(own))
        yield tables.to_html(table, bold=bold)
        if any(is_shown(entry["what"]) for entry in theirs):
            yield "<p>The paper's accuracies; it does not say among which classes:</p>"
            yield tables.to_html(paper_table(theirs))
        if has_seen:
            for column, what in (
                (AMONG_UNSEEN, "on unseen classes, among these alone"),
                ("seen", "on seen classes, among all classes"),
                (ALL, "on all classes"),
            ):
                table, bold = shots_table(own, column)
                html = tables.to_html(table, bold=bold)
                yield f"<details><summary>Accuracy {what}</summary>{html}</details>"
        for source, trajectory in trajectories(own).items():
            if len({row["epoch"] for row in trajectory}) > 1:
                caption = f"{names[target]}: {METHODS.get(method, method).lower()}, by epoch{_of(source)}."
                yield [Drawing("", f"fewshot {names[target]} {method} {source}", caption, curves(trajectory, target))]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Returns (target, method, metric) -> its rows that have accuracies.

    >>> rows = [{"target": "a", "method": "prototypes", "metric": "accuracy", "error": e} for e in ("", "NaN")]
    >>> {key: len(own) for key, own in groups(rows).items()}
    {('a', 'prototypes', 'accuracy'): 1}
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if not row["error"]:
            found.setdefault((row["target"], row["method"], row["metric"]), []).append(row)
    return found


def column_of(rows: Sequence[Row]) -> str:
    """Returns the column of the accuracy that the table of a method shows.

    >>> column_of([{"num_seen": 5}]), column_of([{"num_seen": 0}])
    ('unseen', 'all')
    """
    return AMONG_ALL if rows[0]["num_seen"] else ALL


def _of(source: str) -> str:
    return f" of {source}" if source else ""


def conditions(rows: Sequence[Row], metric: str) -> str:
    """Returns a sentence on the numbers of classes and draws.

    >>> conditions([{"num_seen": 0, "num_unseen": 10, "num_episodes": 100}], "accuracy")
    '10 classes, by accuracy; means over 100 draws of the images, and half the width of their 95 % interval.'
    """
    row = rows[0]
    seen = (
        f"{row['num_seen']} seen and {row['num_unseen']} unseen classes"
        if row["num_seen"]
        else (f"{row['num_unseen']} classes")
    )
    return (
        f"{seen}, by {METRICS[metric]}; means over {row['num_episodes']} draws of the images, and half the width of "
        "their 95 % interval."
    )


def shots_table(rows: Sequence[Row], column: str) -> tuple[list[Row], set[tuple[int, str]]]:
    """Formats the accuracies of checkpoints by number of shots, as in Table 4, and says which cells are the best.

    Args:
      rows: the rows of one target, method and metric.
      column: the column of the accuracy.

    >>> rows = [{"checkpoint": "5", "epoch": 5, "shots": n, "unseen": 0.5 + n / 100, "unseen_interval": 0.01,
    ...          "seen_only": 0.8, "num_seen": 5} for n in (1, 2)]
    >>> shots_table(rows, "unseen")[0]
    [{'Checkpoint': 'epoch 5', 'N = 1': '51.00 ± 1.00', 'N = 2': '52.00 ± 1.00', 'Seen alone': '80.00'}]
    """
    table: list[Row] = []
    shots = sorted({row["shots"] for row in rows})
    values: dict[str, list[float]] = {}
    for own in _by_checkpoint(rows).values():
        cells = {"Checkpoint": label_of(own[0])}
        by_shots = {row["shots"]: row for row in own}
        for n in shots:
            row = by_shots.get(n)
            title = f"N = {n}"
            cells[title] = _with_interval(row, column) if row else EN_DASH
            values.setdefault(title, []).append(row[column] if row and is_number(row[column]) else -1.0)
        if own[0]["num_seen"]:
            cells[SEEN_ALONE] = percent(own[0]["seen_only"], unit="")
            values.setdefault(SEEN_ALONE, []).append(own[0]["seen_only"] if is_number(own[0]["seen_only"]) else -1.0)
        table.append(cells)
    several = len(table) > 1
    bold = {
        (i, title) for title, column in values.items() for i, v in enumerate(column) if several and v == max(column)
    }
    return table, bold


def _by_checkpoint(rows: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["checkpoint"], []).append(row)
    return grouped


def _with_interval(row: Row, column: str) -> str:
    half = row[f"{column}_interval"]
    return percent(row[column], unit="") + (f" ± {100 * half:.2f}" if is_number(half) else "")


def choice_rows(rows: Sequence[Row]) -> list[Row]:
    """Formats which checkpoint the accuracy on seen classes chooses, and how far it is from the best one.

    >>> rows = [{"checkpoint": str(e), "epoch": e, "shots": 1, "unseen": u, "unseen_interval": 0.01, "seen_only": s}
    ...         for e, u, s in ((5, 0.6, 0.7), (9, 0.5, 0.8))]
    >>> (row,) = choice_rows(rows)
    >>> row["Chosen"], row["Best"], row["Behind, points"]
    ('epoch 9', 'epoch 5', '10.00')
    """
    table = []
    for shots in sorted({row["shots"] for row in rows}):
        own = [row for row in rows if row["shots"] == shots and is_number(row[AMONG_ALL])]
        own = [row for row in own if is_number(row["seen_only"])]
        if len(own) < 2:
            continue
        chosen = max(own, key=lambda row: row["seen_only"])
        best = max(own, key=lambda row: row[AMONG_ALL])
        table.append(
            {
                "Images": f"N = {shots}",
                "Chosen": label_of(chosen),
                "Unseen classes": _with_interval(chosen, AMONG_ALL),
                "Best": label_of(best),
                "Its accuracy": _with_interval(best, AMONG_ALL),
                "Behind, points": f"{100 * (best[AMONG_ALL] - chosen[AMONG_ALL]):.2f}",
            }
        )
    return table


def is_shown(what: str) -> bool:
    """Returns whether an accuracy of a paper (`study.config.PaperAccuracy.what`) belongs to this section.

    >>> is_shown("5-shot"), is_shown("FE")
    (True, False)
    """
    return what.endswith("-shot") or what == SEEN.lower()


def paper_table(paper: Sequence[Row]) -> list[Row]:
    """Formats the paper's accuracies of few-shot classifiers, a row for each epoch.

    >>> paper = [{"epoch": 50, "what": what, "accuracy": a} for what, a in (("1-shot", 0.52), ("seen classes", 0.81))]
    >>> paper_table(paper)
    [{'Epoch': 50, 'N = 1': '52.00', 'Seen classes': '81.00'}]
    """
    table: dict[int, Row] = {}
    for entry in filter(lambda entry: is_shown(entry["what"]), paper):
        title = SEEN if entry["what"] == SEEN.lower() else f"N = {entry['what'].removesuffix('-shot')}"
        table.setdefault(entry["epoch"], {"Epoch": entry["epoch"]})[title] = percent(entry["accuracy"], unit="")
    return list(table.values())


@matplotlib.rc_context(STYLE)
def curves(rows: Sequence[Row], target: str) -> Figure:
    """Draws the accuracy (%) on the imprinted classes against pre-training epoch, with a line for each number of shots.

    The bands are 95 % intervals over the draws of images.

    Args:
      rows: the rows of one trajectory, target, method and metric.
      target: name of the target.
    """
    column = column_of(rows)
    shots = sorted({row["shots"] for row in rows})
    figure = Figure(figsize=(WIDTH, 2.2 + 0.14 * len(shots)), layout="constrained")
    axes = figure.subplots()
    for i, n in enumerate(shots):
        own = sorted((row for row in rows if row["shots"] == n), key=lambda row: row["epoch"])
        points = {row["epoch"]: _point(row, column) for row in own if is_number(row[column])}
        if points:
            plot_points(axes, points, PRETRAINING_STYLES[i % len(PRETRAINING_STYLES)], f"N = {n}")
    percent_axis(axes, "Accuracy on unseen classes (%)" if column == AMONG_ALL else "Accuracy (%)")
    legend_above(axes)
    epoch_axis(axes, [row["epoch"] for row in rows])
    figure.suptitle(cut(tables.short_target(target), 38))
    return figure


def _point(row: Row, column: str) -> Point:
    """Returns a mean with its 95 % interval."""
    mean, half = row[column], row[f"{column}_interval"]
    half = half if is_number(half) else 0.0
    return Point(mean, mean - half, mean + half, row["num_episodes"])
