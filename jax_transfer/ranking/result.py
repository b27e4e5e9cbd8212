"""Result of `jax_transfer.rank`: which checkpoint to use for a target, as sentences, a table and a CSV file."""

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
from jax_transfer.trust.evidence import NAIVE

LOW_AGREEMENT = 0.3  # Kendall's tau if about two thirds of the pairs are in the same order
NORMAL = statistics.NormalDist()
EPISODES = 100  # draws of the training images for few-shot accuracies
STAR = "\N{BLACK STAR}"


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The evaluation of one checkpoint. If it could not be evaluated, its results are NaN and `error` says why.

    Attributes:
      checkpoint: display name.
      path: file, folder or description of the checkpoint.
      model: key of `MODELS`.
      num_parameters: number of parameters.
      preprocessing: how images were prepared for it.
      accuracy: accuracy of a cross-validated linear probe, in [0, 1].
      low, high: ends of the 95 % interval of the accuracy.
      behind: accuracy of the best checkpoint minus the accuracy of this one, on the same images.
      behind_low, behind_high: ends of the 95 % interval of this difference.
      scores: score -> value; NaN if the score does not apply.
      naive: list that needs no images of the target (`trust.evidence.NAIVE`) -> value; unknown ones are missing.
      few_shot: number of training images of a class -> accuracy of their class means on the test images, and half of
        the width of its 95 % interval over the draws of these images.
      seconds: time of the evaluation.
      finetuned: accuracy on the test images after fine-tuning; NaN if it was not fine-tuned.
      finetune_error: why fine-tuning failed; "" if it did not.
      notes: sentences on what was assumed about the checkpoint or ignored in its file.
      preprocessing_is_guess: whether the preprocessing was guessed because the checkpoint does not state it.
      error: reason for the failure, "" if there is none.
      loader: loads the checkpoint; see `load`.
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
    naive: dict[str, float] = dataclasses.field(default_factory=dict)
    few_shot: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    seconds: float = math.nan
    finetuned: float = math.nan
    finetune_error: str = ""
    notes: tuple[str, ...] = ()
    preprocessing_is_guess: bool = False
    error: str = ""
    loader: Callable[[], Checkpoint] | None = dataclasses.field(default=None, repr=False, compare=False)

    def load(self) -> Checkpoint:
        """Loads the checkpoint as evaluated, with the same model and preprocessing.

        Raises:
          InputError: if it could not be read during the ranking, or cannot be read now.

        >>> Ranked("a", "a.pth", error="a.pth: the file is truncated").load()
        Traceback (most recent call last):
        jax_transfer.records.InputError: a cannot be loaded: a.pth: the file is truncated
        """
        if self.loader is None:
            raise InputError(
                f"{self.checkpoint} cannot be loaded: {self.error or 'this row is not the result of a ranking'}"
            )
        return self.loader()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the best checkpoints of a ranking were fine-tuned: epochs, learning rate, and numbers of images."""

    epochs: int
    learning_rate: float
    num_train: int
    num_test: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Checkpoints ranked by probe accuracy, failures last. `print(ranking)` shows a table.

    Attributes:
      target: name of the data set.
      num_images: number of images.
      num_classes: number of classes.
      majority: accuracy of always predicting the largest class, on the same images and in the same metric.
      rows: one `Ranked` per checkpoint, best first.
      metric: "accuracy" or "mean_class_accuracy".
      class_names: names of the classes.
      notes: sentences that a reader should know about the images.
      tuning: how the best checkpoints were fine-tuned; None if they were not.

    >>> rows = [Ranked("b", "b.pth", accuracy=0.9, low=0.88, high=0.92, behind=0.0, behind_low=0.0, behind_high=0.0,
    ...                scores={"logme": 1.2}),
    ...         Ranked("a", "a.pth", accuracy=0.8, low=0.78, high=0.82, behind=0.1, behind_low=0.07, behind_high=0.13,
    ...                scores={"logme": 0.7})]
    >>> ranking = Ranking("folder:/my/birds", 1000, 5, 0.3, rows)
    >>> ranking.best.checkpoint, ranking.is_useful, ranking.tied
    ('b', True, [])
    """

    target: str
    num_images: int
    num_classes: int
    majority: float
    rows: list[Ranked]
    metric: str = "accuracy"
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tuning: Tuning | None = None

    @property
    def best(self) -> Ranked:
        """Checkpoint with the highest probe accuracy."""
        return self.rows[0]

    @property
    def evaluated(self) -> list[Ranked]:
        """Checkpoints that could be evaluated, best first.

        >>> ranking = Ranking("a", 9, 2, 0.5, [Ranked("b", "b", accuracy=0.9), Ranked("c", "c", error="no file")])
        >>> [row.checkpoint for row in ranking.evaluated]
        ['b']
        """
        return [row for row in self.rows if not row.error]

    @property
    def is_useful(self) -> bool:
        """Whether the best checkpoint is significantly better than always predicting the largest class.

        The best of k checkpoints may also be the luckiest, so the test uses the confidence 1 - 0.05 / k (Bonferroni).

        >>> Ranking("a", 9, 2, 0.5, [Ranked("b", "b", accuracy=0.6, low=0.49, high=0.7)]).is_useful
        False
        """
        wider = NORMAL.inv_cdf(1 - 0.025 / len(self.evaluated)) / NORMAL.inv_cdf(1 - 0.025)
        return self.best.accuracy - wider * (self.best.accuracy - self.best.low) > self.majority

    @property
    def tied(self) -> list[Ranked]:
        """Checkpoints not significantly worse than the best one: the interval of the difference includes 0.

        >>> rows = [Ranked(name, "", behind_low=low) for name, low in (("b", 0.0), ("a", -0.01), ("c", 0.02))]
        >>> [row.checkpoint for row in Ranking("a", 9, 2, 0.5, rows).tied]
        ['a']
        """
        return [row for row in self.evaluated[1:] if row.behind_low <= 0]

    @property
    def scores(self) -> list[str]:
        """Scores that apply to at least one checkpoint.

        >>> Ranking("a", 9, 2, 0.5, [Ranked("b", "b", scores={"logme": 1.0, "leep": float("nan")})]).scores
        ['logme']
        """
        return [name for name in self.best.scores if self.num_scored(name)]

    @property
    def complete_scores(self) -> list[str]:
        """Scores that every evaluated checkpoint has. Only these can rank all checkpoints.

        >>> rows = [Ranked("b", "b", scores={"logme": 1.0, "leep": -1.0}),
        ...         Ranked("a", "a", scores={"logme": 2.0, "leep": float("nan")})]
        >>> Ranking("a", 9, 2, 0.5, rows).complete_scores
        ['logme']
        """
        return [name for name in self.scores if self.num_scored(name) == len(self.evaluated)]

    @property
    def naive_lists(self) -> list[str]:
        """Lists that need no images of the target and do not rank all checkpoints alike.

        >>> rows = [Ranked(name, name, naive={"num_parameters": size, "last_epoch": 5.0}) for name, size in
        ...         (("a", 1e6), ("b", 2e6))]
        >>> Ranking("a", 9, 2, 0.5, rows).naive_lists
        ['num_parameters']
        """
        return [name for name in NAIVE if len({row.naive.get(name) for row in self.evaluated} - {None}) > 1]

    def value(self, row: Ranked, criterion: str) -> float:
        """Returns the value of a checkpoint by a score or a naive list; NaN if it has none.

        >>> row = Ranked("a", "a", scores={"logme": 1.0}, naive={"num_parameters": 2e6})
        >>> [Ranking("a", 9, 2, 0.5, [row]).value(row, name) for name in ("logme", "num_parameters", "last_epoch")]
        [1.0, 2000000.0, nan]
        """
        return {**row.naive, **row.scores}.get(criterion, math.nan)

    def num_scored(self, score: str) -> int:
        """Returns the number of checkpoints that have this score, or a value in this naive list.

        >>> Ranking("a", 9, 2, 0.5, [Ranked("b", "b", scores={"logme": 1.0})]).num_scored("logme")
        1
        """
        return sum(math.isfinite(self.value(row, score)) for row in self.evaluated)

    def first_by(self, score: str) -> Ranked | None:
        """Returns the checkpoint with the highest score, the best by the probe of several; None if a score is missing.

        >>> rows = [Ranked("b", "b", scores={"logme": 1.0}), Ranked("a", "a", scores={"logme": 2.0})]
        >>> Ranking("a", 9, 2, 0.5, rows).first_by("logme").checkpoint
        'a'
        """
        if self.num_scored(score) < len(self.evaluated):
            return None
        return max(self.evaluated, key=lambda row: self.value(row, score))

    def agreement(self, score: str) -> float:
        """Computes Kendall's tau between a score, or a naive list, and the probe accuracy over all checkpoints.

        Returns NaN for fewer than three checkpoints, or if the score is missing for a checkpoint.

        >>> rows = [Ranked(str(i), "", accuracy=1 - i / 10, scores={"logme": -float(i)}) for i in range(4)]
        >>> Ranking("a", 9, 2, 0.5, rows).agreement("logme")
        1.0
        """
        return _tau([self.value(row, score) for row in self.evaluated], [row.accuracy for row in self.evaluated])

    @property
    def mean_agreement(self) -> float:
        """Mean Kendall's tau over all pairs of criteria (the probe and the complete scores); low if they disagree.

        >>> rows = [Ranked(str(i), "", accuracy=1 - i / 10, scores={"logme": float(i)}) for i in range(4)]
        >>> Ranking("a", 9, 2, 0.5, rows).mean_agreement
        -1.0
        """
        columns = [[row.accuracy for row in self.evaluated]]
        columns += [[row.scores[score] for row in self.evaluated] for score in self.complete_scores]
        taus = [_tau(a, b) for a, b in itertools.combinations(columns, 2)]
        taus = [tau for tau in taus if math.isfinite(tau)]
        return statistics.fmean(taus) if taus else math.nan

    def to_csv(self, path: str | pathlib.Path) -> None:
        """Writes a CSV file with one row per checkpoint and all its values.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "ranking.csv"
        ...     Ranking("a", 9, 2, 0.5, [Ranked("b", "b.pth", accuracy=0.9)]).to_csv(path)
        ...     path.read_text().splitlines()[1][:8]
        '1,b,b.pt'
        """
        tables.to_csv([self._cells(rank, row) for rank, row in enumerate(self.rows, 1)], pathlib.Path(path))

    def _cells(self, rank: int, row: Ranked) -> Row:
        cells = {"rank": rank, **dataclasses.asdict(row)}
        preprocessing = cells.pop("preprocessing") or {}
        scores = cells.pop("scores") or dict.fromkeys(self.best.scores, math.nan)
        # The number of parameters has a column of its own, in which the head counts.
        del cells["naive"]
        names = {name: f"{name}_without_head" if name in cells else name for name in self.naive_lists}
        naive = {column: row.naive.get(name, math.nan) for name, column in names.items()}
        del cells["few_shot"]
        few_shot = {}
        for n in self.best.few_shot:
            few_shot[f"{n}_shot"], few_shot[f"{n}_shot_interval"] = row.few_shot.get(n, (math.nan, math.nan))
        error, notes = cells.pop("error"), " ".join(cells.pop("notes"))
        del cells["loader"]
        return {
            **cells,
            "image_size": preprocessing.get("image_size", ""),
            **scores,
            **naive,
            **few_shot,
            "notes": notes,
            "error": error,
        }

    def __str__(self) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table(self))
        return capture.get()


