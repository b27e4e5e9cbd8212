"""Shows how far each score can be trusted, as in Tables 1 to 3 of "Ranking Neural Checkpoints"."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

import rich.box
from rich.table import Table
from rich.text import Text

from jax_transfer.analysis import MIN_CHECKPOINTS
from jax_transfer.report import tables
from jax_transfer.report.best import DEFAULT, metric_words
from jax_transfer.report.grid import swept_words
from jax_transfer.report.tables import counted, is_number
from jax_transfer.results import Row
from jax_transfer.transfer.finetune import FINETUNE_SCORES

# Column title -> column of results/ranking.jsonl, and the number of decimals on the page and in the narrower terminal
# table. Values are percentages, averaged over the targets on which at least one score has a value, so that all scores
# use the same targets.
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
AGAINST = "Against the list"
AGAINST_INTERVAL = "Its 95 % interval"
ELSEWHERE = (
    "Independent studies found no score that is reliable everywhere (Agostinelli et al., ECCV 2022, arXiv 2204.01403; "
    "arXiv 2510.06448): what holds here need not hold for other checkpoints or targets."
)
AS_IN_THE_PAPER = "GFLOPS as in the paper"
SCORED = "Scored"
FROM_OTHER_TARGETS = ("average_rank", "pooled")


def trust_rows(
    ranking_rows: Sequence[Row],
    score_rows: Sequence[Row],
    method: str,
    judged: Sequence[Row] = (),
    terminal: bool = False,
) -> list[Row]:
    """Formats how well each score predicts the accuracies of `method`: one dict per score, highest Kendall's tau first.

    A score that is missing for some checkpoints cannot be compared over all of them. Its values are then en dashes, and
    the column "Scored" shows how many checkpoints have the score. The GFLOPS columns hold the mean work per
    checkpoint, both as counted in the rows and by the rule in `paper_gigaflops`.

    Args:
      ranking_rows: rows of results/ranking.jsonl.
      score_rows: rows of results/scores.jsonl.
      method: the method whose accuracies the scores predict, such as "finetune".
      judged: rows of results/trust.jsonl, with the difference to a naive list.
      terminal: whether to use fewer decimals, as in the terminal table.

    Returns:
      Column title -> text, for each score.

    >>> from jax_transfer.results import RankingRow, to_json_dict
    >>> row = RankingRow("tfds:mnist", "finetune", "logme", *[0.5] * 7, 4, 0.1, 0.8, regret=0.02)
    >>> (cells,) = trust_rows([to_json_dict(row)], [], "finetune")
    >>> cells["Score"], cells["Kendall"], cells["Regret"]
    ('LogME', '50.00', '2.00')
    """
    own = _shown(ranking_rows, judged, method)
    counts, formatted = _count_scored(own), []
    has_gaps = any(num_scored < num_checkpoints for num_scored, num_checkpoints in counts.values())
    for score, (num_scored, num_checkpoints) in counts.items():
        mean = {c: _mean_over_targets(own, score, c) for c in own[0]}
        cells: Row = {
            "Score": tables.score_name(score),
            **({SCORED: f"{num_scored} of {num_checkpoints}"} if has_gaps else {}),
        }
        for title, (column, decimals) in METRICS.items():
            value = mean[column]
            cells[title] = tables.EN_DASH if value is None else f"{100 * value:z.{decimals[terminal]}f}"
            if title == "Kendall":
                low, high = mean["kendall_low"], mean["kendall_high"]
                cells[INTERVAL] = _interval(low, high)
        cells |= _against(judged, method, score)
        own_scores = [row for row in score_rows if row["score"] == score]
        cells["GFLOPS"] = _format_gigaflops(_mean(row["gflops"] for row in own_scores), 2 - terminal)
        cells[AS_IN_THE_PAPER] = _format_gigaflops(_mean(map(paper_gigaflops, own_scores)), 2 - terminal)
        formatted.append((-2 if mean["kendall"] is None else mean["kendall"], cells))
    return [cells for _, cells in sorted(formatted, key=lambda pair: -pair[0])]


def _shown(ranking_rows: Sequence[Row], judged: Sequence[Row], method: str) -> list[Row]:
    """Returns the ranking rows of a method, without the settings of a heat map, which have no row in `judged`."""
    own = [row for row in ranking_rows if row["method"] == method]
    known = {row["score"] for row in judged if row["method"] == method}
    return [row for row in own if row["score"] in known] if known else own


def _interval(low: float | None, high: float | None) -> str:
    """Formats an interval of fractions in percent."""
    return f"{round(100 * low)}..{round(100 * high)}" if is_number(low) and is_number(high) else tables.EN_DASH


def _against(judged: Sequence[Row], method: str, score: str) -> Row:
    """Returns the cells of the difference to the naive list, and its interval; no cells if there is no such list."""
    row = next((row for row in judged if (row["method"], row["score"]) == (method, score)), None)
    if not any(row["method"] == method and row["baseline"] for row in judged):
        return {}
    difference = row["difference"] if row else None
    return {
        AGAINST: f"{100 * difference:+z.0f}" if is_number(difference) else tables.EN_DASH,
        AGAINST_INTERVAL: _interval(row["difference_low"], row["difference_high"]) if row else tables.EN_DASH,
    }


def verdict(judged: Sequence[Row], method: str) -> list[str]:
    """Says whether any score earned its cost: whether it orders the checkpoints better than a list that needs no data.

    Args:
      judged: rows of results/trust.jsonl.
      method: the method whose accuracies the scores predict.

    >>> rows = [{"method": "probe", "score": score, "baseline": "num_parameters", "kendall": 0.5,
    ...          "difference": difference, "difference_low": low, "difference_high": high, "num_checkpoints": 12}
    ...         for score, difference, low, high in (("logme", 0.1, -0.2, 0.4), ("num_parameters", None, None, None))]
    >>> verdict(rows, "probe")[0]
    'No score earned its cost: the one score does not order the checkpoints better than the list by number of ...'
    """
    own = [row for row in judged if row["method"] == method]
    if not own:
        return []
    scores = [row for row in own if is_judged(row["score"], [other["score"] for other in own])]
    if not scores:
        return ["There are no scores here, only lists that need no data of the target."]
    name = next((row["baseline"] for row in own if row["baseline"]), "")
    if not name:
        return [
            "Whether a score earned its cost cannot be said: there is no list to compare with, because neither the"
            " number of parameters nor the epoch nor any other such list is known for all checkpoints and tells them"
            " apart.",
            ELSEWHERE,
        ]
    if own[0]["num_checkpoints"] < MIN_CHECKPOINTS:
        few = counted(own[0]["num_checkpoints"], "checkpoint")
        return [
            f"Whether a score earned its cost cannot be said from {few}: at least {MIN_CHECKPOINTS} are needed.",
            ELSEWHERE,
        ]
    order, choice = tables.NAIVE_LISTS[name]
    # A score that orders the checkpoints just as the list does has no interval, but is compared.
    compared = [row for row in scores if is_number(row["difference_low"]) or row["difference"] == 0]
    ahead = [tables.score_name(row["score"]) for row in compared if (row["difference_low"] or 0) > 0]
    behind = [tables.score_name(row["score"]) for row in compared if (row["difference_high"] or 0) < 0]
    if not compared:
        return [
            "Whether a score earned its cost cannot be said: no score has a value for every checkpoint, on accuracies"
            f" that differ, to compare with the list by {order}.",
            ELSEWHERE,
        ]
    if ahead:
        its, order_s = ("its cost: it", "orders") if len(ahead) == 1 else ("their cost: they", "order")
        first = (
            f"{tables.listed(ahead)} earned {its} {order_s} the checkpoints better than the list by {order}, by more"
            " than chance explains."
        )
    else:
        none = "the one score does not order" if len(compared) == 1 else f"none of {len(compared)} scores orders"
        first = (
            f"No score earned its cost: {none} the checkpoints better than the list by {order}, by more than chance"
            f" explains. Taking {choice} may have done just as well."
        )
    luck = (
        f" Each of the {len(compared)} scores compared has a chance of one in forty of seeming better when it is not."
        if ahead and len(compared) > 1
        else ""
    )
    worse = (
        f"{tables.listed(behind)} {'does' if len(behind) == 1 else 'do'} worse than the list by {order}, by more than"
        " chance explains."
        if behind
        else ""
    )
    return list(filter(None, [first + luck, _better_list(own, scores, name, bool(ahead)), worse, ELSEWHERE]))


def is_judged(score: str, others: Sequence[str]) -> bool:
    """Returns whether the verdict is about a score: not about a list, nor what is made for something else.

    Pooled scores use accuracies on other targets, an effective rank is meant for the epochs of one pre-training, and
    the parts of NCTI are judged as a whole.

    >>> [name for name in ("logme", "pooled", "ncti_geometry", "ncti") if is_judged(name, ("logme", "ncti"))]
    ['logme', 'ncti']
    """
    is_part = score.startswith("ncti_") and "ncti" in others
    return not (is_part or score in tables.NAIVE_LISTS or score in FROM_OTHER_TARGETS or score == "effective_rank")


def _better_list(own: Sequence[Row], scores: Sequence[Row], baseline: str, ahead: bool) -> str:
    """Says which other list without any accuracies does at least as well as every score; "" if none does."""
    needs_none = [row for row in own if row["score"] in tables.NAIVE_LISTS and row["score"] not in FROM_OTHER_TARGETS]
    lists = [row for row in needs_none if row["score"] != baseline and is_number(row["kendall"])]
    ordered = [row for row in scores if is_number(row["kendall"])]
    if not lists or not ordered:
        return ""
    best_list, best_score = (max(rows, key=lambda row: row["kendall"]) for rows in (lists, ordered))
    if best_list["kendall"] < best_score["kendall"]:
        return ""
    order = tables.NAIVE_LISTS[best_list["score"]][0]
    no_score = "But no score" if ahead else "Nor does a score"
    verb = "orders" if ahead else "order"
    return (
        f"{no_score} {verb} them better than the list by {order}, which needs no data of the target either: its tau is"
        f" {100 * best_list['kendall']:z.0f}, that of the best score, {tables.score_name(best_score['score'])},"
        f" {100 * best_score['kendall']:z.0f}. That list was not fixed beforehand, so its place may be luck."
    )


def paper_gigaflops(row: Row) -> float:
    """Computes the work of a score by the rule of "Ranking Neural Checkpoints".

    The rule counts a multiply-add as one operation, whereas the rows count it as two. All scores share one forward
    pass over the training images, F, which is excluded. Fine-tuning for k epochs costs 3 F per epoch, minus the shared
    pass, plus one forward pass over the test images, T: (3k - 1) F + T. A linear classifier costs T plus its training.
    Any other score costs only the computation of the score.

    Args:
      row: a row of results/scores.jsonl.

    Returns:
      Multiply-adds / 1e9, or NaN if the row lacks a number.

    >>> paper_gigaflops({"score": "finetune_1", "gflops": 1.0, "forward_gflops": 200.0, "test_forward_gflops": 40.0})
    220.0
    """
    own, forward, test_forward = (
        row[name] / 2 if is_number(row.get(name)) else math.nan
        for name in ("gflops", "forward_gflops", "test_forward_gflops")
    )
    if row["score"] in FINETUNE_SCORES:
        return (3 * FINETUNE_SCORES[row["score"]] - 1) * forward + test_forward
    return own + test_forward if row["score"].startswith("linear_") else own


def _format_gigaflops(gflops: float | None, decimals: int) -> str:
    """Formats gigaflops in scientific notation, such as 6.51e5, or plainly if the number is short."""
    if gflops is None:
        return tables.EN_DASH
    if not gflops:
        return "0"
    if 0.01 <= gflops < 100:
        return f"{gflops:.{decimals + 1}g}"
    mantissa, exponent = f"{gflops:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def trust_note(
    ranking_rows: Sequence[Row],
    score_rows: Sequence[Row],
    method: str,
    swept: Iterable[tuple[str, str]] = (),
    judged: Sequence[Row] = (),
) -> str:
    """Describes the data behind `trust_rows`, and says if there are too few checkpoints.

    Args:
      ranking_rows, score_rows, method: see `trust_rows`.
      swept: the value of `grid.swept`, to say so if the accuracies are the best of a sweep on the test images.
      judged: rows of results/trust.jsonl.

    >>> from jax_transfer.results import RankingRow, to_json_dict
    >>> row = RankingRow("tfds:mnist", "finetune", "logme", *[0.5] * 7, 4, 0.1, 0.8, regret=0.02)
    >>> print(trust_note([to_json_dict(row)], [], "finetune"))
    Measured against the FT accuracy of 4 checkpoints, averaged over 1 target, in percent. ...
    """
    own = _shown(ranking_rows, judged, method)
    names = tables.target_names(row["target"] for row in own)
    metrics = {row["target"]: row.get("metric", DEFAULT) for row in own}
    counts = sorted({row["num_checkpoints"] for row in own})
    few = counted(counts[0], "checkpoint")
    checkpoints = few if counts[0] == counts[-1] else f"{counts[0]} to {counted(counts[-1], 'checkpoint')}"
    accuracy = f"{tables.method_name(method)} {metric_words(metrics, names)}{swept_words(swept, method, names)}"
    note = f"Measured against the {accuracy} of {checkpoints}, averaged over {counted(len(names), 'target')}"
    note += (
        ", in percent. 95 %: bootstrap interval of Kendall's tau over checkpoints. Regret: accuracy lost by trusting "
        "the score, in points."
    )
    name = next((row["baseline"] for row in judged if row["method"] == method and row["baseline"]), "")
    if name:
        note += (
            f" Against the list: Kendall's tau minus that of the list by {tables.NAIVE_LISTS[name][0]}, which needs no "
            "data of the target; its interval is a paired bootstrap over checkpoints, with the targets as they are. "
            f"The table holds such lists too; a list in which all checkpoints are equal has {tables.EN_DASH}."
        )
    if any(row["score"] == "effective_rank" for row in own):
        note += (
            f" {tables.SCORE_NAMES['effective_rank']} is meant to compare epochs of one pre-training, not"
            " architectures or methods."
        )
    elsewhere = [tables.SCORE_NAMES[s] for s in FROM_OTHER_TARGETS if any(row["score"] == s for row in own)]
    if elsewhere:
        verb = "uses" if len(elsewhere) == 1 else "use"
        note += f" {tables.listed(elsewhere)} {verb} the accuracies on the other targets."
    note += "".join(f" {sentence}" for sentence in _describe_gaps(own, names))
    forward = _mean([row.get("forward_gflops") for row in score_rows])
    if forward is not None:
        note += (
            " GFLOPS: work per checkpoint, where a multiply-add is two operations. It excludes the forward pass over "
            f"the training images ({forward:.3g}), which all scores share, and forward passes over the images on which "
            "a score is tested. As in the paper: a multiply-add is one operation. If F and T are one forward pass over "
            "the training images and one over the test images, fine-tuning for k epochs costs (3k - 1) F + T, and a "
            "linear classifier costs T plus its training. This matches the paper's groups I and II within 1 %; its "
            "group III does not fit."
        )
    if counts[0] < MIN_CHECKPOINTS:
        verb = "is" if counts[0] == 1 else "are"
        note += f" {few} {verb} too few to trust any of this; at least {MIN_CHECKPOINTS} are needed."
    return note


def _count_scored(own: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Counts the checkpoints with a score and an accuracy, and all checkpoints: score -> both, summed over targets."""
    totals = {row["target"]: row["num_checkpoints"] for row in own}
    scored: dict[str, int] = {}
    for row in own:
        num_scored = row.get("num_scored")
        scored.setdefault(row["score"], 0)
        scored[row["score"]] += row["num_checkpoints"] if num_scored is None else num_scored
    return {score: (number, sum(totals.values())) for score, number in scored.items()}


