"""Puts the section of the page on reusing pre-training data together, from sentences, tables, figures and pictures."""

import base64
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_transfer.report import reuse, reuse_figures, reuse_tables, selected, tables
from jax_transfer.report.families import USUAL, condition, families, words
from jax_transfer.report.figures import Drawing
from jax_transfer.report.markup import escape
from jax_transfer.report.reuse import Paper, Reused
from jax_transfer.report.selected import Selected
from jax_transfer.results import Row, picture
from jax_transfer.selection.strategies import KINDS

LONG_TABLE = 15  # number of rows; longer tables are collapsed
FEW_LISTS = 6  # number of lists of classes; more of them are collapsed together


def section(
    results: Mapping[str, Sequence[Row]], config: Mapping[str, Any], folder: pathlib.Path
) -> Iterator[str | list[Drawing]]:
    """Yields the section as HTML and figures, for each checkpoint; nothing without a selection or a reuse.

    Args:
      results: result file -> its rows, see `best.by_metric`.
      config: the study's config.
      folder: the folder of the results, which holds the pictures.

    >>> list(section({}, {}, pathlib.Path()))
    []
    """
    config = {**config, "select": _completed(config.get("select") or {})}
    reused = {found.checkpoint: found for found in reuse.collect(results.get("reuse", []))}
    selection_rows, overlap = results.get("selection") or [], results.get("overlap") or []
    checkpoints = list(dict.fromkeys((*reused, *(row["checkpoint"] for row in selection_rows))))
    targets = [target for found in reused.values() for target in found.points]
    names = tables.target_names([*targets, *(row["target"] for row in (*selection_rows, *overlap))])
    for checkpoint in checkpoints:
        if len(checkpoints) > 1:
            label = reused[checkpoint].label if checkpoint in reused else checkpoint
            yield f"<h3>From {escape(label)}</h3>"
        found, of_selections = reused.get(checkpoint), _of(selection_rows, checkpoint)
        chosen = selected.by_selection(of_selections)
        if found:
            yield from _accuracies(found, config, chosen, names)
        else:
            yield "<p>No model was fine-tuned with what was selected: stage <code>finetune</code> has not run.</p>"
        if chosen:
            yield from _selections(found, config, chosen, names, checkpoint, folder)
        searched = list(dict.fromkeys(row["target"] for row in of_selections))
        yield from _overlap(_of(overlap, checkpoint), searched, config.get("select") or {}, names)


