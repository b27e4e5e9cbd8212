"""The "scores" stage: scores all checkpoints on a target together, from features or by early-stopped fine-tuning."""

import functools
import math
import time

import jax

from jax_transfer.analysis import score_all, score_gigaflops, score_named, why_undefined
from jax_transfer.data.subsets import stratified_split
from jax_transfer.features.extract import stack
from jax_transfer.logs import log
from jax_transfer.results import Rows, ScoreRow
from jax_transfer.study import estimates, groups, settings
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.finetune import Run, divergence, finetuned
from jax_transfer.study.workspace import Workspace
from jax_transfer.transfer.finetune import FINETUNE_SCORES, early_epochs
from jax_transfer.trust.naive import naive_values, static_values


def run(work: Workspace) -> None:
    """Computes transferability scores on the training images of each target. A failure gets a row with the reason."""
    rows = Rows(work.results, "scores")
    rows.forget_failures()
    _append_naive(work, rows)
    for target in work.config.targets:
        for snapshot, name, measured in _missing_scores(work, target, rows):
            if measured.get("error"):
                log.warning("%s of checkpoint %s on %s: %s.", name, snapshot.name, target, measured["error"])
            numbers = {**dict.fromkeys(("value", "seconds", "gflops"), math.nan), **measured}
            train, test = (work.gigaflops_per_image(snapshot) * len(work.source(target, s)) for s in ("train", "test"))
            numbers |= {"forward_gflops": train, "test_forward_gflops": test}
            rows.append(ScoreRow(snapshot.name, work.epoch(snapshot), target, name, **numbers))


def describe(work: Workspace) -> str:
    """Describes this stage for the plan."""
    return ", ".join(work.config.scores)


def gigaflops(work: Workspace) -> float:
    """Computes the work of early-stopped fine-tuning, in GFLOP. Scores from features take little work in comparison."""
    early = max(early_epochs(work.config.scores), default=0)
    total = 0.0
    for target in work.config.targets if early else ():
        steps = early * len(work.source(target, "train")) // settings.finetune_settings(work.config, target).batch_size
        total += steps * sum(estimates.finetune_step_gigaflops(work, target).values())
    return total


def _append_naive(work: Workspace, rows: Rows) -> None:
    """Appends the rows of the naive lists, which cost nothing and need no data of a target, see `trust.evidence.NAIVE`.

    A checkpoint for which such a value is not known has no row.
    """
    pretrained = {row.checkpoint: row.test_accuracy for row in Rows(work.results, "pretrain").rows}
    places = static_values(work.config.static, [snapshot.name for snapshot in work.snapshots])
    if any(row.score == "static" and row.value != places.get(row.checkpoint) for row in rows.rows):
        rows.replace([row for row in rows.rows if row.score != "static"])  # the user gives another order now
    new = []
    for snapshot in work.snapshots:
        checkpoint, epoch = work.checkpoint(snapshot), work.epoch(snapshot)
        known = checkpoint.source_accuracy or pretrained.get(snapshot.name)
        per_image = work.gigaflops_per_image(snapshot)
        for name, value in naive_values(checkpoint.net, per_image, known, epoch, places.get(snapshot.name)).items():
            for target in work.config.targets:
                forward = [per_image * len(work.source(target, split)) for split in ("train", "test")]
                new.append(ScoreRow(snapshot.name, epoch, target, name, value, 0.0, 0.0, forward[0], "", forward[1]))
    if new := [row for row in new if rows.key(row) not in rows]:
        rows.replace([*rows.rows, *new])  # in one go, since each append waits for the disk


