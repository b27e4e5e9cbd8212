"""Result files of a study: a frozen dataclass for each kind of row, functions to read and write rows, and a lock.

`results/<name>.jsonl` holds one JSON object on each line. The fields of the row's dataclass, in order, are the
columns of this file and of the CSV file that the report writes. Accuracies are in [0, 1], times in seconds; `gflops`
counts floating-point operations / 1e9 (not a rate). `checkpoint` is the name of a `Snapshot`. A checkpoint that could
not be evaluated also has a row, with the reason in `error` instead of a value.

`epoch` may be a fraction: a pre-training that is kept by steps has checkpoints between two epochs.

In a column that may be None, null means "does not apply" (`epoch` is null for checkpoints that the user provides). In
any other column it means NaN. `version` records which version of the computation wrote the row, see VERSIONS.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import socket
import threading
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_transfer import devices
from jax_transfer.logs import log
from jax_transfer.records import InputError

# Values of `TransferRow.split`. Rows of GRID are not results but the points of a grid of settings.
TEST = "test"  # trained on all training images and tested on the test images
VALIDATION = "validation"  # a grid point, trained on four fifths of the training images and tested on the last fifth
TEST_GRID = "test_grid"  # a grid point, trained on all training images; the one with the best test accuracy is chosen
GRID = (VALIDATION, TEST_GRID)

PLAIN = "supervised"  # the value of `TransferRow.objective` for a training on the target's own images alone

# Result file -> version of its numbers. Increase it when a change makes the same study write different numbers: rows of
# an older version are then computed again. Lines without a version count as version 1.
VERSIONS = {
    "pretrain": 1,
    "transfer": 2,
    "scores": 2,
    "spectral": 2,
    "spectrum": 2,
    "similarity": 2,
    "embedding": 2,
    "ranking": 2,
    "trust": 2,
    "checklist": 2,
    "points": 1,
    "predictions": 1,
    "targets": 1,
    "checkpoints": 1,
    "usage": 1,
    "selection": 1,
    "overlap": 1,
    "fewshot": 1,
    "retrieval": 1,
}


@dataclasses.dataclass(frozen=True)
class PretrainRow:
    """A row that records one epoch of pre-training. step: the number of optimizer steps so far."""

    epoch: float | None
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    images_per_second: float
    seconds: float
    source: str
    checkpoint: str
    model: str
    step: int | None = None
    knn_accuracy: float | None = None
    effective_rank: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    objective: str = PLAIN
    version: int = VERSIONS["pretrain"]


@dataclasses.dataclass(frozen=True)
class TransferRow:
    """A row that records the accuracy of a checkpoint transferred to a target by one method.

    Attributes:
      objective: name of the loss that was minimised.
      selection: how source images for training were chosen; None if no source images were used.
      shots, draw: number of training images in each class, and the index of the random draw that chose them.
      split: what the row is and on which images the model was tested: TEST, VALIDATION or TEST_GRID.
      learning_rate, weight_decay: the settings of this training; in a row of TEST, those that were chosen.
      source_weight: weight of the loss on source images relative to that on target images.
    """

    checkpoint: str
    epoch: float | None
    target: str
    method: str
    seed: int
    learning_rate: float
    accuracy: float
    mean_class_accuracy: float
    num_train: int
    num_test: int
    seconds: float
    gflops: float
    error: str = ""
    objective: str = PLAIN
    selection: str | None = None
    shots: int | None = None
    draw: int | None = None
    split: str = TEST
    weight_decay: float | None = None
    source_weight: float | None = None
    version: int = VERSIONS["transfer"]


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """A row that records one score of a checkpoint on a target.

    Attributes:
      forward_gflops, test_forward_gflops: work of one forward pass over all training images and over all test images;
        not part of `gflops`.
    """

    checkpoint: str
    epoch: float | None
    target: str
    score: str
    value: float
    seconds: float
    gflops: float
    forward_gflops: float
    error: str = ""
    test_forward_gflops: float = math.nan
    version: int = VERSIONS["scores"]


@dataclasses.dataclass(frozen=True)
class SpectralRow:
    """A row that records a probe on one spectral component. stage: pretrained or finetuned; rank: mean over batches."""

    checkpoint: str
    epoch: float | None
    target: str
    stage: str
    component: str
    rank: float
    accuracy: float
    error: str = ""
    mean_class_accuracy: float = math.nan
    version: int = VERSIONS["spectral"]


@dataclasses.dataclass(frozen=True)
class SpectrumRow:
    """A row that records the spectrum of a checkpoint's features on all training images.

    Attributes:
      places: positions of selected singular values in descending order, counted from 1.
      shares: those singular values divided by the sum of all.
    """

    checkpoint: str
    epoch: float | None
    target: str
    stage: str
    rank: int
    effective_rank: float
    decay: float
    places: list[int]
    shares: list[float]
    version: int = VERSIONS["spectrum"]


@dataclasses.dataclass(frozen=True)
class SimilarityRow:
    """A row that records how similar two checkpoints' features of the same test images are. cka, overlap: in [0, 1]."""

    checkpoint: str
    other: str
    target: str
    stage: str
    cka: float
    overlap: float
    version: int = VERSIONS["similarity"]


