"""Joint fine-tuning on a target and on labelled pre-training data, with a head for each of them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.models.net import Net, gaussian
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import in_one_pass, linear, loss_and_accuracy


def joint(
    net: Net,
    augment: tuple[str, ...],
    *,
    source_weight: float | Float[Array, ""],
    num_source_classes: int,
    head_std: float = 0.01,
) -> Objective:
    """Makes the objective "mean cross-entropy on the target + source_weight * mean cross-entropy on the source".

    Equation 6 of "Improved Fine-Tuning by Better Leveraging Pre-Training Data"; `source_weight` is its lambda. The
    feeds are "train", the target, and "source". Images of both go through the net in one pass, so that BatchNorm sees
    both, and a second linear head classifies the features of those of the source. Both heads are in the group "head".

    Args:
      net: a net with a head for the classes of the target.
      augment: names of the augmentations of both.
      source_weight: weight of the source; may be traced.
      num_source_classes: number of classes of the source.
      head_std: standard deviation of the initial kernel of the source's head; its bias starts at 0.

    Returns:
      The objective. Its metrics are "accuracy" on the target, "source_loss" and "source_accuracy", in training mode.
      Its model is the net alone, without the source's head.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = joint(resnet10(num_classes=5, width=8), ("flip",), source_weight=0.3, num_source_classes=7)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["net"]["fc"]["kernel"].shape, params["source_head"]["kernel"].shape
      ((64, 5), (64, 7))
    """

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        kernel = gaussian(jax.random.fold_in(key, 1), (net.feature_dim, num_source_classes), head_std)
        source_head = {"kernel": kernel, "bias": jnp.zeros(num_source_classes)}
        return {"net": params, "source_head": source_head}, {"stats": stats}

    def loss(params, aux, views, key):
        target, source = views["train"], views["source"]
        images = (*target.images, *source.images)
        (of_target, of_source), stats = in_one_pass(net, params["net"], aux["stats"], images, key)
        value, accuracy = loss_and_accuracy(of_target.logits, target.labels)
        source_logits = linear(params["source_head"], of_source.features)
        source_value, source_accuracy = loss_and_accuracy(source_logits, source.labels)
        metrics = {"accuracy": accuracy, "source_loss": source_value, "source_accuracy": source_accuracy}
        return value + source_weight * source_value, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,), "source": (augment,)},
        groups=functools.partial(head_and_backbone, (("net", *net.classifier), ("source_head",))),
    )
