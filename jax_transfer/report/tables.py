"""Result rows in, text out: the names that readers see, and any rows as CSV or HTML.

Rows are the dictionaries of `results/*.jsonl` (`results.to_json_dict`); accuracies are in [0, 1] there, and
in percent wherever a reader sees them. A missing value (None or NaN) shows as an en dash.
"""

import csv
import html
import io
import math
import pathlib
import re
from collections.abc import Iterable, Sequence

from jax_transfer.results import Row, column_names, write_atomically

EN_DASH = "–"

# Method -> its short name in figures and tables, and how a sentence says it. FE and FT are the papers' terms.
METHODS = {
    "probe": ("FE", "as a frozen feature extractor (FE)"),
    "probe_converged": ("FE converged", "as a frozen feature extractor with a converged probe"),
    "finetune": ("FT", "fine-tuned (FT)"),
}

# Score -> its name in the field.
SCORE_NAMES = {
    "logme": "LogME",
    "leep": "LEEP",
    "nce": "NCE",
    "nleep": "N-LEEP",
    "h_score": "H-score",
    "h_score_shrunk": "H-score (shrunk)",
    "transrate": "TransRate",
    "linear_1": "Linear (1 epoch)",
    "linear_5": "Linear (5 epochs)",
    "linear_converged": "Linear (converged)",
    "finetune_1": "Fine-tune (1 epoch)",
    "finetune_5": "Fine-tune (5 epochs)",
    "mi_alpha_0.01": "MI (α = 0.01)",
    "mi_alpha_0.5": "MI (α = 0.5)",
    "mi_pca_alpha_0.01": "MI w/ PCA (α = 0.01)",
    "mi_pca_alpha_0.5": "MI w/ PCA (α = 0.5)",
}

# How the options of a target string read: tfds:mnist?per_class=100 -> mnist (100 per class).
TARGET_OPTIONS = {"per_class": "{} per class", "fraction": "fraction {}", "imbalance": "imbalance {}"}


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def showable(text) -> str:
    """Text with what XML cannot hold (control characters, halves of surrogate pairs) replaced."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", str(text))


def short_target(target: str) -> str:
    """How a target is shown: `tfds:mnist?per_class=100` -> `mnist (100 per class)`, `folder:/my/birds` -> `birds`."""
    name, mark, query = showable(target).partition("?")
    pairs = [pair.partition("=") for pair in re.split("[&,]", query)]
    if mark and not all(key.isidentifier() and equals for key, equals, _ in pairs):
        name, pairs = showable(target), []  # a question mark that belongs to a folder's name
    source, colon, rest = name.partition(":")
    name = (rest.rstrip("/").rpartition("/")[2] or rest) if colon and source in ("tfds", "folder", "embedded") else name
    options = [TARGET_OPTIONS.get(key, key + " {}").replace("{}", value) for key, _, value in pairs if key]
    return f"{name} ({', '.join(options)})" if options else name


def target_names(targets: Iterable[str]) -> dict[str, str]:
    """Each target's short name, or its full one where two targets would share the short one."""
    targets = list(dict.fromkeys(targets))
    short = [short_target(target) for target in targets]
    return {t: name if short.count(name) == 1 else showable(t) for t, name in zip(targets, short, strict=True)}


def method_name(method: str) -> str:
    return METHODS[method][0] if method in METHODS else showable(method)


def class_list(names: Sequence[str], num_classes: int, most: int = 5) -> str:
    """How classes are shown: `10: cat, dog, ...`. names: at least the first `most` of them."""
    return f"{num_classes:,}: {', '.join(map(showable, names[:most]))}{', ...' if num_classes > most else ''}"


def score_name(score: str) -> str:
    return SCORE_NAMES.get(score, showable(score))


def percent(accuracy, unit: str = "\N{NO-BREAK SPACE}%") -> str:
    """0.9647 -> `96.47 %`; an en dash for a missing value."""
    return f"{100 * accuracy:.2f}{unit}" if is_number(accuracy) else EN_DASH


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes UTF-8 atomically; what UTF-8 cannot hold (half of a surrogate pair in a file name) is escaped."""
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def to_csv(rows: Sequence[Row], path: pathlib.Path, columns: Sequence[str] | None = None) -> None:
    """Writes rows as CSV: a header line, floats with all their digits, None as an empty cell, NaN as `nan`."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, column_names("", rows) if columns is None else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def format_value(value) -> str:
    """A cell's text: four decimals for floats of ordinary size, an en dash for None and NaN, the length of a list."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return EN_DASH
    if isinstance(value, list):
        return f"({len(value):,} values)"
    if not isinstance(value, float) or value == 0 or math.isinf(value):
        return showable(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.2e}"


def to_html(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as an HTML table, every string escaped; columns without words are aligned to the right (class `n`)."""
    columns = column_names("", rows) if columns is None else columns
    cells = [[format_value(row.get(column)) for column in columns] for row in rows]
    numeric = [all(line[i] == EN_DASH or line[i][:1] in "+-0123456789" for line in cells) for i in range(len(columns))]
    css = [' class="n"' if right else "" for right in numeric]
    head = "".join(f"<th{c}>{html.escape(showable(name))}</th>" for c, name in zip(css, columns, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{c}>{html.escape(cell)}</td>" for c, cell in zip(css, line, strict=True)) + "</tr>"
        for line in cells
    )
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
