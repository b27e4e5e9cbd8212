"""What several objectives have in common: classification, further layers, similarities, and one pass over batches."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jax_transfer.data.mixing import MIXINGS
from jax_transfer.models.net import Net, Output, gaussian
from jax_transfer.records import InputError
from jax_transfer.training.objectives.objective import Division


def loss_and_accuracy(
    logits: Float[Array, "b c"], labels: Int[Array, " b"] | Float[Array, "b c"], label_smoothing: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean softmax cross-entropy of a batch, in nats, and the share of images whose class is predicted.

    Args:
      labels: integers or, if images are mixed, the weights of the classes. The label of a mixed image is the class with
        the largest weight.
      label_smoothing: probability that is taken from the true class and spread evenly over all classes.

    Example:
      >>> loss, accuracy = loss_and_accuracy(jnp.zeros((2, 2)), jnp.array([0, 1]))
      >>> round(float(loss), 2), float(accuracy)
      (0.69, 0.5)
    """
    mixed = labels.ndim == 2
    targets = labels if mixed else jnp.eye(logits.shape[-1])[labels]
    loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing)).mean()
    return loss, (logits.argmax(-1) == (targets.argmax(-1) if mixed else labels)).mean()


def linear(head: dict[str, Array], features: Float[Array, "b d"]) -> Float[Array, "b s"]:
    """Returns the logits of a linear head {"kernel": [d, s], "bias": [s]}.

    Example:
      >>> linear({"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.0, 1.0])}, jnp.ones((1, 3))).tolist()
      [[3.0, 4.0]]
    """
    return features @ head["kernel"] + head["bias"]


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Divides vectors by their lengths, in float32; a vector of zeros stays one.

    Example:
      >>> [round(x, 2) for x in unit(jnp.array([3.0, 4.0])).tolist()]
      [0.6, 0.8]
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def similarities(x: Float[Array, "a e"], y: Float[Array, "b e"]) -> Float[Array, "a b"]:
    """Computes the inner product of each vector of x with each of y, in float32 on every device.

    Of vectors that are split over devices, those of y are gathered, and a row of the result stays with its vector of x.

    Example:
      >>> similarities(jnp.eye(2), jnp.ones((3, 2))).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    return jnp.matmul(x, y.T, precision="float32")


def moved_towards(old: Any, new: Any, momentum: float) -> Any:
    """Moves a tree by 1 - momentum towards another one, through which no gradient flows.

    With this formula, values that equal those of the other tree stay bitwise the same.

    Example:
      >>> jax.tree.map(float, moved_towards({"w": 1.0}, {"w": 3.0}, momentum=0.5))
      {'w': 2.0}
    """
    return jax.tree.map(lambda a, b: a + (1 - momentum) * (jax.lax.stop_gradient(b) - a), old, new)


def check_unmixed(objective: str, augment: Sequence[str]) -> None:
    """Checks that each image, after `augment`, shows one image of the data set, as its view or its caption does.

    Raises:
      InputError: if an augmentation mixes images.

    Example:
      >>> check_unmixed("exemplar", ("flip", "color_jitter"))
    """
    if mixings := [name for name in augment if name in MIXINGS]:
        raise InputError(
            f"the objective {objective} compares single images, and augment mixes images by {mixings[0]!r}: leave it "
            "out."
        )


def check_compared(division: Division) -> None:
    """Checks batches of a loss that compares the images of a batch with each other (`Objective.check`).

    Raises:
      InputError: if there is only one image, or the batch is divided into parts.

    Example:
      >>> check_compared(Division(batch_size=256))
    """
    if division.microbatches > 1:
        raise InputError(
            f"microbatches = {division.microbatches}: the loss compares the images of a whole batch with each other; "
            "leave it at 1, and save memory with remat or a smaller batch_size."
        )
    if division.batch_size < 2:
        raise InputError("batch_size = 1: the loss compares the images of a batch with each other; use 2 or more.")


def new_linear(key: jax.Array, inputs: int, outputs: int) -> dict[str, Array]:
    """Draws a linear layer for `linear`: its kernel from N(0, 1 / inputs), so that the scale is kept; its bias is 0.

    Example:
      >>> jax.tree.map(jnp.shape, new_linear(jax.random.key(0), 64, 4))
      {'bias': (4,), 'kernel': (64, 4)}
    """
    return {"kernel": gaussian(key, (inputs, outputs), inputs**-0.5), "bias": jnp.zeros(outputs)}


def check_compared_views(division: Division) -> None:
    """Checks batches of a loss that tells views of an image from other images, all from one pass (`Objective.check`).

    Views of an image are beside each other, and a group of images that BatchNorm normalises together has statistics by
    which the net could tell them from the images of other groups, without looking at the image.

    Raises:
      InputError: as `check_compared`, or if BatchNorm normalises groups that are smaller than the batch.

    Example:
      >>> check_compared_views(Division(batch_size=256, batch_norm_group=256))
    """
    check_compared(division)
    check_ungrouped(division)


def check_ungrouped(division: Division) -> None:
    """Checks that BatchNorm normalises all views of a batch together (`Objective.check`).

    Raises:
      InputError: if it normalises groups that are smaller than the batch.

    Example:
      >>> check_ungrouped(Division(batch_size=256, batch_norm_group=256))
    """
    if (division.batch_norm_group or division.batch_size) < division.batch_size:
        raise InputError(
            f"BatchNorm normalises groups of {division.batch_norm_group} images (batch_norm_group), whose statistics "
            "give the views of an image away: leave it unset, so that the whole batch is normalised together."
        )


def in_one_pass(
    net: Net, params: Any, stats: Any, batches: Sequence[Float[Array, "_ h w 3"]], key: jax.Array
) -> tuple[list[Output], Any]:
    """Applies a net in training mode to several batches of images in one forward pass, so that BatchNorm sees them all.

    The batches are interleaved: where BatchNorm normalises groups of the batch (`batch_norm_group`), each group holds
    images of all of them in proportion, and a batch that is split over devices stays where it is.

    Returns:
      The output for each batch, and the new statistics.

    Example:
      >>> import types
      >>> apply_train = lambda params, stats, images, key: (Output(images, images), {"mean": images.mean()})
      >>> net = types.SimpleNamespace(apply_train=apply_train)
      >>> batches = [jnp.zeros((2, 1)), jnp.ones((4, 1))]
      >>> outputs, stats = in_one_pass(net, {}, {}, batches, key=None)
      >>> [output.logits.shape for output in outputs], round(float(stats["mean"]), 2)
      ([(2, 1), (4, 1)], 0.67)
    """
    blocks = math.gcd(*map(len, batches))
    divided = [images.reshape(blocks, len(images) // blocks, *images.shape[1:]) for images in batches]
    together = jnp.concatenate(divided, 1)
    output, stats = net.apply_train(params, stats, together.reshape(-1, *together.shape[2:]), key)
    ends = [sum(part.shape[1] for part in divided[: i + 1]) for i in range(len(divided))]

    def rows(part, end):
        def select(x):
            own = x.reshape(blocks, len(x) // blocks, *x.shape[1:])[:, end - part.shape[1] : end]
            return own.reshape(blocks * part.shape[1], *x.shape[1:])  # not -1: logits may have no columns

        return jax.tree.map(select, output)

    return [rows(part, end) for part, end in zip(divided, ends, strict=True)], stats