def _completed(select: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `config.select` with the strategy of each selection, which a config may leave out."""
    selections = select.get("selections") or {}
    return {**select, "selections": {name: {"strategy": USUAL["strategy"], **s} for name, s in selections.items()}}


def _of(rows: Sequence[Row], checkpoint: str) -> list[Row]:
    return [row for row in rows if row["checkpoint"] == checkpoint]


def _accuracies(
    found: Reused, config: Mapping[str, Any], chosen: Selected, names: Mapping[str, str]
) -> Iterator[str | list[Drawing]]:
    """Yields the answer, the tables of accuracies and their figures."""
    sentences, overall = reuse.sentences(found), reuse.overall(found)
    if overall or len(sentences) == 1:
        yield f'<p class="answer">{escape(overall or next(iter(sentences.values())))}</p>'
    if overall or len(sentences) > 1:
        items = (f"<li><strong>{escape(names[t])}.</strong> {escape(text)}</li>" for t, text in sentences.items())
        yield f"<ul>{''.join(items)}</ul>"
    several = any(point.num_seeds > 1 for by_way in found.points.values() for point in by_way.values())
    if not several:
        yield "<p>With a single seed, the spread over seeds is unknown, so a small difference may be due to chance.</p>"
    paper = reuse.paper_accuracies(config.get("paper") or ())
    for heading, titles in reuse_tables.columns(list(found.points), names):
        yield f"<h3>{escape(heading)}</h3>"
        hard = [target for target in titles if condition(target)] or list(titles)  # without 100 % beside fractions
        yield from _tables(found, titles, hard, paper, several)
    of_clusters = families(_selections_of(config), "num_clusters")
    for title, table in reuse_tables.cluster_tables(found, of_clusters, names):
        yield f"<h3>{escape(title)}</h3>"
        yield tables.to_html(table.rows, bold=table.bold)
    yield f'<p class="quiet">{_explain(several, bool(paper))}</p>'
    yield list(reuse_figures.draw_accuracies(found, config.get("select") or {}, chosen, names))


def _tables(
    found: Reused, titles: Mapping[str, str], targets: Sequence[str], paper: Paper, several: bool
) -> Iterator[str]:
    """Yields the means over seeds of the ways that `targets` have, and the best seeds, beside the paper's numbers."""
    has_paper = any(target in titles for target, _ in paper)
    if several or not has_paper:
        mean = reuse_tables.mean_table(found, titles, reuse_tables.ways_in(found, targets, {}))
        yield tables.to_html(mean.rows, bold=mean.bold)
    if several or has_paper:
        best = reuse_tables.best_table(found, titles, reuse_tables.ways_in(found, targets, paper), paper)
        what = "Best seed of each way" if several else "Our accuracies"
        table = tables.to_html(best.rows, bold=best.bold)
        if has_paper and len(best.rows) <= LONG_TABLE:
            yield f"<p>{what}, with the number of the paper in brackets:</p>{table}"
        else:
            beside = ", with the number of the paper in brackets" if has_paper else ""
            yield f"<details><summary>{what}{beside}</summary>{table}</details>"


def _folded(rows: Sequence[Row], what: str) -> str:
    """Returns a table, collapsed if it is long."""
    table = tables.to_html(rows)
    return (
        f"<details><summary>{what} ({len(rows)} rows)</summary>{table}</details>" if len(rows) > LONG_TABLE else table
    )


def _explain(several: bool, has_paper: bool) -> str:
    """Explains the tables of accuracies."""
    text = (
        "In percent, by the metric of the target; the highest value of a column is bold. Plain: fine-tuning on the"
        " images of the target alone. The best way is selected by the accuracy reported here, so a small gain is"
        " optimistic."
    )
    if several:
        text += " ±: half of the spread over seeds, which is the highest minus the lowest accuracy."
    return text + (" The paper reports the best of three seeds." if has_paper else "")


def _selections(
    found: Reused | None,
    config: Mapping[str, Any],
    chosen: Selected,
    names: Mapping[str, str],
    checkpoint: str,
    folder: pathlib.Path,
) -> Iterator[str | list[Drawing]]:
    """Yields what was selected: a table, figures, pictures and the lists of classes."""
    select, selections = config.get("select") or {}, _selections_of(config)
    classes = selected.related(select, chosen)
    recalls = reuse.paper_accuracies(config.get("paper") or (), "recall")
    yield "<h3>What was selected</h3>"
    rows = selected.selection_rows(chosen, selections, classes, names, found, recalls)
    yield _folded(rows, "All selections")
    if classes:
        text = "Recall: the share of the related source classes that a selection holds"
        yield f'<p class="quiet">{text}{", with that of the paper in brackets" if recalls else ""}.</p>'
    if sentence := selected.convergence(chosen, names):
        yield f"<p>{escape(sentence)}</p>"
    recall_figures = reuse_figures.draw_recalls(select, chosen, classes, names)
    yield [*recall_figures, *reuse_figures.draw_similarities(select, chosen, classes, names)]
    pictures = {
        key: figure for key, own in chosen.items() if (figure := _picture(folder, checkpoint, key, own, names[key[0]]))
    }
    first = {target: (target, name) for target, name in reversed(pictures)}  # the first selection of each target
    if first:
        yield f'<div class="figures">{"".join(pictures[key] for key in reversed(first.values()))}</div>'
    lists = []
    for (target, name), own in chosen.items():
        described = f" ({words(selections[name])})" if name in selections else ""
        summary = f"<summary>{escape(names[target] + ', ' + name + described)}</summary>"
        shown = pictures.get((target, name), "") if (target, name) not in first.values() else ""
        table = tables.to_html(selected.class_rows(own, classes.get(target, ())))
        lists.append(f"<details>{summary}{shown}{table}</details>")
    summary = f"<summary>The selected classes and clusters ({tables.counted(len(lists), 'list')})</summary>"
    together = "".join(lists)
    yield f"<details>{summary}{together}</details>" if len(lists) > FEW_LISTS else together


def _picture(folder: pathlib.Path, checkpoint: str, key: tuple[str, str], rows: Sequence[Row], target: str) -> str:
    """Returns the contact sheet of a selection as a figure of the page; "" if there is none.

    Args:
      folder: the folder of the results.
      key: the target and the name of the selection.
      rows: the rows of the selection.
      target: display name of the target.
    """
    path = picture(folder, checkpoint, *key)
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    names = [tables.showable(row["class"]) for row in rows]
    first = f"{', '.join(names[:4])} and so on" if len(names) > 4 else tables.listed(names)
    text = f"{target}: images of the first {KINDS[rows[0]['kind']]} of selection {key[1]}, a row for each: {first}."
    image = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(text)}">'
    return f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>"


def _overlap(
    rows: Sequence[Row], searched: Sequence[str], select: Mapping[str, Any], names: Mapping[str, str]
) -> Iterator[str]:
    """Yields how many source images nearly equal a test image of each target, and the nearest pairs.

    Args:
      rows: the rows of results/overlap.jsonl.
      searched: the targets with selections. Their test images were searched for, if the config says so.
      select: `config.select`.
      names: target -> display name.
    """
    targets = dict.fromkeys([*(row["target"] for row in rows), *searched])
    if targets:
        yield "<h3>Source images that nearly equal a test image</h3>"
    if targets and not rows and not select.get("find_duplicates"):
        yield "<p>Not searched for: <code>config.select.find_duplicates</code> is off.</p>"
        return
    for target in targets:
        own = [row for row in rows if row["target"] == target]
        sentence = selected.overlap_sentence(own, names[target], bool(select.get("exclude_duplicates")))
        yield f"<p>{escape(sentence)}</p>"
        if own:
            yield tables.to_html(selected.overlap_rows(own))


def _selections_of(config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return (config.get("select") or {}).get("selections") or {}
