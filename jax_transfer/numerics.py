"""Arithmetic shared by several formulas."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def positive(value: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Replaces 0 with 1, so that the result is a safe divisor. NaN stays NaN.

    >>> import jax.numpy as jnp
    >>> positive(jnp.array([0.0, 2.0, jnp.nan])).tolist()
    [1.0, 2.0, nan]
    """
    return jnp.where(value == 0, 1, value)


def unit(x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """Divides vectors by their lengths, in float32; a vector of zeros stays one, and its gradient is finite.

    >>> import jax.numpy as jnp
    >>> [[round(value, 2) for value in row] for row in unit(jnp.array([[3e30, 4e30], [0.0, 0.0]])).tolist()]
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    # Squares of large values would overflow. The result does not depend on the scale, so neither does its gradient.
    x = x / positive(jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True)))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
