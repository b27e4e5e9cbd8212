"""The records that stages exchange: batches, features, and one dataclass per result file.

Every result row is a frozen dataclass; its fields, in order, are the columns of `results/<name>.jsonl`
and of the CSV the report writes. Accuracies are in [0, 1], times in seconds, and `gflops` counts
floating point operations / 1e9 (not a rate). `checkpoint` is the name of a `Snapshot`. A checkpoint that could
not be evaluated has a row too: without a value, and with the reason in `error`.

A column that may be None is null where it does not apply; `epoch` is null for given checkpoints. `version` says how a row was
computed, see VERSIONS.
"""

import dataclasses
import math
import re
import typing

import jax


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, what was expected, what to do.

    `main` prints it without a traceback and exits with code 2.
    """


# Characters that break a line or cannot be written: control characters, separators, and bytes that were no UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text) -> str:
    """As one line for a message: characters that cannot be shown or written, as names of files may hold, are escaped."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


# Result file -> version of what its numbers are. Raise it when a change makes the same study write other numbers: the
# older rows are then computed again. Lines from before there were versions count as version 1.
VERSIONS = {
    "pretrain": 1,
    "transfer": 2,
    "scores": 2,
    "spectral": 2,
    "spectrum": 2,
    "similarity": 2,
    "embedding": 2,
    "ranking": 2,
    "targets": 1,
}


def is_current(file: str, line: dict, where) -> bool:
    """Whether a line of a result file was computed by this version of jax_transfer, and not by an older one.

    Args:
      where: the file and the number of the line, for messages.

    Raises:
      InputError: if a newer one computed it, its version is not a whole number, or it lacks a field that
        identifies the row.
    """
    version = line.get("version", 1)
    if type(version) is not int or version < 1:
        raise InputError(f"{where} has version {version!r}, expected a whole number from 1: use another --workdir.")
    if version > VERSIONS[file]:
        raise InputError(
            f"{where} was computed by a newer version of jax_transfer ({version}, this one computes {VERSIONS[file]}): "
            "use that one, or another --workdir."
        )
    if missing := [name for name in ROWS[file][1] if name not in line]:
        raise InputError(f"{where} lacks {', '.join(missing)}; remove that line and rerun its stage.")
    return version == VERSIONS[file]


