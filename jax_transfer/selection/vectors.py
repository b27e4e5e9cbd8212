"""Checks the vectors that a selection compares, and normalises them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_transfer.analysis.arguments import as_features, is_traced
from jax_transfer.records import InputError


def as_vectors(x, name: str, axes: str, metric: str, advice: str) -> Float[Array, "n d"]:
    """Converts vectors to float32 as `as_features` does, and checks their values unless they are traced.

    Args:
      x: vectors, one a row.
      name: name of the argument, used in messages.
      axes: names of the expected axes.
      metric: "cosine" if the vectors must have a direction.
      advice: what to do about a row that is not finite, used in messages.

    Raises:
      InputError: if x has the wrong type or shape, a row is not finite, or a row is 0 and the metric is cosine. The
        message names the first such row.

    Example:
      >>> as_vectors([[3.0, 4.0], [0.0, 0.0]], "x", "n d", "cosine", "remove it")
      Traceback (most recent call last):
      jax_transfer.records.InputError: x[1] is a zero vector (1 of 2 rows are): it has no direction to compare. ...
    """
    x = as_features(x, name, axes)
    if is_traced(x):
        return x
    largest = np.asarray(_largest(x))
    wrong = np.flatnonzero(~np.isfinite(largest))
    if len(wrong):
        value = "NaN" if np.isnan(largest[wrong[0]]) else "an infinite value"
        raise InputError(f"{name}[{wrong[0]}] holds {value} ({len(wrong):,} of {len(x):,} rows do): {advice}.")
    zero = np.flatnonzero(largest == 0)
    if metric == "cosine" and len(zero):
        raise InputError(
            f"{name}[{zero[0]}] is a zero vector ({len(zero):,} of {len(x):,} rows are): it has no direction to "
            'compare. Leave such rows out, or use metric="l2".'
        )
    return x


@jax.jit  # so that no copy of x is made
def _largest(x: Float[Array, "n d"]) -> Float[Array, "n"]:
    return jnp.max(jnp.abs(x), axis=1)
