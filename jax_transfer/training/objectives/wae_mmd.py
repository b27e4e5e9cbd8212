"""The Wasserstein autoencoder whose codes match the prior in mean discrepancy (Tolstikhin et al., ICLR 2018)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_transfer.fields import Count, NotNegative
from jax_transfer.models.net import Net
from jax_transfer.training.objectives.autoencoder import autoencoder, deterministic_codes
from jax_transfer.training.objectives.objective import Objective
from jax_transfer.training.objectives.parts import check_compared, similarities

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # those of the authors' code


def inverse_multiquadratic(x: Float[Array, "a e"], y: Float[Array, "b e"]) -> Float[Array, "a b"]:
    """Computes the kernel k(x_i, y_j) = sum_s C_s / (C_s + |x_i - y_j|^2) with C_s = 2 e s for the s in SCALES.

    2 e is the expected squared distance of two draws from the prior N(0, 1) of e dimensions (Tolstikhin et al.,
    section 4).

    Example:
      >>> inverse_multiquadratic(jnp.zeros((1, 3)), jnp.zeros((2, 3))).tolist()
      [[7.0, 7.0]]
    """
    squares = jnp.square(x).sum(-1)[:, None] + jnp.square(y).sum(-1) - 2 * similarities(x, y)
    distances, typical = jnp.maximum(squares, 0), 2 * x.shape[-1]
    return jnp.stack([typical * s / (typical * s + distances) for s in SCALES]).sum(0)


def mmd(x: Float[Array, "n e"], y: Float[Array, "n e"]) -> Float[Array, ""]:
    """Estimates the squared maximum mean discrepancy of the distributions of which x and y are n draws each.

        1 / (n (n - 1)) sum_{i != j} (k(x_i, x_j) + k(y_i, y_j)) - 2 / n^2 sum_{i, j} k(x_i, y_j)

    The unbiased estimate of Tolstikhin et al., algorithm 2, with `inverse_multiquadratic`; it may be negative. Of a
    batch that is split over devices, only x and y are gathered.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 64, 4))
      >>> bool(abs(mmd(x[0], x[1])) < 0.1 < mmd(x[0], x[1] + 1))
      True
    """
    n, others = len(x), ~jnp.eye(len(x), dtype=bool)
    within = sum(jnp.where(others, inverse_multiquadratic(z, z), 0).sum() for z in (x, y)) / (n * (n - 1))
    return within - 2 * inverse_multiquadratic(x, y).mean()


def wae_mmd(
    net: Net,
    augment: tuple[str, ...],
    *,
    latent_dim: Count = 128,
    decoder_width: Count = 32,
    weight: NotNegative = 100.0,
) -> Objective:
    """Makes the objective of WAE-MMD, (|x - decode(z)|^2 + weight * MMD^2(codes, prior)) / number of values.

    Algorithm 2 of Tolstikhin et al., "Wasserstein Auto-Encoders", ICLR 2018, arXiv:1711.01558, with deterministic codes
    and as many draws from the prior N(0, 1) as images; see `mmd` and `autoencoder`. The estimate compares all images of
    the global batch.

    Args:
      net: a net; its classification head, if it has one, is not used.
      augment: names of the augmentations.
      latent_dim: dimension of the codes.
      decoder_width: channels of the decoder, see `new_decoder`.
      weight: weight of the divergence; 100 is the paper's for CelebA.

    Returns:
      The objective, with the metrics "squared_error" and "penalty"; its model is the net alone.

    Example:
      >>> from jax_transfer.models.resnet import resnet10
      >>> objective = wae_mmd(resnet10(num_classes=0, width=8), ("flip",), latent_dim=16, decoder_width=4)
      >>> params, aux = jax.eval_shape(objective.init, jax.random.key(0), None)
      >>> params["code"]["kernel"].shape
      (64, 16)
    """

    def penalty(critic, codes, key, weight):
        return weight * mmd(jax.random.normal(key, codes.z.shape), codes.z)

    settings = {"latent_dim": latent_dim, "decoder_width": decoder_width, "weight": weight}
    return autoencoder(net, augment, deterministic_codes, penalty, **settings, check=check_compared)
