"""The "fewshot" stage: classifiers of a few images a class, made from each checkpoint with and without tuning it."""

import functools
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer import devices, fields
from jax_transfer.checkpoints import Checkpoint, with_classes
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.choose import choose
from jax_transfer.data.batches import joined, steps_per_epoch
from jax_transfer.data.crops import crops_of
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.source import Source
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.features import cache, extract
from jax_transfer.features.views import make_embed
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.models.cosine import HEAD, with_cosine_head, with_new_cosine_head
from jax_transfer.models.net import without_head
from jax_transfer.records import Features, InputError
from jax_transfer.results import VERSIONS, FewShotRow, Rows, write_array
from jax_transfer.study import estimates, settings
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.finetune import divergence, gathered, tuning_key
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.transfer.cross_validation import image_weights
from jax_transfer.transfer.fewshot import (
    PROTOCOLS,
    ClassSplit,
    FewShotProblem,
    FewShotSettings,
    draw_episodes,
    imprint,
    interval,
    prototypes,
    split_classes,
)
from jax_transfer.transfer.finetune import Candidate, finetune, total_steps

METRICS = ("unseen", "seen", "all", "unseen_only")  # accuracies of each episode


def run(work: Workspace) -> None:
    """Writes a row for each checkpoint, target, method and number of shots."""
    rows, few = Rows(work.results, "fewshot"), settings.fewshot_settings(work.config)
    rows.forget_failures()
    devices.wait_for_all("few-shot classifiers: rows are read")
    for target, method in itertools.product(work.config.targets, few.methods):
        metric = work.metric(target)
        missing = {
            snapshot: [shots for shots in few.shots if (snapshot.name, target, method, shots, metric) not in rows]
            for snapshot in work.snapshots
        }
        todo = [snapshot for snapshot in work.snapshots if missing[snapshot]]
        if not todo:
            continue
        log.info("%s on %s: %d checkpoints", method, target, len(todo))
        if PROTOCOLS[method].is_tuned:
            results = _tuned(work, target, todo, rows)
        else:
            for snapshot in todo[jax.process_index() :: jax.process_count()]:
                _embeddings(work, work.checkpoint(snapshot), target)
            devices.wait_for_all("few-shot classifiers: embeddings are kept")
            results = ((snapshot, {}) for snapshot in todo)
        for snapshot, measured in results:
            _evaluate(work, snapshot, target, method, missing[snapshot], measured, rows)


def tunes(few: FewShotSettings) -> bool:
    """Returns whether a method tunes the checkpoints.

    >>> tunes(FewShotSettings()), tunes(FewShotSettings(methods=("prototypes",)))
    (True, False)
    """
    return any(PROTOCOLS[method].is_tuned for method in few.methods)


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    few = settings.fewshot_settings(work.config)
    shots = ", ".join(map(str, few.shots))
    return f"{', '.join(few.methods)} from {shots} images a class: {estimates.checkpoints(work)}"


def gigaflops(work: Workspace) -> float:
    """Computes the work of the tuning and of the forward passes, in GFLOP, beside those of the stage "features"."""
    few, total = settings.fewshot_settings(work.config), 0.0
    frozen = not all(PROTOCOLS[method].is_tuned for method in few.methods)
    for target in work.config.targets:
        train, test = (len(work.source(target, split)) for split in ("train", "test"))
        images = frozen * few.augmented_copies * train
        steps, step = 0, dict.fromkeys(work.snapshots, 0.0)
        if tunes(few):
            images += max(1, few.augmented_copies) * train + test
            seen = len(_rows_of(work.source(target, "train"), class_split(work, target).seen))
            steps = total_steps(settings.finetune_settings(work.config, target), seen, target)
            step = estimates.finetune_step_gigaflops(work, target)
        total += sum(steps * step[each] + images * work.gigaflops_per_image(each) for each in work.snapshots)
    return total


def check(work: Workspace) -> None:
    """Checks that the classes of each target can be divided as the config says, and have enough images.

    Raises:
      InputError: if not.
    """
    few = settings.fewshot_settings(work.config)
    for target in work.config.targets:
        split = class_split(work, target)
        train, test = work.source(target, "train"), work.source(target, "test")
        count, most = np.bincount(train.labels, minlength=train.num_classes), max(few.shots)
        used = np.concatenate([split.seen, split.unseen])
        if not count[used].all():
            empty = train.class_names[used[np.argmin(count[used])]]
            raise InputError(
                f"{target}: class {empty!r} has no training images: list the classes to use, without it, in "
                "config.fewshot.seen and config.fewshot.unseen."
            )
        imprinted = split.unseen if all(PROTOCOLS[method].has_seen for method in few.methods) else used
        smallest = imprinted[np.argmin(count[imprinted])]
        if count[smallest] < most:
            raise InputError(
                f"{target}: class {train.class_names[smallest]!r} has {count[smallest]} training images, fewer than "
                f"the {most} shots of config.fewshot.shots: use fewer shots, or more images."
            )
        for kind, classes in (("seen", split.seen), ("unseen", split.unseen)):
            if not len(_rows_of(test, classes)):
                raise InputError(
                    f"{target}: none of the {len(classes)} {kind} classes has a test image: choose others in "
                    f"config.fewshot.{kind}."
                )
        if tunes(few):
            number, of = len(_rows_of(train, split.seen)), f"the seen classes of {target} (config.finetune)"
            steps_per_epoch(number, settings.finetune_settings(work.config, target).batch_size, of)


