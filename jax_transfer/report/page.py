"""Writes the report: an HTML page that begins with the answer, and separate files for the figures and tables."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jax_transfer.records import METRICS, InputError
from jax_transfer.report import (
    fewshot,
    figures,
    figures_by_name,
    kind_figure,
    paper_tables,
    retrieval,
    reuse_section,
    score_figures,
    spectral,
    spectral_figures,
    tables,
    trust_section,
    used,
)
from jax_transfer.report.answer import answer
from jax_transfer.report.best import by_metric, given, is_given
from jax_transfer.report.grid import choice_note, grid_rows, grid_sentences, is_result, swept
from jax_transfer.report.markup import escape, inline_svg, to_page
from jax_transfer.report.style import to_svg
from jax_transfer.results import Row, column_names, is_plain, read_rows

LONG_TABLE = 15  # number of rows; longer tables are collapsed
MANY_NAMES = 6  # number of given checkpoints in the head of the page
MANY_FIGURES = 12  # number per section; with more, all groups but the first are collapsed
OPTIONAL = ("selection", "overlap", "fewshot", "retrieval")  # listed as missing only if the study plans them


@dataclasses.dataclass(frozen=True)
class Page:
    """Data for the sections of the page.

    Attributes:
      config: the content of the study's config.json.
      results: result file -> its rows as on disk.
      read: like `results`, with the metric added to each row of transfer and spectral, and with the rows of
        fine-tuning that reuses source data apart from the plain ones (`best.by_metric`).
      written_by: result file -> the stages that write it.
      results_folder: folder of the result files and pictures.
      figures: folder for the SVG files.
      taken: names already used for SVG files.
    """

    config: dict
    results: dict[str, list[Row]]
    read: Mapping[str, Sequence[Row]]
    written_by: Mapping[str, Sequence[str]]
    results_folder: pathlib.Path
    figures: pathlib.Path
    taken: set[str] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def given(self) -> list[str]:
        """The names of the checkpoints that were given to the study: those in the results, or else as in the config."""
        files = ("transfer", "fewshot", "retrieval", "scores", "spectral")
        rows = [row for name in files for row in given(self.results.get(name, []))]
        return list(dict.fromkeys(row["checkpoint"] for row in rows)) or list(self.config.get("checkpoints") or ())

    @functools.cached_property
    def has_trajectory(self) -> bool:
        """Whether the study has a pre-training of its own."""
        own = not all(map(is_given, self.results.get("transfer", [])))
        planned = "pretrain" in self.config.get("stages", ())
        return own or planned or not self.given or bool(self.results.get("pretrain"))

    @property
    def has_targets(self) -> bool:
        """Whether the study transfers to targets; a study of retrieval need not, and lacks no results of them."""
        return bool(self.config.get("targets", True))

    def plans(self, name: str) -> bool:
        """Returns whether the study runs a stage that writes a result file; True if its stages are unknown."""
        stages = self.config.get("stages")
        return stages is None or bool(set(stages) & set(self.written_by.get(name, ())))

    def not_run(self, name: str) -> str:
        """Returns a paragraph that says that a result file has no rows, and which stages write it."""
        stages = " or ".join(self.written_by.get(name, ()))
        why = f": stage {stages} has not run" if stages else ""
        return f"<p>No results in <code>results/{escape(name)}.jsonl</code>{why}.</p>"


def write_report(workdir: pathlib.Path, written_by: Mapping[str, Sequence[str]] | None = None) -> pathlib.Path:
    """Writes `report/index.html`, `report/figures/*.svg` and `report/<name>.csv` for each `results/<name>.jsonl`.

    The page is a single file without scripts or network requests. It lists missing results and the stages that compute
    them, so the report can be written at any time during a study.

    Args:
      workdir: working directory of the study.
      written_by: result file -> the stages that write it, in the order of the page (`stages.written_by()`). A missing
        file that is not a key is listed without a stage.

    Returns:
      Path of index.html.

    Raises:
      InputError: if `workdir` is not a folder, or if a file in it cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_report(pathlib.Path(folder))
    ...     "No results" in path.read_text()
    True
    """
    written_by = written_by or {}
    if not workdir.is_dir():
        raise InputError(f"Working directory {workdir} does not exist; give the --workdir of a study.")
    unordered = {path.stem: read_rows(path) for path in sorted((workdir / "results").glob("*.jsonl"))}
    results = {name: unordered[name] for name in dict.fromkeys((*written_by, *unordered)) if name in unordered}
    config, report = _read_config(workdir / "config.json"), workdir / "report"
    (report / "figures").mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        tables.to_csv(rows, report / f"{name}.csv", column_names(name, rows))
    title = tables.showable(config.get("name") or workdir.resolve().name)
    page = Page(config, results, by_metric(results), written_by, workdir / "results", report / "figures")
    body = _head(title, page)
    for heading, section in SECTIONS.items():
        if content := list(section(page)):
            body += [f"<h2>{escape(heading)}</h2>", *content]
    tables.write_text(report / "index.html", to_page(f"{title}: which checkpoint transfers best", body))
    return report / "index.html"


def _read_config(path: pathlib.Path) -> dict:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); restore it or rerun the study.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: contains a {type(config).__name__}; expected a JSON object. Rerun the study.")
    return config


def _head(title: str, page: Page) -> list[str]:
    subjects = [_pretrained(page.config) if page.has_trajectory else "", _given(page.given)]
    subject = ", and ".join(filter(None, subjects))
    return [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(subject)}</p>' if subject else ""]


def _pretrained(config: Mapping) -> str:
    """Describes the study's own pre-training."""
    sections = {name: config.get(name) or {} for name in ("model", "source")}
    model, source = sections["model"].get("name"), sections["source"].get("dataset")
    source = " and ".join([source, *(sections["source"].get("others") or ())]) if source else None
    model = ", ".join([model, *(other["name"] for other in sections["model"].get("others") or ())]) if model else None
    return f"{model or 'A model'} pre-trained on {source}" if source else model or ""


