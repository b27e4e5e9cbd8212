"""The result of `jax_transfer.rank`: which checkpoint to take for a target, as a table, a CSV file and a page."""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterator

import matplotlib
import rich.box
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer.analysis import MIN_CHECKPOINTS, kendall
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.report import tables
from jax_transfer.report.markup import escape, inline_svg, to_page
from jax_transfer.report.style import BLUE, GREY, STYLE, WIDTH, cut, to_svg
from jax_transfer.report.tables import EN_DASH, Row, percent

LOW_AGREEMENT = 0.3  # of Kendall's tau: two of three pairs in the same order
STAR = "\N{BLACK STAR}"


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One checkpoint. Accuracies are in [0, 1], those of a cross-validated linear probe, with their 95 % intervals.

    behind: accuracy of the best checkpoint minus that of this one, from the same images. A score that does not apply is
    NaN. A checkpoint that could not be evaluated has NaN everywhere and the reason in `error`.
    """

    checkpoint: str
    path: str
    model: str = ""
    num_parameters: int = 0
    preprocessing: Preprocessing | None = None
    accuracy: float = math.nan
    low: float = math.nan
    high: float = math.nan
    behind: float = math.nan
    behind_low: float = math.nan
    behind_high: float = math.nan
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = math.nan
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The checkpoints, best probe accuracy first, failures last. `print` shows a table.

    majority: share of the largest class, the accuracy of knowing nothing.
    """

    target: str
    num_images: int
    num_classes: int
    majority: float
    rows: list[Ranked]

    @property
    def best(self) -> Ranked:
        return self.rows[0]

    @property
    def sound(self) -> list[Ranked]:
        """Those that could be evaluated."""
        return [row for row in self.rows if not row.error]

    @property
    def tied(self) -> list[Ranked]:
        """Those that these images cannot tell from the best one: the interval of the difference reaches 0."""
        return [row for row in self.sound[1:] if row.behind_low <= 0]

    @property
    def scores(self) -> list[str]:
        """Those that apply to at least one checkpoint."""
        return [name for name in self.best.scores if any(math.isfinite(row.scores[name]) for row in self.sound)]

    def first_by(self, score: str) -> Ranked:
        """The checkpoint of the highest score."""
        return max((row for row in self.sound if math.isfinite(row.scores[score])), key=lambda row: row.scores[score])

    def agreement(self, score: str) -> float:
        """Kendall's tau of a score with the probe accuracy; NaN where fewer than three checkpoints have both."""
        rows = [row for row in self.sound if math.isfinite(row.scores[score])]
        return _tau([row.scores[score] for row in rows], [row.accuracy for row in rows])

    @property
    def mean_agreement(self) -> float:
        """Kendall's tau between the probe and the scores, each with each, in the mean. A low one: they contradict each other."""
        columns = [[row.accuracy for row in self.sound]]
        columns += [[row.scores[score] for row in self.sound] for score in self.scores]
        columns = [column for column in columns if all(map(math.isfinite, column))]
        taus = [_tau(a, b) for a, b in itertools.combinations(columns, 2)]
        taus = [tau for tau in taus if math.isfinite(tau)]
        return statistics.fmean(taus) if taus else math.nan

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes a row a checkpoint, with all that is known of it."""
        tables.to_csv([self._cells(place, row) for place, row in enumerate(self.rows, 1)], pathlib.Path(path))

    def _cells(self, place: int, row: Ranked) -> Row:
        cells = {"rank": place, **dataclasses.asdict(row)}
        preprocessing = cells.pop("preprocessing") or {}
        scores = cells.pop("scores") or dict.fromkeys(self.best.scores, math.nan)
        error = cells.pop("error")
        return {**cells, "image_size": preprocessing.get("image_size", ""), **scores, "error": error}

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table(self))
        return capture.get()


def _tau(a: list[float], b: list[float]) -> float:
    return float(kendall(a, b)) if len(a) > 2 else math.nan


def answer(ranking: Ranking) -> list[str]:
    """The result in sentences, the most important one first."""
    best, tied = ranking.best, [row.checkpoint for row in ranking.tied]
    said = [
        f"Take {best.checkpoint}: a linear classifier on its features is right on {percent(best.accuracy)} of the images "
        f"(95 %: {percent(best.low)} to {percent(best.high)}); always naming the largest class, on {percent(ranking.majority)}."
    ]
    if len(ranking.sound) == 1:
        said.append("It is the only checkpoint that could be evaluated.")
    elif tied:
        names = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
        said.append(
            f"{ranking.num_images:,} images cannot tell it from {names}: more images would, or take the cheaper one."
        )
    else:
        second = ranking.rows[1]
        low, high = 100 * second.behind_low, 100 * second.behind_high
        said.append(
            f"The next one, {second.checkpoint}, is {100 * second.behind:.2f} points behind (95 %: {low:.2f} to {high:.2f})."
        )
    if math.isfinite(ranking.mean_agreement):
        said.append(_what_the_scores_say(ranking))
        tau = f"{ranking.mean_agreement:.2f}"
        if ranking.mean_agreement < LOW_AGREEMENT:
            said.append(
                f"The criteria contradict each other (mean Kendall's tau {tau}): trust the probe, which is measured."
            )
        else:
            said.append(f"The criteria agree with a mean Kendall's tau of {tau}.")
    if 2 < len(ranking.sound) < MIN_CHECKPOINTS:
        said.append(
            f"Of {len(ranking.sound)} checkpoints a tau says little: at least {MIN_CHECKPOINTS} would be needed."
        )
    if len(ranking.sound) < len(ranking.rows):
        said.append(f"{len(ranking.rows) - len(ranking.sound)} could not be evaluated: see below.")
    said.append("All this judges frozen features; fine-tuned, the order may differ.")
    return said


def _what_the_scores_say(ranking: Ranking) -> str:
    """Which checkpoint each score puts first, in a sentence."""
    by: dict[str, list[str]] = {ranking.best.checkpoint: []}
    for score in ranking.scores:
        by.setdefault(ranking.first_by(score).checkpoint, []).append(tables.score_name(score))
    own = by.pop(ranking.best.checkpoint)
    clauses = [f"{_listed(own)} put{'s' * (len(own) == 1)} it first too"] if own else ["No score puts it first"]
    clauses += [f"{_listed(scores)} put{'s' * (len(scores) == 1)} {name} first" for name, scores in by.items()]
    return "; ".join(clauses) + "."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def table_rows(ranking: Ranking) -> list[Row]:
    """Column title -> text: a row a checkpoint. A star marks the one that a score puts first."""
    found = []
    several = len({row.model for row in ranking.sound}) > 1
    firsts = {score: ranking.first_by(score) for score in ranking.scores}
    for place, row in enumerate(ranking.rows, 1):
        ok = not row.error
        cells = {"": str(place) if ok else EN_DASH, "Checkpoint": row.checkpoint}
        cells |= {"Model": row.model or EN_DASH} if several else {}
        cells |= {
            "Probe %": percent(row.accuracy, unit=""),
            "95 %": f"{100 * row.low:.1f}..{100 * row.high:.1f}" if ok else EN_DASH,
            "Behind": _behind(ranking, row),
        }
        for score in ranking.scores:
            cells[tables.score_name(score)] = _score(row.scores[score], row is firsts[score]) if ok else EN_DASH
        found.append(cells)
    return found


def _behind(ranking: Ranking, row: Ranked) -> str:
    if row.error or row is ranking.best:
        return EN_DASH
    tied = any(row is other for other in ranking.tied)
    return f"{'≈ ' if tied else ''}{100 * row.behind:.1f}"


def _score(value: float, first: bool) -> str:
    if not math.isfinite(value):
        return EN_DASH
    digits = 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2
    return f"{value:.{digits}f}{STAR if first else ''}"


# How a narrow terminal heads a column.
SHORT = {"H-score (shrunk)": "H-\nscore", "N-LEEP": "N-\nLEEP", "TransRate": "Trans\nRate", "Behind": "Be-\nhind"}


def table(ranking: Ranking) -> Table:
    """For a terminal, 80 columns wide: `rich.print(table(ranking))`."""
    found = Table(
        title=f"{tables.short_target(ranking.target)}: {ranking.num_images:,} images, {ranking.num_classes} classes",
        box=rich.box.SIMPLE_HEAD,
        caption="\n".join([*answer(ranking), *(f"Failed: {row.error}" for row in ranking.rows if row.error)]),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    rows = [
        {title: cell for title, cell in row.items() if title not in ("Model", "95 %")} for row in table_rows(ranking)
    ]
    for row, cells in zip(ranking.rows, rows, strict=True):
        if not row.error:
            cells["Probe %"] = f"{100 * row.accuracy:.1f} ±{50 * (row.high - row.low):.1f}"
    for title in rows[0]:
        name = title == "Checkpoint"
        found.add_column(
            SHORT.get(title, title), justify="left" if name else "right", no_wrap=not name, overflow="fold"
        )
    for cells in rows:
        found.add_row(*map(Text, cells.values()))
    return found


@matplotlib.rc_context(STYLE)
def figure(ranking: Ranking) -> Figure:
    """The probe accuracy of each checkpoint with its 95 % interval, the best on top."""
    rows = ranking.sound[::-1]
    drawn = Figure(figsize=(WIDTH, 0.55 + 0.2 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    for place, row in enumerate(rows):
        alike = any(row is other for other in (ranking.best, *ranking.tied))
        colour = BLUE if alike else GREY
        ends = [[100 * (row.accuracy - row.low)], [100 * (row.high - row.accuracy)]]
        axes.errorbar([100 * row.accuracy], [place], xerr=ends, fmt="o", color=colour, markersize=4, elinewidth=1.2)
    axes.set_yticks(range(len(rows)), [cut(row.checkpoint, 30) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel("Probe accuracy (%)")
    return drawn


def write_page(ranking: Ranking, folder: pathlib.Path) -> pathlib.Path:
    """Writes `index.html`, `accuracy.svg` and `ranking.csv` into a folder; returns the path of the page."""
    svg = to_svg(figure(ranking))
    tables.write_text(folder / "accuracy.svg", svg)
    ranking.to_csv(folder / "ranking.csv")
    title = f"Which checkpoint to take for {tables.short_target(ranking.target)}"
    tables.write_text(folder / "index.html", to_page(title, list(_body(ranking, title, svg))))
    return folder / "index.html"


def _body(ranking: Ranking, title: str, svg: str) -> Iterator[str]:
    first, *others = answer(ranking)
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="quiet">{escape(ranking.target)}: {ranking.num_images:,} images of {ranking.num_classes} classes, '
        f"{len(ranking.rows)} checkpoints</p>"
    )
    yield f'<p class="answer">{escape(first)}</p>'
    yield f"<p>{escape(' '.join(others))}</p>"
    yield tables.to_html(table_rows(ranking))
    yield (
        '<p class="quiet">Probe: accuracy of a softmax regression on the frozen features, each image tested by a classifier '
        "trained on four fifths of the others, with its 95 % interval. Behind: points less than the best, on the same "
        f"images; ≈: the 95 % interval of that difference reaches 0. {STAR}: first by this score. Scores: higher is better; "
        "their values compare checkpoints of one target and nothing else.</p>"
    )
    caption = (
        "Probe accuracy and its 95 % interval. Blue: the best one, and those that these images cannot tell from it."
    )
    yield f"<figure>{inline_svg(svg, 'a-', caption)}<figcaption>{escape(caption)}</figcaption></figure>"
    yield "<h2>How far to trust it</h2>"
    yield tables.to_html(
        [
            {
                "Score": tables.score_name(score),
                "Puts first": ranking.first_by(score).checkpoint,
                "Kendall's tau with the probe": f"{tau:.2f}"
                if math.isfinite(tau := ranking.agreement(score))
                else EN_DASH,
                "Checkpoints": sum(math.isfinite(row.scores[score]) for row in ranking.sound),
            }
            for score in ranking.scores
        ]
    )
    yield (
        '<p class="quiet">The probe is measured, the scores are predictions of it: where they agree, the order does not '
        "depend on the criterion. LEEP and NCE need the classes that a checkpoint was trained on.</p>"
    )
    failed = [{"Checkpoint": row.checkpoint, "Why": row.error} for row in ranking.rows if row.error]
    if failed:
        yield "<h2>What failed</h2>"
        yield tables.to_html(failed)
    yield "<h2>What was measured</h2>"
    yield tables.to_html(
        [
            {
                "Checkpoint": row.path,
                "Model": row.model,
                "Parameters": f"{row.num_parameters:,}",
                "Image size": row.preprocessing.image_size,
                "Crop fraction": f"{row.preprocessing.crop_fraction:g}",
                "Mean": " ".join(f"{value:.3f}" for value in row.preprocessing.mean),
                "Std": " ".join(f"{value:.3f}" for value in row.preprocessing.std),
                "Interpolation": row.preprocessing.interpolation,
                "Seconds": f"{row.seconds:.1f}",
            }
            for row in ranking.sound
            if row.preprocessing
        ]
    )
