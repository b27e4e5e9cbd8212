"""Answers in words and tables which checkpoint is best: the first section of the page."""

from collections.abc import Collection, Iterator, Sequence

from jax_transfer.records import METRICS
from jax_transfer.report import tables
from jax_transfer.report.best import best_checkpoints, frozen_method, summary_rows
from jax_transfer.report.comparison import Comparison, comparison_rows, comparisons
from jax_transfer.report.grid import FEW, SWEPT
from jax_transfer.report.markup import escape
from jax_transfer.report.tables import METHODS, counted, epoch_name, in_points, listed, percent
from jax_transfer.results import Row

LONG_TABLE = 60  # number of rows; a longer comparison is collapsed


def answer(transfer_rows: Sequence[Row], stages: Collection[str] = ()) -> Iterator[str]:
    """Yields the section as HTML: over all targets, per target, and as tables; nothing without an accuracy.

    Epochs of the study's own pre-training are compared with its last epoch, and given checkpoints with each other and
    with the best and the last epoch.

    Args:
      transfer_rows: rows of results/transfer.jsonl.
      stages: stages that write them; the section says which of "probe" and "finetune" has not run.

    >>> row = {"target": "tfds:mnist", "method": "probe", "epoch": None}
    >>> rows = [{**row, "checkpoint": "a", "accuracy": 0.8}, {**row, "checkpoint": "run/b", "accuracy": 0.9}]
    >>> next(answer(rows))
    '<p class="answer">As a frozen feature extractor (FE), run/b is best on the only target.</p>'
    """
    best, compared = best_checkpoints(transfer_rows), comparisons(transfer_rows)
    if not best and not compared:
        return
    for statement in (overall_by_name(compared), overall(best, among_given=bool(compared))):
        if statement:
            yield f'<p class="answer">{escape(statement)}</p>'
    evaluated = {row["method"] for row in best} | {comparison.method for comparison in compared}
    for stage, methods in (("probe", {"probe", "probe_converged"}), ("finetune", {"finetune"})):
        if stage in stages and not methods & evaluated:
            yield f"<p>The stage <code>{stage}</code> has not run.</p>"
    yield "<ul>"
    targets = [*(row["target"] for row in best), *(comparison.target for comparison in compared)]
    for target, name in tables.target_names(targets).items():
        sentences = _sentences(target, best, compared)
        yield f"<li><strong>{escape(name)}.</strong> {escape(' '.join(map(_capitalised, sentences)))}</li>"
    yield "</ul>"
    if any(row["num_seeds"] == 1 for row in best):
        yield "<p>With a single seed, the spread over seeds is unknown, so a small gain may be due to chance.</p>"
    elif any(comparison.num_seeds == 1 for comparison in compared):
        yield "<p>With a single seed, the spread over seeds is unknown, so a small lead may be due to chance.</p>"
    if compared:
        rows = comparison_rows(compared)
        table, summary = tables.to_html(rows), f"<summary>All checkpoints ({len(rows)} rows)</summary>"
        yield f"<details>{summary}{table}</details>" if len(rows) > LONG_TABLE else table
        yield f'<p class="quiet">{_explain_comparison(bool(best))}</p>'
    if best:
        yield tables.to_html(summary_rows(transfer_rows))
    metrics = {row["metric"] for row in best} | {comparison.metric for comparison in compared}
    yield f'<p class="quiet">{_explain(metrics, bool(best))}</p>'


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _explain(metrics: set[str], has_epochs: bool) -> str:
    """Explains the terms of the section and, if epochs were compared, of their table."""
    text = "FE: the backbone is frozen and a classifier is trained on its features. FT: the whole model is fine-tuned."
    if "mean_class_accuracy" in metrics:
        text += " Mean class accuracy gives each class the same weight, regardless of its number of test images."
    text += " Accuracies are averaged over seeds"
    if not has_epochs:
        return f"{text}."
    return (
        f"{text}; the earliest epoch wins a tie. Gain: best minus last checkpoint. Seed spread: highest minus lowest"
        " accuracy over seeds, the larger value of the best and the last epoch. The best epoch is selected by the"
        " accuracy reported here, so small gains are optimistic."
    )


def _explain_comparison(has_epochs: bool) -> str:
    """Explains the table of checkpoints that are compared by name."""
    text = (
        "Behind: how far the accuracy is below that of the best checkpoint. Seed spread: highest minus lowest accuracy"
        " over seeds. Of equal checkpoints, the first in the results comes first."
    )
    return text + (" The study's own pre-training takes part with its best and its last epoch." if has_epochs else "")


