"""The practitioner's door: any checkpoints, one target, and a table that says which to take and how far to trust it."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_transfer import devices
from jax_transfer.analysis import SCORES, kendall, score_all, why_undefined
from jax_transfer.choose import choose
from jax_transfer.data.batches import make_feed
from jax_transfer.data.sources import Source, load_source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.models import Checkpoint, expand, load_checkpoint
from jax_transfer.records import Features, InputError
from jax_transfer.report import tables
from jax_transfer.transfer.probe import ProbeSettings, converged

FOLDS = 5
L2 = (1e-1, 1e-2, 1e-3, 1e-4)
DEFAULT_SCORES = ("logme", "nleep", "h_score_shrunk", "transrate", "leep", "nce")
NEED_LOGITS = ("leep", "nce")  # of the classes that the checkpoint was trained on


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One checkpoint: accuracy of the cross-validated probe with its 95 % interval, in [0, 1], and its scores.

    A checkpoint that could not be evaluated has NaN and the reason in `error`; a score that does not apply is NaN.
    """

    checkpoint: str  # the part of its path in which it differs from the others
    path: pathlib.Path
    model: str
    accuracy: float
    low: float
    high: float
    scores: dict[str, float]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The checkpoints, best probe accuracy first, failures last. `print` shows the table.

    agreement: mean Kendall's tau between the columns (probe accuracy and scores), each with each; NaN for fewer than three
    checkpoints. A low one says that the criteria contradict each other.
    """

    target: str
    num_images: int
    rows: list[Ranked]
    agreement: float

    @property
    def best(self) -> Ranked:
        return self.rows[0]

    @property
    def tied(self) -> list[Ranked]:
        """Those whose interval reaches the best one's accuracy: more images are needed to tell them apart."""
        return [row for row in self.rows[1:] if row.high >= self.best.accuracy]

    def to_csv(self, path: str | pathlib.Path) -> None:
        tables.to_csv([self._cells(i, row) for i, row in enumerate(self.rows, 1)], pathlib.Path(path))

    def _cells(self, place: int, row: Ranked) -> dict:
        head = {"rank": place, "checkpoint": row.checkpoint, "model": row.model, "accuracy": row.accuracy}
        head["path"] = str(row.path)
        return {**head, "low": row.low, "high": row.high, **row.scores, "error": row.error}

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(_table(self))
        return capture.get()


def rank(
    checkpoints: Sequence[str | pathlib.Path],
    target: str,
    model: str | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    preprocessing: dict | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Ranking:
    """Ranks checkpoints for a target, without fine-tuning any.

    Each is judged by the accuracy of a converged linear probe on its features, cross-validated over all images of the
    target, and by the scores. One that cannot be read or evaluated is listed last with the reason.

    Args:
      checkpoints: files (.safetensors, .pth), epochs (`run/checkpoints/5`) or whole trajectories (`run/checkpoints`).
      target: a data set, such as "folder:/my/images" or "tfds:caltech101?train=2000"; see `data.sources`.
      model: the key of MODELS, for files that do not say which model they are.
      scores: keys of SCORES.
      preprocessing: fields of `Preprocessing` that replace those which come with the checkpoints.
      seed: of the folds, the scores and the subsets of the target.
      batch_size: of the forward pass.

    Raises:
      InputError: if the target or an argument cannot be used, a name occurs twice, or no checkpoint is usable.
    """
    for score in scores:
        choose(SCORES, score, "score (scores)")
    paths = [path for given in checkpoints for path in expand(given)]
    if twice := [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise InputError(f"checkpoints names {twice[0]} twice.")
    if not paths:
        raise InputError("checkpoints is empty: name at least one file or folder.")
    sources = [load_source(target, split, seed) for split in ("train", "test")]
    if sources[0].num_classes < 2:
        raise InputError(f"{target} has a single class ({sources[0].class_names[0]!r}): at least two are needed.")
    common = pathlib.Path(os.path.commonpath([path.absolute().parent for path in paths]))
    rows = []
    for path in paths:
        row = _evaluate(path, model, sources, tuple(scores), preprocessing or {}, seed, batch_size)
        rows.append(dataclasses.replace(row, checkpoint=str(path.absolute().relative_to(common))))
    if all(row.error for row in rows):
        raise InputError("No checkpoint can be used. " + " ".join(row.error for row in rows))
    rows.sort(key=lambda row: -row.accuracy if math.isfinite(row.accuracy) else math.inf)
    return Ranking(target, sum(map(len, sources)), rows, _agreement(rows))


def _evaluate(path, model, sources: list[Source], scores, overrides, seed, batch_size) -> Ranked:
    num_classes = sources[0].num_classes
    try:
        checkpoint = load_checkpoint(path, model)
        features = _features(checkpoint, sources, overrides, batch_size)
        if problem := extract.problem(features, num_classes):
            raise InputError(f"{path}: {problem}.")
    except InputError as error:
        log.warning("%s", error)
        return Ranked("", path, model or "", math.nan, math.nan, math.nan, dict.fromkeys(scores, math.nan), str(error))
    accuracy, low, high = cross_validated(features, num_classes, seed)
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], features)
    values = {}
    for score in scores:
        applies = checkpoint.has_head or score not in NEED_LOGITS
        values[score] = float(score_all(score, stacked, num_classes)[0]) if applies else math.nan
        if applies and not math.isfinite(values[score]):
            log.warning("%s of %s: %s.", score, path, why_undefined(score, features, num_classes))
    return Ranked("", path, checkpoint.net.name, accuracy, low, high, values)


