"""Predicting by how many quarter turns an image is rotated (Gidaris et al., 2018, arXiv:1803.07728)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import linear, loss_and_accuracy, new_linear


def four_rotations(images: Float[Array, "b h h c"]) -> Float[Array, "4*b h h c"]:
    """Returns each image turned counterclockwise by 0, 90, 180 and 270 degrees, in rows 4 i to 4 i + 3.

    So the copies of an image stay on its device, and a group of images for BatchNorm holds all rotations.

    Example:
      >>> image = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> four_rotations(image)[:2, ..., 0].tolist()
      [[[0.0, 1.0], [2.0, 3.0]], [[1.0, 3.0], [0.0, 2.0]]]
    """
    turned = jnp.stack([jnp.rot90(images, turns, axes=(1, 2)) for turns in range(4)], 1)
    return turned.reshape(-1, *images.shape[1:])


def rotation_loss_and_accuracy(
    head: dict[str, Array], features: Float[Array, "4*b d"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean cross-entropy of the predicted rotations, and the share of images where they are right.

    Args:
      head: a linear head for the four rotations, see `parts.linear`.
      features: those of the images of `four_rotations`, in its order.

    Example:
      >>> head = {"kernel": 9 * jnp.eye(4), "bias": jnp.zeros(4)}
      >>> loss, accuracy = rotation_loss_and_accuracy(head, jnp.eye(4))
      >>> round(float(loss), 3), float(accuracy)
      (0.0, 1.0)
    """
    return loss_and_accuracy(linear(head, features), jnp.arange(len(features)) % 4)


def rotation(net: Net, augment: tuple[str, ...]) -> Objective:
    """Makes the objective "mean cross-entropy of predicting the rotation of an image".

    Each image of the feed "train" is seen in all four rotations in one pass, and a linear head classifies the features
    (Gidaris et al., 2018, equation 3). An epoch is thus four times the work of a supervised one with the same batch.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.

    Returns:
      The objective. Its metric is "rotation_accuracy", in training mode; its model is the net without the head.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = rotation(resnet10(num_classes=0, width=8), ("flip",))
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["head"]["kernel"].shape
      (64, 4)
    """

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return {"net": params, "head": new_linear(jax.random.fold_in(key, 1), net.feature_dim, 4)}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,) = views["train"].images
        output, stats = net.apply_train(params["net"], aux["stats"], four_rotations(images), key)
        value, accuracy = rotation_loss_and_accuracy(params["head"], output.features)
        return value, ({"stats": stats}, {"rotation_accuracy": accuracy})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("head",),)),
    )
