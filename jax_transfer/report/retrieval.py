"""Shows image-text retrieval: recalls of every checkpoint, and which one a part of the training images would choose.

The rows are those of results/retrieval.jsonl. Recalls are printed in percent, and so are their sums (rsum, at most
600). The choice is that of section 4.6 and Table 3 of "Towards Inadequately Pre-trained Models in Transfer Learning"
(Deng et al., ICCV 2023).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import rich.box
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from jax_transfer.logs import duration
from jax_transfer.report import tables
from jax_transfer.report.best import trajectories
from jax_transfer.report.figures import Drawing, from_source
from jax_transfer.report.markup import escape
from jax_transfer.report.style import BLUE, GREY, ORANGE, STYLE, WIDTH, cut, epoch_axis, legend_above
from jax_transfer.report.tables import EN_DASH, is_number, percent
from jax_transfer.results import Row

WAYS = {"i2t": "Captions", "t2i": "Images"}  # what is found -> its name in the columns of tables
RECALLS = {f"{way}_recall@{k}": f"{name} R@{k}" for way, name in WAYS.items() for k in (1, 5, 10)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The checkpoint that the smallest share of the training images would choose, and what that costs.

    Attributes:
      fraction, whole: the smallest and the largest share of the training images.
      chosen: the checkpoint with the largest rsum on the validation images after training on the smallest share.
      best: the checkpoint with the largest rsum on the test images after training on the largest share.
      regret: how much larger that rsum is than that of the chosen checkpoint, in [0, 6].
      seconds, gflops: of training from all checkpoints on the smallest share.
      whole_seconds, whole_gflops: the same on the largest share.
      num_checkpoints: number of checkpoints that are compared, which have both results.
    """

    fraction: float
    whole: float
    chosen: str
    best: str
    regret: float
    seconds: float
    gflops: float
    whole_seconds: float
    whole_gflops: float
    num_checkpoints: int


def choice(rows: Iterable[Row], target: str, folds: int) -> Choice | None:
    """Returns which checkpoint the smallest share of the training images would choose; None if nothing is compared.

    Args:
      rows: rows of results/retrieval.jsonl.
      target: the data set.
      folds: the number of folds by whose rsum is judged.

    >>> row = {"target": "coco", "folds": 1, "seconds": 60.0, "gflops": 5.0, "error": ""}
    >>> rows = [
    ...     {**row, "checkpoint": name, "fraction": fraction, "split": split, "rsum": rsum + fraction}
    ...     for name, rsum in (("70", 1.4), ("90", 1.3))
    ...     for fraction in (0.25, 1.0)
    ...     for split in ("validation", "test")
    ... ]
    >>> found = choice(rows, "coco", 1)
    >>> found.chosen, found.best, found.regret, found.seconds
    ('70', '70', 0.0, 120.0)
    """
    own = [row for row in rows if (row["target"], row["folds"]) == (target, folds) and is_number(row["rsum"])]
    fractions = sorted({row["fraction"] for row in own})
    if len(fractions) < 2:
        return None
    part, whole = fractions[0], fractions[-1]

    def of(fraction: float, split: str) -> dict[str, Row]:
        return {row["checkpoint"]: row for row in own if (row["fraction"], row["split"]) == (fraction, split)}

    validated, small, large = of(part, "validation"), of(part, "test"), of(whole, "test")
    names = [name for name in large if name in validated and name in small]
    if len(names) < 2:
        return None
    chosen = max(names, key=lambda name: validated[name]["rsum"])
    best = max(names, key=lambda name: large[name]["rsum"])

    def cost(found: Mapping[str, Row], column: str) -> float:
        return math.fsum(found[name][column] for name in names)

    return Choice(
        part,
        whole,
        chosen,
        best,
        large[best]["rsum"] - large[chosen]["rsum"],
        cost(small, "seconds"),
        cost(small, "gflops"),
        cost(large, "seconds"),
        cost(large, "gflops"),
        len(names),
    )