def _given(names: Sequence[str]) -> str:
    """Counts the given checkpoints and names the first few."""
    if not names:
        return ""
    listed = ", ".join([*names[:MANY_NAMES], *(["..."] if len(names) > MANY_NAMES else [])])
    return f"{tables.counted(len(names), 'given checkpoint')}: {listed}"


def _answer(page: Page) -> Iterator[str]:
    """Yields statements about which checkpoint is best: over all targets, per target, and as tables."""
    missing = [] if page.results.get("transfer") or not page.has_targets else [page.not_run("transfer")]
    stages = page.written_by.get("transfer", ())  # none if no study made the page
    yield from list(answer(page.read.get("transfer", []), stages)) or missing


def _reuse(page: Page) -> Iterator[str]:
    """Yields whether fine-tuning gains by reusing source data, how, and what was selected from it."""
    yield from _with_figures(reuse_section.section(page.read, page.config, page.results_folder), page)


def _fewshot(page: Page) -> Iterator[str]:
    """Yields how well classifiers of a few images a class do, and which checkpoint to choose for them."""
    yield from _with_figures(fewshot.section(page.results.get("fewshot", []), page.config.get("paper") or ()), page)


def _retrieval(page: Page) -> Iterator[str]:
    """Yields how well images and captions are found, and which checkpoint a part of the data would choose."""
    yield from _with_figures(retrieval.section(page.results.get("retrieval", []), page.config), page)


def _targets(page: Page) -> Iterator[str]:
    """Yields a table of the targets with their sizes, classes and metrics, and notes about the data."""
    rows = page.results.get("targets")
    if not rows:
        return
    names = tables.target_names(row["target"] for row in rows)
    yield tables.to_html(
        [
            {
                "Target": names[row["target"]],
                "Training images": f"{row['num_train']:,}",
                "Test images": f"{row['num_test']:,}",
                "Metric": METRICS[row["metric"]],
                "Classes": tables.class_list(row["class_names"], row["num_classes"]),
            }
            for row in rows
        ]
    )
    notes = [(names[row["target"]], note) for row in rows for note in row["notes"]]
    if notes:
        yield f"<ul>{_items(notes)}</ul>"


def _items(notes: Iterable[tuple[str, str]]) -> str:
    """Returns the items of a list, each of which begins with a name."""
    return "".join(f"<li><strong>{escape(name)}.</strong> {escape(note)}</li>" for name, note in notes)


def _checkpoints(page: Page) -> Iterator[str]:
    """Yields a table of the given checkpoints, and notes on what was assumed about them."""
    rows = page.results.get("checkpoints")
    if not rows:
        return
    yield tables.to_html(
        [
            {
                "Checkpoint": row["checkpoint"],
                "Model": row["model"],
                "Parameters": f"{row['num_parameters']:,}",
                "Image size": row["preprocessing"]["image_size"],
                "Preprocessing": "a guess" if row["preprocessing_is_guess"] else "known",
                "Head": "yes" if row["has_head"] else "no",
                "File": row["path"],
            }
            for row in rows
        ]
    )
    if notes := [(row["checkpoint"], note) for row in rows for note in row["notes"]]:
        yield f"<ul>{_items(notes)}</ul>"


