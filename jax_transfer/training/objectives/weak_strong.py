"""Fine-tuning on a target and on unlabelled pre-training data, whose weak views label their strong views."""

import functools

import jax
import optax
from jaxtyping import Array, Float

from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import check_unmixed, in_one_pass, loss_and_accuracy

STRONG = "rand_augment_fixmatch"  # what a strong view has in addition to a weak one


def weak_strong(net: Net, augment: tuple[str, ...], *, source_weight: float | Float[Array, ""]) -> Objective:
    """Makes the objective "cross-entropy on the target + source_weight * cross-entropy of strong with weak views".

    Equation 7 of "Improved Fine-Tuning by Better Leveraging Pre-Training Data"; `source_weight` is its lambda. The
    feeds are "train", the target, and "source", whose labels are not used: each of its images is seen twice, and the
    probabilities that the net gives to the weak view are the soft label of the strong one, without a temperature or a
    threshold. No gradient flows through the soft labels. All views go through the net in one pass, as in the public
    code, so that BatchNorm sees all of them.

    Args:
      net: a net with a head for the classes of the target.
      augment: names of the augmentations of the target's images and of the weak views; strong views add STRONG.
      source_weight: weight of the source; may be traced.

    Returns:
      The objective. Its metrics are "accuracy" on the target, in training mode, and "source_loss".

    Raises:
      InputError: if `augment` mixes images: both views of an image must show the same one.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> weak_strong(resnet10(num_classes=5, width=8), ("flip",), source_weight=0.3).views["source"]
      (('flip',), ('flip', 'rand_augment_fixmatch'))
    """
    check_unmixed("weak_strong", augment)

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return params, {"stats": stats}

    def loss(params, aux, views, key):
        images = (*views["train"].images, *views["source"].images)
        (target, weak, strong), stats = in_one_pass(net, params, aux["stats"], images, key)
        value, accuracy = loss_and_accuracy(target.logits, views["train"].labels)
        soft_labels = jax.lax.stop_gradient(jax.nn.softmax(weak.logits))
        source_value = optax.softmax_cross_entropy(strong.logits, soft_labels).mean()
        metrics = {"accuracy": accuracy, "source_loss": source_value}
        return value + source_weight * source_value, ({"stats": stats}, metrics)

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params, "stats": aux["stats"]},
        views={"train": (augment,), "source": (augment, (*augment, STRONG))},
        groups=functools.partial(head_and_backbone, (net.classifier,)),
    )
