"""How fine-tuning reuses pre-training data (`config.finetune.reuse`): its objective, feeds, arrays and grid."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jax_transfer.data.batches import Feed
from jax_transfer.data.crops import crops_of
from jax_transfer.data.subsets import stratified_split
from jax_transfer.models import Net
from jax_transfer.records import InputError
from jax_transfer.results import write_array
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.select import selected_images
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES, REUSE, Objective
from jax_transfer.transfer.finetune import FinetuneSettings, Reuse, grid
from jax_transfer.transfer.relationship import category_relationship

TARGET, SOURCE = "train", "source"  # names of the feeds; an epoch is one pass over the images of the target


def num_source_views(reuse: Reuse) -> int:
    """Returns how many views of each source image a training step processes.

    >>> num_source_views(Reuse("weak_strong", "uot")), num_source_views(Reuse("cotuning"))
    (2, 0)
    """
    return REUSE[reuse.objective].source_views


class Training(NamedTuple):
    """What trains a checkpoint on a target.

    Attributes:
      make_objective: called with the settings that a grid changes, and with the arrays.
      feeds: name -> (feed, images in a step).
      arrays: inputs of the objective that belong to the checkpoint.
    """

    make_objective: Callable[..., Objective]
    feeds: dict[str, tuple[Feed, int]]
    arrays: dict[str, Any]


def points(tuning: FinetuneSettings, reuse: Reuse | None) -> list[dict[str, float]]:
    """Returns the points of the grid of settings: learning rates, weight decays and, with reuse, source weights.

    >>> reuse = Reuse("joint", "uot", source_weights=(0.1, 1.0))
    >>> [point["source_weight"] for point in points(FinetuneSettings(), reuse)]
    [0.1, 1.0]
    """
    if reuse is None:
        return grid(tuning)
    replaced = {
        name: value for name in ("learning_rates", "weight_decays") if (value := getattr(reuse, name)) is not None
    }
    weights = reuse.source_weights or (REUSE[reuse.objective].source_weight,)
    return grid(dataclasses.replace(tuning, **replaced), weights)


def training(
    work: Workspace,
    snapshot: Snapshot,
    target: str,
    split: str,
    net: Net,
    tuning: FinetuneSettings,
    reuse: Reuse | None,
    mesh: Mesh,
) -> Training:
    """Returns what trains a checkpoint on a split of a target.

    Args:
      net: the net of the checkpoint, with a head for the classes of the target.
      tuning: the settings of fine-tuning on the target.
      reuse: how pre-training data is reused; None: not at all.
      mesh: the devices that train.

    Raises:
      InputError: if the checkpoint or the selected images do not suit the objective.
    """
    preprocessing = work.checkpoint(snapshot).preprocessing
    feed = work.feed(target, split, preprocessing, crops=crops_of((tuning.augment,))).on(mesh)
    feeds = {TARGET: (feed, tuning.batch_size)}
    if reuse is None:
        return Training(functools.partial(OBJECTIVES["supervised"], net, tuning.augment), feeds, {})
    kind = REUSE[reuse.objective]
    make = functools.partial(kind.make, net, tuning.augment)
    if kind.arrays:
        return Training(make, feeds, _relationship(work, snapshot, target))
    assert reuse.selection is not None  # checked with the config
    chosen = selected_images(work, snapshot, target, reuse.selection)
    check_number(len(chosen), f"{reuse}: selection {reuse.selection!r} holds", work.reused, reuse, tuning)
    source = work.part(work.reused, chosen.tobytes(), reuse.only_selected_classes)
    given = {"num_source_classes": source.num_classes, "head_std": tuning.head_std}
    make = functools.partial(make, **{name: given[name] for name in kind.settings})
    crops = crops_of(make(source_weight=1.0).views[SOURCE])
    images = work.feed_of(source, preprocessing, crops).on(mesh)
    return Training(make, {**feeds, SOURCE: (images, reuse.batch_size or tuning.batch_size)}, {})


def check_number(number: int, what: str, dataset: str, reuse: Reuse, tuning: FinetuneSettings) -> None:
    """Checks that there are enough images of the source for a step.

    >>> check_number(10, "joint with uot: the source has", "folder:source", Reuse("joint", "uot"), FinetuneSettings())
    Traceback (most recent call last):
    jax_transfer.records.InputError: joint with uot: the source has 10 images of folder:source, fewer than the 128 of a
    step: set a smaller 'batch_size' in this entry of config.finetune.reuse, or select more.
    """
    batch_size = reuse.batch_size or tuning.batch_size
    if number < batch_size:
        raise InputError(
            f"{what} {number} images of {dataset}, fewer than the {batch_size} of a step: set a smaller 'batch_size' "
            "in this entry of config.finetune.reuse, or select more."
        )


def _relationship(work: Workspace, snapshot: Snapshot, target: str) -> dict[str, Any]:
    """Returns the head of the checkpoint, and how its classes are related to those of the target.

    The relationship is learned on the part "fit" of the training images and calibrated on the part "held_out". It is
    kept in a file, since the regression takes minutes for a thousand source classes.
    """
    checkpoint, source = work.checkpoint(snapshot), work.source(target, "train")
    features = work.features_of.path(checkpoint, source)
    assert features is not None  # a study keeps its features
    path = features.parent / "selection" / f"relationship-{features.stem}.npy"
    if not path.exists():
        train = work.features(snapshot, target, "train")
        logits, labels = np.asarray(train.logits), np.asarray(train.labels)
        fit, held_out = stratified_split(labels)
        parts = logits[fit], labels[fit], logits[held_out], labels[held_out]
        write_array(path, category_relationship(*parts, source.num_classes))
    head = checkpoint.model["params"]
    for name in checkpoint.net.classifier:
        head = head[name]
    return {"relationship": np.load(path), "source_head": head}