def _targets_with(own: Sequence[Row], column: str) -> list[str]:
    """Returns the targets on which at least one score has a value in a column."""
    return list(dict.fromkeys(row["target"] for row in own if is_number(row.get(column))))


def _mean_over_targets(own: Sequence[Row], score: str, column: str) -> float | None:
    """Averages a column over the targets on which any score has a value; None if this score lacks any of them."""
    values = {row["target"]: row.get(column) for row in own if row["score"] == score}
    values = [values.get(target) for target in _targets_with(own, column)]
    return _mean(values) if all(map(is_number, values)) else None


def _describe_gaps(own: Sequence[Row], names: dict[str, str]) -> Iterator[str]:
    """Yields sentences about missing values: checkpoints without a score, and targets without values in a column."""
    missing = [
        f"{tables.score_name(score)} {num_scored} of {num_checkpoints} scored"
        for score, (num_scored, num_checkpoints) in _count_scored(own).items()
        if num_scored < num_checkpoints
    ]
    if missing:
        yield (
            f"{', '.join(missing)}: these checkpoints have both the score and the accuracy. If any checkpoint lacks "
            f"either, the score cannot be judged over all checkpoints ({tables.EN_DASH})."
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
    """Returns the method whose accuracies the scores should predict: fine-tuning if it has run, else a probe.

    >>> ground_truth([{"method": "probe"}, {"method": "finetune"}])
    'finetune'
    """
    methods = {row["method"] for row in ranking_rows}
    return next((method for method in ("finetune", "probe_converged", "probe") if method in methods), None)


def trust_table(
    ranking_rows: Sequence[Row],
    score_rows: Sequence[Row],
    method: str,
    swept: Iterable[tuple[str, str]] = (),
    judged: Sequence[Row] = (),
) -> Table:
    """Builds a terminal table of `trust_rows` that fits into 80 columns. See `trust_note` for the arguments.

    >>> from jax_transfer.results import RankingRow, to_json_dict
    >>> row = RankingRow("tfds:mnist", "finetune", "logme", *[0.5] * 7, 4, 0.1, 0.8, regret=0.02)
    >>> import rich
    >>> rich.print(trust_table([to_json_dict(row)], [], "finetune"))
    How far each score can be trusted...
    """
    note = " ".join([trust_note(ranking_rows, score_rows, method, swept, judged), *verdict(judged, method)])
    table = Table(
        title="How far each score can be trusted",
        caption=Text(note),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    rows = []
    for row in trust_rows(ranking_rows, score_rows, method, judged, terminal=True):
        gap = f"\n{row[SCORED]} scored" if SCORED in row else ""
        cells = {k: v for k, v in row.items() if k not in (SCORED, AGAINST_INTERVAL)}
        rows.append({**cells, "Score": cells["Score"] + gap})
    short = {"Recall@1": "Rec\n@1", "Rel@1": "Rel\n@1", "Recall@3": "Rec\n@3", "Rel@3": "Rel\n@3"}
    short |= {
        "Pearson": "Pear-\nson",
        "Kendall": "Ken-\ndall",
        INTERVAL: "its\n95 %",
        "GFLOPS": "GF-\nLOPS",
        AS_IN_THE_PAPER: "as in\npaper",
        "Regret": "Re-\ngret",
        AGAINST: "vs\nlist",
        "weighted": "weigh-\nted",
    }
    work = ("GFLOPS", AS_IN_THE_PAPER)
    is_counted = any(row[title] != tables.EN_DASH for row in rows for title in work)
    dropped = ("weighted",) if is_counted else work  # both do not fit
    rows = [{title: cell for title, cell in row.items() if title not in dropped} for row in rows]
    titles: list[str] = list(rows[0]) if rows else []
    for title in titles:
        is_name = title == "Score"  # only names may wrap, because a truncated number would be wrong
        table.add_column(
            short.get(title, title), justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _mean(values) -> float | None:
    values = [value for value in values if is_number(value)]
    return statistics.fmean(values) if values else None
