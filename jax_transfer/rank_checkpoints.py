"""The practitioner's door: any checkpoints, one target, and a table that says which to take and how far to trust it."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer import devices, logs, trees
from jax_transfer.analysis import SCORES, score_all, why_undefined
from jax_transfer.choose import choose
from jax_transfer.data.batches import Feed, make_feed
from jax_transfer.data.sources import Source, load_source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import extract
from jax_transfer.logs import log
from jax_transfer.models import (
    MODELS,
    Checkpoint,
    at_image_size,
    describes_itself,
    expand,
    load_checkpoint,
    released_preprocessing,
)
from jax_transfer.models.torch_weights import ALSO_READ, ENDINGS
from jax_transfer.plan import duration
from jax_transfer.records import Features, InputError
from jax_transfer.report.ranking import Ranked, Ranking
from jax_transfer.transfer.cross_validation import cross_validated, gigaflops, paired_difference, wilson

DEFAULT_SCORES = ("logme", "nleep", "h_score_shrunk", "transrate", "leep", "nce")
NEED_LOGITS = ("leep", "nce")  # of the classes that the checkpoint was trained on
RESIDENT_GIGABYTES, NUM_THREADS = 4.0, 16  # a study's defaults
KEPT_GIGABYTES = 2.0  # of the checkpoints that are read for the estimate; the others are read again
RANDOM = "random:"  # random:resnet18 is that model as it is initialised: what a checkpoint must beat


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the checkpoints to rank, not read yet. `path` is None for a random initialisation."""

    name: str
    path: pathlib.Path | None
    model: str | None


def rank(
    checkpoints: Sequence[str | pathlib.Path],
    target: str,
    model: str | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    preprocessing: dict | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_corrupt: str = "skip",
    workdir: str | pathlib.Path | None = None,
) -> Ranking:
    """Ranks checkpoints for a target, without fine-tuning any.

    Each is judged by the accuracy of a converged linear probe on its features, cross-validated over all images of the
    target, and by the scores. One that cannot be read or evaluated is listed last with the reason.

    Args:
      checkpoints: files (.safetensors, .pth), epochs (`run/checkpoints/5`), whole trajectories (`run/checkpoints`),
        folders of such files, and random initialisations to compare with (`random:resnet18`). `FILE=MODEL` says which
        model a file is of.
      target: a data set, such as "folder:/my/images" or "tfds:caltech101?train=2000"; see `data.sources`.
      model: the key of MODELS, for files that do not say which model they are.
      scores: keys of SCORES.
      preprocessing: fields of `Preprocessing` that replace those which come with the checkpoints.
      seed: of the folds, the scores, the subsets of the target and random initialisations.
      batch_size: of the forward pass.
      on_corrupt: "skip" leaves damaged images out and names them; "error" stops.
      workdir: keeps the features, so that a repeated ranking need not compute them again.

    Raises:
      InputError: if the target or an argument cannot be used, a checkpoint is given twice, or none is usable.
    """
    for score in scores:
        choose(SCORES, score, "score (scores)")
    candidates = _candidates(checkpoints, model)
    sources = [load_source(target, split, seed, on_corrupt) for split in ("train", "test")]
    labels = np.concatenate([source.labels for source in sources])
    classes = np.bincount(labels, minlength=sources[0].num_classes)
    if np.count_nonzero(classes) < 2:
        raise InputError(f"{target} has a single class ({sources[0].class_names[0]!r}): at least two are needed.")
    load = functools.partial(_load, overrides=preprocessing or {}, seed=seed)
    target_of = _Target(sources, batch_size, workdir)
    known = _say_what_and_how_long(candidates, load, target_of)
    rows, correct = [], {}
    for place, candidate in enumerate(candidates, 1):
        found = known.pop(candidate, None)
        row, correct[candidate.name] = _evaluate(candidate, found, load, target_of, tuple(scores), seed)
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
    rows = [row if row.error else _compared(row, correct[rows[0].checkpoint], correct[row.checkpoint]) for row in rows]
    return Ranking(target, len(labels), int(np.count_nonzero(classes)), float(classes.max() / len(labels)), rows)