@dataclasses.dataclass(frozen=True)
class EmbeddingRow:
    """A row that holds a t-SNE embedding of the features of some test images. x, y, labels: one entry per image."""

    checkpoint: str
    epoch: float | None
    target: str
    stage: str
    x: list[float]
    y: list[float]
    labels: list[int]
    version: int = VERSIONS["embedding"]


@dataclasses.dataclass(frozen=True)
class RankingRow:
    """A row that records how well a score predicts the `metric` of a method on a target.

    The study has `num_checkpoints` checkpoints, and `num_scored` of them have both the score and the metric. If any
    checkpoint lacks one of them, all other numbers are NaN, because a ranking of the other checkpoints says nothing
    about the missing ones.
    """

    target: str
    method: str
    score: str
    pearson: float
    kendall: float
    weighted_kendall: float
    recall_at_1: float
    recall_at_3: float
    rel_at_1: float
    rel_at_3: float
    num_checkpoints: int
    kendall_low: float
    kendall_high: float
    regret: float
    num_scored: int | None = None
    metric: str = "accuracy"
    version: int = VERSIONS["ranking"]


@dataclasses.dataclass(frozen=True)
class TrustRow:
    """A row that records how well a score ranks the checkpoints over all targets, compared with a naive list.

    Attributes:
      num_targets: the targets on which at least one score orders the checkpoints; all numbers are means over them.
      baseline: the naive list to which the score is compared; "" without one.
      difference, difference_low, difference_high: Kendall's tau of the score minus that of the baseline, and its 95 %
        interval over checkpoints.
      fidelity_pearson, ...: correlation between gaps in the score and gaps in accuracy, over all pairs of checkpoints.
      top_fidelity_pearson, ...: the same over the pairs with one of the three most accurate checkpoints.
      kendall_epochs, num_epochs: tau over the last epoch of each pre-training alone, and their number.
      kendall_earlier, num_earlier: the same, over the other epochs.
      kendall_families, num_families: the same, over the largest of the last ones in each family of architectures.
      kendall_sizes, num_sizes: the same, over the most checkpoints of nearly equal size.
    """

    method: str
    score: str
    num_targets: int
    num_checkpoints: int
    kendall: float
    weighted_kendall: float
    baseline: str
    difference: float
    difference_low: float
    difference_high: float
    fidelity_pearson: float
    fidelity_spearman: float
    top_fidelity_pearson: float
    top_fidelity_spearman: float
    kendall_epochs: float
    num_epochs: int
    kendall_earlier: float
    num_earlier: int
    kendall_families: float
    num_families: int
    kendall_sizes: float
    num_sizes: int
    version: int = VERSIONS["trust"]


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """A row that records one finding of the checklist of `trust.checklist`.

    Attributes:
      check: a key of `trust.checklist.CHECKS`.
      subject: the target, score or checkpoint that the finding is about; "" for all.
      value, low, high: the number that was found, and the ends of its range, if it has one.
      passed: False if the finding weakens the comparison, True if not; null if it is only information.
      finding: a sentence.
    """

    method: str
    check: str
    subject: str
    value: float | None
    low: float | None
    high: float | None
    passed: bool | None
    finding: str
    version: int = VERSIONS["checklist"]


