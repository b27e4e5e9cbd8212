"""The variational autoencoder (Kingma and Welling, 2014, arXiv:1312.6114)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.fields import Count, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.autoencoder import autoencoder, gaussian_codes
from jax_transfer.training.objectives.objective import Objective


def kl_to_prior(mean: Float[Array, "b e"], log_variance: Float[Array, "b e"]) -> Float[Array, ""]:
    """Computes KL(N(mean_i, diag(variance_i)) || N(0, 1)) in nats, averaged over the rows i.

    Appendix B of Kingma and Welling: 1/2 sum_k (mean_k^2 + variance_k - log variance_k - 1).

    Example:
      >>> float(kl_to_prior(jnp.full((1, 3), 2.0), jnp.zeros((1, 3))))
      6.0
    """
    return (jnp.square(mean) + jnp.expm1(log_variance) - log_variance).sum(-1).mean() / 2


def vae(
    net: Net,
    augment: tuple[str, ...],
    *,
    latent_dim: Count = 128,
    decoder_width: Count = 32,
    weight: NotNegative = 1.0,
) -> Objective:
    """Makes the objective of a VAE, (|x - decode(z)|^2 + weight * KL(q(z | x) || N(0, 1))) / number of values.

    It is the negative evidence lower bound, times a constant, of a decoder N(decode(z), weight / 2) (equation 10 of
    Kingma and Welling with one draw of z). Codes are Gaussian, see `gaussian_codes`; the rest is in `autoencoder`.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.
      latent_dim: dimension of the codes.
      decoder_width: channels of the decoder, see `new_decoder`.
      weight: weight of the divergence, twice the variance of the decoder.

    Returns:
      The objective, with the metrics "squared_error" and "penalty"; its model is the net alone.

    Example:
      >>> import jax
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = vae(resnet10(num_classes=0, width=8), ("flip",), latent_dim=16, decoder_width=4)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["code"]["kernel"].shape  # mean and logarithm of the variance
      (64, 32)
    """

    def penalty(critic, codes, key, weight):
        return weight * kl_to_prior(codes.mean, codes.log_variance)

    settings = {"latent_dim": latent_dim, "decoder_width": decoder_width, "weight": weight}
    return autoencoder(net, augment, gaussian_codes, penalty, **settings)