def _paper(page: Page) -> Iterator[str]:
    """Yields the paper's numbers beside those of our epochs, and its tables of scores beside ours."""
    paper = [entry for entry in page.config.get("paper") or () if entry.get("epoch") is not None]
    if paper := [entry for entry in paper if not fewshot.is_shown(entry["what"])]:
        yield tables.to_html(spectral.paper_rows(page.read, paper))
    yield from paper_tables.section(page.config.get("paper_tables") or (), page.read)


def _why(page: Page) -> Iterator[str]:
    """Yields what the spectral components show, in words and as Table 1. The figures come later on the page."""
    if not page.read.get("spectral"):
        return
    if stories := list(spectral.story(page.read)):
        yield f"<ul>{_items(stories)}</ul>"
    rows = spectral.table_1(page.read)
    if not rows:
        yield "<p>No component has an accuracy by the metric of its target yet; run stage spectral.</p>"
        return
    yield tables.to_html(rows)
    frozen = tables.method_name(spectral.methods(page.read)["pretrained"])
    own = f"the checkpoint with the highest {frozen} accuracy and the last checkpoint" if page.has_trajectory else ""
    by_name = f"the given checkpoint with the highest {frozen} accuracy, the next and the lowest" if page.given else ""
    yield (
        f'<p class="quiet">The table shows {", and ".join(filter(None, (own, by_name)))}. The'
        f" accuracy belongs to the {frozen} probe or the fine-tuned model, by the metric of the target. Probe: a"
        " softmax classifier on all features of a model (FE: pre-trained, FT: fine-tuned), on their main component (the"
        " smallest number of singular directions of each batch that hold 80 % of the sum of its singular values) and on"
        " the residual component.</p>"
    )


def _trust(page: Page) -> Iterator[str]:
    """Yields, for each method, how well the scores rank the checkpoints."""
    ranking, scored = page.read.get("ranking", []), page.read.get("scores", [])
    if not ranking and page.has_targets:
        yield page.not_run("ranking" if scored else "scores")
    for method in sorted({row["method"] for row in ranking}):
        yield f"<h3>{escape(tables.method_name(method))}</h3>"
        yield from trust_section.section(
            page.read, method, swept(page.read.get("transfer", [])), page.config.get("notes") or ()
        )


def _grid(page: Page) -> Iterator[str]:
    """Yields which settings were tried and chosen, and what to think of the choices."""
    rows = page.results.get("transfer", [])  # of all ways of fine-tuning
    if cells := grid_rows(rows):
        yield tables.to_html(cells)
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in grid_sentences(rows))
        yield f"<ul>{items}</ul>" if items else ""
        yield (
            '<p class="quiet">Chosen: the settings of the results, for which checkpoints. Diverged: trainings in the'
            " grid without an accuracy, out of all. They are not repeated. The grid's own accuracies are only in the"
            f" table of all results. {escape(choice_note(rows))}</p>"
        )


def _used(page: Page) -> Iterator[str]:
    """Yields what each stage took."""
    if rows := page.results.get("usage"):
        yield tables.to_html(used.used_rows(rows))
        yield (
            '<p class="quiet">Sums over all finished runs of a stage; a later run computes only what is missing.'
            " Memory: the peak of the first process since its start, so it includes earlier stages of the same"
            " run.</p>"
        )


def _failures(page: Page) -> Iterator[str]:
    """Yields a table of the values that could not be computed, with the reasons."""
    columns = {
        "transfer": "method",
        "scores": "score",
        "spectral": "component",
        "fewshot": "method",
    }  # file -> column that names what was computed
    failed = [
        {"Checkpoint": row["checkpoint"], "Target": row["target"], "What": _what(row, column), "Why": row["error"]}
        for name, column in columns.items()
        for row in page.results.get(name, [])
        if row.get("error") and is_result(row)
    ]
    failed += [
        {"Checkpoint": row["checkpoint"], "Target": row["target"], "What": "retrieval", "Why": row["error"]}
        for row in page.results.get("retrieval", [])
        if row.get("error")
    ]
    if failed:
        yield "<p>These values are excluded from all rankings. The next run tries to compute them again.</p>"
        yield tables.to_html(failed)


def _what(row: Row, column: str) -> str:
    """Returns what a row records, with the way of fine-tuning if it reuses source data."""
    return row[column] if is_plain(row) else tables.way_name(row["objective"], row["selection"])


def _file_stem(name: str, taken: set[str]) -> str:
    """Returns a portable file name for a text in any script, and adds the name to `taken`."""
    # 40 characters are up to 160 bytes in UTF-8; file systems allow 255. The name is lower case because some file
    # systems ignore case.
    stem = base = re.sub(r"\W+", "_", name.lower())[: 60 if name.isascii() else 40].strip("_")
    number = 1
    while stem in taken:
        number += 1
        stem = f"{base}_{number}"
    taken.add(stem)
    return stem