METRIC_SENTENCES = {
    "accuracy": "is right on {} of the images",
    "mean_class_accuracy": "is right on {} of the images of a class, averaged over classes",
}


def _tau(a: list[float], b: list[float]) -> float:
    return float(kendall(a, b)) if len(a) > 2 else math.nan


def answer(ranking: Ranking) -> list[str]:
    """Describes the result in sentences, the most important one first.

    >>> rows = [Ranked("b", "b.pth", accuracy=0.9, low=0.88, high=0.92, behind=0.0, behind_low=0.0, behind_high=0.0,
    ...                scores={"logme": 1.2}),
    ...         Ranked("a", "a.pth", accuracy=0.8, low=0.78, high=0.82, behind=0.1, behind_low=0.07, behind_high=0.13,
    ...                scores={"logme": 0.7})]
    >>> ranking = Ranking("folder:/my/birds", 1000, 5, 0.3, rows)
    >>> print(answer(ranking)[1])
    The next one, a, is 10.00 points behind (95 %: 7.00 to 13.00).
    """
    best, tied = ranking.best, [row.checkpoint for row in ranking.tied]
    right = METRIC_SENTENCES[ranking.metric].format(percent(best.accuracy))
    interval = f"(95 %: {percent(best.low)} to {percent(best.high)})"
    if not ranking.is_useful:
        majority = METRIC_SENTENCES[ranking.metric].format(percent(ranking.majority))
        luck = f", which the best of {len(ranking.evaluated)} may reach by luck" if best.low > ranking.majority else ""
        return [
            "Use none of them: no checkpoint is significantly better than always predicting the largest class, which "
            f"{majority}. A linear classifier on the features of the best one, {best.checkpoint}, {right} "
            f"{interval}{luck}.",
            *_failures(ranking),
            *_finetuning(ranking),
            "Try other checkpoints or more images."
            if ranking.tuning
            else "Try other checkpoints, more images, or fine-tuning, which was not measured here.",
        ]
    sentences = [
        f"Use {best.checkpoint}: a linear classifier on its features {right} {interval}; always predicting the largest "
        f"class is right on {percent(ranking.majority)}."
    ]
    if len(ranking.evaluated) == 1:
        sentences.append("It is the only checkpoint that could be evaluated.")
    elif tied:
        names = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
        sentences.append(
            f"{ranking.num_images:,} images are too few to tell it from {names}: use more images, or choose the "
            "cheapest."
        )
    else:
        second = ranking.rows[1]
        low, high = 100 * second.behind_low, 100 * second.behind_high
        sentences.append(
            f"The next one, {second.checkpoint}, is {100 * second.behind:.2f} points behind (95 %: {low:.2f} to "
            f"{high:.2f})."
        )
    if math.isfinite(ranking.mean_agreement):
        sentences.append(_first_by_each_score(ranking))
        tau = f"{ranking.mean_agreement:.2f}"
        if ranking.mean_agreement < LOW_AGREEMENT:
            sentences.append(
                f"The criteria contradict each other (mean Kendall's tau {tau}): trust the probe, which is measured."
            )
        else:
            sentences.append(f"The criteria agree with a mean Kendall's tau of {tau}.")
    sentences += _naive(ranking)
    if 2 < len(ranking.evaluated) < MIN_CHECKPOINTS:
        sentences.append(
            f"Kendall's tau over {len(ranking.evaluated)} checkpoints means little: at least {MIN_CHECKPOINTS} are "
            "needed."
        )
    caveat = [] if ranking.tuning else ["This ranks frozen features; after fine-tuning, the order may differ."]
    return [*sentences, *_failures(ranking), *_finetuning(ranking), *caveat]


