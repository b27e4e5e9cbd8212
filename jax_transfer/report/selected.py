"""Shows what was selected from the source images: recall, sizes, convergence, and overlap with test images.

The rows are those of results/selection.jsonl and results/overlap.jsonl. The recall of related classes is that of
section 4.4 and Table 4 of "Improved Fine-Tuning by Better Leveraging Pre-Training Data" (Liu et al., NeurIPS 2022).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jax_transfer.report.families import Selections, number_of, words
from jax_transfer.report.reuse import Paper, Reused, Way
from jax_transfer.report.tables import (
    EN_DASH,
    counted,
    is_number,
    listed,
    percent,
    showable,
    way_name,
)
from jax_transfer.results import Row

FEW = 5  # as many near duplicates are shown

Selected = Mapping[tuple[str, str], Sequence[Row]]  # (target, name of the selection) -> its rows by rank
Related = Mapping[str, Collection[str]]  # target -> names of the source classes that are related to it


def by_selection(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each selection of a checkpoint: (target, selection) -> rows, by rank.

    >>> row = {"target": "a", "strategy": "uot"}
    >>> [row["rank"] for row in by_selection([{**row, "rank": 2}, {**row, "rank": 1}])["a", "uot"]]
    [1, 2]
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        found.setdefault((row["target"], row["strategy"]), []).append(row)
    return found


def related(select: Mapping[str, Any], selected: Selected) -> dict[str, set[str]]:
    """Returns the source classes that are related to each target: those that the config lists, or that labels selected.

    Args:
      select: `config.select`.
      selected: the value of `by_selection`.

    >>> related({"labels": {"a": ["jay", "wren"]}}, {}) == {"a": {"jay", "wren"}}
    True
    """
    by_label = {
        target: {row["class"] for row in rows}
        for (target, name), rows in selected.items()
        if (select.get("selections") or {}).get(name, {}).get("strategy") == "labels"
    }
    return by_label | {target: set(names) for target, names in (select.get("labels") or {}).items()}


def recall(rows: Sequence[Row], classes: Collection[str]) -> float | None:
    """Returns the share of the related classes that a selection of classes holds; None if it has no meaning.

    >>> recall([{"kind": "class", "class": "jay"}, {"kind": "class", "class": "cup"}], {"jay", "wren"})
    0.5
    """
    if not classes or any(row["kind"] != "class" for row in rows):
        return None
    return len({row["class"] for row in rows} & set(classes)) / len(classes)


def selection_rows(
    selected: Selected,
    selections: Selections,
    classes: Related,
    names: Mapping[str, str],
    reused: Reused | None,
    recalls: Paper,
) -> list[Row]:
    """Formats the selections for the page: one dict per target and selection, column title -> text.

    Args:
      selected: the value of `by_selection`.
      selections: `config.select.selections`.
      classes: the value of `related`.
      names: target -> display name.
      reused: what fine-tuning with the selections gave, if it has run.
      recalls: the recalls that the paper reports, see `reuse.paper_accuracies`.

    >>> rows = {("a", "uot"): [{"kind": "class", "class": "jay", "rank": 1, "num_images": 1300}]}
    >>> (cells,) = selection_rows(rows, {"uot": {"strategy": "uot"}}, {"a": {"jay"}}, {"a": "cub"}, None, {})
    >>> cells["How"], cells["Selected"], cells["Images"], cells["Recall (%)"]
    ('UOT, cosine', '1 class', '1,300', '100.00')
    """
    table = []
    of_paper = {(target, way.selection): value for (target, way), value in recalls.items()}
    objectives = dict.fromkeys(way.objective for way in (reused.ways if reused else ()) if way.selection)
    has_ranks = any(rows[0]["rank"] > 1 for rows in selected.values())
    for (target, name), rows in selected.items():
        points = reused.points.get(target, {}) if reused else {}
        share = percent(recall(rows, classes.get(target, ())), unit="")
        paper = f" ({percent(of_paper[target, name], unit='')})" if (target, name) in of_paper else ""
        accuracies = {
            f"{way_name(objective, None)} (%)": percent(point.mean if point else None, unit="")
            for objective in objectives
            for point in [points.get(Way(objective, name))]
        }
        table.append({
            "Target": names[target],
            "Selection": name,
            "How": words(selections[name], ["num_selected"], with_metric=True) if name in selections else EN_DASH,
            "Selected": number_of(len(rows), rows[0]["kind"]),
            **({"Ranks": f"{rows[0]['rank']} to {rows[-1]['rank']}"} if has_ranks else {}),
            "Images": f"{sum(row['num_images'] for row in rows):,}",
            **({"Recall (%)": share + paper} if classes else {}),
            **accuracies,
        })  # fmt: skip
    return table


def convergence(selected: Selected, names: Mapping[str, str]) -> str:
    """Says which selections come from a solver that did not converge; "" if all did.

    >>> convergence({("a", "uot"): [{"converged": False}]}, {"a": "cub"})
    'The transport of uot for cub did not converge: its similarities and ranks are approximate.'
    """
    found = [f"{showable(name)} for {names[t]}" for (t, name), rows in selected.items() if not rows[0]["converged"]]
    their = "its similarities and ranks are" if len(found) == 1 else "their similarities and ranks are"
    return f"The transport of {listed(found)} did not converge: {their} approximate." if found else ""


def class_rows(rows: Sequence[Row], classes: Collection[str]) -> list[Row]:
    """Formats the classes or clusters of a selection: one dict each, column title -> text or number.

    >>> row = {"rank": 1, "class": "jay", "kind": "class", "similarity": 0.5, "num_images": 1300}
    >>> class_rows([row], {"jay"})
    [{'Rank': 1, 'Class': 'jay', 'Related': 'yes', 'Similarity': 0.5, 'Images': '1,300'}]
    """
    compared = any(is_number(row["similarity"]) for row in rows)
    return [
        {
            "Rank": row["rank"],
            row["kind"].capitalize(): row["class"],
            **({"Related": "yes" if row["class"] in classes else ""} if classes and row["kind"] == "class" else {}),
            **({"Similarity": row["similarity"]} if compared else {}),
            "Images": f"{row['num_images']:,}",
        }
        for row in rows
    ]


def overlap_sentence(rows: Sequence[Row], name: str, left_out: bool) -> str:
    """Says how many source images nearly equal a test image of a target, and whether they were left out.

    Args:
      rows: rows of results/overlap.jsonl of one checkpoint and target.
      name: display name of the target.
      left_out: `config.select.exclude_duplicates`.

    >>> print(overlap_sentence([{"source_image": 1, "test_image": image} for image in (5, 6)], "cub", True))
    1 source image nearly equals a test image of cub (2 test images). It was left out.
    >>> print(overlap_sentence([], "cub", True))
    No source image nearly equals a test image of cub.
    """
    if not rows:
        return f"No source image nearly equals a test image of {name}."
    images, tests = (len({row[column] for row in rows}) for column in ("source_image", "test_image"))
    them, were = ("It", "was") if images == 1 else ("They", "were")
    text = f"{counted(images, 'source image')} nearly {'equals' if images == 1 else 'equal'} a test image of {name}"
    text += f" ({counted(tests, 'test image')}). {them} {were} "
    if left_out:
        return f"{text}left out."
    return (
        f"{text}not left out, so part of a gain by reuse may be leakage; config.select.exclude_duplicates leaves "
        f"{'it' if images == 1 else 'them'} out."
    )


def overlap_rows(rows: Sequence[Row]) -> list[Row]:
    """Formats the nearest pairs of source and test images: one dict each, column title -> text or number.

    >>> row = {"source_image": 1, "test_image": 5, "distance": 0, "similarity": 0.99, "source_class": "jay",
    ...        "target_class": "Blue Jay"}
    >>> overlap_rows([row])[0]["Source image"]
    'jay (1)'
    """
    nearest = sorted(rows, key=lambda row: (row["distance"], -row["similarity"]))[:FEW]
    return [
        {
            "Source image": f"{showable(row['source_class'])} ({row['source_image']})",
            "Test image": f"{showable(row['target_class'])} ({row['test_image']})",
            "Bits of the hash that differ": row["distance"],
            "Similarity of the features": row["similarity"],
        }
        for row in nearest
    ]
