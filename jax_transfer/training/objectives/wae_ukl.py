"""The autoencoder whose penalty is an upper bound of KL(distribution of all codes || prior): WAE-UKL of VTAB."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.fields import Count, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.autoencoder import Codes, autoencoder, gaussian_codes
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import check_compared


def mixture_kl(codes: Codes) -> Float[Array, ""]:
    """Estimates KL(q || p) in nats, for the distribution q of the codes of all images and the prior p = N(0, 1).

    The mixture of the codes of a batch, q_b(z) = 1/b sum_j q(z | x_j), stands for q, and one draw z_i from each of its
    components for the expectation under it:

        1/b sum_i (log q_b(z_i) - log p(z_i)),   z_i ~ q(z | x_i)

    This is the random-mixture estimator, by Monte Carlo (RAM-MC), of Rubenstein et al., "Practical and Consistent
    Estimation of f-divergences", NeurIPS 2019, arXiv:1905.11112, section 2. Its expectation is that of KL(q_b || p),
    which is at least KL(q || p) since KL is convex (their proposition 1), and at most the mean of KL(q(z | x_i) || p),
    the penalty of a VAE. The difference to the latter is an estimate of the information of codes about their images.

    Example:
      >>> mean, log_variance = jnp.zeros((4, 2)), jnp.zeros((4, 2))  # all codes have the distribution of the prior
      >>> round(abs(float(mixture_kl(Codes(mean, log_variance, jnp.ones((4, 2)))))), 5)
      0.0
    """
    mean, log_variance, z = codes.mean, jnp.asarray(codes.log_variance), codes.z
    # The differences are not expanded into products, because variances may be small; the compiler fuses the sum.
    squares = (jnp.square(z[:, None] - mean) * jnp.exp(-log_variance) + log_variance).sum(-1)
    log_mixture = jax.nn.logsumexp(-squares / 2, axis=1) - math.log(len(z))
    return (log_mixture + jnp.square(z).sum(-1) / 2).mean()


def wae_ukl(
    net: Net,
    augment: tuple[str, ...],
    *,
    latent_dim: Count = 128,
    decoder_width: Count = 32,
    weight: NotNegative = 1.0,
) -> Objective:
    """Makes the objective of WAE-UKL, (|x - decode(z)|^2 + weight * upper bound of KL(q || p)) / number of values.

    One of the generative models of VTAB (Zhai et al., 2019, arXiv:1910.04867), a Wasserstein autoencoder (Tolstikhin
    et al., 2018, arXiv:1711.01558) with the bound of Rubenstein et al. (see `mixture_kl`) as its divergence. Codes are
    Gaussian, see `gaussian_codes`; the rest is in `autoencoder`. The bound compares all images of the global batch.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.
      latent_dim: dimension of the codes.
      decoder_width: channels of the decoder, see `new_decoder`.
      weight: weight of the bound.

    Returns:
      The objective, with the metrics "squared_error" and "penalty"; its model is the net alone.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = wae_ukl(resnet10(num_classes=0, width=8), ("flip",), latent_dim=16, decoder_width=4)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["code"]["kernel"].shape  # mean and logarithm of the variance
      (64, 32)
    """

    def penalty(critic, codes, key, weight):
        return weight * mixture_kl(codes)

    settings = {"latent_dim": latent_dim, "decoder_width": decoder_width, "weight": weight}
    return autoencoder(net, augment, gaussian_codes, penalty, **settings, check=check_compared)