@dataclasses.dataclass(frozen=True)
class PointsRow:
    """A row that records what a gap in a score has meant on the other targets, see `trust.points`.

    Attributes:
      gap: one standard deviation of the score over the checkpoints of this target.
      points, spread: what such a gap has meant in accuracy on the other targets, in [-1, 1]: mean and deviation.
      num_others: number of other targets.
    """

    method: str
    target: str
    score: str
    gap: float
    points: float
    spread: float
    num_others: int
    version: int = VERSIONS["points"]


@dataclasses.dataclass(frozen=True)
class PredictionRow:
    """A row that records the accuracy that the scores together predict for a checkpoint, see `trust.points`.

    Attributes:
      predicted, low, high: the prediction without the target's own accuracies, but for their mean; its interval.
      accuracy: what was measured.
    """

    method: str
    target: str
    checkpoint: str
    predicted: float
    low: float
    high: float
    accuracy: float
    version: int = VERSIONS["predictions"]


@dataclasses.dataclass(frozen=True)
class TargetRow:
    """A row that describes a target for the report.

    Attributes:
      metric: a key of METRICS.
      class_names: names of the first few classes.
      notes: sentences about the data of the target.
    """

    target: str
    metric: str
    num_classes: int
    class_names: list[str]
    num_train: int
    num_test: int
    notes: list[str]
    version: int = VERSIONS["targets"]


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """A row that describes a given checkpoint, so that a change of its file between two runs is noticed.

    Attributes:
      path: the file or folder, or the name of a random initialisation.
      model: a key of MODELS.
      preprocessing: the fields of `Preprocessing`.
      preprocessing_is_guess: whether it was inferred from a name because nothing states it.
      has_head: whether its logits stand for classes.
      notes: sentences on what was assumed, guessed or left out.
      fingerprint: hash of the weights.
    """

    checkpoint: str
    path: str
    model: str
    num_parameters: int
    preprocessing: dict
    preprocessing_is_guess: bool
    has_head: bool
    notes: list[str]
    fingerprint: str
    version: int = VERSIONS["checkpoints"]


@dataclasses.dataclass(frozen=True)
class SelectionRow:
    """A row that records a class or cluster of source images that was selected for a target.

    Attributes:
      strategy: name of the selection, a key of `config.select.selections`.
      kind: "class" or "cluster".
      class_: name of the class, or "cluster 17".
      rank: position by similarity, from 1; a selection may begin at a later rank than 1.
      similarity: similarity to the target, higher is closer; null if the strategy does not measure any.
      label: the number of the class or cluster.
      num_images: its number of source images, including those that nearly equal a test image.
      num_selected: number of rows of the selection, so that an unfinished one is noticed.
      made_from: hash of the settings and of the classes or clusters that were selected from.
      converged: whether the solver of the strategy converged.
    """

    checkpoint: str
    target: str
    strategy: str
    kind: str
    class_: str
    rank: int
    similarity: float | None
    label: int
    num_images: int
    num_selected: int
    made_from: str
    converged: bool = True
    version: int = VERSIONS["selection"]


@dataclasses.dataclass(frozen=True)
class OverlapRow:
    """A row that records a source image that nearly equals a test image of a target.

    Attributes:
      source_image, test_image: index of each image in its data set.
      distance: number of bits in which their perceptual hashes differ.
      similarity: cosine between their features.
    """

    checkpoint: str
    target: str
    source_image: int
    test_image: int
    source_class: str
    target_class: str
    distance: int
    similarity: float
    version: int = VERSIONS["overlap"]


