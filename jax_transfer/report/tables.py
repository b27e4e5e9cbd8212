"""Turns result rows into text: display names, CSV files and HTML tables.

Rows are the dictionaries in `results/*.jsonl` (`results.to_json_dict`). Accuracies are fractions in [0, 1] in these
rows, and percentages wherever a reader sees them. A missing value (None or NaN) is shown as an en dash.
"""

import csv
import html
import io
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TypeGuard

from jax_transfer.results import PLAIN, Row, column_names, write_atomically

EN_DASH = "–"

# Method -> its short name in figures and tables, and its name in a sentence. FE and FT are the papers' terms.
METHODS = {
    "probe": ("FE", "as a frozen feature extractor (FE)"),
    "probe_converged": ("FE converged", "as a frozen feature extractor with a converged probe"),
    "zero_shot": ("Zero-shot", "without training, by the names of the classes"),
    "finetune": ("FT", "when fine-tuned (FT)"),
}

# Objective of fine-tuning -> its name in tables, and in a sentence. The first one uses the target's own images alone.
OBJECTIVE_NAMES = {
    PLAIN: ("Plain", "plain fine-tuning"),
    "joint": ("Joint", "joint fine-tuning"),
    "weak_strong": ("Weak-strong", "weak-strong fine-tuning"),
    "cotuning": ("Co-Tuning", "Co-Tuning"),
}

# Score -> its usual name in the literature.
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
    "knn": "k-NN",
    "effective_rank": "Effective rank",
    "ncti_variability": "NCTI: variability",
    "ncti_geometry": "NCTI: geometry",
    "ncti_nearest": "NCTI: nearest centre",
    "ncti": "NCTI",
    "pooled": "All scores pooled",
    "num_parameters": "Parameters",
    "forward_gflops": "GFLOP of a forward pass",
    "source_accuracy": "Source accuracy",
    "last_epoch": "Epoch",
    "static": "The given order",
    "average_rank": "Rank on other targets",
}

# Lists that need no data of the target -> what they order by, and what to choose by them.
NAIVE_LISTS = {
    "num_parameters": ("number of parameters", "the largest checkpoint"),
    "forward_gflops": ("work of a forward pass", "the most expensive checkpoint"),
    "source_accuracy": ("accuracy on the source", "the most accurate checkpoint on its source"),
    "last_epoch": ("epoch", "the last epoch"),
    "static": ("given order", "the first in the given order"),
    "average_rank": ("mean rank on the other targets", "the best on other targets"),
}

# Option of a score -> its name after the name of the score; others keep their own names.
SCORE_OPTIONS = {"components_per_class": "components", "learning_rate": "rate"}

MANY_CLASSES = 4  # from which on the classes in a target string are counted, not named
# Display form of the options in a target string: tfds:mnist?per_class=100 -> mnist (100 per class).
TARGET_OPTIONS = {
    "per_class": "{} per class",
    "fraction": "fraction {}",
    "imbalance": "imbalance {}",
    "exponential_imbalance": "exponential imbalance {}",
    "train_fraction": "train fraction {}",
}


def is_number(value) -> TypeGuard[float]:
    """Returns whether a value is a finite number.

    >>> [is_number(value) for value in (0.5, 3, None, float("nan"))]
    [True, True, False, False]
    """
    return isinstance(value, (int, float)) and math.isfinite(value)