def _sentences(target: str, best: Sequence[Row], compared: Sequence[Comparison]) -> Iterator[str]:
    """Yields the sentences about a target, method by method."""
    by_name = {comparison.method: comparison for comparison in compared if comparison.target == target}
    methods = [row["method"] for row in best if row["target"] == target]
    for method in sorted({*methods, *by_name}, key=lambda m: ([*METHODS, m].index(m), m)):
        if method in by_name:
            yield comparison_sentence(by_name[method])
        own = [row for row in best if (row["target"], row["method"]) == (target, method)]
        if len(own) > FEW:
            yield pretrainings_sentence(own, among_given=method in by_name)
        else:
            yield from (epoch_sentence(row, among_given=method in by_name) for row in own)


def _in_words(method: str) -> str:
    return METHODS[method][1] if method in METHODS else f"with {tables.method_name(method)}"


def _accuracy(accuracy: float, metric: str, swept: bool) -> str:
    return f"{percent(accuracy)} {METRICS[metric]}" + (f" ({SWEPT})" if swept else "")


def _winners(comparison: Comparison) -> str:
    """Says which checkpoints are best, or that all are equally good."""
    labels = [candidate.label for candidate in comparison.winners]
    if 1 < len(labels) == len(comparison.candidates):
        return f"{listed(labels) if len(labels) <= FEW else f'all {len(labels)} checkpoints'} are equally good"
    return f"{listed(labels)} {'is' if len(labels) == 1 else 'are'} best"


def _others(comparison: Comparison) -> str:
    """Says how far the checkpoints that are not best are behind; "" if all are equally good."""
    others = comparison.candidates[len(comparison.winners) :]
    if not others:
        return ""
    (second, *_), last = others, others[-1]
    lead, accuracy = in_points(comparison.behind(second)), percent(second.point.mean)
    if second.point.mean == last.point.mean:
        names = listed([c.label for c in others]) if len(others) <= FEW else f"the other {len(others)}"
        return f", {lead} above {names} ({accuracy})"
    lowest = f"{in_points(comparison.behind(last))} above the lowest of {len(comparison.candidates)}, {last.label}"
    return f", {lead} above the next, {second.label} ({accuracy}), and {lowest}"


def epoch_sentence(row: Row, among_given: bool = False) -> str:
    """Describes the best epoch of one method on one target.

    Args:
      row: a row of `best.best_checkpoints`.
      among_given: whether the sentence follows that about the given checkpoints, which names the method.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": accuracy}
    ...         for epoch, accuracy in ((1, 0.8), (5, 0.9))]
    >>> epoch_sentence(best_checkpoints(rows)[0], among_given=True)
    "of the study's own epochs, 5 is best with 90.00\\xa0% accuracy; it is also the last checkpoint."
    """
    source = f"{tables.showable(row['source'])} " if row["source"] else ""
    if among_given:
        opening = f"of the study's own {source}epochs, {epoch_name(row['best_epoch'])}"
    else:
        opening = f"{_in_words(row['method'])}, {source}epoch {epoch_name(row['best_epoch'])}"
    text = f"{opening} is best with {_accuracy(row['best_accuracy'], row['metric'], row['swept'])}"
    if row["num_checkpoints"] == 1:
        return f"{text} (the only {'epoch' if among_given else 'checkpoint'} evaluated)."
    if row["best_epoch"] == row["last_epoch"]:
        text += "; it is also the last checkpoint"
    elif row["gain"] == 0:
        text += "; the last checkpoint is equally good"
    else:
        text += f", {in_points(row['gain'])} above the last checkpoint ({percent(row['last_accuracy'])})"
        if row["seed_spread"] is not None and row["gain"] <= row["seed_spread"]:
            text += f"; the spread over seeds is as large ({in_points(row['seed_spread'])}), so there is no clear gain"
    incomplete = ", ".join(map(epoch_name, row["incomplete_epochs"]))
    epochs = "epoch" if len(row["incomplete_epochs"]) == 1 else "epochs"
    return f"{text}." + (f" Some seeds are missing at {epochs} {incomplete}." if incomplete else "")


def pretrainings_sentence(rows: Sequence[Row], among_given: bool = False) -> str:
    """Describes the best epoch among many pre-trainings for one method on one target; the table has each of them.

    Args:
      rows: rows of `best.best_checkpoints`, one for each pre-training.
      among_given: see `epoch_sentence`.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": f"{run}/{epoch}", "epoch": epoch, "accuracy": accuracy}
    ...         for run in ("simclr", "vae") for epoch, accuracy in ((1, 0.8), (5, 0.9))]
    >>> pretrainings_sentence(best_checkpoints(rows)).replace(chr(160), " ")
    'as a frozen feature extractor (FE), simclr epoch 5 is the best of 2 pre-trainings with 90.00 % accuracy; ...'
    """
    first = max(rows, key=lambda row: row["best_accuracy"])
    opening = "of the study's own checkpoints" if among_given else _in_words(first["method"])
    accuracy = _accuracy(first["best_accuracy"], first["metric"], first["swept"])
    name = f"{tables.showable(first['source'])} epoch {epoch_name(first['best_epoch'])}"
    text = f"{opening}, {name} is the best of {counted(len(rows), 'pre-training')} with {accuracy}"
    if any(row["num_checkpoints"] > 1 for row in rows):
        earlier = sum(row["gain"] > 0 for row in rows)
        text += f"; an earlier checkpoint beats the last one in {earlier or 'none'} of them"
    incomplete = sum(bool(row["incomplete_epochs"]) for row in rows)
    return f"{text}." + (f" Some seeds are missing in {counted(incomplete, 'pre-training')}." if incomplete else "")


