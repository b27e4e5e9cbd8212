"""Ranks any checkpoints for one target, with a table that shows which one to use and how far to trust the choice."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer import devices, logs, trees
from jax_transfer.analysis import score_all, score_named, why_undefined
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.choose import choose
from jax_transfer.data.batches import Feed, make_feed
from jax_transfer.data.sources import Source, load_source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import extract
from jax_transfer.features.cache import FeatureCache
from jax_transfer.logs import duration, log
from jax_transfer.ranking.candidates import Candidate, list_candidates, load
from jax_transfer.ranking.result import EPISODES, Ranked, Ranking, named_classes
from jax_transfer.ranking.tuning import finetune_best
from jax_transfer.records import METRICS, Features, InputError
from jax_transfer.transfer.cross_validation import (
    FOLDS,
    cross_validated,
    gigaflops,
    image_weights,
    paired_difference,
    share_with_interval,
)
from jax_transfer.transfer.fewshot import ClassSplit, FewShotProblem, draw_episodes, imprint, interval
from jax_transfer.trust.naive import naive_values

DEFAULT_SCORES = ("logme", "nleep", "h_score_shrunk", "transrate", "leep", "nce")
KEPT_GIGABYTES = 2.0  # memory for checkpoints that are kept after the time estimate; the others are read again


def rank(
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike],
    target: str,
    model: str | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    preprocessing: dict | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_corrupt: str = "skip",
    workdir: str | pathlib.Path | None = None,
    metric: str | None = None,
    finetune: int = 0,
    shots: Sequence[int] = (),
) -> Ranking:
    """Ranks checkpoints for a target by their frozen features, and fine-tunes the best ones if asked to.

    Checkpoints are ordered by the accuracy of a converged linear probe on their features, cross-validated over all
    images of the target. The scores are shown beside this accuracy. A checkpoint that cannot be read or evaluated is
    listed last, with the reason.

        import jax_transfer as jt

        ranking = jt.rank(["a.safetensors", "run/checkpoints"], target="folder:/my/images", model="resnet50")
        print(ranking)
        net = ranking.best.load().net

    Args:
      checkpoints: files (.safetensors, .pth), epochs (`run/checkpoints/5`), whole trajectories (`run/checkpoints`),
        folders of such files, and random initialisations to compare with (`random:resnet18`). `FILE=MODEL` gives the
        model of a file. A single name or path counts as a list of one.
      target: a data set, such as "folder:/my/images" or "tfds:caltech101?train=2000"; see `data.sources`.
      model: a key of MODELS, for files that do not contain the name of their model.
      scores: keys of `jax_transfer.analysis.SCORES`, with or without options ("knn?k=5").
      preprocessing: fields of `Preprocessing` that replace those of the checkpoints.
      seed: seed of the folds, the scores, the subsets of the target and random initialisations.
      batch_size: number of images in a forward pass.
      on_corrupt: "skip" leaves corrupt images out and logs their names; "error" stops.
      workdir: folder in which the features are saved, so that a repeated ranking does not compute them again.
      metric: the metric that orders the checkpoints: "accuracy", or "mean_class_accuracy", the mean of the accuracies
        of the classes. By default, the metric that papers report for the target (`data.catalog`), or accuracy if none
        is known.
      finetune: number of the best checkpoints to fine-tune on the training images of the target (`tuning.SETTINGS`);
        their accuracies on its test images are shown beside the probe's, and the order stays that of the probe.
      shots: numbers of training images of a class, such as (1, 5), from which a classifier of nearest class means is
        made without training (`transfer.fewshot`, "prototypes"); its accuracies on the test images, in the mean over
        EPISODES draws, are shown beside the probe's.

    Returns:
      The ranking; `print` shows it as a table.

    Raises:
      InputError: if the target or an argument is not valid, a checkpoint is given twice, or no checkpoint can be used.
    """
    for score in scores:
        score_named(score, "score (scores)")
    if type(finetune) is not int or finetune < 0:
        raise InputError(f"finetune = {finetune!r}: expected the number of checkpoints to fine-tune, 0 or more.")
    candidates = list_candidates(checkpoints, model)
    sources = [load_source(target, split, seed, on_corrupt) for split in ("train", "test")]
    metric = metric or sources[0].metric
    choose(METRICS, metric, "metric (metric)")
    images = _Target(sources, metric, batch_size, workdir)
    _check_shots(shots, images)
    if len(images.classes) < 2:
        raise InputError(f"{target} has a single class ({', '.join(images.classes)!r}): at least two are needed.")
    if images.num_images < FOLDS:
        raise InputError(
            f"{target} has {images.num_images} images: at least {FOLDS} are needed, and far more to tell checkpoints "
            "apart. Add images."
        )
    notes = (*dict.fromkeys(note for source in sources for note in source.notes), *_small_classes(images))
    loaders = {c: functools.partial(load, c, overrides=preprocessing or {}, seed=seed) for c in candidates}
    already_read = _log_plan(loaders, images)
    rows, correct = [], {}
    for number, (candidate, loader) in enumerate(loaders.items(), 1):
        checkpoint = already_read.pop(candidate, None)
        row, correct[candidate.name] = _evaluate(
            candidate, checkpoint, loader, images, tuple(scores), tuple(shots), seed
        )
        rows.append(row)
        if not isinstance(checkpoint, str):  # else `_log_plan` has logged why it cannot be read
            _log_row(row, number, len(candidates))
    if all(row.error for row in rows):
        raise InputError("No checkpoint can be used. " + " ".join(row.error for row in rows))
    rows = _ordered(rows, correct, images.weights)
    rows, tuning = finetune_best(rows, finetune, images.feeds_of, metric, seed)
    majority = float(np.bincount(images.labels, images.weights).max() / images.weights.sum())
    return Ranking(
        target, len(images.labels), len(images.classes), majority, rows, metric, images.classes, notes, tuning
    )


def _log_row(row: Ranked, number: int, count: int) -> None:
    interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
    result = row.error or f"probe {100 * row.accuracy:.2f} % ({interval}), {row.seconds:.0f} s"
    (log.warning if row.error else log.info)("%d/%d %s: %s", number, count, row.checkpoint, result)


def _ordered(rows: list[Ranked], correct: dict, weights: np.ndarray) -> list[Ranked]:
    """Sorts rows by accuracy, failures last, and adds how far each checkpoint is behind the first one.

    Args:
      correct: checkpoint -> bool [n], which of the images its probe classifies correctly.
      weights: weights of the images in the metric.
    """
    rows = sorted(rows, key=lambda row: -row.accuracy if not row.error else math.inf)
    best = correct[rows[0].checkpoint]
    for i, row in enumerate(rows):
        if not row.error:
            behind, low, high = paired_difference(best, correct[row.checkpoint], weights)
            rows[i] = dataclasses.replace(row, behind=behind, behind_low=low, behind_high=high)
    return rows


def _small_classes(images: "_Target") -> Iterator[str]:
    """Yields a note on the classes that have too few images for every fold, if there are any."""
    count = np.bincount(images.labels)
    small = [f"{images.sources[0].class_names[k]} {count[k]}" for k in np.flatnonzero((count > 0) & (count < FOLDS))]
    if not small:
        return
    has, accuracies = ("has", "its accuracy is") if len(small) == 1 else ("have", "their accuracies are")
    unseen = " An image that is alone in its class is tested by a classifier that has never seen that class."
    yield (
        f"{len(small)} of {len(images.classes)} classes {has} fewer than {FOLDS} images ({', '.join(small[:3])}"
        f"{', ...' if len(small) > 3 else ''}): {accuracies} rough.{unseen if 1 in count else ''}"
    )


class _Target:
    """The images of the target, from the training and test splits together, and their features.

    Attributes:
      weights: weight of each image in the metric.
      classes: names of the classes that have images.
      cache: the cache of features.
    """

    def __init__(self, sources: list[Source], metric: str, batch_size: int, workdir: str | pathlib.Path | None):
        self.sources, self.metric = sources, metric
        self.labels = np.concatenate([source.labels for source in sources])
        self.weights = image_weights(self.labels, metric)
        self.classes = tuple(sources[0].class_names[label] for label in np.unique(self.labels))
        self.num_images, self.num_classes = sum(map(len, sources)), sources[0].num_classes
        self.mesh = devices.make_mesh()
        # The images are read and resized once for all checkpoints that take the same size.
        self._feeds = functools.lru_cache(maxsize=1)(self._read)
        folder = pathlib.Path(workdir) / "features" if workdir else None
        self.cache = FeatureCache(folder, self._feed, self.mesh, batch_size)

    def _feed(self, source: Source, preprocessing: Preprocessing) -> Feed:
        index = next(i for i, candidate in enumerate(self.sources) if candidate is source)
        return self._feeds(preprocessing.reading)[index]

    def feeds_of(self, preprocessing: Preprocessing) -> list[Feed]:
        """Returns the feeds of the training and the test images."""
        return self._feeds(preprocessing.reading)

    def _read(self, reading: Preprocessing) -> list[Feed]:
        with logs.progress(self.num_images, f"read images at {reading.host_size} pixels", "images") as bar:
            starts = itertools.accumulate([0, *map(len, self.sources)])
            return [
                make_feed(
                    source,
                    reading,
                    self.mesh,
                    progress=lambda count, start=start: bar.update(start + count - bar.n),
                )
                for start, source in zip(starts, self.sources, strict=False)
            ]

    def features(self, checkpoint: Checkpoint) -> Features:
        """Returns the features of all images, with the training split first."""
        parts = [self.cache(checkpoint, source) for source in self.sources]
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def few_shot(self, features: Features, shots: int, seed: int) -> tuple[float, float]:
        """Returns the accuracy of prototypes of some training images on the test images, and half of its interval."""
        train, test = np.split(np.asarray(features.features), [len(self.sources[0])])
        y, y_test = (source.labels for source in self.sources)
        split = ClassSplit(seen=np.array([], int), unseen=np.unique(self.labels))
        problem = FewShotProblem(train, y, test, y_test, split, image_weights=image_weights(y_test, self.metric))
        return interval(imprint(problem, draw_episodes(y, split.unseen, shots, EPISODES, seed)).all)


def _evaluate(
    candidate: Candidate, already_read: Checkpoint | str | None, loader, target: _Target, scores, shots, seed
) -> tuple[Ranked, np.ndarray | None]:
    """Evaluates a checkpoint by its probe and scores.

    Args:
      already_read: the checkpoint, or the reason why it cannot be read; None if it has not been read yet.

    Returns:
      (row, correct): the row of the ranking, and which of the images the probe classifies correctly, a bool [n]. If
      the checkpoint fails, the row says why and `correct` is None.
    """
    where, start = str(candidate.path or candidate.name), time.perf_counter()
    if isinstance(already_read, str):
        return Ranked(candidate.name, where, error=already_read), None
    try:
        checkpoint = already_read or loader()
        features = target.features(checkpoint)
        if problem := extract.problem(features, target.num_classes):
            raise InputError(f"{where}: {problem}.")
        correct = cross_validated(features.features, features.labels, target.num_classes, seed, target.metric)
        few_shot = {n: target.few_shot(features, n, seed) for n in shots}
        image_gigaflops = target.cache.gigaflops_per_image(checkpoint.net, checkpoint.preprocessing)
    except InputError as error:
        return Ranked(candidate.name, where, error=str(error)), None
    except jax.errors.JaxRuntimeError as error:  # for example, the model does not fit into the device's memory
        return Ranked(candidate.name, where, error=f"{where}: {str(error).splitlines()[0]}"), None
    accuracy, low, high = share_with_interval(correct, target.weights)
    row = Ranked(
        candidate.name,
        where,
        checkpoint.net.name,
        sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params)),
        checkpoint.preprocessing,
        accuracy,
        low,
        high,
        scores=dict(_scores(checkpoint, features, target.num_classes, scores, where)),
        naive=naive_values(checkpoint.net, image_gigaflops, checkpoint.source_accuracy, _epoch(candidate)),
        few_shot=few_shot,
        seconds=time.perf_counter() - start,
        notes=checkpoint.notes,
        preprocessing_is_guess=checkpoint.preprocessing_is_guess,
        loader=loader,
    )
    return row, correct


def _epoch(candidate: Candidate) -> float | None:
    """Returns the epoch of a checkpoint in a trajectory, by the name of its folder; None for any other checkpoint."""
    path = candidate.path
    return float(path.name) if path and path.is_dir() and path.name.isdecimal() else None


def _check_shots(shots: Sequence[int], target: _Target) -> None:
    """Checks that every class has as many training images as `shots` asks for, and that there are test images.

    Raises:
      InputError: if not.
    """
    train, test = target.sources
    if not isinstance(shots, list | tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shots):
        raise InputError(f"shots = {shots!r}: expected a list of numbers of images, such as (1, 5).")
    if any(n < 1 for n in shots):
        raise InputError(f"shots = {tuple(shots)!r}: expected numbers of images, each 1 or more.")
    if len(set(shots)) < len(shots):
        raise InputError(f"shots = {tuple(shots)!r} lists a number twice: list it once.")
    if shots and not len(test):
        raise InputError(f"shots = {tuple(shots)!r}: {test.name} has no test images.")
    count = np.bincount(train.labels, minlength=train.num_classes)
    occurring = np.unique(target.labels)
    smallest = occurring[np.argmin(count[occurring])]
    if shots and count[smallest] < max(shots):
        raise InputError(
            f"shots = {tuple(shots)!r}: class {train.class_names[smallest]!r} of {train.name} has {count[smallest]} "
            f"training images, fewer than {max(shots)}: use fewer shots, or more images."
        )


def _scores(checkpoint, features, num_classes, scores, where) -> Iterator[tuple[str, float]]:
    """Yields (score, value); NaN if the score does not apply to the checkpoint or is undefined."""
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], features)
    for score in scores:
        applies = checkpoint.has_head or score_named(score).needs != "logits"
        value = float(score_all(score, stacked, num_classes)[0]) if applies else math.nan
        if applies and not math.isfinite(value):
            log.warning("%s of %s: %s.", score, where, why_undefined(score, features, num_classes))
        yield score, value


def _log_plan(
    loaders: Mapping[Candidate, Callable[[], Checkpoint]], target: _Target
) -> dict[Candidate, Checkpoint | str]:
    """Logs, before the work starts, what will be done and roughly how long it will take.

    One checkpoint of each group is read for the estimate.

    Returns:
      Candidate -> the checkpoint that was read, if it fits into KEPT_GIGABYTES, or the reason why it cannot be read.
    """
    already_read: dict[Candidate, Checkpoint | str] = {}
    free_bytes = KEPT_GIGABYTES * 1e9
    rate = devices.sustained_gigaflops_per_second()
    total_seconds, readings = 0.0, set()
    log.info(
        "%d checkpoints, %d images in %d classes%s:",
        len(loaders),
        target.num_images,
        len(target.classes),
        named_classes(target.classes),
    )
    for group in _groups(loaders):
        first = group[0]
        try:
            checkpoint = loaders[first]()
        except InputError as error:
            already_read[first] = str(error)
            log.warning("  %s: %s", first.name, error)
            continue
        free_bytes -= trees.size_bytes(checkpoint.model)
        if free_bytes >= 0:
            already_read[first] = checkpoint
        image_gigaflops = target.cache.gigaflops_per_image(checkpoint.net, checkpoint.preprocessing)
        probe_gigaflops = gigaflops(target.num_images, checkpoint.net.feature_dim, target.num_classes)
        seconds = len(group) * (target.num_images * image_gigaflops + probe_gigaflops) / rate
        log.info(
            "  %s: %s, %d pixels%s, %.2f GFLOP per image, about %s",
            first.name if len(group) == 1 else f"{first.name} and {len(group) - 1} more",
            checkpoint.net.name,
            checkpoint.preprocessing.image_size,
            " (preprocessing is a guess)" if checkpoint.preprocessing_is_guess else "",
            image_gigaflops,
            duration(seconds),
        )
        total_seconds += seconds
        readings.add(checkpoint.preprocessing.reading)
    reading_seconds = len(readings) * _reading_seconds(target)
    log.info(
        "About %s of computation, not including reading the images (about %s) and compilation.",
        duration(total_seconds),
        duration(reading_seconds),
    )
    return already_read


def _groups(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Groups candidates that need the same work, the epochs of a trajectory; all others form groups of one."""
    groups: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        path = candidate.path
        groups.setdefault(path.parent if path and path.is_dir() else candidate.name, []).append(candidate)
    return list(groups.values())


def _reading_seconds(target: _Target) -> float:
    """Estimates the time to read all images of the target, from a sample."""
    start, sample = time.perf_counter(), range(min(16, len(target.sources[0])))
    target.sources[0].read(list(sample))
    return target.num_images * (time.perf_counter() - start) / len(sample)