def _figures(section: figures.Section, page: Page) -> Iterator[str]:
    """Yields the figures of a section."""
    if not ((section.for_trajectories and page.has_trajectory) or (section.for_given and page.given)):
        return
    missing = [name for name in section.needs if not page.read.get(name)]
    if missing and section.optional:
        return
    if missing:
        is_expected = page.written_by and (page.has_targets or "pretrain" in missing)
        yield from map(page.not_run, missing if is_expected else ())
        return
    drawn = list(_drawn(section.draw(page.read), page))
    yield from drawn if drawn or section.optional else ["<p>The results contain no values to draw yet.</p>"]


def _with_figures(parts: Iterable[str | Sequence[figures.Drawing]], page: Page) -> Iterator[str]:
    """Yields the parts of a section in order: HTML as it is, and figures as `_drawn` yields them."""
    for part in parts:
        yield from [part] if isinstance(part, str) else _drawn(part, page)


def _drawn(drawings: Iterable[figures.Drawing], page: Page) -> Iterator[str]:
    """Yields figures by group, and writes each figure to a file."""
    groups = {}
    for drawing in drawings:
        svg = to_svg(drawing.figure)
        stem = _file_stem(drawing.name, page.taken)
        tables.write_text(page.figures / f"{stem}.svg", svg)
        element = inline_svg(svg, f"f{len(page.taken)}-", drawing.caption)
        caption = f"<figcaption>{escape(drawing.caption)}</figcaption>"
        groups.setdefault(drawing.group, []).append(f"<figure>{element}{caption}</figure>")
    fold = sum(map(len, groups.values())) > MANY_FIGURES and len(groups) > 1
    for number, (group, elements) in enumerate(groups.items()):
        grid = '<div class="figures">' + "\n".join(elements) + "</div>"
        heading = f"<h3>{escape(group)}</h3>" if group else ""
        opened = " open" if number == 0 else ""
        folded = f"<details{opened}><summary>{escape(group)}</summary>{grid}</details>"
        yield folded if fold else heading + grid


def _tables(page: Page) -> Iterator[str]:
    """Yields all rows of the result files as tables."""
    yield (
        '<p class="quiet">Accuracies are in [0, 1] and times in seconds. Each table is also a CSV file in the folder of'
        " this page.</p>"
    )
    for name in dict.fromkeys((*page.written_by, *page.results)):
        rows = page.results.get(name)
        is_optional = name in OPTIONAL or not page.has_targets
        unplanned = (name == "pretrain" and not page.has_trajectory) or (is_optional and not page.plans(name))
        if not rows and unplanned:
            continue
        if not rows:
            yield f"<h3>{escape(name)}</h3>"
            yield "<p>No rows.</p>" if name in page.results else page.not_run(name)
            continue
        columns = [column for column in column_names(name, rows) if any(row.get(column) is not None for row in rows)]
        table = tables.to_html(rows, columns)
        summary = f"{escape(name)} ({len(rows)} {'row' if len(rows) == 1 else 'rows'})"
        long = len(rows) > LONG_TABLE
        yield f"<details><summary>{summary}</summary>{table}</details>" if long else f"<h3>{summary}</h3>{table}"


def _configuration(page: Page) -> Iterator[str]:
    """Yields the study's config as JSON."""
    text = json.dumps(page.config, indent=2, ensure_ascii=False)
    missing = "<p>There is no <code>config.json</code> in the working directory.</p>"
    yield f"<pre>{escape(text, keep_lines=True)}</pre>" if page.config else missing


# Sections in the order of the page: heading -> function that yields HTML. A section that yields nothing is left out.
SECTIONS: dict[str, Callable[[Page], Iterator[str]]] = {
    "Reusing pre-training data": _reuse,
    "Image-text retrieval": _retrieval,
    "Which checkpoint transfers best": _answer,
    "New classes from a few images": _fewshot,
    "Targets": _targets,
    "Given checkpoints": _checkpoints,
    "Comparison with the paper": _paper,
    "Why: the spectral components": _why,
    "How far each score can be trusted": _trust,
    "Settings tried": _grid,
    "What failed": _failures,
    **{
        title: functools.partial(_figures, section)
        for group in (figures_by_name, kind_figure, figures, score_figures, spectral_figures)
        for title, section in group.FIGURES.items()
    },
    "Time and memory": _used,
    "All results": _tables,
    "Configuration": _configuration,
}
