"""Canonical order of samples and classes, which makes randomised scores independent of the given order."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


def canonical(
    x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, held_out: Int[Array, "m"] | None = None
) -> tuple[Float[Array, "n d"], Int[Array, "n"], Int[Array, ""], Int[Array, "n"]]:
    """Sorts samples by their values and numbers the classes in order of first appearance in the sorted samples.

    Samples with equal values are sorted by a hash of all samples of their class, and then with those in `held_out`
    last. Exchanging samples that are still tied has no effect.

    Args:
      x: features.
      y: labels in [0, num_classes).
      num_classes: C, static.
      held_out: indices of the samples to test on, or None.

    Returns:
      (features, labels, number of classes that occur, order). `order` holds the index in x of each sorted sample.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[3.0], [1.0], [2.0]]), jnp.array([1, 0, 1])
      >>> first, second = canonical(x, y, 2), canonical(x[::-1], 1 - y[::-1], 2)
      >>> bool((first[0] == second[0]).all() and (first[1] == second[1]).all()), int(first[2])
      (True, 2)
    """
    hashed, is_held_out = hash_of_values(x), jnp.zeros(len(y), bool)
    if held_out is not None:
        is_held_out = is_held_out.at[held_out].set(True)
    class_hash = jnp.zeros(num_classes, jnp.uint32).at[y].add(hashed * jnp.where(is_held_out, np.uint32(0x85EBCA6B), 1))
    order = jnp.lexsort((is_held_out, class_hash[y], hashed))
    x, y = x[order], y[order]
    first = jnp.full(num_classes, len(y)).at[y].min(jnp.arange(len(y)))
    new_label = jnp.zeros(num_classes, int).at[jnp.argsort(first)].set(jnp.arange(num_classes))
    return x, new_label[y].astype(y.dtype), jnp.sum(first < len(y)), order


def order_of_values(x: Float[Array, "n d"]) -> Int[Array, "n"]:
    """Returns the indices that sort the rows into an order that depends only on their values.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0], [1.0], [2.0]])
      >>> bool((x[order_of_values(x)] == x[::-1][order_of_values(x[::-1])]).all())
      True
    """
    return jnp.argsort(hash_of_values(x))


def hash_of_values(x: Float[Array, "n d"]) -> UInt32[Array, "n"]:
    """Hashes each row to a 32-bit integer, in exact integer arithmetic; equal rows have equal hashes.

    Example:
      >>> import jax.numpy as jnp
      >>> first, second, other = hash_of_values(jnp.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]]))
      >>> bool(first == second), bool(first == other)
      (True, False)
    """
    bits = jax.lax.bitcast_convert_type(x + 0, jnp.uint32).reshape(len(x), -1)  # + 0: -0 equals 0
    odd = 2 * np.random.default_rng(0).integers(2**31, size=bits.shape[1], dtype=np.uint32) + 1
    bits = bits * np.uint32(0x9E3779B1)
    return jnp.sum((bits ^ (bits >> 15)) * odd, axis=1, dtype=jnp.uint32)