def judged_folds(rows: Sequence[Row], config: Mapping[str, Any]) -> int:
    """Returns the number of folds by which epochs and checkpoints are judged: the first one in the config.

    >>> judged_folds([{"folds": 1}, {"folds": 5}], {"retrieval": {"folds": [5, 1]}})
    5
    """
    found = list(dict.fromkeys(row["folds"] for row in rows))
    return next((count for count in (config.get("retrieval") or {}).get("folds") or () if count in found), found[0])


def choice_sentence(found: Choice) -> str:
    """Says which checkpoint would be chosen, what is lost by that, and what it costs.

    >>> for part in choice_sentence(Choice(0.25, 1.0, "70", "90", 0.031, 60, 1e3, 300, 4e3, 5)).split("; "):
    ...     print(part[:83])
    With 25 % of the training images, validation would choose checkpoint 70 of 5
    after training on 100 %, 90 is the best on the test images, and the rsum of 70 is 3
    """
    part, whole = f"{100 * found.fraction:g} %", f"{100 * found.whole:g} %"
    if found.chosen == found.best:
        outcome = "it is the best on the test images, too"
    else:
        outcome = f"{found.best} is the best on the test images, and the rsum of {found.chosen} is "
        outcome += f"{100 * found.regret:.2f} lower"
    return (
        f"With {part} of the training images, validation would choose checkpoint {found.chosen} of "
        f"{found.num_checkpoints}; after training on {whole}, {outcome}. Training from all checkpoints takes "
        f"{duration(found.seconds)} and {found.gflops:,.0f} GFLOP with {part} of the images, and "
        f"{duration(found.whole_seconds)} and {found.whole_gflops:,.0f} GFLOP with {whole}."
    )


def recall_rows(rows: Sequence[Row]) -> list[Row]:
    """Formats the results of one data set, share and number of folds: one dict per checkpoint, column title -> text.

    >>> row = {"checkpoint": "70", "rsum": 1.3866, "chance_rsum": 0.01, "i2t_median_rank": 3.0, "t2i_median_rank": 4.0,
    ...        "best_epoch": 9, "i2t_recall@1": 0.1228}
    >>> (cells,) = recall_rows([{**dict.fromkeys(RECALLS), **row}])
    >>> cells["Captions R@1"], cells["rsum"], cells["Chance"], cells["Median ranks"]
    ('12.28', '138.66', '1.00', '3 and 4')
    """
    return [
        {
            "Checkpoint": row["checkpoint"],
            **{title: percent(row[column], unit="") for column, title in RECALLS.items()},
            "rsum": percent(row["rsum"], unit=""),
            "Chance": percent(row["chance_rsum"], unit=""),
            "Median ranks": _ranks(row),
            "Best epoch of training": row["best_epoch"],
        }
        for row in rows
    ]


def _ranks(row: Row) -> str:
    ranks = [row["i2t_median_rank"], row["t2i_median_rank"]]
    return f"{ranks[0]:g} and {ranks[1]:g}" if all(map(is_number, ranks)) else EN_DASH