def class_split(work: Workspace, target: str) -> ClassSplit:
    """Returns the seen and the unseen classes of a target, each in ascending order.

    Raises:
      InputError: if a name is no class of the target, or a class is seen and unseen.
    """
    few, names = settings.fewshot_settings(work.config), work.source(target, "train").class_names
    for field, chosen in (("seen", few.seen), ("unseen", few.unseen)):
        fields.check_unique(chosen.get(target, ()), f"config.fewshot.{field}[{target!r}]")
    if both := [name for name in few.seen.get(target, ()) if name in few.unseen.get(target, ())]:
        raise InputError(
            f"config.fewshot: class {both[0]!r} of {target} is in seen and in unseen ({len(both)} in all): remove it "
            "from one of them."
        )
    numbers = {name: number for number, name in enumerate(names)}

    def listed(field: str, chosen: Mapping[str, tuple[str, ...]]) -> list[int] | None:
        where = f"class of {target} (config.fewshot.{field}[{target!r}])"
        return [choose(numbers, name, where) for name in chosen[target]] if target in chosen else None

    seen, unseen = listed("seen", few.seen), listed("unseen", few.unseen)
    try:
        split = split_classes(len(names), seen, unseen)
    except InputError as error:
        raise InputError(f"config.fewshot, {target}: {error}") from error
    return ClassSplit(np.sort(split.seen), np.sort(split.unseen))


def _rows_of(source: Source, classes: np.ndarray) -> np.ndarray:
    """Returns the indices of the images of some classes."""
    return np.flatnonzero(np.isin(source.labels, classes)).astype(np.int64)


def _seen(work: Workspace, target: str, split: str) -> Source:
    """Returns the images of a split that belong to seen classes, which are numbered from 0."""
    chosen = _rows_of(work.source(target, split), class_split(work, target).seen)
    return work.part(target, chosen.tobytes(), renumber=True, split=split)


def _tuned(work: Workspace, target: str, todo: list[Snapshot], rows: Rows) -> Iterator[tuple[Snapshot, dict]]:
    """Tunes checkpoints on the seen classes of a target, and keeps the embeddings and weights that this gives.

    With several processes, each tunes its share, and all of them yield all results.

    Yields:
      (checkpoint, the columns of its rows that describe the tuning).
    """
    known = {row.checkpoint: row for row in rows.rows if (row.target, row.method) == (target, "imprinting")}
    kinds: dict[tuple[Net, Preprocessing], list[Snapshot]] = {}
    kept = [snapshot for snapshot in todo if snapshot.name in known and _are_kept(work, snapshot, target)]
    devices.wait_for_all("few-shot classifiers: files are listed")
    for snapshot in kept:
        yield snapshot, {name: getattr(known[snapshot.name], name) for name in ("seconds", "gflops", "num_train")}
    for snapshot in todo:
        if snapshot not in kept:
            kind = _headless(work, snapshot), work.checkpoint(snapshot).preprocessing
            kinds.setdefault(kind, []).append(snapshot)
    tuning = settings.finetune_settings(work.config, target)
    mesh = devices.make_mesh(sweep=jax.local_device_count())
    for (headless, preprocessing), snapshots in kinds.items():
        train, test = (_seen(work, target, split) for split in ("train", "test"))
        net = _cosine_net(work, headless, target)
        share = snapshots[jax.process_index() :: jax.process_count()]
        names = [f"checkpoint {snapshot.name}" for snapshot in share]
        feed = work.feed_of(train, preprocessing, crops_of((tuning.augment,))).on(mesh)
        results = finetune(
            dict(zip(names, map(work.checkpoint, share), strict=True)),
            [Candidate(name, work.config.seed) for name in names],
            net,
            functools.partial(OBJECTIVES["supervised"], net, tuning.augment),
            joined({"train": (feed, tuning.batch_size)}),
            work.feed_of(test, preprocessing).on(mesh),
            preprocessing,
            tuning,
            mesh,
            head=functools.partial(_with_new_head, headless),
            eval_batch_size=work.config.data.eval_batch_size,
        )
        for snapshot, result in gathered(snapshots, results, functools.partial(_keep, work, target)):
            log.info(
                "imprinting: checkpoint %s tuned on %d classes of %s: accuracy %.4f (%.1f s)",
                *(snapshot.name, train.num_classes, target, result.metrics["accuracy"], result.seconds),
            )
            measured = {"seconds": result.seconds, "gflops": result.gflops, "num_train": len(train)}
            yield snapshot, {**measured, "error": divergence(result)}