def _features(checkpoint: Checkpoint, sources: list[Source], overrides: dict, batch_size: int) -> Features:
    """Of all images of the target, training and test split together."""
    mesh = devices.make_mesh()
    preprocessing = Preprocessing.from_json({**checkpoint.preprocessing.to_json(), **overrides})
    if preprocessing.image_size < checkpoint.net.min_image_size:
        raise InputError(
            f"{checkpoint.name}: image_size {preprocessing.image_size} is too small; {checkpoint.net.name} needs at least "
            f"{checkpoint.net.min_image_size} pixels."
        )
    forward = extract.make_forward(checkpoint.net, preprocessing, mesh)
    weights = devices.replicate({"params": checkpoint.params, "stats": checkpoint.stats}, mesh)
    feeds = [make_feed(source, preprocessing, mesh, resident_gigabytes=0, num_threads=4) for source in sources]
    found = [extract.extract(forward, weights, feed, batch_size) for feed in feeds]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def cross_validated(features: Features, num_classes: int, seed: int = 0) -> tuple[float, float, float]:
    """(accuracy, low, high): of a converged softmax regression over five stratified folds, Wilson's 95 % interval.

    The regularisation of best accuracy is taken, of four; with so few that is hardly optimistic. Up to four images are
    left out, so that the folds are of one size.
    """
    x, y = jnp.asarray(features.features), np.asarray(features.labels)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(y)), y))
    size = len(y) // FOLDS
    if size == 0:
        raise InputError(f"The target has {len(y)} images: at least {FOLDS} are needed.")
    folds = order[: size * FOLDS].reshape(size, FOLDS).T  # neighbours, which are of one class, go to different folds
    train = np.stack([np.concatenate(np.delete(folds, i, axis=0)) for i in range(FOLDS)])
    with jax.default_matmul_precision("float32"):
        correct = np.asarray(_correct(x, jnp.asarray(y), train, folds, num_classes)).sum(0)
    return wilson(int(correct.max()), size * FOLDS)


@functools.partial(jax.jit, static_argnames="num_classes")
def _correct(x, y, train, test, num_classes):
    """How many test images of each fold are right, for each regularisation: [folds, values]."""

    def fold(train, test):
        l2 = jnp.asarray(L2, x.dtype)
        weights = converged(x, y, train, l2, jax.random.key(0), num_classes, ProbeSettings())
        predicted = (x[test] @ weights["w"] + weights["b"][:, None]).argmax(-1)
        return jnp.sum(predicted == y[test], axis=-1)

    return jax.lax.map(lambda rows: fold(*rows), (train, test))


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float, float]:
    """(share, low, high): Wilson's score interval of a binomial share, 95 %."""
    p = correct / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return p, centre - half, centre + half


def _agreement(rows: list[Ranked]) -> float:
    sound = [row for row in rows if not row.error]
    if len(sound) < 3:
        return math.nan
    columns = [[row.accuracy for row in sound]]
    columns += [[row.scores[score] for row in sound] for score in sound[0].scores]
    taus = [kendall(a, b) for a, b in itertools.combinations(columns, 2)]
    taus = [tau for tau in taus if math.isfinite(tau)]
    return statistics.fmean(taus) if taus else math.nan


def _table(ranking: Ranking) -> Table:
    table = Table(
        title=f"{tables.short_target(ranking.target)}: {ranking.num_images:,} images", box=rich.box.SIMPLE_HEAD,
        caption=_note(ranking), padding=(0, 1, 0, 0),
    )  # fmt: skip
    scores = list(ranking.rows[0].scores)
    for title in ("", "Checkpoint", "Probe %", "95 %", *map(tables.score_name, scores)):
        table.add_column(title, justify="left" if title == "Checkpoint" else "right")
    for place, row in enumerate(ranking.rows, 1):
        interval = f"{100 * row.low:.1f}..{100 * row.high:.1f}" if not row.error else tables.EN_DASH
        values = [f"{row.scores[s]:.3f}" if math.isfinite(row.scores[s]) else tables.EN_DASH for s in scores]
        cells = [str(place), row.checkpoint, tables.percent(row.accuracy, unit=""), interval, *values]
        table.add_row(*map(Text, cells))
    return table


def _note(ranking: Ranking) -> str:
    said = f"Best: {ranking.best.checkpoint}. Probe: accuracy of a linear classifier on frozen features, {FOLDS} folds."
    if ranking.tied:
        others = "other" if len(ranking.tied) == 1 else "others"
        said += f" {len(ranking.tied)} {others} cannot be told apart from it with so few images."
    if math.isfinite(ranking.agreement):
        said += f" The criteria agree with a mean Kendall's tau of {ranking.agreement:.2f}."
    for row in ranking.rows:
        said += f" Failed: {row.error}" if row.error else ""
    return said
