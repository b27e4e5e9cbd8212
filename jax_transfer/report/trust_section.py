"""The section of a page that says how far transferability scores can be trusted, and whether they earn their cost."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from jax_transfer.report import tables
from jax_transfer.report.markup import escape
from jax_transfer.report.tables import EN_DASH, is_number
from jax_transfer.report.trust import trust_note, trust_rows, verdict
from jax_transfer.results import Row

VERDICTS = {True: "Fine", False: "Weakens it", None: "Unknown"}
MIN_APART = 3  # fewer checkpoints have no tau that says anything
SIMILAR = 1.5  # the largest of several numbers of parameters divided by the smallest, if they are nearly equal
FAMILIES = "the largest of the last epochs in each family of architectures with the same pre-training"
PREDICTED = 60  # as many predictions are shown; the others are in the table of all results


def section(
    read: Mapping[str, Sequence[Row]],
    method: str,
    swept: Iterable[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Iterator[str]:
    """Yields the parts of the section for the accuracies of one method, as HTML.

    Args:
      read: result file -> rows; uses ranking, scores, trust, checklist, points and predictions.
      method: the method whose accuracies the scores should predict.
      swept: the value of `grid.swept`.
      notes: sentences on what makes the numbers weaker than they could be.

    >>> from jax_transfer.results import RankingRow, to_json_dict
    >>> row = RankingRow("tfds:mnist", "finetune", "logme", *[0.5] * 7, 4, 0.1, 0.8, regret=0.02)
    >>> parts = list(section({"ranking": [to_json_dict(row)]}, "finetune"))
    >>> "Measured against the FT accuracy" in parts[0]
    True
    """
    ranking, scored, judged = (read.get(name, []) for name in ("ranking", "scores", "trust"))
    for sentence in verdict(judged, method):
        yield f"<p>{escape(sentence)}</p>"
    if notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"
    yield f'<p class="quiet">{escape(trust_note(ranking, scored, method, swept, judged))}</p>'
    yield tables.to_html(trust_rows(ranking, scored, method, judged))
    own = {name: [row for row in read.get(name, []) if row["method"] == method] for name in read if name in OWN}
    yield from _checklist(own.get("checklist", []))
    yield from _apart(own.get("trust", []))
    yield from _points(own.get("points", []), own.get("predictions", []))


OWN = ("trust", "checklist", "points", "predictions")  # the files whose rows belong to a method


def _checklist(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the findings, those that weaken the comparison first."""
    if not rows:
        return
    first = sorted(rows, key=lambda row: (row["passed"] is not False, row["passed"] is None))
    cells = [
        {"Check": row["check"].capitalize(), "Finding": row["finding"], "This comparison": VERDICTS[row["passed"]]}
        for row in first
    ]
    weak = sum(row["passed"] is False for row in rows)
    verb = "weakens" if weak == 1 else "weaken"
    summary = f"Checklist: {weak or 'none'} of {tables.counted(len(rows), 'finding')} {verb} this comparison"
    yield f"<details{' open' if weak else ''}><summary>{escape(summary)}</summary>{tables.to_html(cells)}</details>"


def _apart(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the taus without nested checkpoints, and how well gaps in a score tell gaps in accuracy."""
    if not rows:
        return
    number, epochs = rows[0]["num_checkpoints"], rows[0]["num_epochs"]
    apart = {
        name: (heading, words)
        for name, most, heading, words in (
            ("epochs", number, "Last epochs", "the last epoch of each pre-training"),
            ("earlier", number, "Earlier epochs", "its other epochs"),
            ("families", epochs, "One of each family", FAMILIES),
            (
                "sizes",
                number,
                "Equal size",
                f"the most checkpoints whose numbers of parameters are within a factor of {SIMILAR}",
            ),
        )
        if MIN_APART <= rows[0][f"num_{name}"] < most
    }
    titles = {
        "kendall": f"All {number}",
        **{f"kendall_{name}": f"{heading} ({rows[0][f'num_{name}']})" for name, (heading, _) in apart.items()},
        "fidelity_pearson": "Gaps, Pearson",
        "fidelity_spearman": "Gaps, Spearman",
        "top_fidelity_pearson": "Top gaps, Pearson",
        "top_fidelity_spearman": "Top gaps, Spearman",
    }
    over = ["over all checkpoints", *(f"over {words}" for _, words in apart.values())]
    summary = "Kendall's tau over parts of the checkpoints, and whether gaps" if apart else "Whether gaps"
    cells = [
        {
            "Score": tables.score_name(row["score"]),
            **{title: f"{100 * row[name]:z.0f}" if is_number(row[name]) else EN_DASH for name, title in titles.items()},
        }
        for row in sorted(rows, key=lambda row: -row["kendall"] if is_number(row["kendall"]) else 2)
    ]
    yield (
        f"<details><summary>{summary} in a score tell gaps in accuracy</summary>"
        f"{tables.to_html(cells)}"
        f'<p class="quiet">Kendall\'s tau in percent {tables.listed(over)}. Gaps: the correlation in percent between'
        " the distance of two checkpoints in the score and their distance in accuracy, over all pairs, and (top gaps)"
        " over the pairs with at least one of the three most accurate checkpoints.</p></details>"
    )


def _points(rows: Sequence[Row], predictions: Sequence[Row]) -> Iterator[str]:
    """Yields what a gap in each score has meant in accuracy, and the accuracies that all scores together predict."""
    if not rows:  # the checklist says why
        return
    names = tables.target_names(row["target"] for row in rows)
    sentences = [
        f"{names[row['target']]}: a gap of {row['gap']:.3g} in {tables.score_name(row['score'])} has meant"
        f" {100 * row['points']:z.1f} points of accuracy, plus or minus {100 * row['spread']:.1f}."
        for row in rows
    ]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    yield (
        "<details><summary>What a gap in a score has meant in points of accuracy</summary>"
        f"<ul>{items}</ul>"
        '<p class="quiet">Each gap is one standard deviation of the score over the checkpoints of the target. Its'
        f" meaning is learned from the {rows[0]['num_others']} other targets: the mean of the slopes of their lines,"
        " plus or minus the standard deviation.</p></details>"
    )
    inside = [row for row in predictions if is_number(row["accuracy"]) and row["low"] <= row["accuracy"] <= row["high"]]
    cells = [
        {
            "Target": names.get(row["target"], row["target"]),
            "Checkpoint": row["checkpoint"],
            "Predicted": tables.percent(row["predicted"]),
            "95 %": f"{100 * row['low']:.1f}..{100 * row['high']:.1f}",
            "Measured": tables.percent(row["accuracy"]),
        }
        for row in predictions[:PREDICTED]
    ]
    more = f"The first {PREDICTED} of {len(predictions)}. " if len(predictions) > PREDICTED else ""
    yield (
        "<details><summary>Accuracies that all scores together predict</summary>"
        f"{tables.to_html(cells)}"
        f'<p class="quiet">{more}The mean of the lines of all scores, learned from the other targets; only the mean'
        f" accuracy of the checkpoints is taken from the target itself. {len(inside)} of {len(predictions)} measured"
        " accuracies lie in their intervals.</p></details>"
    )
