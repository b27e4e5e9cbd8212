"""How far each score can be trusted: all scores by all metrics, as Tables 1 to 3 of "Ranking Neural Checkpoints"."""

import math
import statistics
from collections.abc import Iterator, Sequence

import rich.box
from rich.table import Table
from rich.text import Text

from jax_transfer.analysis import MIN_CHECKPOINTS
from jax_transfer.report import tables
from jax_transfer.report.best import DEFAULT, metric_words
from jax_transfer.report.tables import is_number
from jax_transfer.results import Row
from jax_transfer.transfer.finetune import FINETUNE_SCORES

# Column title -> column of results/ranking.jsonl, and its decimals on the page and in the narrower terminal; each is
# shown in per cent, the mean over the targets on which any score has it: the same targets for all scores.
METRICS = {
    "Recall@1": ("recall@1", (2, 0)),
    "Rel@1": ("rel@1", (2, 1)),
    "Recall@3": ("recall@3", (2, 0)),
    "Rel@3": ("rel@3", (2, 1)),
    "Pearson": ("pearson", (2, 0)),
    "Kendall": ("kendall", (2, 0)),
    "weighted": ("weighted_kendall", (2, 0)),
    "Regret": ("regret", (2, 1)),
}
INTERVAL = "95 % interval"
AS_IN_THE_PAPER = "GFLOPS as in the paper"
SCORED = "Scored"


def trust_rows(
    ranking_rows: Sequence[Row], score_rows: Sequence[Row], method: str, terminal: bool = False
) -> list[Row]:
    """Column title -> text, a row a score: how it ranks checkpoints by their accuracy with `method`; best Kendall first.

    A score that a checkpoint lacks has no value against all checkpoints: it shows en dashes, and how many it has.
    GFLOPS: the mean work of the score for one checkpoint, as its rows have it, and as `paper_gigaflops` has it.
    """
    own = [row for row in ranking_rows if row["method"] == method]
    scored, found = _scored(own), []
    gaps = any(have < of for have, of in scored.values())
    for score, (have, of) in scored.items():
        mean = {c: _mean_over_targets(own, score, c) for c in own[0]}
        cells: Row = {"Score": tables.score_name(score), **({SCORED: f"{have} of {of}"} if gaps else {})}
        for title, (column, decimals) in METRICS.items():
            cells[title] = tables.EN_DASH if mean[column] is None else f"{100 * mean[column]:.{decimals[terminal]}f}"
            if title == "Kendall":
                ends = mean["kendall_low"], mean["kendall_high"]
                cells[INTERVAL] = tables.EN_DASH if None in ends else "{}..{}".format(*(round(100 * e) for e in ends))
        own_scores = [row for row in score_rows if row["score"] == score]
        cells["GFLOPS"] = _work(_mean(row["gflops"] for row in own_scores), 2 - terminal)
        cells[AS_IN_THE_PAPER] = _work(_mean(map(paper_gigaflops, own_scores)), 2 - terminal)
        found.append((-2 if mean["kendall"] is None else mean["kendall"], cells))
    return [cells for _, cells in sorted(found, key=lambda pair: -pair[0])]


def paper_gigaflops(row: Row) -> float:
    """The work of a score by the rule of "Ranking Neural Checkpoints", from a row of results/scores.jsonl.

    A multiply-add is one operation there; rows count two. A forward pass over the training images, F, serves all
    scores and is left out. Fine-tuning for k epochs costs 3 F an epoch, less that one, and T, a forward pass over the
    test images: (3k - 1) F + T. A linear classifier costs T and its training. Other scores cost what they compute.

    Returns:
      Multiply-adds / 1e9; NaN where the row lacks a number.
    """
    own, forward, test_forward = (
        row[name] / 2 if is_number(row.get(name)) else math.nan
        for name in ("gflops", "forward_gflops", "test_forward_gflops")
    )
    if row["score"] in FINETUNE_SCORES:
        return (3 * FINETUNE_SCORES[row["score"]] - 1) * forward + test_forward
    return own + test_forward if row["score"].startswith("linear_") else own