@dataclasses.dataclass(frozen=True)
class FewShotRow:
    """A row that records how well classifiers of a few images a class do, in the mean over many draws of these images.

    Each accuracy has half the width of its 95 % interval over the draws; null if there are no seen classes.

    Attributes:
      method: a key of `transfer.fewshot.PROTOCOLS`.
      shots: number of training images from which each unseen class was imprinted.
      metric: the metric of all accuracies, a key of METRICS.
      unseen, seen, all: accuracy on the test images of these classes, among all classes.
      unseen_only: accuracy on the test images of unseen classes, among the unseen classes.
      seen_only: accuracy on the test images of seen classes, among the seen classes, which depends on no draw.
      num_seen, num_unseen: numbers of classes.
      num_train: number of training images of the tuning, 0 without any.
      seconds, gflops: of the tuning, which serves all shots; 0 without any.
    """

    checkpoint: str
    epoch: float | None
    target: str
    method: str
    shots: int
    num_episodes: int
    metric: str
    unseen: float
    unseen_interval: float
    seen: float | None
    seen_interval: float | None
    all: float
    all_interval: float
    unseen_only: float
    unseen_only_interval: float
    seen_only: float | None
    num_seen: int
    num_unseen: int
    num_train: int
    num_test: int
    seed: int
    seconds: float
    gflops: float
    error: str = ""
    version: int = VERSIONS["fewshot"]


@dataclasses.dataclass(frozen=True)
class RetrievalRow:
    """A row that records how well PVSE, trained from a checkpoint, finds captions for images and images for captions.

    Attributes:
      target: the data set with captions.
      fraction: share of its training images on which PVSE was trained; `num_train` is their number.
      split: the images that are ranked: VALIDATION, by which the best epoch of training was chosen, or TEST.
      folds, num_images: number of folds into which the images are divided, and number of images in each.
      num_captions, num_duplicates: captions of all folds, and how many of them another image has too.
      i2t_recall_at_1, ...: share of the images with one of their captions among the most similar ones (i2t), and of the
        captions with their image (t2i), in [0, 1].
      rsum, chance_rsum: sum of the six recalls, in [0, 6], and that of random orders on average.
      best_epoch: the epoch of training whose weights are measured.
      seconds, gflops: of the training, without this measurement. The seconds include compilation and the validation.
    """

    checkpoint: str
    epoch: float | None
    target: str
    fraction: float
    split: str
    folds: int
    seed: int
    i2t_recall_at_1: float
    i2t_recall_at_5: float
    i2t_recall_at_10: float
    t2i_recall_at_1: float
    t2i_recall_at_5: float
    t2i_recall_at_10: float
    rsum: float
    chance_rsum: float
    i2t_median_rank: float
    t2i_median_rank: float
    best_epoch: int | None
    num_train: int
    num_images: int
    num_captions: int
    num_duplicates: int
    seconds: float
    gflops: float
    error: str = ""
    version: int = VERSIONS["retrieval"]


@dataclasses.dataclass(frozen=True)
class UsageRow:
    """A row that records what one finished run of a stage took in the first process.

    Attributes:
      run: counts the runs of the stage in this working directory, from 1.
      compile_seconds, num_programs: time for compiling, part of `seconds`, and number of compiled programs.
      host_gigabytes, device_gigabytes: peaks of memory since the start of the process; null for a device that does not
        report its own.
    """

    stage: str
    run: int
    seconds: float
    compile_seconds: float
    num_programs: int
    host_gigabytes: float
    device_gigabytes: float | None
    version: int = VERSIONS["usage"]


# Field -> column, for columns that are not Python identifiers.
COLUMNS = {
    "recall_at_1": "recall@1",
    "recall_at_3": "recall@3",
    "rel_at_1": "rel@1",
    "rel_at_3": "rel@3",
    **{f"{way}_recall_at_{k}": f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)},
    "class_": "class",
}

_FIELD_OF_COLUMN = {column: field for field, column in COLUMNS.items()}

