"""What every objective is made of, so that one loop trains all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from jax_transfer.models.net import Net
from jax_transfer.records import Views

Params = Any  # a tree: all that the gradient trains, such as a net, a projector, a text tower, several heads
Aux = dict[str, Any]  # all that changes by other means: BatchNorm statistics, a momentum encoder, a queue
Model = dict[str, Any]  # {"params", "stats"} of a net


def all_backbone(params: Params):
    """Labels every parameter "backbone"."""
    return jax.tree.map(lambda _: "backbone", params)


class Objective(NamedTuple):
    """What a training minimises, as pure functions; made by `OBJECTIVES[name](net, augment, **its own settings)`.

    Attributes:
      init: `init(key, model) -> (params, aux)`. model: {"params", "stats"} of the net to start from, its head included, or
        None for a new one.
      loss: `loss(params, aux, views, key) -> (loss, (new aux, metrics))`. views: feed -> `records.Views`; metrics: scalars
        by name, "accuracy" among them where there is one. The new aux has the shapes and dtypes of the old.
      model: `model(params, aux) -> {"params", "stats"}` of the net that is kept, evaluated and transferred. It selects
        leaves of its arguments and computes nothing: they are stored once, with the model.
      views: feed -> the augmentations (`data.augment`) of each view. The first feed is the one whose length is an epoch.
      has_head: whether the net's logits are of the classes of the source: only then there are a class accuracy, LEEP, NCE.
      groups: `groups(params)` labels each parameter "backbone" or "head" (`OptimizerSettings.head_learning_rate_factor`).
    """

    init: Callable[[jax.Array, Model | None], tuple[Params, Aux]]
    loss: Callable[
        [Params, Aux, dict[str, Views], jax.Array], tuple[Float[Array, ""], tuple[Aux, dict[str, Float[Array, ""]]]]
    ]
    model: Callable[[Params, Aux], Model]
    views: dict[str, tuple[tuple[str, ...], ...]]
    has_head: bool = True
    groups: Callable[[Params], Any] = all_backbone


def head_and_backbone(net: Net, params: Params):
    """Labels the parameters of a net: those of its classification head "head", the others "backbone"."""
    head = net.classifier

    def label(path, _):
        return "head" if tuple(key.key for key in path[: len(head)]) == head else "backbone"

    return jax.tree_util.tree_map_with_path(label, params)