def _finetuning(ranking: Ranking) -> list[str]:
    """Describes the accuracies after fine-tuning."""
    if not (how := ranking.tuning):
        return []
    tuned = sorted((row for row in ranking.evaluated if math.isfinite(row.finetuned)), key=lambda row: -row.finetuned)
    words = f"fine-tuning ({how.epochs} epochs on {how.num_train:,} images, learning rate {how.learning_rate:g})"
    failed = [
        f"Fine-tuning {row.checkpoint} failed: {row.finetune_error}." for row in ranking.rows if row.finetune_error
    ]
    if not tuned:
        return failed
    then = "".join(f", then {row.checkpoint} with {percent(row.finetuned)}" for row in tuned[1:])
    first = f"After {words}, {tuned[0].checkpoint} is best with {percent(tuned[0].finetuned)}{then}, "
    rest = len(ranking.evaluated) - len(tuned)
    others = "the other one was" if rest == 1 else f"the other {rest} were"
    untuned = f"; {others} not fine-tuned" if rest else ""
    return [f"{first}on {how.num_test:,} test images{untuned}.", *failed]


def _failures(ranking: Ranking) -> list[str]:
    failed = len(ranking.rows) - len(ranking.evaluated)
    return [f"{failed} could not be evaluated: see below."] if failed else []