def _headless(work: Workspace, snapshot: Snapshot) -> Net:
    """Returns the net of a checkpoint without a classification head, in the precision of the device."""
    return with_classes(work.checkpoint(snapshot), 0, devices.compute_dtype())


def _cosine_net(work: Workspace, headless: Net, target: str) -> Net:
    """Returns the net that is tuned on the seen classes of a target."""
    few = settings.fewshot_settings(work.config)
    return with_cosine_head(headless, len(class_split(work, target).seen), few.embedding_dim)


def _with_new_head(headless: Net, key, params: dict, net: Net) -> dict:
    """Replaces the head of a checkpoint, if it has one, with a new cosine head for the classes of `net`."""
    return with_new_cosine_head(without_head(params, headless), key, net)


def _tuned_checkpoint(work: Workspace, snapshot: Snapshot, target: str, model: Model | None = None) -> Checkpoint:
    """Returns a checkpoint after tuning it on the seen classes of a target.

    Only its embeddings are kept on disk, and the weights of the seen classes. The cache key of the embeddings includes
    everything that determines them.

    Args:
      model: the tuned weights, as long as they are in memory.
    """
    source, few = work.checkpoint(snapshot), settings.fewshot_settings(work.config)
    made_from = (
        source.fingerprint,
        work.source(target, "train").fingerprint,
        class_split(work, target).seen.tolist(),
        few.embedding_dim,
        tuning_key(settings.finetune_settings(work.config, target), {}),
        work.config.seed,
        VERSIONS["fewshot"],
    )

    def read_model() -> Model:
        if model is None:
            raise InputError(f"Files of {work.workdir / 'features'} were removed while the study ran: run it again.")
        return model

    return Checkpoint.stored(
        source.name,
        _cosine_net(work, _headless(work, snapshot), target),
        read_model,
        source.preprocessing,
        settings=source.settings,
        known_fingerprint=f"imprinting {made_from}",
    )


def _keep(work: Workspace, target: str, snapshot: Snapshot, model: Model) -> None:
    """Writes the embeddings of a tuned checkpoint, and its weights of the seen classes."""
    tuned = _tuned_checkpoint(work, snapshot, target, devices.replicate(model, work.mesh))
    # A run that was killed here may have left files of another tuning, which need not be equal bit for bit.
    for path in _paths(work, tuned, target):
        path.unlink(missing_ok=True)
    _embeddings(work, tuned, target)
    write_array(_weights_path(work, tuned, target), np.asarray(model["params"][HEAD]["kernel"]).T)


def _are_kept(work: Workspace, snapshot: Snapshot, target: str) -> bool:
    return all(path.exists() for path in _paths(work, _tuned_checkpoint(work, snapshot, target), target))


def _paths(work: Workspace, tuned: Checkpoint, target: str) -> tuple[pathlib.Path, ...]:
    """Returns the files that are kept of a tuned checkpoint."""
    test = work.features_of.path(tuned, work.source(target, "test"))
    assert test is not None  # a study keeps its features
    return _train_path(work, tuned, target), test, _weights_path(work, tuned, target)


def _weights_path(work: Workspace, tuned: Checkpoint, target: str) -> pathlib.Path:
    path = _train_path(work, tuned, target)
    return path.with_name(f"{path.stem}-weights.npy")


def _train_path(work: Workspace, checkpoint: Checkpoint, target: str) -> pathlib.Path:
    """Returns the file of the embeddings of the training images, each as it is or in augmented copies."""
    path = work.features_of.path(checkpoint, work.source(target, "train"))
    assert path is not None  # a study keeps its features
    copies = settings.fewshot_settings(work.config).augmented_copies
    if not copies:
        return path
    determined_by = (copies, _views(work, target), work.config.seed, work.config.data.eval_batch_size)
    digest = hashlib.blake2b(repr(determined_by).encode(), digest_size=8).hexdigest()
    return path.with_name(f"{path.stem}-copies-{digest}.npz")


def _views(work: Workspace, target: str) -> tuple[str, ...]:
    """Returns the augmentations of a copy; an image that is mixed with another one is no copy of it."""
    return tuple(name for name in settings.finetune_settings(work.config, target).augment if name not in MIXINGS)


