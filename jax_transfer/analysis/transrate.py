"""TransRate: mutual information of features and labels by coding rates (Huang et al., ICML 2022).

    TransRate = R(Z) - sum_c n_c / n R(Z_c),   R(Z) = 1/2 logdet(I + Z'Z / (n eps)),

Z the centred features and Z_c the rows of class c, not centred again. A rate is a sum over the singular values of Z,
taken from the triangle of a QR: in a Gram matrix float32 loses those that lie near sqrt(n eps).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, scored
from jax_transfer.analysis.hscore import varying
from jax_transfer.numerics import positive

SMALLEST_BLOCK = 32


def transrate(x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, eps: float = 1e-4) -> Float[Array, ""]:
    """R(Z) - sum_c n_c / n R(Z_c), in nats (equations 4 and 5 of the paper). Higher is better.

    Args:
      x: features. The score does not change under shifts and rotations of them; their scale counts.
      y: labels in [0, num_classes); a class without samples changes nothing.
      num_classes: C, static.
      eps: the distortion, > 0, in squared units of the features.

    Returns:
      A scalar of x's dtype, 0 for constant features, NaN for features that are not finite. The distortion of a
      feature is no finer than its rounding: it is the square of that where rounding x to its dtype moves it by more than
      sqrt(eps) (float32 features above 80,000), or the errors would count as features.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels that are traced give NaN if they are out of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    as_number(eps, "eps", lambda eps: 0 < eps < float("inf"), "a positive number; the paper's is 1e-4")
    y = as_labels(y, num_classes, len(x))
    return scored(lambda x, y: _transrate(x, y, eps, num_classes), x, y, num_classes)


@functools.partial(jax.jit, static_argnames="num_classes")
def _transrate(x, y, eps, num_classes):
    eps = jnp.asarray(eps, x.dtype)
    z, rounding = varying(x)
    z = z * jnp.minimum(1, jnp.sqrt(eps) / positive(rounding))  # a column's distortion: rounding^2 in place of eps
    with jax.default_matmul_precision("float32"):
        return _difference(z, y, jnp.arange(num_classes), eps)


@jax.custom_batching.sequential_vmap  # so that lax.switch stays a branch; QR and SVD run through a batch one by one anyway
def _difference(z, y, classes, eps):
    n, d = z.shape
    scale = positive(jnp.max(jnp.abs(z)))
    z = z / scale
    z = z[:, jnp.argsort(-jnp.linalg.norm(z, axis=0))]  # columns of falling size: small ones keep their digits

    def rate(z, count):
        """R of rows z, of which all but `count` are zero."""
        z = z if z.shape[0] >= d else z.T
        s = jnp.linalg.svd(jnp.linalg.qr(z, mode="r"), compute_uv=False)
        log_ratio = 2 * (jnp.log(s) + jnp.log(scale)) - jnp.log(jnp.fmax(count, 1) * eps)
        return jnp.sum(jnp.logaddexp(0, log_ratio)) / 2  # log(1 + s^2 / (n eps)) without overflow

    # Rows sorted by class: a class is a block, read with the smallest of a few static sizes that holds it.
    z, y = z[jnp.argsort(y)], jnp.sort(y)
    starts, ends = jnp.searchsorted(y, classes, side="left"), jnp.searchsorted(y, classes, side="right")
    sizes = [SMALLEST_BLOCK]
    while sizes[-1] < n:
        sizes.append(min(2 * sizes[-1], n))

    def rate_of_block(size, start, count):
        rows = jnp.arange(size)
        block = z.at[start + rows].get(mode="fill", fill_value=0)
        return rate(jnp.where(rows[:, None] < count, block, 0), count)

    def rate_of_class(bounds):
        start, count = bounds[0], bounds[1] - bounds[0]
        smallest = jnp.searchsorted(jnp.array(sizes), count)
        return jax.lax.switch(smallest, [functools.partial(rate_of_block, size) for size in sizes], start, count)

    rates = jax.lax.map(rate_of_class, (starts, ends))
    return rate(z, n) - jnp.sum((ends - starts) * rates) / n
