"""The practitioner's door: any checkpoints, one target, and a table that says which to take and how far to trust it."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer import devices, logs, trees
from jax_transfer.analysis import SCORES, score_all, why_undefined
from jax_transfer.checkpoints import Checkpoint
from jax_transfer.choose import choose
from jax_transfer.data.batches import Feed, make_feed
from jax_transfer.data.sources import Source, load_source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import extract
from jax_transfer.features.cache import FeatureCache
from jax_transfer.logs import duration, log
from jax_transfer.ranking.candidates import Candidate, list_candidates, load
from jax_transfer.ranking.result import Ranked, Ranking, named_classes
from jax_transfer.records import METRICS, Features, InputError
from jax_transfer.transfer.cross_validation import (
    FOLDS,
    cross_validated,
    gigaflops,
    image_weights,
    paired_difference,
    share_with_interval,
)

DEFAULT_SCORES = ("logme", "nleep", "h_score_shrunk", "transrate", "leep", "nce")
RESIDENT_GIGABYTES, NUM_THREADS = 4.0, 16  # a study's defaults
KEPT_GIGABYTES = 2.0  # of the checkpoints that are read for the estimate; the others are read again


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
) -> Ranking:
    """Ranks checkpoints for a target, without fine-tuning any.

    Each is judged by the accuracy of a converged linear probe on its features, cross-validated over all images of the
    target, and by the scores. One that cannot be read or evaluated is listed last with the reason.

    Args:
      checkpoints: files (.safetensors, .pth), epochs (`run/checkpoints/5`), whole trajectories (`run/checkpoints`),
        folders of such files, and random initialisations to compare with (`random:resnet18`). `FILE=MODEL` says which
        model a file is of. A single name or path is a list of one.
      target: a data set, such as "folder:/my/images" or "tfds:caltech101?train=2000"; see `data.sources`.
      model: the key of MODELS, for files that do not say which model they are.
      scores: keys of SCORES.
      preprocessing: fields of `Preprocessing` that replace those which come with the checkpoints.
      seed: of the folds, the scores, the subsets of the target and random initialisations.
      batch_size: of the forward pass.
      on_corrupt: "skip" leaves damaged images out and names them; "error" stops.
      workdir: keeps the features, so that a repeated ranking need not compute them again.
      metric: "accuracy", or "mean_class_accuracy" (the mean of the classes' accuracies), which orders the checkpoints. None:
        what the field reports for the target (`data.catalog`), accuracy where nothing is known.

    Raises:
      InputError: if the target or an argument cannot be used, a checkpoint is given twice, or none is usable.
    """
    for score in scores:
        choose(SCORES, score, "score (scores)")
    candidates = list_candidates(checkpoints, model)
    sources = [load_source(target, split, seed, on_corrupt) for split in ("train", "test")]
    metric = metric or sources[0].metric
    choose(METRICS, metric, "metric (metric)")
    images = _Target(sources, metric, batch_size, workdir)
    if len(images.classes) < 2:
        raise InputError(f"{target} has a single class ({images.classes[0]!r}): at least two are needed.")
    if images.num_images < FOLDS:
        raise InputError(
            f"{target} has {images.num_images} images: at least {FOLDS} are needed, and far more to tell checkpoints "
            "apart; add images."
        )
    notes = (*dict.fromkeys(note for source in sources for note in source.notes), *_small_classes(images))
    loaders = {c: functools.partial(load, c, overrides=preprocessing or {}, seed=seed) for c in candidates}
    known = _say_what_and_how_long(loaders, images)
    rows, correct = [], {}
    for place, (candidate, loader) in enumerate(loaders.items(), 1):
        found = known.pop(candidate, None)
        row, correct[candidate.name] = _evaluate(candidate, found, loader, images, tuple(scores), seed)
        rows.append(row)
        said = (
            row.error
            or f"probe {100 * row.accuracy:.2f} % ({100 * row.low:.1f} to {100 * row.high:.1f}), {row.seconds:.0f} s"
        )
        if not isinstance(found, str):
            (log.warning if row.error else log.info)("%d/%d %s: %s", place, len(candidates), candidate.name, said)
    if all(row.error for row in rows):
        raise InputError("No checkpoint can be used. " + " ".join(row.error for row in rows))
    rows.sort(key=lambda row: -row.accuracy if not row.error else math.inf)
    best = correct[rows[0].checkpoint]
    for place, row in enumerate(rows):
        if not row.error:
            behind, low, high = paired_difference(best, correct[row.checkpoint], images.weights)
            rows[place] = dataclasses.replace(row, behind=behind, behind_low=low, behind_high=high)
    majority = float(np.bincount(images.labels, images.weights).max() / images.weights.sum())
    return Ranking(target, len(images.labels), len(images.classes), majority, rows, metric, images.classes, notes)


def _small_classes(images: "_Target") -> Iterator[str]:
    """Says which classes are too small for each fold to test an image of them."""
    count = np.bincount(images.labels)
    small = [f"{images.sources[0].class_names[k]} {count[k]}" for k in np.flatnonzero((count > 0) & (count < FOLDS))]
    if not small:
        return
    has, accuracies = ("has", "its accuracy is") if len(small) == 1 else ("have", "their accuracies are")
    unseen = " The only image of a class is tested by a classifier that has never seen that class."
    yield (
        f"{len(small)} of {len(images.classes)} classes {has} fewer than {FOLDS} images ({', '.join(small[:3])}"
        f"{', ...' if len(small) > 3 else ''}): {accuracies} rough.{unseen if 1 in count else ''}"
    )


class _Target:
    """The images of the target, training and test split together, and the features that checkpoints make of them.

    weights: what each image counts in the metric. classes: the names of those that occur.
    """

    def __init__(self, sources: list[Source], metric: str, batch_size: int, workdir: str | pathlib.Path | None):
        self.sources, self.metric = sources, metric
        self.labels = np.concatenate([source.labels for source in sources])
        self.weights = image_weights(self.labels, metric)
        self.classes = tuple(sources[0].class_names[label] for label in np.unique(self.labels))
        self.num_images, self.num_classes = sum(map(len, sources)), sources[0].num_classes
        self.mesh = devices.make_mesh()
        # Read and resized once for all checkpoints that take images of one size.
        self._feeds = functools.lru_cache(maxsize=1)(self._read)
        folder = pathlib.Path(workdir) / "features" if workdir else None
        self.cache = FeatureCache(folder, self._feed, self.mesh, batch_size)

    def _feed(self, source: Source, preprocessing: Preprocessing) -> Feed:
        position = next(i for i, each in enumerate(self.sources) if each is source)
        return self._feeds(preprocessing.reading)[position]

    def _read(self, reading: Preprocessing) -> list[Feed]:
        with logs.progress(self.num_images, f"read images at {reading.host_size} pixels", "images") as bar:
            done = itertools.accumulate([0, *map(len, self.sources)])
            return [
                make_feed(
                    source,
                    reading,
                    self.mesh,
                    RESIDENT_GIGABYTES,
                    NUM_THREADS,
                    progress=lambda count, first=first: bar.update(first + count - bar.n),
                )
                for first, source in zip(done, self.sources, strict=False)
            ]

    def features(self, checkpoint: Checkpoint) -> Features:
        """Returns the features of all images, those of the training split first."""
        parts = [self.cache(checkpoint, source) for source in self.sources]
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _evaluate(
    candidate: Candidate, known: Checkpoint | str | None, loader, target: _Target, scores, seed
) -> tuple[Ranked, np.ndarray | None]:
    """A row, and which of the images the probe has right; none for a checkpoint that fails.

    known: the checkpoint, or why there is none, if it was read already.
    """
    where, start = str(candidate.path or candidate.name), time.perf_counter()
    if isinstance(known, str):
        return Ranked(candidate.name, where, error=known), None
    try:
        checkpoint = known or loader()
        features = target.features(checkpoint)
        if problem := extract.problem(features, target.num_classes):
            raise InputError(f"{where}: {problem}.")
        right = cross_validated(features.features, features.labels, target.num_classes, seed, target.metric)
    except InputError as error:
        return Ranked(candidate.name, where, error=str(error)), None
    except jax.errors.JaxRuntimeError as error:  # such as a model that does not fit into the device's memory
        return Ranked(candidate.name, where, error=f"{where}: {str(error).splitlines()[0]}"), None
    accuracy, low, high = share_with_interval(right, target.weights)
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
        seconds=time.perf_counter() - start,
        notes=checkpoint.notes,
        preprocessing_is_guess=checkpoint.preprocessing_is_guess,
        loader=loader,
    )
    return row, right


def _scores(checkpoint, features, num_classes, scores, where) -> Iterator[tuple[str, float]]:
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], features)
    for score in scores:
        applies = checkpoint.has_head or SCORES[score].needs != "logits"
        value = float(score_all(score, stacked, num_classes)[0]) if applies else math.nan
        if applies and not math.isfinite(value):
            log.warning("%s of %s: %s.", score, where, why_undefined(score, features, num_classes))
        yield score, value


def _say_what_and_how_long(
    loaders: dict[Candidate, Callable[[], Checkpoint]], target: _Target
) -> dict[Candidate, Checkpoint | str]:
    """Logs what will be done and about how long it takes, before it starts. Checkpoints of a trajectory are alike.

    Returns:
      What was read for it, as far as it may be kept, and why what could not be read could not.
    """
    known: dict[Candidate, Checkpoint | str] = {}
    room = KEPT_GIGABYTES * 1e9
    rate = devices.sustained_gigaflops_per_second()
    alike: dict[object, list[Candidate]] = {}
    for candidate in loaders:
        path = candidate.path
        alike.setdefault(path.parent if path and path.is_dir() else candidate.name, []).append(candidate)
    total, sizes = 0.0, set()
    log.info(
        "%d checkpoints, %d images of %d classes%s:",
        len(loaders),
        target.num_images,
        len(target.classes),
        named_classes(target.classes),
    )
    for group in alike.values():
        try:
            checkpoint = loaders[group[0]]()
        except InputError as error:
            known[group[0]] = str(error)
            log.warning("  %s: %s", group[0].name, error)
            continue
        room -= trees.size_bytes(checkpoint.model)
        if room >= 0:
            known[group[0]] = checkpoint
        image = target.cache.gigaflops_per_image(checkpoint.net, checkpoint.preprocessing)
        work = target.num_images * image + gigaflops(target.num_images, checkpoint.net.feature_dim, target.num_classes)
        seconds = len(group) * work / rate
        name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
        size = checkpoint.preprocessing.image_size
        log.info(
            "  %s: %s, %d pixels%s, %.2f GFLOP an image, about %s",
            name,
            checkpoint.net.name,
            size,
            " (preprocessing is a guess)" if checkpoint.preprocessing_is_guess else "",
            image,
            duration(seconds),
        )
        total += seconds
        sizes.add(checkpoint.preprocessing.reading)
    start, sample = time.perf_counter(), range(min(16, len(target.sources[0])))
    target.sources[0].read(list(sample))
    reading = len(sizes) * target.num_images * (time.perf_counter() - start) / len(sample)
    log.info("In all about %s, and reading the images (%s) and compilation.", duration(total), duration(reading))
    return known
