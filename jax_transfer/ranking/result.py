"""The result of `jax_transfer.rank`: which checkpoint to take for a target, in sentences, as a table and as a CSV file."""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer.analysis import MIN_CHECKPOINTS, kendall
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.records import InputError, printable
from jax_transfer.report import tables
from jax_transfer.report.tables import EN_DASH, percent
from jax_transfer.results import Row

LOW_AGREEMENT = 0.3  # of Kendall's tau: two of three pairs in the same order
NORMAL = statistics.NormalDist()
STAR = "\N{BLACK STAR}"


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One checkpoint. Accuracies are in [0, 1], those of a cross-validated linear probe, with their 95 % intervals.

    behind: accuracy of the best checkpoint minus that of this one, from the same images. A score that does not apply is
    NaN. notes: what was assumed about the checkpoint or left out of it, in sentences. A checkpoint that could not be
    evaluated has NaN everywhere and the reason in `error`.
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
    notes: tuple[str, ...] = ()
    preprocessing_is_guess: bool = False
    error: str = ""
    loader: Callable[[], Checkpoint] | None = dataclasses.field(default=None, repr=False, compare=False)

    def load(self) -> Checkpoint:
        """Loads the checkpoint as it was evaluated: the model named for it, the preprocessing replaced.

        Raises:
          InputError: if it could not be read then, or cannot be now.
        """
        if self.loader is None:
            raise InputError(
                f"{self.checkpoint} cannot be loaded: {self.error or 'this row is not the result of a ranking'}"
            )
        return self.loader()


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The checkpoints, best probe accuracy first, failures last. `print` shows a table.

    majority: what always naming the largest class achieves on the same images, by the same metric. metric: what
    accuracies are, "accuracy" or "mean_class_accuracy". notes: what a reader should know of the images, in sentences.
    """

    target: str
    num_images: int
    num_classes: int
    majority: float
    rows: list[Ranked]
    metric: str = "accuracy"
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Ranked:
        return self.rows[0]

    @property
    def sound(self) -> list[Ranked]:
        """Those that could be evaluated."""
        return [row for row in self.rows if not row.error]

    @property
    def is_useful(self) -> bool:
        """Whether the best checkpoint is better than always naming the largest class, its interval included.

        The best of k checkpoints has the most luck too: its interval is that of confidence 1 - 0.05 / k (Bonferroni).
        """
        wider = NORMAL.inv_cdf(1 - 0.025 / len(self.sound)) / NORMAL.inv_cdf(1 - 0.025)
        return self.best.accuracy - wider * (self.best.accuracy - self.best.low) > self.majority

    @property
    def tied(self) -> list[Ranked]:
        """Those that these images cannot tell from the best one: the interval of the difference reaches 0."""
        return [row for row in self.sound[1:] if row.behind_low <= 0]

    @property
    def scores(self) -> list[str]:
        """Those that apply to at least one checkpoint."""
        return [name for name in self.best.scores if self.num_scored(name)]

    @property
    def complete_scores(self) -> list[str]:
        """Those that every evaluated checkpoint has: only they say which of all checkpoints is first."""
        return [name for name in self.scores if self.num_scored(name) == len(self.sound)]

    def num_scored(self, score: str) -> int:
        """How many checkpoints have a score."""
        return sum(math.isfinite(row.scores[score]) for row in self.sound)

    def first_by(self, score: str) -> Ranked | None:
        """The checkpoint of the highest score; None where a checkpoint has none, which might have been the first."""
        return max(self.sound, key=lambda row: row.scores[score]) if score in self.complete_scores else None

    def agreement(self, score: str) -> float:
        """Kendall's tau of a score with the probe accuracy over all checkpoints.

        NaN for fewer than three checkpoints, and where one of them has no such score.
        """
        return _tau([row.scores[score] for row in self.sound], [row.accuracy for row in self.sound])

    @property
    def mean_agreement(self) -> float:
        """Kendall's tau between the probe and the complete scores, each with each, in the mean. A low one: they contradict."""
        columns = [[row.accuracy for row in self.sound]]
        columns += [[row.scores[score] for row in self.sound] for score in self.complete_scores]
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
        error, notes = cells.pop("error"), " ".join(cells.pop("notes"))
        del cells["loader"]
        return {**cells, "image_size": preprocessing.get("image_size", ""), **scores, "notes": notes, "error": error}

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table(self))
        return capture.get()


METRIC_SENTENCES = {
    "accuracy": "is right on {} of the images",
    "mean_class_accuracy": "is right on {} of the images of a class in the mean over classes",
}


def _tau(a: list[float], b: list[float]) -> float:
    return float(kendall(a, b)) if len(a) > 2 else math.nan