def showable(text) -> str:
    """Replaces the characters that XML cannot contain (control characters and lone surrogates) in a text.

    >>> showable("birds\\x07")
    'birds�'
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", str(text))


def short_target(target: str) -> str:
    """Returns the display name of a target.

    >>> short_target("tfds:mnist?per_class=100")
    'mnist (100 per class)'
    >>> short_target("folder:/my/birds"), short_target("tfds:cifar10?classes=cat+deer+dog+frog+horse")
    ('birds', 'cifar10 (5 classes)')
    """
    name, options = split_target(showable(target))
    source, colon, rest = name.partition(":")
    name = (rest.rstrip("/").rpartition("/")[2] or rest) if colon and source in ("tfds", "folder", "embedded") else name
    if options.get("classes", "").count("+") >= MANY_CLASSES:
        options["classes"] = str(options["classes"].count("+") + 1)
    shown = TARGET_OPTIONS | ({"classes": "{} classes"} if options.get("classes", "").isdecimal() else {})
    words = [shown.get(key, key + " {}").replace("{}", value) for key, value in options.items()]
    return f"{name} ({', '.join(words)})" if words else name


def split_target(target: str) -> tuple[str, dict[str, str]]:
    """Splits the name of a target into its address and its options.

    >>> split_target("tfds:mnist?fraction=0.2&test=100")
    ('tfds:mnist', {'fraction': '0.2', 'test': '100'})
    """
    address, mark, query = target.partition("?")
    pairs = [pair.partition("=") for pair in re.split("[&,]", query)] if mark else []
    if not all(key.isidentifier() and equals for key, equals, _ in pairs):
        return target, {}  # here the question mark is part of a folder's name
    return address, {key: value for key, _, value in pairs}


def target_names(targets: Iterable[str]) -> dict[str, str]:
    """Maps each target to its short name, or to its full name if another target has the same short name.

    >>> target_names(["folder:/a/birds", "folder:/b/birds", "tfds:mnist"])
    {'folder:/a/birds': 'folder:/a/birds', 'folder:/b/birds': 'folder:/b/birds', 'tfds:mnist': 'mnist'}
    """
    targets = list(dict.fromkeys(targets))
    short = [short_target(target) for target in targets]
    return {t: name if short.count(name) == 1 else showable(t) for t, name in zip(targets, short, strict=True)}


def method_name(method: str) -> str:
    """Returns the short name of a method, such as "FT"; an unknown method keeps its own name.

    >>> method_name("finetune"), method_name("mine")
    ('FT', 'mine')
    """
    return METHODS[method][0] if method in METHODS else showable(method)


def way_name(objective: str, selection: str | None) -> str:
    """Returns the short name of a way of fine-tuning: its objective and the selection of source images, if any.

    >>> way_name("joint", "uot"), way_name("supervised", None)
    ('Joint, uot', 'Plain')
    """
    return ", ".join([_objective(objective, 0), *([showable(selection)] if selection else [])])


def way_words(objective: str, selection: str | None) -> str:
    """Returns the name of a way of fine-tuning for a sentence.

    >>> way_words("joint", "uot"), way_words("cotuning", None)
    ('joint fine-tuning with uot', 'Co-Tuning')
    """
    return " with ".join([_objective(objective, 1), *([showable(selection)] if selection else [])])


def _objective(objective: str, form: int) -> str:
    return OBJECTIVE_NAMES[objective][form] if objective in OBJECTIVE_NAMES else showable(objective)


def counted(number: int, noun: str) -> str:
    """Returns a number and its noun, in the plural unless there is one.

    >>> counted(1, "checkpoint"), counted(2, "checkpoint")
    ('1 checkpoint', '2 checkpoints')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Joins names with commas, and the last two with "and".

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def in_points(difference: float) -> str:
    """Returns the text of a positive difference between accuracies in [0, 1], in percentage points.

    >>> in_points(0.05), in_points(0.00001)
    ('5.00 points', 'less than 0.01 points')
    """
    return f"{100 * difference:.2f} points" if round(100 * difference, 2) > 0 else "less than 0.01 points"


def epoch_name(epoch: float) -> str:
    """Returns the text of an epoch, with two decimals if it is a fraction.

    >>> epoch_name(8), epoch_name(17.984375), epoch_name(18.0)
    ('8', '17.98', '18')
    """
    return f"{round(epoch, 2):.10g}"


def class_list(names: Sequence[str], num_classes: int, most: int = 5) -> str:
    """Returns the number of classes and the first few names.

    Args:
      names: names of at least the first `most` classes.
      num_classes: number of classes.
      most: maximum number of names to show.

    >>> class_list(["cat", "dog", "emu"], 10, most=2)
    '10: cat, dog, ...'
    """
    return f"{num_classes:,}: {', '.join(map(showable, names[:most]))}{', ...' if num_classes > most else ''}"