# Result file -> its row dataclass, and the fields that identify a row.
ROWS = {
    "pretrain": (PretrainRow, ("checkpoint",)),
    "transfer": (
        TransferRow,
        (
            "checkpoint",
            "target",
            "method",
            "seed",
            "split",
            "learning_rate",
            "weight_decay",
            "objective",
            "selection",
            "source_weight",
        ),
    ),
    "scores": (ScoreRow, ("checkpoint", "target", "score")),
    "spectral": (SpectralRow, ("checkpoint", "target", "stage", "component")),
    "spectrum": (SpectrumRow, ("checkpoint", "target", "stage")),
    "similarity": (SimilarityRow, ("checkpoint", "other", "target", "stage")),
    "embedding": (EmbeddingRow, ("checkpoint", "target", "stage")),
    "ranking": (RankingRow, ("target", "method", "score")),
    "targets": (TargetRow, ("target",)),
    "checkpoints": (CheckpointRow, ("checkpoint",)),
    "usage": (UsageRow, ("stage", "run")),
    "trust": (TrustRow, ("method", "score")),
    "checklist": (CheckRow, ("method", "check", "subject")),
    "points": (PointsRow, ("method", "target", "score")),
    "predictions": (PredictionRow, ("method", "target", "checkpoint")),
    "selection": (SelectionRow, ("checkpoint", "target", "strategy", "rank")),
    "retrieval": (RetrievalRow, ("checkpoint", "target", "fraction", "split", "folds", "seed")),
    "overlap": (OverlapRow, ("checkpoint", "target", "source_image", "test_image")),
    "fewshot": (FewShotRow, ("checkpoint", "target", "method", "shots", "metric")),
}

Row = dict  # a row as read from a JSON line: column -> value


def to_json_dict(row) -> Row:
    """Converts a row dataclass to the dictionary that is written as a JSON line.

    >>> to_json_dict(SimilarityRow("0", "1", "tfds:mnist", "pretrained", cka=0.9, overlap=0.5))["cka"]
    0.9
    """
    return {COLUMNS.get(field.name, field.name): getattr(row, field.name) for field in dataclasses.fields(row)}


def from_json_dict(row_type: type, values: Row):
    """Builds a row dataclass from a parsed JSON line. Null becomes None if the field may be None, else NaN.

    >>> from_json_dict(SimilarityRow, {"checkpoint": "0", "other": "1", "target": "t", "stage": "pretrained",
    ...                                "cka": None, "overlap": 0.5}).cka
    nan

    Raises:
      TypeError: if fields are missing or unknown.
    """
    fields: dict[str, Any] = {_FIELD_OF_COLUMN.get(str(name), str(name)): value for name, value in values.items()}
    annotations = {field.name: field.type for field in dataclasses.fields(row_type)}
    missing = {
        name: None if type(None) in typing.get_args(annotations.get(name)) else math.nan
        for name, value in fields.items()
        if value is None
    }
    return row_type(**fields | missing)


def column_names(name: str, rows: Iterable[Row]) -> list[str]:
    """Lists the columns of the result file `name` in the order of its dataclass, followed by any others in the rows.

    >>> column_names("similarity", [{"note": "x"}])
    ['checkpoint', 'other', 'target', 'stage', 'cka', 'overlap', 'version', 'note']
    """
    fields = dataclasses.fields(ROWS[name][0]) if name in ROWS else ()
    known = [COLUMNS.get(field.name, field.name) for field in fields]
    return list(dict.fromkeys(known + [key for row in rows for key in row]))


class _Lines(typing.NamedTuple):
    """Content of a result file: rows of the current version, number of older rows, and bytes of complete lines."""

    rows: list[Row]
    num_older: int
    num_bytes: int