def _embeddings(work: Workspace, checkpoint: Checkpoint, target: str) -> tuple[np.ndarray, Features]:
    """Returns embeddings of the training images, [n, d] or [n, copies, d], and the features of the test images."""
    source, copies = work.source(target, "train"), settings.fewshot_settings(work.config).augmented_copies
    test = work.features_of(checkpoint, work.source(target, "test"))
    if not copies:
        return np.asarray(work.features_of(checkpoint, source).features), test
    path = _train_path(work, checkpoint, target)
    kept = cache.load(path)
    if kept is None:
        preprocessing = checkpoint.preprocessing
        embed = make_embed(
            checkpoint.net,
            source,
            (_views(work, target),) * copies,
            lambda numbered, crops: work.feed_of(numbered, preprocessing, crops),
            preprocessing,
            work.mesh,
            work.config.seed,
            work.config.data.eval_batch_size,
        )
        embedded = embed(devices.replicate(checkpoint.model, work.mesh), lambda: False)
        assert embedded is not None  # nothing stops it
        x = np.stack(embedded, axis=1)
        kept = Features(x, np.zeros((len(x), 0), np.float32), source.labels)
        cache.save(path, kept)
    return np.asarray(kept.features), test


def _evaluate(
    work: Workspace, snapshot: Snapshot, target: str, method: str, all_shots: list[int], tuning: Mapping, rows: Rows
) -> None:
    """Writes the rows of a checkpoint on a target.

    Args:
      all_shots: the numbers of shots without a row.
      tuning: the columns that describe the tuning; empty if there is none.
    """
    few, protocol, metric = settings.fewshot_settings(work.config), PROTOCOLS[method], work.metric(target)
    train, test = work.source(target, "train"), work.source(target, "test")
    split = class_split(work, target)
    used = np.sort(np.concatenate([split.seen, split.unseen]))
    split = split if protocol.has_seen else ClassSplit(seen=used[:0], unseen=used)
    tested = _rows_of(test, used)

    def row(shots: int, **measured) -> FewShotRow:
        missing = math.nan if protocol.has_seen else None
        seen = dict.fromkeys(("seen", "seen_interval", "seen_only"), missing)
        others = dict.fromkeys(
            (*itertools.chain(*((n, f"{n}_interval") for n in METRICS if n != "seen")), "seconds", "gflops"), math.nan
        )
        no_tuning = {} if protocol.is_tuned else {"seconds": 0.0, "gflops": 0.0}
        return FewShotRow(
            checkpoint=snapshot.name,
            epoch=work.epoch(snapshot),
            target=target,
            method=method,
            shots=shots,
            num_episodes=few.num_episodes,
            metric=metric,
            num_seen=len(split.seen),
            num_unseen=len(split.unseen),
            num_test=len(tested),
            seed=work.config.seed,
            **{"num_train": 0, **others, **seen, **no_tuning, **tuning, **measured},
        )

    if tuning.get("error"):
        for shots in all_shots:
            rows.append(row(shots))
        return
    checkpoint = _tuned_checkpoint(work, snapshot, target) if protocol.is_tuned else work.checkpoint(snapshot)
    x, features = _embeddings(work, checkpoint, target)
    if error := extract.problem(features, train.num_classes):
        log.warning("%s of checkpoint %s on %s is skipped: test %s.", method, snapshot.name, target, error)
        for shots in all_shots:
            rows.append(row(shots, error=f"test {error}"))
        return
    weights = _weights(work, checkpoint, target, x, split) if protocol.has_seen else None
    problem = FewShotProblem(
        x,
        train.labels,
        np.asarray(features.features)[tested],
        test.labels[tested],
        split,
        weights,
        image_weights(test.labels[tested], metric),
    )
    for shots in all_shots:
        result = imprint(problem, draw_episodes(train.labels, split.unseen, shots, few.num_episodes, work.config.seed))
        means = {name: interval(getattr(result, name)) for name in METRICS if protocol.has_seen or name != "seen"}
        measured = {name: mean for name, (mean, _) in means.items()}
        measured |= {f"{name}_interval": half_width for name, (_, half_width) in means.items()}
        measured |= {"seen_only": result.seen_only} if protocol.has_seen else {}
        error = "" if math.isfinite(measured["all"]) else "training features hold values that are NaN or infinite"
        rows.append(row(shots, **measured, error=error))
        log.info(
            "%s of checkpoint %s on %s from %d images a class: %.4f ± %.4f on unseen classes",
            *(method, snapshot.name, target, shots, *means["unseen"]),
        )


def _weights(work: Workspace, checkpoint: Checkpoint, target: str, x: np.ndarray, split: ClassSplit) -> np.ndarray:
    """Returns the weights of the seen classes: the learned ones, or without tuning their prototypes."""
    if checkpoint.net.classifier == (HEAD,):
        return np.load(_weights_path(work, checkpoint, target))
    train = work.source(target, "train")
    return np.asarray(prototypes(jnp.asarray(x), jnp.asarray(train.labels), train.num_classes))[split.seen]
