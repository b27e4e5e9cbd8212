"""TransRate: the mutual information of features and labels, measured by coding rates (Huang et al., ICML 2022).

    TransRate = R(Z) - sum_c n_c / n R(Z_c),   R(Z) = 1/2 logdet(I + Z'Z / (n eps)),

where Z holds the centred features and Z_c the rows of class c, which are not centred again. A coding rate is a sum over
the singular values of Z. These are computed from the R factor of a QR factorisation, since a Gram matrix in float32
would lose the singular values near sqrt(n eps).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, scored
from jax_transfer.analysis.classwise import by_class
from jax_transfer.analysis.hscore import varying
from jax_transfer.numerics import positive


def transrate(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, eps: float = 1e-4) -> Float[Array, ""]:
    """Computes TransRate, R(Z) - sum_c n_c / n R(Z_c), in nats.

    Huang et al., "Frustratingly Easy Transferability Estimation", ICML 2022, equations 4 and 5. Higher is better.

    Args:
      x: features. Shifting or rotating them does not change the score, but scaling them does.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.
      eps: the distortion, > 0, in squared units of the features.

    Returns:
      A scalar of x's dtype: 0 for constant features, NaN if a feature is not finite. If rounding x to its dtype changes
      a feature by more than sqrt(eps) (with the default eps: float32 features above 80,000), the square of the rounding
      error replaces eps for that feature, so that rounding errors do not count as features.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.2], [0.8, -0.3], [0.1, 1.0], [-0.1, 0.9]])
      >>> informative, shuffled = transrate(x, jnp.array([0, 0, 1, 1]), 2), transrate(x, jnp.array([0, 1, 0, 1]), 2)
      >>> round(float(informative), 2), round(float(shuffled), 2)
      (0.15, 0.08)
    """
    num_classes, x = as_count(num_classes), as_features(x)
    as_number(eps, "eps", lambda eps: 0 < eps < float("inf"), "a positive number; the paper uses 1e-4")
    y = as_labels(y, num_classes, len(x))
    return scored(lambda x, y: _transrate(x, y, eps, num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _transrate(
    x: Float[Array, "n d"], y: Int[Array, "n"], eps: float | Float[Array, ""], num_classes: int
) -> Float[Array, ""]:
    eps = jnp.asarray(eps, x.dtype)
    z, rounding = varying(x)
    z = z * jnp.minimum(1, jnp.sqrt(eps) / positive(rounding))  # for these columns, rounding^2 replaces eps
    with jax.default_matmul_precision("float32"):
        return _difference(z, y, jnp.arange(num_classes), eps)


# Sequential: QR and SVD process a batch one matrix at a time anyway, and lax.switch then runs only one of the branches.
@jax.custom_batching.sequential_vmap
def _difference(
    z: Float[Array, "n d"], y: Int[Array, "n"], classes: Int[Array, "c"], eps: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns R(Z) - sum_c n_c / n R(Z_c) of centred features z."""
    n, d = z.shape
    scale = positive(jnp.max(jnp.abs(z)))
    z = z / scale
    # Sorted by descending norm, so that small columns keep their accuracy in the QR.
    z = z[:, jnp.argsort(-jnp.linalg.norm(z, axis=0))]

    def rate(z: Float[Array, "m d"], count: Int[Array, ""] | int) -> Float[Array, ""]:
        """Returns the coding rate R of `count` samples; any further rows of z are 0."""
        z = z if z.shape[0] >= d else z.T
        s = jnp.linalg.svd(jnp.linalg.qr(z, mode="r"), compute_uv=False)
        log_ratio = 2 * (jnp.log(s) + jnp.log(scale)) - jnp.log(jnp.fmax(count, 1) * eps)
        return jnp.sum(jnp.logaddexp(0, log_ratio)) / 2  # log(1 + s^2 / (n eps)) without overflow

    rates, counts = by_class(rate, z, y, classes)
    return rate(z, n) - jnp.sum(counts * rates) / n