def _missing_scores(work: Workspace, target: str, rows: Rows):
    """Yields (snapshot, score, {value, seconds, gflops, error}) for each missing row; early stopping comes last."""
    need_head = {
        name for name in work.config.scores if name not in FINETUNE_SCORES and score_named(name).needs == "logits"
    }
    missing = {
        name: [
            snapshot
            for snapshot in work.snapshots
            if (work.checkpoint(snapshot).has_head or name not in need_head)
            and (snapshot.name, target, name) not in rows
        ]
        for name in work.config.scores
    }
    for name, snapshots in missing.items():
        if not snapshots or name in FINETUNE_SCORES:
            continue
        log.info("%s on %s: %d checkpoints", name, target, len(snapshots))
        counted = groups.known_gflops(work, (row for row in rows.rows if (row.target, row.score) == (target, name)))
        for snapshot, measured in _by_features(work, snapshots, target, name, counted):
            yield snapshot, name, measured
    early = {name: snapshots for name, snapshots in missing.items() if name in FINETUNE_SCORES}
    yield from _by_finetuning(work, early, target)


def _by_features(work: Workspace, snapshots: list[Snapshot], target: str, name: str, gflops: dict[int, float]):
    """Yields (snapshot, {value, seconds, gflops} or {error}), with one compiled call for each group of checkpoints.

    Scores that need training are tested on the same held-out images as early-stopped fine-tuning.

    Args:
      gflops: feature dimension -> work of a checkpoint that already has a row, see `groups.known_gflops`.
    """
    train = work.source(target, "train")
    num_classes, held_out = train.num_classes, stratified_split(train.labels)[1]
    problems = {
        snapshot: groups.problem(work, target, functools.partial(work.features, snapshot, target))
        for snapshot in snapshots
    }
    yield from ((snapshot, {"error": problem}) for snapshot, problem in problems.items() if problem)
    valid = [snapshot for snapshot in snapshots if not problems[snapshot]]
    for group in groups.by_feature_dim(work, valid, target):
        stacked = stack([work.features(snapshot, target, "train") for snapshot in group])
        start = time.perf_counter()
        values = score_all(name, stacked, num_classes, held_out)
        seconds = (time.perf_counter() - start) / len(group)
        dim = stacked.features.shape[-1]
        if dim not in gflops:
            gflops[dim] = score_gigaflops(name, jax.tree.map(lambda x: x[0], stacked), num_classes, held_out)
        for i, (snapshot, value) in enumerate(zip(group, values, strict=True)):
            measured = {"value": float(value), "seconds": seconds, "gflops": gflops[dim]}
            if not math.isfinite(value):
                features = jax.tree.map(lambda x, i=i: x[i], stacked)
                measured |= {"value": math.nan, "error": why_undefined(name, features, num_classes, held_out)}
            yield snapshot, measured


def _by_finetuning(work: Workspace, missing: dict[str, list[Snapshot]], target: str):
    """Yields (snapshot, score, {value, seconds, gflops, error}) from early-stopped fine-tuning on some of the images.

    One training run of a checkpoint gives all its missing scores. Checkpoints that need the same number of epochs
    train together.
    """
    tuning = settings.finetune_settings(work.config, target)
    missing_of = {s: [name for name in missing if s in missing[name]] for s in work.snapshots}
    last_epochs = {s: max(FINETUNE_SCORES[name] for name in names) for s, names in missing_of.items() if names}
    for last_epoch in sorted(set(last_epochs.values())):
        group = [snapshot for snapshot in last_epochs if last_epochs[snapshot] == last_epoch]
        score_at = {FINETUNE_SCORES[name]: name for name in missing if any(name in missing_of[s] for s in group)}
        log.info("%s on %s: %d checkpoints", " and ".join(score_at.values()), target, len(group))
        # With the settings of the config alone: the choice from a grid has seen more epochs than these scores may.
        todo = [Run(snapshot, work.config.seed) for snapshot in group]
        splits = ("fit", "held_out")
        for (snapshot, *_), result in finetuned(work, todo, target, splits, tuning, epochs=sorted(score_at)):
            if score_at[result.epoch] in missing_of[snapshot]:
                measured = {
                    "value": result.metrics["accuracy"],
                    "seconds": result.seconds,
                    "gflops": result.gflops,
                    "error": divergence(result),
                }
                yield snapshot, score_at[result.epoch], measured