def _compared(row: Ranked, best: np.ndarray, own: np.ndarray) -> Ranked:
    behind, low, high = paired_difference(best, own)
    return dataclasses.replace(row, behind=behind, behind_low=low, behind_high=high)


def _candidates(given: Sequence[str | pathlib.Path], model: str | None) -> list[Candidate]:
    """What `checkpoints` of `rank` stands for; each is called by the part of its path in which it differs from the others."""
    if model is not None:
        choose(MODELS, model, "model (model)")
    found: list[tuple[pathlib.Path | None, str | None]] = []
    for one in map(str, given):
        path, mark, named = one.rpartition("=")
        if one.startswith(RANDOM):
            found.append((None, _model_named(one.removeprefix(RANDOM), one)))
        elif mark and named in MODELS:
            found += [(p, named) for p in expand(path)]
        else:
            found += [(p, None if describes_itself(p) else model) for p in expand(one)]
    if not found:
        raise InputError("checkpoints is empty: name at least one file or folder.")
    same = [path.resolve() if path else named for path, named in found]
    if twice := [place for place in dict.fromkeys(same) if same.count(place) > 1]:
        raise InputError(f"checkpoints names {twice[0]} twice.")
    paths = [path.absolute() for path, _ in found if path]
    common = pathlib.Path(os.path.commonpath([path.parent for path in paths])) if paths else None
    whole = [path.absolute().relative_to(common) if path else pathlib.Path(f"random {named}") for path, named in found]
    plain = [str(name.with_suffix("")) if name.suffix in (*ENDINGS, *ALSO_READ) else str(name) for name in whole]
    names = plain if len(set(plain)) == len(plain) else list(map(str, whole))
    return [Candidate(name, path, named) for name, (path, named) in zip(names, found, strict=True)]


def _model_named(name: str, given: str) -> str:
    choose(MODELS, name, f"model (checkpoint {given!r})")
    return name


def _load(candidate: Candidate, overrides: dict, seed: int) -> Checkpoint:
    """The checkpoint, with what replaces its preprocessing."""
    if candidate.path is None:
        net = MODELS[candidate.model](num_classes=1000)
        settings, preprocessing = {}, released_preprocessing(candidate.model)
        if candidate.model.startswith("vit_tiny_patch"):  # the small ones take other images than the released
            preprocessing = dataclasses.replace(preprocessing, image_size=net.min_image_size)
        params, stats = net.init(jax.random.key(seed))
        found = Checkpoint(candidate.name, net, params, stats, preprocessing, settings=settings, has_head=False)
    else:
        found = load_checkpoint(candidate.path, candidate.model)
    if "image_size" in overrides:
        found = at_image_size(found, overrides["image_size"])
    changed = Preprocessing.from_json({**found.preprocessing.to_json(), **overrides})
    if changed.image_size < found.net.min_image_size:
        raise InputError(
            f"{candidate.name}: image_size {changed.image_size} is too small; {found.net.name} needs at least "
            f"{found.net.min_image_size} pixels."
        )
    return dataclasses.replace(found, preprocessing=changed)