def _first_by_each_score(ranking: Ranking) -> str:
    """Says which checkpoint each score ranks first."""
    scores_by_first: dict[str, list[str]] = {ranking.best.checkpoint: []}
    for score in ranking.complete_scores:
        first = ranking.first_by(score)
        assert first is not None  # no value of a complete score is missing
        scores_by_first.setdefault(first.checkpoint, []).append(tables.score_name(score))
    agreeing = scores_by_first.pop(ranking.best.checkpoint)
    clauses = [f"{_join(agreeing)} also {_ranks(agreeing)} it first"] if agreeing else ["No score ranks it first"]
    clauses += [f"{_join(scores)} {_ranks(scores)} {name} first" for name, scores in scores_by_first.items()]
    text = "; ".join(clauses) + "."
    if partial := [tables.score_name(score) for score in ranking.scores if score not in ranking.complete_scores]:
        is_missing, it = ("is missing", "it") if len(partial) == 1 else ("are missing", "they")
        count = len(ranking.evaluated)
        text += f" {_join(partial)} {is_missing} for some of the {count} checkpoints, so {it} cannot rank them."
    return text


def _naive(ranking: Ranking) -> list[str]:
    """Says what the first complete list that needs no images of the target would have chosen."""
    for name in ranking.naive_lists:
        first = ranking.first_by(name)
        if first is None:
            continue
        value = ranking.value(first, name)
        equal = [row.checkpoint for row in ranking.evaluated if ranking.value(row, name) == value]
        tau = ranking.agreement(name)
        with_tau = f" (Kendall's tau with the probe {tau:.2f})" if math.isfinite(tau) else ""
        return [
            f"The list by {tables.NAIVE_LISTS[name][0]}, which needs no images of the target, "
            f"{'ranks' if len(equal) == 1 else 'ties'} {_join(equal[:3])}{' and others' if len(equal) > 3 else ''} "
            f"first{with_tau}."
        ]
    return []