def comparison_sentence(comparison: Comparison) -> str:
    """Describes which checkpoint is best for one method on one target, and how far the others are behind.

    >>> row = {"target": "a", "method": "probe", "epoch": None}
    >>> rows = [{**row, "checkpoint": "a", "accuracy": 0.8}, {**row, "checkpoint": "run/b", "accuracy": 0.9}]
    >>> comparison_sentence(comparisons(rows)[0]).replace(chr(160), " ")
    'as a frozen feature extractor (FE), run/b is best with 90.00 % accuracy, 10.00 points above a (80.00 %).'
    """
    text = f"{_in_words(comparison.method)}, {_winners(comparison)} with "
    text += _accuracy(comparison.best.point.mean, comparison.metric, comparison.swept)
    if len(comparison.candidates) == 1:
        return f"{text} (the only checkpoint evaluated)."
    text += _others(comparison)
    spread = comparison.seed_spread
    if len(comparison.winners) == 1 and spread is not None and comparison.behind(comparison.candidates[1]) <= spread:
        text += f"; the spread over seeds is as large as the lead ({in_points(spread)}), so there is no clear winner"
    incomplete = [c.label for c in comparison.candidates if c.point.num_seeds < comparison.num_seeds]
    return f"{text}." + (f" Some seeds are missing for {', '.join(incomplete)}." if incomplete else "")


def overall_by_name(compared: Sequence[Comparison]) -> str:
    """Says in one sentence which checkpoints are best on how many targets, for FE and for FT; "" if none was compared.

    >>> row = {"target": "a", "method": "finetune", "checkpoint": "run/b", "epoch": None, "accuracy": 0.9}
    >>> overall_by_name(comparisons([row]))
    'When fine-tuned (FT), run/b is best on the only target.'
    """
    clauses = []
    for method in (frozen_method({comparison.method for comparison in compared}), "finetune"):
        winners = [_winners(comparison) for comparison in compared if comparison.method == method]
        counts = {words: winners.count(words) for words in sorted(winners, key=winners.count, reverse=True)}
        of = f" of {len(winners)} targets"
        where = [f"{words} on {n}{'' if i else of}" for i, (words, n) in enumerate(counts.items())]
        if winners:
            only = f"{winners[0]} on the only target" if len(winners) == 1 else ", ".join(where)
            clauses.append(f"{METHODS[method][1]}, {only}")
    return _capitalised("; ".join(clauses)) + "." if clauses else ""


def overall(best: Sequence[Row], among_given: bool = False) -> str:
    """Says in one sentence on how many targets an earlier epoch beats the last one, for FE and for FT.

    With several pre-trainings, each of them on each target is a case.

    Args:
      best: rows of `best.best_checkpoints`.
      among_given: whether the study also compares given checkpoints.

    Returns:
      The sentence; "" if no trajectory was evaluated.

    >>> rows = [{"target": "a", "method": "probe", "checkpoint": str(epoch), "epoch": epoch, "accuracy": accuracy}
    ...         for epoch, accuracy in ((1, 0.8), (5, 0.9))]
    >>> overall(best_checkpoints(rows))
    'As a frozen feature extractor (FE), no earlier checkpoint beats the last one on the only target.'
    """
    clauses = []
    for method in (frozen_method({row["method"] for row in best}), "finetune"):
        rows = [row for row in best if row["method"] == method and row["num_checkpoints"] > 1]
        gains = [row["gain"] for row in rows if row["gain"] > 0]
        unclear = [row for row in rows if 0 < row["gain"] <= (row["seed_spread"] or 0)]
        several = len({row["target"] for row in rows}) < len(rows)  # pre-trainings on a target
        targets = counted(len(rows), "case" if several else "target")
        doubt = f"; the spread over seeds is as large {'in' if several else 'on'} {len(unclear)}" if unclear else ""
        if gains:
            gain = f"by {'up to ' if len(gains) > 1 else ''}{in_points(max(gains))}{doubt}"
            count = f"{'in' if several else 'on'} {len(gains)} of {targets} ({gain})"
            clauses.append(f"{METHODS[method][1]}, an earlier checkpoint beats the last one {count}")
        elif rows:
            count = f"{'in' if several else 'on'} any of {targets}" if len(rows) > 1 else "on the only target"
            clauses.append(f"{METHODS[method][1]}, no earlier checkpoint beats the last one {count}")
    text = "; ".join(clauses)
    text = f"in the study's own pre-training: {text}" if text and among_given else text
    return f"{_capitalised(text)}." if text else ""