def paper_rows(rows: Iterable[Row], target: str, folds: int, paper: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Formats the paper's recalls as printed, beside our rsum of the same epoch, split and share of the images.

    >>> entry = {"epoch": 50, "fraction": 1.0, "where": "Table 2", "i2t": (9.88, 28.28, 41.26),
    ...          "t2i": (3.84, 12.58, 19.88), "rsum": 114.98}
    >>> (cells,) = paper_rows([], "coco", 1, [entry])
    >>> cells["Captions R@1"], cells["rsum"], cells["Sum of the recalls"], cells["Our rsum"]
    ('9.88', '114.98', '115.72', '–')
    """
    ours = {
        (row["epoch"], row["fraction"], row["split"]): row["rsum"]
        for row in rows
        if (row["target"], row["folds"]) == (target, folds)
    }
    return [
        {
            "Where": entry["where"],
            "Epoch": tables.epoch_name(entry["epoch"]),
            **{
                title: f"{value:.2f}"
                for title, value in zip(RECALLS.values(), [*entry["i2t"], *entry["t2i"]], strict=True)
            },
            "rsum": f"{entry['rsum']:.2f}",
            "Sum of the recalls": f"{math.fsum([*entry['i2t'], *entry['t2i']]):.2f}",
            "Our rsum": percent(ours.get((entry["epoch"], entry["fraction"], _split(entry))), unit=""),
            "Ours, on": f"{_split(entry)} images",
            "Note": entry.get("note") or "",
        }
        for entry in paper
    ]


def _split(entry: Mapping[str, Any]) -> str:
    """Returns the split on which the paper measured an entry of `config.retrieval.paper`."""
    return entry.get("split") or "test"


def summary_tables(rows: Sequence[Row]) -> list[Table]:
    """Builds a terminal table of the test results for each data set that fits into 80 columns.

    >>> row = {"target": "tfds:coco_captions", "checkpoint": "70", "fraction": 1.0, "folds": 5, "split": "test"}
    >>> numbers = {"rsum": 1.3866, "chance_rsum": 0.02}
    >>> (table,) = summary_tables([{**row, **numbers, **dict.fromkeys(RECALLS, 0.1)}])
    >>> [list(column.cells)[0].plain for column in table.columns][:4]
    ['70', '100 %', '5', '10.0']
    """
    found = []
    for target, name in tables.target_names(row["target"] for row in rows).items():
        title = Text(f"Image-text retrieval on {name}, in %")  # Text, because brackets in a name are not markup
        table = Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("Checkpoint")
        recalls = [f"{way}\nR@{k}" for way in WAYS for k in (1, 5, 10)]
        for column in ("Images", "Folds", *recalls, "\nrsum", "\nChance"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if (row["target"], row["split"]) == (target, "test"):
                values = [f"{100 * row[column]:.1f}" if is_number(row[column]) else EN_DASH for column in RECALLS]
                sums = [percent(row[column], unit="") for column in ("rsum", "chance_rsum")]
                cells = [row["checkpoint"], f"{100 * row['fraction']:g} %", str(row["folds"]), *values, *sums]
                table.add_row(*map(Text, cells))
        found.append(table)
    return found


@matplotlib.rc_context(STYLE)
def rsum_curves(rows: Sequence[Row], source: str = "") -> Figure:
    """Draws the rsum on the test images against pre-training epoch, with a line for each share of the training images.

    A star marks the best epoch of each.

    Args:
      rows: rows of one data set and number of folds.
      source: the pre-training, if the study has several; see `best.source_of`.

    >>> rows = [{"target": "coco", "checkpoint": str(epoch), "epoch": epoch, "fraction": 1.0, "split": "test",
    ...          "rsum": 1.2, "chance_rsum": 0.01} for epoch in (50, 60)]
    >>> [text.get_text() for text in rsum_curves(rows).axes[0].get_legend().get_texts()]
    ['100 % of the images, best 120.00 at epoch 50', 'Chance']
    """
    own = [r for r in trajectories(rows).get(source, []) if r["split"] == "test" and is_number(r["rsum"])]
    figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
    axes, styles = figure.subplots(), ((BLUE, "o"), (ORANGE, "D"), (GREY, "s"))
    for number, fraction in enumerate(sorted({row["fraction"] for row in own}, reverse=True)):
        points = sorted((row["epoch"], 100 * row["rsum"]) for row in own if row["fraction"] == fraction)
        epoch, highest = max(points, key=lambda point: point[1])
        color, marker = styles[number % len(styles)]
        text = f"{100 * fraction:g} % of the images, best {highest:.2f} at epoch {tables.epoch_name(epoch)}"
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=text, clip_on=False)
        axes.plot([epoch], [highest], color=color, marker="*", markersize=11, markeredgecolor="white", clip_on=False)
    axes.axhline(100 * own[0]["chance_rsum"], color=GREY, linewidth=0.7, linestyle=":", label="Chance")
    axes.set_ylabel("rsum (%)")
    legend_above(axes)
    epoch_axis(axes, [row["epoch"] for row in own])
    figure.suptitle(cut(tables.short_target(own[0]["target"]) + from_source(source), 38))
    return figure


def section(rows: Sequence[Row], config: Mapping[str, Any]) -> Iterator[str | list[Drawing]]:
    """Yields the section as HTML and figures; nothing without rows.

    Args:
      rows: rows of results/retrieval.jsonl.
      config: the study's config.

    >>> list(section([], {}))
    []
    """
    names = tables.target_names(row["target"] for row in rows)
    for target, name in names.items():
        own = [row for row in rows if row["target"] == target]
        protocols = list(dict.fromkeys(row["folds"] for row in own))
        judged = judged_folds(own, config)
        if len(names) > 1:
            yield f"<h3>{escape(name)}</h3>"
        if found := choice(own, target, judged):
            yield f'<p class="answer">{escape(choice_sentence(found))}</p>'
        yield f"<p>{escape(_data_sentence(own, target))}</p>"
        for fraction in sorted({row["fraction"] for row in own}, reverse=True):
            for folds in protocols:
                yield from _table(own, fraction, folds)
        yield [
            Drawing("", f"rsum-{name}{source and '-'}{source}", _caption(name), rsum_curves(part, source))
            for part in [[row for row in own if row["folds"] == judged]]
            for source, of_source in trajectories(part).items()
            if any(row["split"] == "test" and is_number(row["rsum"]) for row in of_source)
        ]
        if paper := (config.get("retrieval") or {}).get("paper"):
            yield "<h3>The paper's recalls, as printed</h3>"
            yield tables.to_html(paper_rows(own, target, judged, paper))
            yield (
                '<p class="quiet">Printed as in the paper, where rsum is not always the sum of the recalls. Only the'
                " order of the epochs can be compared: the paper does not say how it ranks.</p>"
            )


def _caption(name: str) -> str:
    return (
        f"{name}: sum of the recalls on the test images, of PVSE trained from each epoch. Stars mark the best epoch. "
        "The weights are those of the best epoch of PVSE's own training, by the validation images."
    )


def _data_sentence(rows: Sequence[Row], target: str) -> str:
    """Says how many images and captions are ranked, and where the captions come from."""
    row = next((row for row in rows if row["split"] == "test"), rows[0])
    captions, shared = row["num_captions"], row["num_duplicates"]
    text = (
        f"{row['num_images'] * row['folds']:,} test images with {captions:,} captions, of which {shared:,} "
        f"({percent(shared / captions)}) are word for word captions of another image too; equally similar items count "
        "against a model."
    )
    made = tables.split_target(target)[1].get("captions")
    what = {
        "attributes": "the names of the classes, and the brightness, contrast and colours of the images",
        "templates": "the names of the classes",
        "names": "the names of the classes",
    }
    return text + (f" The captions are not written by people, but made from {what[made]}." if made in what else "")


def _table(rows: Sequence[Row], fraction: float, folds: int) -> Iterator[str]:
    """Yields the table of a share of the training images and a number of folds, with the best of each column marked."""
    own = [r for r in rows if (r["fraction"], r["folds"], r["split"]) == (fraction, folds, "test")]
    if not own:
        return
    of_folds = f"the mean of {folds} folds of {own[0]['num_images']:,} images" if folds > 1 else "all test images"
    yield f"<h3>{100 * fraction:g} % of the training images ({own[0]['num_train']:,}), {of_folds}</h3>"
    columns = {**RECALLS, "rsum": "rsum"}
    best = {column: max((r[column] for r in own if is_number(r[column])), default=math.nan) for column in columns}
    bold = {(i, columns[c]) for i, row in enumerate(own) for c in columns if row[c] == best[c]}
    yield tables.to_html(recall_rows(own), bold=bold)