def _ranks(scores: list[str]) -> str:
    """Returns the verb for one or several scores."""
    return "ranks" if len(scores) == 1 else "rank"


def _join(names: list[str]) -> str:
    """Joins names to "a, b and c"."""
    return names[0] if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


NAMED_CLASSES = 6


def named_classes(class_names: Sequence[str]) -> str:
    """Formats the first few classes and the last one, so that a misread folder is easy to spot.

    >>> named_classes(["cat", "dog"])
    ' (cat, dog)'
    """
    names = [printable(name) for name in class_names]
    if len(names) > NAMED_CLASSES:
        names = [*names[: NAMED_CLASSES - 2], f"... {names[-1]}"]
    return f" ({', '.join(names)})" if names else ""


def table_rows(ranking: Ranking) -> list[Row]:
    """Formats one dict per checkpoint: column title -> text. A star marks the checkpoint that a score ranks first.

    >>> rows = [Ranked("b", "b.pth", accuracy=0.9, low=0.88, high=0.92, behind=0.0, behind_low=0.0, behind_high=0.0,
    ...                scores={"logme": 1.2}),
    ...         Ranked("a", "a.pth", accuracy=0.8, low=0.78, high=0.82, behind=0.1, behind_low=0.07, behind_high=0.13,
    ...                scores={"logme": 0.7})]
    >>> ranking = Ranking("folder:/my/birds", 1000, 5, 0.3, rows)
    >>> table_rows(ranking)[1]
    {'': '2', 'Checkpoint': 'a', 'Probe %': '80.00', '95 %': '78.0..82.0', 'Behind': '10.0', 'LogME': '0.70'}
    """
    cells_of_rows = []
    several = len({row.model for row in ranking.evaluated}) > 1
    firsts = {score: ranking.first_by(score) for score in ranking.scores}
    for rank, row in enumerate(ranking.rows, 1):
        ok = not row.error
        cells = {"": str(rank) if ok else EN_DASH, "Checkpoint": row.checkpoint}
        cells |= {"Model": row.model or EN_DASH} if several else {}
        cells |= {
            _heading(ranking): percent(row.accuracy, unit=""),
            "95 %": f"{100 * row.low:.1f}..{100 * row.high:.1f}" if ok else EN_DASH,
            "Behind": _behind(ranking, row),
            **({"Fine-tuned %": percent(row.finetuned, unit="")} if ranking.tuning else {}),
            **{f"{n}-shot %": _few_shot(row, n) for n in ranking.best.few_shot},
        }
        for score in ranking.scores:
            cells[tables.score_name(score)] = _format_score(row.scores[score], row is firsts[score]) if ok else EN_DASH
        cells_of_rows.append(cells)
    return cells_of_rows