# What may count on a target: column of results/transfer.jsonl -> its name in a sentence.
METRICS = {"accuracy": "accuracy", "mean_class_accuracy": "mean class accuracy"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images as a feed gives them.

    images: uint8 [b, h, w, 3]; labels: int32 [b]; mask: bool [b], False where a row is padding; extra: further arrays
    [b, ...] by name, such as the tokens of captions (`Source.extra`).
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """A batch as an objective sees it: augmented, cut to the model's size and normalised, once for each view.

    images: a tuple of float32 [b, h, w, 3], one entry a view. labels: int32 [b], or float32 [b, c] with the weight of each
    class where the first view mixes images. mask and extra are those of the batch.
    """

    images: tuple[jax.Array, ...]
    labels: jax.Array
    mask: jax.Array
    extra: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What a checkpoint says of a data set: features float32 [n, d], logits float32 [n, s], labels int32 [n]."""

    features: jax.Array
    logits: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One model trained on one source: a trajectory. `name` tells it from the others of a study; "" if there are none."""

    model: str
    source: str
    name: str


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One epoch of a pre-training, or a given checkpoint without one; `name` is what rows and messages call the checkpoint."""

    pretraining: Pretraining
    epoch: int | None
    name: str


@dataclasses.dataclass(frozen=True)
class PretrainRow:
    """An epoch of a pre-training; step: those of the optimizer so far."""

    epoch: int | None
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
    version: int = VERSIONS["pretrain"]


@dataclasses.dataclass(frozen=True)
class TransferRow:
    """A checkpoint on a target by a method.

    objective: what was minimised. selection: how a part of the source was chosen to train on. shots, draw: training images
    of each class, and which random choice of them. split: what was tested on. source_weight: of the source's loss beside
    the target's.
    """

    checkpoint: str
    epoch: int | None
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
    objective: str = "supervised"
    selection: str | None = None
    shots: int | None = None
    draw: int | None = None
    split: str = "test"
    weight_decay: float | None = None
    source_weight: float | None = None
    version: int = VERSIONS["transfer"]


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """forward_gflops, test_forward_gflops: a forward pass over the training and the test images; not part of gflops."""

    checkpoint: str
    epoch: int | None
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
    """Accuracies of a probe on one spectral component. stage: pretrained or finetuned; rank: mean over batches."""

    checkpoint: str
    epoch: int | None
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
    """The spectrum of the features of all training images. shares: of the sum of singular values, at some `places` (from 1)."""

    checkpoint: str
    epoch: int | None
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
    """How alike two checkpoints represent the same test images; both in [0, 1]."""

    checkpoint: str
    other: str
    target: str
    stage: str
    cka: float
    overlap: float
    version: int = VERSIONS["similarity"]


@dataclasses.dataclass(frozen=True)
class EmbeddingRow:
    """t-SNE of the features of some test images: coordinates and labels, in the same order."""

    checkpoint: str
    epoch: int | None
    target: str
    stage: str
    x: list[float]
    y: list[float]
    labels: list[int]
    version: int = VERSIONS["embedding"]


@dataclasses.dataclass(frozen=True)
class RankingRow:
    """How well a score predicts the `metric` of a method on a target, against all `num_checkpoints` of the study.

    `num_scored` of them have both the score and the metric. If these are not all, nothing else is known: a ranking of the
    others says nothing of the missing ones.
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
class TargetRow:
    """A target as the report shows it. metric: a key of METRICS; class_names: the first few; notes: on its data."""

    target: str
    metric: str
    num_classes: int
    class_names: list[str]
    num_train: int
    num_test: int
    notes: list[str]
    version: int = VERSIONS["targets"]


# Row fields that are no Python names: the files and tables say recall@1.
COLUMNS = {"recall_at_1": "recall@1", "recall_at_3": "recall@3", "rel_at_1": "rel@1", "rel_at_3": "rel@3"}

_FIELD_OF_COLUMN = {column: field for field, column in COLUMNS.items()}

# Result file -> its row, and the fields that identify one row among the others.
ROWS = {
    "pretrain": (PretrainRow, ("checkpoint",)),
    "transfer": (TransferRow, ("checkpoint", "target", "method", "seed")),
    "scores": (ScoreRow, ("checkpoint", "target", "score")),
    "spectral": (SpectralRow, ("checkpoint", "target", "stage", "component")),
    "spectrum": (SpectrumRow, ("checkpoint", "target", "stage")),
    "similarity": (SimilarityRow, ("checkpoint", "other", "target", "stage")),
    "embedding": (EmbeddingRow, ("checkpoint", "target", "stage")),
    "ranking": (RankingRow, ("target", "method", "score")),
    "targets": (TargetRow, ("target",)),
}


def to_json_dict(row) -> dict:
    """The row as the dictionary its JSON line holds."""
    return {COLUMNS.get(field.name, field.name): getattr(row, field.name) for field in dataclasses.fields(row)}


def from_json_dict(row_type: type, values: dict):
    """The row of a JSON line. A null is None in a field that may be None, and NaN in any other.

    Raises:
      TypeError: if fields are missing or unknown.
    """
    fields = {_FIELD_OF_COLUMN.get(name, name): value for name, value in values.items()}
    annotations = {field.name: field.type for field in dataclasses.fields(row_type)}
    missing = {
        name: None if type(None) in typing.get_args(annotations.get(name)) else math.nan
        for name, value in fields.items()
        if value is None
    }
    return row_type(**fields | missing)
