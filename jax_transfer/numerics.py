"""Arithmetic shared by several formulas."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def positive(value: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Replaces 0 with 1, so that the result is a safe divisor. NaN stays NaN.

    >>> import jax.numpy as jnp
    >>> positive(jnp.array([0.0, 2.0, jnp.nan])).tolist()
    [1.0, 2.0, nan]
    """
    return jnp.where(value == 0, 1, value)