def _heading(ranking: Ranking) -> str:
    return {"accuracy": "Probe %", "mean_class_accuracy": "Probe, class mean %"}[ranking.metric]


def _behind(ranking: Ranking, row: Ranked) -> str:
    if row.error or row is ranking.best:
        return EN_DASH
    tied = any(row is other for other in ranking.tied)
    return f"{'≈ ' if tied else ''}{100 * row.behind:.1f}"


def _few_shot(row: Ranked, shots: int) -> str:
    if shots not in row.few_shot:
        return EN_DASH
    mean, half_width = row.few_shot[shots]
    return f"{100 * mean:.1f} ±{100 * half_width:.1f}"


def _format_score(value: float, first: bool) -> str:
    if not math.isfinite(value):
        return EN_DASH
    digits = 0 if abs(value) >= 99.5 else 1 if abs(value) >= 9.95 else 2
    return f"{value:.{digits}f}{STAR if first else ''}"


# Column title -> title in a narrow terminal.
SHORT = {
    "Probe, class mean %": "Probe, class\nmean %",
    "H-score (shrunk)": "H-\nscore",
    "N-LEEP": "N-\nLEEP",
    "TransRate": "Trans\nRate",
    "Behind": "Be-\nhind",
    "Fine-tuned %": "Fine-\ntuned",
}


def table(ranking: Ranking) -> Table:
    """Builds the terminal table, 80 columns wide, and under it the conclusion: which checkpoint to use.

    >>> rows = [Ranked("b", "b.pth", accuracy=0.9, low=0.88, high=0.92, behind=0.0, behind_low=0.0, behind_high=0.0,
    ...                scores={"logme": 1.2}),
    ...         Ranked("a", "a.pth", accuracy=0.8, low=0.78, high=0.82, behind=0.1, behind_low=0.07, behind_high=0.13,
    ...                scores={"logme": 0.7})]
    >>> ranking = Ranking("folder:/my/birds", 1000, 5, 0.3, rows)
    >>> import rich
    >>> rich.print(table(ranking))
    birds: 1,000 images, 5 classes
    ...
    """
    sentences = [*answer(ranking), *ranking.notes, *(f"Failed: {row.error}" for row in ranking.rows if row.error)]
    built = Table(
        # As Text, because rich would read square brackets in names of classes and files as styles.
        title=Text(
            f"{printable(tables.short_target(ranking.target))}: {ranking.num_images:,} images, "
            f"{ranking.num_classes} classes{named_classes(ranking.class_names)}"
        ),
        box=rich.box.SIMPLE_HEAD,
        caption=Text("\n".join(map(printable, sentences))),
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
        cells |= {f"{n}-shot %": f"{100 * mean:.1f}" for n, (mean, _) in row.few_shot.items()}
    titles: list[str] = list(rows[0])
    short = SHORT | {f"{n}-shot %": f"{n}-\nshot" for n in ranking.best.few_shot}
    for title in titles:
        is_name = title == "Checkpoint"
        built.add_column(
            short.get(title, title), justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold"
        )
    for cells in rows:
        built.add_row(*(Text(printable(cell)) for cell in cells.values()))
    return built
