"""What the autoencoders have in common: codes of images, their reconstruction, and an objective of both."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.models.decoder import decode, new_decoder
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.objective import Division, Objective, head_and_backbone
from jax_transfer.training.objectives.parts import linear, new_linear


class Codes(NamedTuple):
    """The distributions q(z | x_i) = N(mean_i, diag(exp(log_variance_i))) of the codes of images, and a draw from each.

    Attributes:
      mean, log_variance: parameters of the distributions; the latter is -inf for a deterministic encoder.
      z: the codes that are decoded.
    """

    mean: Float[Array, "b e"]
    log_variance: Float[Array, "b e"]
    z: Float[Array, "b e"]


def gaussian_codes(layer: dict[str, Array], features: Float[Array, "b d"], key: jax.Array) -> Codes:
    """Draws z = mean + exp(log_variance / 2) * noise, where a linear layer of the features gives [mean, log_variance].

    Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, arXiv:1312.6114, section 2.4.

    Example:
      >>> layer = {"kernel": jnp.zeros((5, 6)), "bias": jnp.array([1.0, 2.0, 3.0, -60.0, -60.0, -60.0])}
      >>> gaussian_codes(layer, jnp.ones((1, 5)), jax.random.key(0)).z.tolist()
      [[1.0, 2.0, 3.0]]
    """
    mean, log_variance = jnp.split(linear(layer, features.astype(jnp.float32)), 2, axis=-1)
    noise = jax.random.normal(key, mean.shape)
    return Codes(mean, log_variance, mean + jnp.exp(log_variance / 2) * noise)


def deterministic_codes(layer: dict[str, Array], features: Float[Array, "b d"], key: jax.Array) -> Codes:
    """Computes z as a linear layer of the features; `key` is not used.

    Example:
      >>> layer = {"kernel": jnp.ones((5, 3)), "bias": jnp.zeros(3)}
      >>> deterministic_codes(layer, jnp.ones((1, 5)), jax.random.key(0)).z.tolist()
      [[5.0, 5.0, 5.0]]
    """
    z = linear(layer, features.astype(jnp.float32))
    return Codes(z, jnp.full_like(z, -jnp.inf), z)


def autoencoder(
    net: Net,
    augment: tuple[str, ...],
    encode: Callable[[dict[str, Array], Float[Array, "b d"], jax.Array], Codes],
    penalty: Callable[[Any, Codes, jax.Array, float], Float[Array, ""]],
    *,
    latent_dim: int,
    decoder_width: int,
    weight: float,
    new_critic: Callable[[jax.Array], dict] | None = None,
    check: Callable[[Division], None] = lambda division: None,
) -> Objective:
    """Makes the objective of an autoencoder, (|x - decode(z)|^2 + weight * divergence of the codes) / number of values.

    The squared error is summed over the pixels and channels of an image, and averaged over images. What is encoded and
    reconstructed is the augmented and normalised image. The division by the number of its values, 3 h w, changes no
    optimum, and gives gradients the same scale for all sizes of images.

    Its feed is "train"; its labels are not used. Height and width of the images are multiples of 8.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.
      encode: `gaussian_codes` or `deterministic_codes`, of a linear layer of the net's features.
      penalty: `penalty(critic, codes, key, weight)` is what is added to the loss to bring the distribution of the codes
        near to the prior N(0, 1), mostly weight times a divergence; this weight has been divided by 3 h w.
      latent_dim: dimension of the codes.
      decoder_width: as in `new_decoder`.
      weight: weight of the divergence.
      new_critic: draws the parameters of the penalty from a key, if it has some.
      check: as in `Objective`.

    Returns:
      The objective. Its metrics are the two terms of the loss, "squared_error" and "penalty". Its model is the net
      alone, without the layer of the codes and the decoder.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> net, sizes = resnet10(num_classes=0, width=8), {"latent_dim": 16, "decoder_width": 4}
      >>> plain = autoencoder(net, (), deterministic_codes, lambda critic, codes, key, weight: 0.0, **sizes, weight=0.0)
      >>> sorted(jax.eval_shape(plain.init, jax.random.key(0), None)[0])
      ['code', 'critic', 'decoder', 'net']
    """
    columns = 2 * latent_dim if encode is gaussian_codes else latent_dim

    def init(key, model=None):
        params, stats = net.init(key) if model is None else (model["params"], model["stats"])
        key_code, key_decoder, key_critic = (jax.random.fold_in(key, i) for i in (1, 2, 3))
        new = {
            "code": new_linear(key_code, net.feature_dim, columns),
            "decoder": new_decoder(key_decoder, latent_dim, decoder_width),
            "critic": new_critic(key_critic) if new_critic else {},
        }
        return {"net": params, **new}, {"stats": stats}

    def loss(params, aux, views, key):
        (images,) = views["train"].images
        key_net, key_codes, key_penalty = jax.random.split(key, 3)
        output, stats = net.apply_train(params["net"], aux["stats"], images, key_net)
        codes = encode(params["code"], output.features, key_codes)
        error = jnp.square(decode(params["decoder"], codes.z, *images.shape[1:3]) - images).mean()
        added = penalty(params["critic"], codes, key_penalty, weight / math.prod(images.shape[1:]))
        return error + added, ({"stats": stats}, {"squared_error": error, "penalty": added})

    return Objective(
        init,
        loss,
        model=lambda params, aux: {"params": params["net"], "stats": aux["stats"]},
        views={"train": (augment,)},
        has_head=False,
        groups=functools.partial(head_and_backbone, (("code",), ("decoder",), ("critic",))),
        check=check,
    )
