"""Masked autoencoding: predicting the hidden patches of an image from the visible ones (He et al., 2022)."""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer import devices
from jax_transfer.fields import Count, Few, Rule
from jax_transfer.models.mae_decoder import masked_decoder
from jax_transfer.models.net import Net
from jax_transfer.records import InputError
from jax_transfer.training.objectives.objective import Objective, head_and_backbone


def patch_values(images: Float[Array, "b h w 3"], patch: int) -> Float[Array, "b n 3*patch*patch"]:
    """Returns the values of each patch, row by row, with mean 0 and variance 1 in each patch.

    The variance is the unbiased one, plus 1e-6, as in the code of He et al. (section 4.1, "w/ norm").

    Example:
      >>> patch_values(jnp.ones((2, 8, 12, 3)), patch=4).shape
      (2, 6, 48)
    """
    b, h, w, c = images.shape
    patches = images.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(b, -1, patch * patch * c)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)


def draw_visible(key: jax.Array, b: int, n: int, m: int) -> tuple[Int[Array, "b m"], Int[Array, "b n"]]:
    """Draws m of n patches for each image.

    Returns:
      The numbers of these patches, and the place of each patch in a random order of all of them, which begins with
      these: less than m for them, and at least m for the others.

    Example:
      >>> kept, places = draw_visible(jax.random.key(0), b=1, n=4, m=3)
      >>> sorted(places[0, kept[0]].tolist())
      [0, 1, 2]
    """
    order = jnp.argsort(jax.random.uniform(key, (b, n)), axis=1)
    return order[:, :m], jnp.argsort(order, axis=1)


def mae(
    net: Net,
    augment: tuple[str, ...],
    *,
    mask_ratio: Annotated[float, Rule(lambda x: 0 < x < 1, "lie in (0, 1)")] = 0.75,
    decoder_layers: Few = 8,
    decoder_width: Count = 512,
    decoder_heads: Few = 16,
) -> Objective:
    """Makes the objective of a masked autoencoder, the mean squared error of the values of the hidden patches.

    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377. The net sees only the
    visible patches, a random quarter of each image by default; a transformer predicts the values of the hidden ones
    from their tokens. These values are those of the augmented and normalised image, with mean 0 and variance 1 in each
    patch (`patch_values`). The paper's position embedding of the net is fixed; ours is learned, as in supervised
    training.

    Its feed is "train"; its labels are not used.

    Args:
      net: a vision transformer; its classification head, if it has one, is not used.
      augment: names of the augmentations; the paper has a random crop and flips.
      mask_ratio: share of the patches that are hidden.
      decoder_layers, decoder_width, decoder_heads: number of blocks, width of the tokens, and heads of the decoder.

    Returns:
      The objective. Its model is the net alone, whose features are those of the class token of whole images.

    Raises:
      InputError: if the net is no vision transformer, or no patch is hidden or visible.

    Example:
      >>> from jax_transfer.models import MODELS
      >>> net = MODELS["vit_tiny_patch4_32"](num_classes=0, image_size=16)
      >>> objective = mae(net, ("flip",), decoder_layers=1, decoder_width=32, decoder_heads=2)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["decoder"]["pred"]["kernel"].shape
      (32, 48)
    """
    encode = net.encode_train
    if encode is None:
        raise InputError(
            f"objective mae hides patches from a vision transformer, not from {net.name}: use a vit_* model."
        )
    patch = net.shapes["params/patch_embed/proj/kernel"][0]
    n = net.shapes["params/pos_embed"][1] - 1
    m = round(n * (1 - mask_ratio))
    if not 0 < m < n:
        raise InputError(
            f"mask_ratio = {mask_ratio}: {m} of the {n} patches of {net.name} would be visible; some must be, "
            "and not all."
        )
    decoder = masked_decoder(
        token_dim=net.feature_dim,
        grid=(math.isqrt(n),) * 2,
        outputs=3 * patch**2,
        width=decoder_width,
        layers=decoder_layers,
        heads=decoder_heads,
        dtype=jnp.dtype(devices.compute_dtype()).name,
    )

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        return {"net": params, "decoder": decoder.init(jax.random.fold_in(key, 1))[0]}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,) = views["train"].images
        key_visible, key_net = jax.random.split(key)
        kept, places = draw_visible(key_visible, len(images), n, m)
        tokens = encode(params["net"], aux["stats"], images, kept, key_net)
        predicted = decoder.apply(params["decoder"], {}, (tokens, places))
        errors = jnp.square(predicted - patch_values(images, patch)).mean(-1)
        return jnp.where(places >= m, errors, 0).sum() / (len(images) * (n - m)), (aux, {})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("decoder",),)),
    )
