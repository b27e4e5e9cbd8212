"""Patches of images, and the task of telling where they come from, for `relative_patch` and `jigsaw`.

Following Kolesnikov et al. (2019, arXiv:1901.09005, section 3.2): an image is cut into a grid of 3 x 3 cells, a patch
at a random place of each cell is normalised by itself, and the embeddings of several patches are classified together.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer.data.augment import random_crop
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net
from jax_transfer.records import InputError
from jax_transfer.training.objectives.objective import Objective, head_and_backbone
from jax_transfer.training.objectives.parts import linear, loss_and_accuracy, new_linear

SIDE = 3  # cells along each side of an image
PATCHES = SIDE**2


def cut_patches(key: jax.Array, images: Float[Array, "b h w c"], jitter: float) -> Float[Array, "9*b p p c"]:
    """Cuts a patch from each of the 3 x 3 cells of each image, in rows 9 i to 9 i + 8, from left to right and down.

    A cell has a side of cell = floor(min(h, w) / 3) pixels and a patch one of p = cell - round(jitter * cell). Each
    patch is at a uniformly random place in its cell, so that the edges of two patches do not continue each other.

    Raises:
      InputError: if the images have fewer than 3 pixels along a side.

    Example:
      >>> cut_patches(jax.random.key(0), jnp.zeros((2, 32, 32, 3)), jitter=0.25).shape
      (18, 8, 8, 3)
    """
    b, height, width, channels = images.shape
    cell = min(height, width) // SIDE
    if not cell:
        raise InputError(
            f"images of {height}x{width} pixels cannot be cut into {SIDE}x{SIDE} patches: use larger ones."
        )
    grid = images[:, : SIDE * cell, : SIDE * cell].reshape(b, SIDE, cell, SIDE, cell, channels).swapaxes(2, 3)
    patch = max(1, cell - round(jitter * cell))
    return random_crop(key, grid.reshape(-1, cell, cell, channels), Preprocessing(image_size=patch))


def standardise(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scales each image to mean 0 and standard deviation 1 over its pixels and channels.

    The deviation is taken to be at least 1e-3, so that an image of one colour becomes 0.

    Example:
      >>> standardise(jnp.array([[[[1.0], [3.0]]]])).ravel().tolist()
      [-1.0, 1.0]
    """
    axes = tuple(range(1, images.ndim))
    return (images - images.mean(axes, keepdims=True)) / jnp.maximum(images.std(axes, keepdims=True), 1e-3)


def classify_tuples(
    net: Net,
    augment: tuple[str, ...],
    tuples: Int[np.ndarray, "s m"],
    drawn: int,
    jitter: float,
    embedding: int,
    hidden: int,
) -> Objective:
    """Makes the objective "mean cross-entropy of telling which m patches of an image are shown, in which order".

    The net sees nine patches of each image, cut by `cut_patches` and then standardised, in one pass. Patches that are
    smaller than `net.min_image_size`, in pixels, are enlarged to it: those of any size for nets whose images have a
    fixed size, such as a ViT. A linear layer embeds the features of each patch. The embeddings of the patches of a
    tuple are concatenated, and a hidden layer with ReLU and a linear one classify them as one of the s tuples.

    In Kolesnikov et al. the hidden layer also has BatchNorm and dropout, which are left out, and the representation
    that they evaluate is the mean over nine patches. Here the features are those of the whole image, as for every
    checkpoint, although BatchNorm has averaged the statistics of patches. Statistics of whole images instead, at the
    price of a forward pass, made a small net's k-NN accuracy higher (30.0 instead of 27.0 %, CIFAR-10) but a linear
    probe's lower (31.9 instead of 32.6 %).

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations of the whole image.
      tuples: the numbers of the patches of each class, 0 to 8.
      drawn: number of tuples, the same for all images of a step, which are drawn in each step.
      jitter: see `cut_patches`.
      embedding: columns of the embedding of a patch.
      hidden: width of the hidden layer.

    Returns:
      The objective. Its metric is "patch_accuracy", in training mode; its model is the net without the other layers.
    """
    choices, shown = tuples.shape

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        widths = {
            "embedding": (net.feature_dim, embedding),
            "hidden": (shown * embedding, hidden),
            "output": (hidden, choices),
        }
        head = {name: new_linear(jax.random.fold_in(key, i), *widths[name]) for i, name in enumerate(widths, 1)}
        return {"net": params, "head": head}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,) = views["train"].images
        key_net, key_cut, key_draw = jax.random.split(key, 3)
        patches = standardise(cut_patches(key_cut, images, jitter))
        if patches.shape[1] < net.min_image_size:
            sides = (net.min_image_size, net.min_image_size)
            patches = jax.image.resize(patches, (len(patches), *sides, patches.shape[-1]), "bilinear")
        output, stats = net.apply_train(params["net"], aux["stats"], patches, key_net)
        embedded = linear(params["head"]["embedding"], output.features).reshape(-1, PATCHES, embedding)
        classes = jax.random.permutation(key_draw, choices)[:drawn]
        joined = embedded[:, jnp.asarray(tuples)[classes]].reshape(-1, shown * embedding)
        logits = linear(params["head"]["output"], jax.nn.relu(linear(params["head"]["hidden"], joined)))
        value, accuracy = loss_and_accuracy(logits, jnp.tile(classes, len(images)))
        return value, ({"stats": stats}, {"patch_accuracy": accuracy})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("head",),)),
    )