def _read_lines(path: pathlib.Path) -> _Lines:
    """Reads a result file. An unfinished last line, left by a killed run, is dropped with a warning.

    Raises:
      InputError: if the file cannot be read, another line is not a JSON object, or a newer version wrote it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSON-lines file.") from error
    end = data.rfind(b"\n") + 1
    if end != len(data) and devices.is_first_process():
        log.warning("%s: the last line is incomplete (a run was killed while writing it); it is dropped.", path)
    rows, num_older = [], 0
    for number, line in enumerate(
        data[:end].split(b"\n")[:-1], start=1
    ):  # not splitlines, because names may contain other line separators
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON or bad UTF-8
            raise InputError(f"{where} is not JSON ({error}); remove or repair it.") from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object; remove or repair it.")
        if path.stem in ROWS and not _is_current(path.stem, row, where):
            num_older += 1
        else:
            rows.append(row)
    return _Lines(rows, num_older, end)


def _is_current(file: str, line: Row, where: str) -> bool:
    """Returns whether the current version of jax_transfer computed a line of a result file; False for an older version.

    Raises:
      InputError: if a newer version computed it, its version is not valid, or a field that identifies the row is
        missing.
    """
    version = line.get("version", 1)
    if type(version) is not int or version < 1:
        raise InputError(
            f"{where} has version {version!r}, expected a whole number of at least 1: use another --workdir."
        )
    if version > VERSIONS[file]:
        raise InputError(
            f"{where} was computed by a newer version of jax_transfer ({version}; this one computes {VERSIONS[file]}): "
            "use that version, or another --workdir."
        )
    required = {field.name for field in dataclasses.fields(ROWS[file][0]) if field.default is dataclasses.MISSING}
    columns = [str(COLUMNS.get(name, name)) for name in ROWS[file][1] if name in required]
    if missing := [column for column in columns if column not in line]:
        raise InputError(f"{where} lacks {', '.join(missing)}; remove the line and rerun its stage.")
    return version == VERSIONS[file]


def read_rows(path: pathlib.Path) -> list[Row]:
    """Reads the rows of a result file, in order, as dictionaries.

    An unfinished last line, which a killed run leaves, and rows that an older version of jax_transfer computed are
    dropped with a warning. Missing columns get the defaults of the file's dataclass.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes.jsonl"
    >>> _ = path.write_text('{"epoch": 1}' + chr(10))
    >>> read_rows(path)
    [{'epoch': 1}]

    Raises:
      InputError: if the file cannot be read, a line is not a JSON object, or a row of a file in ROWS lacks a column.
    """
    rows, num_older, _ = _read_lines(path)
    fields = dataclasses.fields(ROWS[path.stem][0]) if path.stem in ROWS else ()
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    rows = [{**row, **{name: value for name, value in defaults.items() if name not in row}} for row in rows]
    for row in rows:
        if missing := [name for name in column_names(path.stem, []) if name not in row]:
            raise InputError(f"{path}: a row lacks {', '.join(missing)}; rerun its stage.")
    if num_older:
        _warn_of_older(path, num_older)
    return rows


@functools.cache  # warns only once, although both the page and the terminal read the file
def _warn_of_older(path: pathlib.Path, count: int) -> None:
    log.warning("%s: %s: run its stage again.", path, _older(count, "left out"))


def _older(count: int, outcome: str) -> str:
    """Says how many rows an older version computed, and what happens to them."""
    rows, were, are = ("1 row", "was", "is") if count == 1 else (f"{count:,} rows", "were", "are")
    return f"{rows} {were} computed by an older version of jax_transfer and {are} {outcome}"


def picture(results: pathlib.Path, checkpoint: str, target: str, strategy: str) -> pathlib.Path:
    """Returns the file with the picture of a selection, `results/pictures/<hash>.jpg`, whether it exists or not.

    >>> picture(pathlib.Path("results"), "resnet18", "tfds:pets", "uot").suffix
    '.jpg'
    """
    digest = hashlib.blake2b("\n".join((checkpoint, target, strategy)).encode(), digest_size=8).hexdigest()
    return results / "pictures" / f"{digest}.jpg"


def is_plain(row: TransferRow | Row) -> bool:
    """Returns whether a row of results/transfer.jsonl is a probe or plain fine-tuning.

    Any other row belongs to a way of fine-tuning that reuses source images or source labels. Everything that compares
    checkpoints reads plain rows only.

    >>> is_plain({"objective": "supervised"}), is_plain({"objective": "joint", "selection": "uot"})
    (True, False)
    """
    return (row.get("objective", PLAIN) if isinstance(row, dict) else row.objective) == PLAIN


def results_of(
    rows: Iterable[TransferRow], objective: str = PLAIN, selection: str | None = None
) -> set[tuple[str, str, str, int]]:
    """Returns (checkpoint, target, method, seed) of each result among the rows, leaving out the points of a grid.

    Args:
      objective, selection: only results with these; by default those that reuse no pre-training data.

    >>> row = TransferRow("5", None, "tfds:mnist", "finetune", 0, 0.1, 0.9, 0.9, 800, 200, 1.0, 1.0, split=VALIDATION)
    >>> results_of([row]), results_of([dataclasses.replace(row, split=TEST)])
    (set(), {('5', 'tfds:mnist', 'finetune', 0)})
    """
    return {
        (row.checkpoint, row.target, row.method, row.seed)
        for row in rows
        if row.split not in GRID and (row.objective, row.selection) == (objective, selection)
    }


class Rows:
    """A result file that a stage writes: each row is appended and flushed immediately.

    A row with the same key fields as an earlier row is not written, so a stage that runs again after a kill adds only
    the missing rows. Rows that an older version of jax_transfer computed are ignored; the first write removes them from
    the file. Only the first process writes.

    >>> import pathlib, tempfile
    >>> rows = Rows(pathlib.Path(tempfile.mkdtemp()), "similarity")
    >>> rows.append(SimilarityRow("0", "1", "tfds:mnist", "pretrained", cka=0.9, overlap=0.5))
    >>> ("0", "1", "tfds:mnist", "pretrained") in rows
    True

    Raises:
      InputError: if a newer version wrote the file, or a line has other fields than those that this version writes.
    """

    def __init__(self, results: pathlib.Path, name: str):
        self.name, self.path = name, results / f"{name}.jsonl"
        self.row_type, self.key_fields = ROWS[name]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = _read_lines(self.path) if self.path.exists() else _Lines([], 0, 0)
        if devices.is_first_process() and self.path.exists() and lines.num_bytes < self.path.stat().st_size:
            os.truncate(self.path, lines.num_bytes)  # otherwise the next row would be appended to the unfinished line
        self.rows = list(map(self._row, lines.rows))
        self._num_older = lines.num_older
        self._keys = set(map(self.key, self.rows))
        self._lock = threading.Lock()

    def _row(self, values: Row):
        try:
            return from_json_dict(self.row_type, values)
        except TypeError as error:
            raise InputError(
                f"{self.path} was edited, or written by another version of jax_transfer: the fields of a line are not "
                f"{', '.join(field.name for field in dataclasses.fields(self.row_type))}. Use another --workdir."
            ) from error

    def key(self, row) -> tuple:
        """Returns the values of the fields that identify a row, with None for NaN, which does not equal itself."""
        values = (getattr(row, field) for field in self.key_fields)
        return tuple(None if isinstance(value, float) and math.isnan(value) else value for value in values)

    def __contains__(self, key: tuple) -> bool:
        return key in self._keys

    def append(self, row) -> None:
        """Appends a row to the file, unless the file already has a row with the same key."""
        if self.key(row) in self:
            return
        if self._num_older:
            self.replace(self.rows)
        if devices.is_first_process():
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)
        self._keys.add(self.key(row))

    def forget_failures(self) -> None:
        """Drops failed rows and rows of older versions, so that they are computed again.

        Points of a grid stay: that training diverges with a setting is a finding.
        """
        kept = [row for row in self.rows if not row.error or getattr(row, "split", TEST) in GRID]
        if self._num_older or len(kept) < len(self.rows):
            self.replace(kept)

    def replace(self, rows: Iterable) -> None:
        """Replaces all rows of the file. A kill leaves either the old file or the new one."""
        if self._num_older and devices.is_first_process():
            log.warning("%s: %s.", self.path, _older(self._num_older, "computed again"))
        self._num_older = 0
        self.rows = list(rows)
        self._keys = set(map(self.key, self.rows))
        if devices.is_first_process():
            write_atomically(self.path, "".join(map(_line, self.rows)).encode())


def _line(row) -> str:
    # JSON has no NaN, so NaN is written as null.
    values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in to_json_dict(row).items()}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a kill at any moment leaves either the old or the new content, never a partial file.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "config.json"
    >>> write_atomically(path, b"{}")
    >>> path.read_bytes()
    b'{}'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an array as `.npy`, in the same way.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "array.npy"
    >>> write_array(path, np.arange(3))
    >>> np.load(path).tolist()
    [0, 1, 2]
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())


def lock_workdir(workdir: pathlib.Path) -> typing.IO | contextlib.ExitStack:
    """Locks a working directory for this run, after creating it if needed.

    Returns:
      The lock. Keep it until the run ends, then `close` it.

    Raises:
      InputError: if the directory cannot be written, or another run uses it.
    """
    if not devices.is_first_process():
        return contextlib.ExitStack()  # the first process holds the lock for all processes
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")  # noqa: SIM115  stays open until the run ends
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"--workdir={workdir} is in use by another run: wait for it, or choose another one."
        ) from error
    return lock