def score_name(score: str) -> str:
    """Returns the usual name of a score, with its options; an unknown score keeps its own name.

    >>> score_name("nleep"), score_name("mine")
    ('N-LEEP', 'mine')
    >>> score_name("nleep?energy=0.5&components_per_class=2")
    'N-LEEP, energy 0.5, components 2'
    """
    name, options = split_target(score)
    if name not in SCORE_NAMES:
        return showable(score)
    words = [f"{SCORE_OPTIONS.get(key, key.replace('_', ' '))} {value}" for key, value in options.items()]
    return showable(", ".join([SCORE_NAMES[name], *words]))


def percent(accuracy, unit: str = "\N{NO-BREAK SPACE}%") -> str:
    """Formats an accuracy in [0, 1] as a percentage, or a missing value as an en dash.

    >>> percent(0.9647, unit=" %"), percent(None)
    ('96.47 %', '–')
    """
    return f"{100 * accuracy:.2f}{unit}" if is_number(accuracy) else EN_DASH


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically as UTF-8, escaping characters that UTF-8 cannot encode (lone surrogates).

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "page.html"
    ...     write_text(path, "FE \\udcff")
    ...     print(path.read_text())
    FE \\udcff
    """
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def to_csv(rows: Sequence[Row], path: pathlib.Path, columns: Sequence[str] | None = None) -> None:
    """Writes rows as CSV with a header line. Floats keep all digits, None becomes an empty cell and NaN `nan`.

    Args:
      rows: the rows to write.
      path: the CSV file.
      columns: the columns in order; all columns of the rows by default.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "scores.csv"
    ...     to_csv([{"epoch": 1, "logme": 0.5}, {"epoch": 2, "logme": None}], path)
    ...     path.read_text().splitlines()
    ['epoch,logme', '1,0.5', '2,']
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, column_names("", rows) if columns is None else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def format_value(value) -> str:
    """Formats a value for a table cell: four decimals for ordinary floats, the length of a list, a dash for None.

    >>> [format_value(value) for value in (0.5, 123.456, 1e-5, None, [1, 2])]
    ['0.5000', '123.5', '1.00e-05', '–', '(2 values)']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return EN_DASH
    if isinstance(value, list):
        return f"({len(value):,} values)"
    if not isinstance(value, float) or value == 0 or math.isinf(value):
        return showable(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.2e}"


def to_html(rows: Sequence[Row], columns: Sequence[str] | None = None, bold: Collection[tuple[int, str]] = ()) -> str:
    """Returns rows as an HTML table with all strings escaped. Numeric columns are right-aligned (class `n`).

    Args:
      rows: the rows to show.
      columns: the columns in order; all columns of the rows by default.
      bold: (index of the row, column) of the cells in bold print.

    >>> print(to_html([{"score": "LogME", "tau": 0.5}]))
    <div class="table"><table>
    <thead><tr><th>score</th><th class="n">tau</th></tr></thead>
    <tbody>
    <tr><td>LogME</td><td class="n">0.5000</td></tr>
    </tbody></table></div>
    """
    columns = column_names("", rows) if columns is None else columns
    cells = [[format_value(row.get(column)) for column in columns] for row in rows]
    numeric = [all(line[i][:1] in f"+-{EN_DASH}0123456789" for line in cells) for i in range(len(columns))]
    css = [' class="n"' if right else "" for right in numeric]
    head = "".join(f"<th{c}>{html.escape(showable(name))}</th>" for c, name in zip(css, columns, strict=True))

    def cell(i: int, j: int) -> str:
        text = html.escape(cells[i][j])
        return f"<td{css[j]}>" + (f"<strong>{text}</strong>" if (i, columns[j]) in bold else text) + "</td>"

    body = "\n".join("<tr>" + "".join(cell(i, j) for j in range(len(columns))) + "</tr>" for i in range(len(cells)))
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
