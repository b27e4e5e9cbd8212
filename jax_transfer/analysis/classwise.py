"""Applies a function to the samples of each class, although a compiled program must know the shapes of its arrays."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMALLEST_BLOCK = 32  # rows


def by_class(
    function: Callable[[Float[Array, "m d"], Int[Array, ""]], Float[Array, ""]],
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    classes: Int[Array, "c"],
) -> tuple[Float[Array, "c"], Int[Array, "c"]]:
    """Returns function(rows of a class, number of rows) for each class, and these numbers.

    The rows of a class come first in a block of 32, 64, 128, ... or n rows; the other rows of the block are 0. The
    function is compiled once for each size, and the data determine which one runs. Under vmap all of them would run:
    wrap the caller in `jax.custom_batching.sequential_vmap`.

    Args:
      function: function(rows [m, d], count) -> scalar, where only the first `count` rows differ from 0.
      x: features, or another vector for each sample.
      y: labels.
      classes: the classes; one that does not occur has the count 0.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0], [2.0], [4.0]]), jnp.array([1, 0, 1])
      >>> sums, counts = by_class(lambda rows, count: jnp.sum(rows), x, y, jnp.arange(3))
      >>> sums.tolist(), counts.tolist()
      ([2.0, 5.0, 0.0], [1, 2, 0])
    """
    # After sorting by class, the rows of a class form a block. It is read with the smallest static size that fits it.
    x, y = x[jnp.argsort(y)], jnp.sort(y)
    starts, ends = jnp.searchsorted(y, classes, side="left"), jnp.searchsorted(y, classes, side="right")
    sizes = [SMALLEST_BLOCK]
    while sizes[-1] < len(x):
        sizes.append(min(2 * sizes[-1], len(x)))

    def of_block(size: int, start: Int[Array, ""], count: Int[Array, ""]) -> Float[Array, ""]:
        rows = jnp.arange(size)
        block = x.at[start + rows].get(mode="fill", fill_value=0)
        return function(jnp.where(rows[:, None] < count, block, 0), count)

    def of_class(bounds: tuple[Int[Array, ""], Int[Array, ""]]) -> Float[Array, ""]:
        start, count = bounds[0], bounds[1] - bounds[0]
        smallest = jnp.searchsorted(jnp.array(sizes), count)
        return jax.lax.switch(smallest, [functools.partial(of_block, size) for size in sizes], start, count)

    return jax.lax.map(of_class, (starts, ends)), ends - starts
