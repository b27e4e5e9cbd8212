"""Arithmetic that more than one formula needs."""

import jax.numpy as jnp


def positive(value):
    """value, or 1 where it is 0: a safe divisor that lets NaN through."""
    return jnp.where(value == 0, 1, value)
