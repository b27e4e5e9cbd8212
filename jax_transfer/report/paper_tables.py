"""Shows a paper's table of how well scores rank checkpoints beside ours, cell by cell."""

from collections.abc import Iterator, Mapping, Sequence

from jax_transfer.report import tables
from jax_transfer.report.markup import escape
from jax_transfer.report.tables import EN_DASH, counted, is_number
from jax_transfer.report.trust import AS_IN_THE_PAPER, METRICS, trust_rows
from jax_transfer.results import Row

GFLOPS = "GFLOPS"
# Column of a paper's table -> column of `trust_rows` with our number.
COLUMNS = {**{title: title for title in METRICS}, GFLOPS: AS_IN_THE_PAPER}


def paper_table_rows(table: Mapping, ranking_rows: Sequence[Row], score_rows: Sequence[Row]) -> list[Row]:
    """Formats the numbers of a paper's table beside ours, "paper / ours", in the order of the paper.

    Args:
      table: an entry of `config.paper_tables`, see `study.config.PaperTable`.
      ranking_rows: rows of results/ranking.jsonl. Our numbers are means over their targets, see `trust.trust_rows`.
      score_rows: rows of results/scores.jsonl.

    Returns:
      Column title -> text, for each score of the paper.

    >>> from jax_transfer.results import RankingRow, to_json_dict
    >>> row = RankingRow("tfds:mnist", "finetune", "nleep", *[0.5] * 7, 4, 0.1, 0.8, regret=0.02)
    >>> table = {"method": "finetune", "columns": ("Rel@1", "Kendall"), "scores": {"nleep": (99.65, None)}}
    >>> paper_table_rows(table, [to_json_dict(row)], [])
    [{'Score': 'N-LEEP', 'Rel@1': '99.65 / 50.00', 'Kendall': '– / 50.00'}]
    """
    ours = _ours(table, ranking_rows, score_rows)
    return [
        {
            "Score": tables.score_name(score),
            **{
                title: f"{_printed(title, number)} / {ours.get(score, {}).get(COLUMNS[title], EN_DASH)}"
                for title, number in zip(table["columns"], numbers, strict=True)
            },
        }
        for score, numbers in table["scores"].items()
    ]


def section(paper_tables: Sequence[Mapping], read: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yields each table of the paper beside ours as HTML, and sentences that say what can be compared.

    Args:
      paper_tables: `config.paper_tables`.
      read: result file -> rows; uses ranking and scores.
    """
    ranking, scored = (read.get(name, []) for name in ("ranking", "scores"))
    for table in paper_tables:
        yield f"<h3>{escape(table['where'])}: how well scores rank</h3>"
        yield tables.to_html(paper_table_rows(table, ranking, scored))
        yield f'<p class="quiet">{escape(" ".join(sentences(table, ranking, scored)))}</p>'


def sentences(table: Mapping, ranking_rows: Sequence[Row], score_rows: Sequence[Row]) -> list[str]:
    """Says how to read `paper_table_rows`, which scores of the paper we have, and whether numbers can be compared.

    >>> table = {"where": "Table 1", "method": "finetune", "columns": ("Kendall",), "scores": {"nleep": (76.0,)},
    ...          "targets": ("tfds:sun397",), "num_checkpoints": 16}
    >>> sentences(table, [], [])[-1]
    'No score is judged by FT accuracies here yet.'
    """
    ours = _ours(table, ranking_rows, score_rows)
    columns = [COLUMNS[title] for title in table["columns"]]
    printed = [score for score, numbers in table["scores"].items() if any(map(is_number, numbers))]
    lacking = [s for s in printed if all(ours.get(s, {}).get(column, EN_DASH) == EN_DASH for column in columns)]
    by_rule = ", but GFLOPS by the paper's rule" if GFLOPS in table["columns"] else ""
    words = [
        f"In each cell the paper's number, as printed, then ours, against {tables.method_name(table['method'])} "
        f"accuracy, in percent{by_rule}."
    ]
    own = [row for row in ranking_rows if row["method"] == table["method"]]
    if not own:
        return [*words, f"No score is judged by {tables.method_name(table['method'])} accuracies here yet."]
    without = f"; {tables.listed([tables.score_name(score) for score in lacking])} without" if lacking else ""
    words.append(
        f"{len(printed) - len(lacking)} of the {counted(len(printed), 'score')} of the paper have a number "
        f"here{without}."
    )
    theirs, here = list(table["targets"]), list(dict.fromkeys(row["target"] for row in own))
    names = tables.target_names((*theirs, *here))
    if set(theirs) != set(here):
        words.append(
            f"The numbers cannot be compared: the paper's are means over {tables.listed([names[t] for t in theirs])}, "
            f"ours over {tables.listed([names[t] for t in here])}."
        )
    if (num_checkpoints := max(row["num_checkpoints"] for row in own)) != table["num_checkpoints"]:
        words.append(
            f"The paper ranks {counted(table['num_checkpoints'], 'checkpoint')}, here it is {num_checkpoints}."
        )
    return words


def _ours(table: Mapping, ranking_rows: Sequence[Row], score_rows: Sequence[Row]) -> dict[str, Row]:
    """Returns our cells for each score of the paper that is judged by the method of the table."""
    by_name = {row["Score"]: row for row in trust_rows(ranking_rows, score_rows, table["method"])}
    names = {score: tables.score_name(score) for score in table["scores"]}
    return {score: by_name[name] for score, name in names.items() if name in by_name}


def _printed(title: str, number: float | None) -> str:
    """Formats a number as the paper prints it: two decimals, and large GFLOPS in scientific notation."""
    if number is None:
        return EN_DASH
    return f"{number:.2e}".replace("e+0", "e") if title == GFLOPS and number >= 1e4 else f"{number:.2f}"