def _work(gflops: float | None, decimals: int) -> str:
    """6.51e5, with so many decimals."""
    if gflops is None:
        return tables.EN_DASH
    if 0.01 <= gflops < 100:
        return f"{gflops:.{decimals + 1}g}"
    mantissa, exponent = f"{gflops:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def trust_note(ranking_rows: Sequence[Row], score_rows: Sequence[Row], method: str) -> str:
    """What `trust_rows` are measured on, and whether it is enough."""
    own = [row for row in ranking_rows if row["method"] == method]
    names = tables.target_names(row["target"] for row in own)
    metrics = {row["target"]: row.get("metric", DEFAULT) for row in own}
    targets, counts = len(names), sorted({row["num_checkpoints"] for row in own})
    checkpoints = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    what = f"{tables.method_name(method)} {metric_words(metrics, names)}"
    note = f"Against {what} of {checkpoints} checkpoints, mean over {targets} "
    note += "target" if targets == 1 else "targets"
    note += (
        "; in per cent. 95 %: bootstrap interval of Kendall's tau over checkpoints. Regret: accuracy lost by trusting "
    )
    note += "the score, in points."
    note += "".join(f" {sentence}" for sentence in _gaps(own, names))
    forward = _mean([row["forward_gflops"] for row in score_rows])
    if forward is not None:
        note += (
            f" GFLOPS of one checkpoint: a multiply-add is two operations; the forward pass over the training images "
            f"({forward:.3g}), which all scores share, and those over images that a score is tested on are left out. As in "
            "the paper: a multiply-add is one operation; with F and T a forward pass over the training and the test "
            "images, fine-tuning for k epochs costs (3k - 1) F + T, and a linear classifier T more than its training (the "
            "paper's groups I and II to 1 %; its group III does not fit)."
        )
    if counts[0] < MIN_CHECKPOINTS:
        note += f" {counts[0]} checkpoints are too few to trust any of this: at least {MIN_CHECKPOINTS} are needed."
    return note


def _scored(own: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Score -> how many checkpoints have it and an accuracy, and how many there are, summed over targets."""
    of = {row["target"]: row["num_checkpoints"] for row in own}
    have: dict[str, int] = {}
    for row in own:
        num_scored = row.get("num_scored")
        have.setdefault(row["score"], 0)
        have[row["score"]] += row["num_checkpoints"] if num_scored is None else num_scored
    return {score: (number, sum(of.values())) for score, number in have.items()}


def _targets_with(own: Sequence[Row], column: str) -> list[str]:
    """The targets on which any score has a value in a column."""
    return list(dict.fromkeys(row["target"] for row in own if is_number(row.get(column))))


def _mean_over_targets(own: Sequence[Row], score: str, column: str) -> float | None:
    """The mean over the targets on which any score has the column; None if this one lacks it on one of them."""
    values = {row["target"]: row.get(column) for row in own if row["score"] == score}
    values = [values.get(target) for target in _targets_with(own, column)]
    return _mean(values) if all(map(is_number, values)) else None


def _gaps(own: Sequence[Row], names: dict[str, str]) -> Iterator[str]:
    """What is missing, in sentences: scores of some checkpoints, and columns of some targets."""
    missing = [f"{tables.score_name(s)} {have} of {of} scored" for s, (have, of) in _scored(own).items() if have < of]
    if missing:
        yield (
            f"{', '.join(missing)}: checkpoints with both the score and the accuracy. Where one lacks either, nothing is "
            f"known against all of them ({tables.EN_DASH})."
        )
    without: dict[tuple[str, ...], list[str]] = {}
    for title, (column, _) in METRICS.items():
        absent = tuple(name for target, name in names.items() if target not in _targets_with(own, column))
        if absent and len(absent) < len(names):
            without.setdefault(absent, []).append(title)
    for absent, titles in without.items():
        yield (
            f"No score has a value on {', '.join(absent)}: the means of {', '.join(titles)} are over "
            f"{len(names) - len(absent)} of {len(names)} targets."
        )


def ground_truth(ranking_rows: Sequence[Row]) -> str | None:
    """The method whose accuracies the scores are to predict: fine-tuning, where it was run."""
    methods = {row["method"] for row in ranking_rows}
    return next((method for method in ("finetune", "probe_converged", "probe") if method in methods), None)


def trust_table(ranking_rows: Sequence[Row], score_rows: Sequence[Row], method: str) -> Table:
    """`trust_rows` for a terminal, 80 columns wide: `rich.print(trust_table(...))`."""
    note = trust_note(ranking_rows, score_rows, method)
    table = Table(
        title="How far each score can be trusted",
        caption=note,
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    rows = []
    for row in trust_rows(ranking_rows, score_rows, method, 1):
        gap = f"\n{row[SCORED]} scored" if SCORED in row else ""
        cells = {k: v for k, v in row.items() if k not in ("weighted", SCORED)}
        rows.append({**cells, "Score": cells["Score"] + gap})
    short = {"Recall@1": "Rec\n@1", "Rel@1": "Rel\n@1", "Recall@3": "Rec\n@3", "Rel@3": "Rel\n@3"}
    short |= {
        "Pearson": "Pear-\nson",
        "Kendall": "Ken-\ndall",
        INTERVAL: "its\n95 %",
        "GFLOPS": "GF-\nLOPS",
        AS_IN_THE_PAPER: "as in\npaper",
        "Regret": "Re-\ngret",
    }
    for title in rows[0] if rows else ():
        is_name = title == "Score"  # the one column that may wrap: a number cut short would be wrong
        table.add_column(short.get(title, title), justify="left" if is_name else "right", no_wrap=not is_name)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _mean(values) -> float | None:
    values = [value for value in values if is_number(value)]
    return statistics.fmean(values) if values else None
