"""The interface of all objectives, so that one loop trains any of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.records import Views

Params = Any  # a tree of everything trained by gradients, such as a net, a projector, a text tower or several heads
LABELLED = "labelled"  # the feed of images that have labels, of the classes of the first feed, where others have none
Aux = dict[str, Any]  # everything that changes by other means: BatchNorm statistics, a momentum encoder, a queue


def all_backbone(params: Params):
    """Labels every parameter "backbone".

    Example:
      >>> all_backbone({"conv": 0.0, "fc": 0.0})
      {'conv': 'backbone', 'fc': 'backbone'}
    """
    return jax.tree.map(lambda _: "backbone", params)


class Division(NamedTuple):
    """How the images of the first feed are divided in a training step.

    Attributes:
      batch_size: images of a step, over all devices.
      microbatches: number of parts that are processed one after another.
      batch_norm_group: images that BatchNorm normalises together; None for a net without BatchNorm.
    """

    batch_size: int
    microbatches: int = 1
    batch_norm_group: int | None = None


class Objective(NamedTuple):
    """A training objective as pure functions, made by `OBJECTIVES[name](net, augment, **settings)`.

    Attributes:
      init: `init(key, model) -> (params, aux)`. `model` is {"params", "stats"} of the net to start from, including its
        head, or None for a new initialisation.
      loss: `loss(params, aux, views, key) -> (loss, (new aux, metrics))`. `views` maps each feed to `records.Views`;
        `metrics` are scalars by name, including "accuracy" if it is defined. The new aux has the shapes and dtypes of
        the old one.
      model: `model(params, aux) -> {"params", "stats"}` of the net that is stored, evaluated and transferred. It must
        select leaves of its arguments and not compute new ones, since they are stored once, as part of the model.
      views: feed -> names of the augmentations (`data.augment`) of each view. An epoch is one pass over the first feed.
        The labels of a feed named LABELLED are those of the classes of the first feed.
      has_head: whether the net has a logit for each source class, as class accuracy, LEEP and NCE need.
      groups: `groups(params)` labels each parameter "backbone" or "head"
        (`OptimizerSettings.head_learning_rate_factor`).
      extra: names of the arrays in `Views.extra` of the first feed that the loss reads, such as "tokens", the tokens of
        the captions of each image.
      check: `check(division)` raises an InputError if the objective cannot be computed with batches of this size, or
        would not be what it is meant to be. Its message names the fields without their section.
      zero_shot_head: `zero_shot_head(params, tokens [c, k, l]) -> {"kernel": [d, c], "bias": [c]}`, a head of the
        net for c classes from the tokens of k captions of each class; None for an objective without language.
    """

    init: Callable[[jax.Array, Model | None], tuple[Params, Aux]]
    loss: Callable[
        [Params, Aux, dict[str, Views], jax.Array], tuple[Float[Array, ""], tuple[Aux, dict[str, Float[Array, ""]]]]
    ]
    model: Callable[[Params, Aux], Model]
    views: dict[str, tuple[tuple[str, ...], ...]]
    has_head: bool = True
    groups: Callable[[Params], Any] = all_backbone
    extra: tuple[str, ...] = ()
    check: Callable[[Division], None] = lambda division: None
    zero_shot_head: Callable[[Params, Int[Array, "c k l"]], dict[str, Array]] | None = None


class ReuseObjective(NamedTuple):
    """An objective of fine-tuning that reuses what a checkpoint was pre-trained on, and what it must be given for that.

    Attributes:
      make: `make(net, augment, source_weight=..., **settings, **arrays) -> Objective`. `net` has a head for the classes
        of the target, `augment` the names of the augmentations of its images, and the loss is that of the target plus
        `source_weight`, which may be traced, times that of the source. The first feed is "train", the target.
      source_views: number of views of each image of the feed "source", the pre-training data; 0 for an objective that
        trains on no source images.
      settings: names of further keyword arguments: "num_source_classes" of an objective that needs the labels of the
        source, and "head_std" of one that makes a new head for them.
      arrays: names of the keyword arguments that are arrays, as in `transfer.finetune.Candidate.arrays`.
      source_weight: the usual weight of the source.
    """

    make: Callable[..., Objective]
    source_views: int
    settings: tuple[str, ...] = ()
    arrays: tuple[str, ...] = ()
    source_weight: float = 1.0


def head_and_backbone(heads: Sequence[tuple[str, ...]], params: Params):
    """Labels the parameters below the paths in `heads` "head" and all others "backbone".

    Example:
      >>> head_and_backbone([("fc",)], {"conv": {"kernel": 0.0}, "fc": {"bias": 0.0}})
      {'conv': {'kernel': 'backbone'}, 'fc': {'bias': 'head'}}
    """

    def label(path, _):
        names = tuple(key.key for key in path)
        return "head" if any(names[: len(head)] == head for head in heads) else "backbone"

    return jax.tree_util.tree_map_with_path(label, params)