def answer(ranking: Ranking) -> list[str]:
    """The result in sentences, the most important one first."""
    best, tied = ranking.best, [row.checkpoint for row in ranking.tied]
    right = METRIC_SENTENCES[ranking.metric].format(percent(best.accuracy))
    interval = f"(95 %: {percent(best.low)} to {percent(best.high)})"
    if not ranking.is_useful:
        return [
            f"Take none: no checkpoint is shown to be better than always naming the largest class, which "
            f"{METRIC_SENTENCES[ranking.metric].format(percent(ranking.majority))}. A linear classifier on the features of the best "
            f"one, {best.checkpoint}, {right} {interval}"
            + (f", which the best of {len(ranking.sound)} may reach by luck." if best.low > ranking.majority else "."),
            *_failures(ranking),
            "Try other checkpoints, more images, or fine-tuning, which was not measured here.",
        ]
    said = [
        f"Take {best.checkpoint}: a linear classifier on its features {right} {interval}; always naming the largest class, "
        f"on {percent(ranking.majority)}."
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
            f"A tau over {len(ranking.sound)} checkpoints says little: at least {MIN_CHECKPOINTS} would be needed."
        )
    return [*said, *_failures(ranking), "All this judges frozen features; fine-tuned, the order may differ."]


def _failures(ranking: Ranking) -> list[str]:
    failed = len(ranking.rows) - len(ranking.sound)
    return [f"{failed} could not be evaluated: see below."] if failed else []


def _what_the_scores_say(ranking: Ranking) -> str:
    """Which checkpoint each score puts first, in a sentence."""
    by: dict[str, list[str]] = {ranking.best.checkpoint: []}
    for score in ranking.complete_scores:
        by.setdefault(ranking.first_by(score).checkpoint, []).append(tables.score_name(score))
    own = by.pop(ranking.best.checkpoint)
    clauses = [f"{_listed(own)} put{'s' * (len(own) == 1)} it first too"] if own else ["No score puts it first"]
    clauses += [f"{_listed(scores)} put{'s' * (len(scores) == 1)} {name} first" for name, scores in by.items()]
    said = "; ".join(clauses) + "."
    if partial := [tables.score_name(score) for score in ranking.scores if score not in ranking.complete_scores]:
        count = len(ranking.sound)
        said += f" {_listed(partial)} exist{'s' * (len(partial) == 1)} for fewer than all {count} checkpoints and rank{'s' * (len(partial) == 1)} nothing."
    return said


def _listed(names: list[str]) -> str:
    return names[0] if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


NAMED_CLASSES = 6


def named_classes(class_names: Sequence[str]) -> str:
    """ " (cat, dog, ... zebra)": the first classes and the last, for what a folder was taken for to be seen at once."""
    names = [printable(name) for name in class_names]
    if len(names) > NAMED_CLASSES:
        names = [*names[: NAMED_CLASSES - 2], f"... {names[-1]}"]
    return f" ({', '.join(names)})" if names else ""


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
            _heading(ranking): percent(row.accuracy, unit=""),
            "95 %": f"{100 * row.low:.1f}..{100 * row.high:.1f}" if ok else EN_DASH,
            "Behind": _behind(ranking, row),
        }
        for score in ranking.scores:
            cells[tables.score_name(score)] = _score(row.scores[score], row is firsts[score]) if ok else EN_DASH
        found.append(cells)
    return found


def _heading(ranking: Ranking) -> str:
    return {"accuracy": "Probe %", "mean_class_accuracy": "Probe, class mean %"}[ranking.metric]


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
SHORT = {
    "Probe, class mean %": "Probe, class\nmean %",
    "H-score (shrunk)": "H-\nscore",
    "N-LEEP": "N-\nLEEP",
    "TransRate": "Trans\nRate",
    "Behind": "Be-\nhind",
}


def table(ranking: Ranking) -> Table:
    """For a terminal, 80 columns wide: `rich.print(table(ranking))`."""
    said = [*answer(ranking), *ranking.notes, *(f"Failed: {row.error}" for row in ranking.rows if row.error)]
    found = Table(
        # As Text, for rich would take what stands in square brackets, in names of classes and files, for styles.
        title=Text(
            f"{printable(tables.short_target(ranking.target))}: {ranking.num_images:,} images, {ranking.num_classes} classes"
            f"{named_classes(ranking.class_names)}"
        ),
        box=rich.box.SIMPLE_HEAD,
        caption=Text("\n".join(map(printable, said))),
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    rows = [
        {title: cell for title, cell in row.items() if title not in ("Model", "95 %")} for row in table_rows(ranking)
    ]
    for row, cells in zip(ranking.rows, rows, strict=True):
        if not row.error:
            cells[_heading(ranking)] = f"{100 * row.accuracy:.1f} ±{50 * (row.high - row.low):.1f}"
    for title in rows[0]:
        name = title == "Checkpoint"
        found.add_column(
            SHORT.get(title, title), justify="left" if name else "right", no_wrap=not name, overflow="fold"
        )
    for cells in rows:
        found.add_row(*(Text(printable(cell)) for cell in cells.values()))
    return found
