"""Co-Tuning: the head of the checkpoint stays, and learns what a target's class tells about the source's classes."""

import functools

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import linear, loss_and_accuracy


def cotuning(
    net: Net,
    augment: tuple[str, ...],
    *,
    relationship: Float[Array, "t s"],
    source_head: dict[str, Array],
    source_weight: float | Float[Array, ""] = 2.3,
) -> Objective:
    """Makes the objective "cross-entropy on the target + source_weight * cross-entropy with the relationship".

    You et al., "Co-Tuning for Transfer Learning", NeurIPS 2020. The feed is "train". The loss of the source's head is
    sum_s -p(s | y) log q_s, with p(s | y) the row of `relationship` for the label y and q the softmax of its logits,
    averaged over the images. As in the public code, the source's head is trained at the learning rate of the backbone,
    and only the target's head is in the group "head".

    Args:
      net: a net with a head for the classes of the target.
      augment: names of the augmentations.
      relationship: the probability of each source class given each target class, from
        `transfer.relationship.category_relationship`.
      source_head: the classifier of the checkpoint, {"kernel": [d, s], "bias": [s]}, from which training starts.
      source_weight: weight of the source; may be traced. The default is that of the public code.

    Returns:
      The objective. Its metrics are "accuracy" on the target, in training mode, and "source_loss". Its model is the net
      alone, without the source's head.

    Example:
      >>> import jax
      >>> from jax_transfer.models.resnet import resnet10
      >>> head = {"kernel": jnp.zeros((64, 7)), "bias": jnp.zeros(7)}
      >>> objective = cotuning(
      ...     resnet10(num_classes=5, width=8), ("flip",), relationship=jnp.full((5, 7), 1 / 7), source_head=head
      ... )
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["net"]["fc"]["kernel"].shape, params["source_head"]["kernel"].shape
      ((64, 5), (64, 7))
    """

    relationship = jnp.asarray(relationship)

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return {"net": params, "source_head": source_head}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,), labels = views["train"].images, views["train"].labels
        output, stats = net.apply_train(params["net"], aux["stats"], images, key)
        value, accuracy = loss_and_accuracy(output.logits, labels)
        # The precision is that of the probabilities; by default, accelerators would round them to 8 bits.
        of_image = jnp.matmul(labels, relationship, precision="highest") if labels.ndim == 2 else relationship[labels]
        source_value = optax.softmax_cross_entropy(linear(params["source_head"], output.features), of_image).mean()
        metrics = {"accuracy": accuracy, "source_loss": source_value}
        return value + source_weight * source_value, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        groups=functools.partial(head_and_backbone, (("net", *net.classifier),)),
    )
