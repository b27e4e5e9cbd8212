"""One order of samples and one numbering of classes, whatever those given: so that a score with chance in it has one value."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


def canonical(
    x: Float[Array, "n d"], y: Int[Array, "n"], num_classes: int, held_out: Int[Array, "m"] | None = None
) -> tuple[Float[Array, "n d"], Int[Array, "n"], Int[Array, ""], Int[Array, "n"]]:
    """Samples in an order that depends on their values alone, classes numbered as they appear in it, how many occur, and
    the order: indices into the samples given.

    Equal samples are ordered by the samples that their classes hold, then those of `held_out` last: what is still equal can
    be exchanged without an effect.
    """
    value, is_held_out = hash_of_values(x), jnp.zeros(len(y), bool)
    if held_out is not None:
        is_held_out = is_held_out.at[held_out].set(True)
    of_class = jnp.zeros(num_classes, jnp.uint32).at[y].add(value * jnp.where(is_held_out, np.uint32(0x85EBCA6B), 1))
    order = jnp.lexsort((is_held_out, of_class[y], value))
    x, y = x[order], y[order]
    first = jnp.full(num_classes, len(y)).at[y].min(jnp.arange(len(y)))
    number = jnp.zeros(num_classes, int).at[jnp.argsort(first)].set(jnp.arange(num_classes))
    return x, number[y].astype(y.dtype), jnp.sum(first < len(y)), order


def order_of_values(x: Float[Array, "n d"]) -> Int[Array, "n"]:
    """An order of the rows by their values, the same whatever the order given."""
    return jnp.argsort(hash_of_values(x))


def hash_of_values(x: Float[Array, "n d"]) -> UInt32[Array, "n"]:
    """A number for each row, exact in integers."""
    bits = jax.lax.bitcast_convert_type(x + 0, jnp.uint32).reshape(len(x), -1)  # + 0: -0 equals 0
    odd = 2 * np.random.default_rng(0).integers(2**31, size=bits.shape[1], dtype=np.uint32) + 1
    bits = bits * np.uint32(0x9E3779B1)
    return jnp.sum((bits ^ (bits >> 15)) * odd, axis=1, dtype=jnp.uint32)