class _Target:
    """The images of the target, training and test split together, and the features that checkpoints make of them."""

    def __init__(self, sources: list[Source], batch_size: int, workdir: str | pathlib.Path | None):
        self.sources, self.batch_size = sources, batch_size
        self.folder = pathlib.Path(workdir) / "features" if workdir else None
        self.mesh = devices.make_mesh()
        self.num_images, self.num_classes = sum(map(len, sources)), sources[0].num_classes
        # Compiled once for all epochs of a trajectory; read and resized once for all that take images of one size.
        self.forward = functools.cache(lambda net, preprocessing: extract.make_forward(net, preprocessing, self.mesh))
        self._feeds = functools.lru_cache(maxsize=1)(self._read)

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

    def gigaflops_per_image(self, checkpoint: Checkpoint) -> float:
        forward = self.forward(checkpoint.net, checkpoint.preprocessing)
        weights = {"params": checkpoint.params, "stats": checkpoint.stats}
        return extract.forward_gigaflops(forward, weights, checkpoint.preprocessing, self.batch_size)

    def features(self, checkpoint: Checkpoint) -> Features:
        weights = {"params": checkpoint.params, "stats": checkpoint.stats}
        settings = {"name": checkpoint.net.name, **checkpoint.settings}
        fingerprint = trees.fingerprint(weights) if self.folder else ""
        parts = []
        for place, source in enumerate(self.sources):
            path = found = None
            if self.folder:
                key = extract.cache_key(fingerprint, settings, checkpoint.preprocessing, source)
                path = self.folder / f"{key}.npz"
                found = extract.load(path)
            if found is None:
                forward = self.forward(checkpoint.net, checkpoint.preprocessing)
                feed = self._feeds(checkpoint.preprocessing.reading)[place]
                found = extract.extract(forward, devices.replicate(weights, self.mesh), feed, self.batch_size)
                if path:
                    extract.save(path, found)
            parts.append(found)
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _evaluate(
    candidate: Candidate, known: Checkpoint | str | None, load, target: _Target, scores, seed
) -> tuple[Ranked, np.ndarray | None]:
    """A row, and which of the images the probe has right; none for a checkpoint that fails.

    known: the checkpoint, or why there is none, if it was read already.
    """
    where, start = str(candidate.path or candidate.name), time.perf_counter()
    if isinstance(known, str):
        return Ranked(candidate.name, where, error=known), None
    try:
        checkpoint = known or load(candidate)
        features = target.features(checkpoint)
        if problem := extract.problem(features, target.num_classes):
            raise InputError(f"{where}: {problem}.")
        right = cross_validated(features.features, features.labels, target.num_classes, seed)
    except InputError as error:
        return Ranked(candidate.name, where, error=str(error)), None
    except jax.errors.JaxRuntimeError as error:  # such as a model that does not fit into the device's memory
        return Ranked(candidate.name, where, error=f"{where}: {str(error).splitlines()[0]}"), None
    accuracy, low, high = wilson(int(right.sum()), len(right))
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
    )
    return row, right


def _scores(checkpoint, features, num_classes, scores, where) -> Iterator[tuple[str, float]]:
    stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], features)
    for score in scores:
        applies = checkpoint.has_head or score not in NEED_LOGITS
        value = float(score_all(score, stacked, num_classes)[0]) if applies else math.nan
        if applies and not math.isfinite(value):
            log.warning("%s of %s: %s.", score, where, why_undefined(score, features, num_classes))
        yield score, value


def _say_what_and_how_long(candidates: list[Candidate], load, target: _Target) -> dict[Candidate, Checkpoint | str]:
    """Logs what will be done and about how long it takes, before it starts. Checkpoints of a trajectory are alike.

    Returns:
      What was read for it, as far as it may be kept, and why what could not be read could not.
    """
    known: dict[Candidate, Checkpoint | str] = {}
    room = KEPT_GIGABYTES * 1e9
    rate = devices.sustained_gigaflops_per_second()
    alike: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        path = candidate.path
        alike.setdefault(path.parent if path and path.is_dir() else candidate.name, []).append(candidate)
    total, sizes = 0.0, set()
    log.info("%d checkpoints, %d images of %d classes:", len(candidates), target.num_images, target.num_classes)
    for group in alike.values():
        try:
            checkpoint = load(group[0])
        except InputError as error:
            known[group[0]] = str(error)
            log.warning("  %s: %s", group[0].name, error)
            continue
        room -= trees.size_bytes((checkpoint.params, checkpoint.stats))
        if room >= 0:
            known[group[0]] = checkpoint
        image = target.gigaflops_per_image(checkpoint)
        work = target.num_images * image + gigaflops(target.num_images, checkpoint.net.feature_dim, target.num_classes)
        seconds = len(group) * work / rate
        name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
        size = checkpoint.preprocessing.image_size
        log.info(
            "  %s: %s, %d pixels, %.2f GFLOP an image, about %s",
            name,
            checkpoint.net.name,
            size,
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
