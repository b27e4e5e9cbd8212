"""Held-out samples for scores that train a classifier, chosen from the labels alone: the same for all checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jax_transfer.analysis.arguments import as_labels


def stratified_fifth(y: Int[Array, "n"]) -> Int[Array, "m"]:
    """Selects about a fifth of the samples of each class, m = max(1, round(n / 5)) in total.

    The result depends only on y, and not on how the classes are numbered. It is the same for numpy, JAX and traced
    labels. The sample of a class that has only one is not held out, as long as the other classes have enough samples.
    (`jax_transfer.data.subsets.stratified_split` rounds the number for each class, so the size of its result depends on
    the labels, which a compiled program does not allow.)

    Args:
      y: labels, whole numbers from 0.

    Returns:
      Indices [m] in ascending order.

    Raises:
      InputError: if y has the wrong type, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> y = jnp.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
      >>> y[stratified_fifth(y)].tolist()
      [0, 1]
    """
    y = as_labels(y, None, None)
    n = len(y)
    drawn = jnp.asarray(np.random.default_rng(0).permutation(n))  # a random rank for each sample
    order = jnp.lexsort((drawn, y))
    grouped = y[order]
    first, last = (jnp.searchsorted(grouped, grouped, side=side) for side in ("left", "right"))
    # Sample r of a class with n_c samples is held out if (r + 1/2) / n_c is below a threshold common to all classes.
    # This holds out about n_c / 5 samples.
    share = jnp.zeros(n).at[order].set((jnp.arange(n) - first + 0.5) / (last - first))
    return jnp.sort(jnp.lexsort((drawn, share))[: max(1, round(n / 5))])


def held_out_last(held_out: Int[Array, "m"], order: Int[Array, "n"]) -> tuple[Int[Array, "n-m"], Int[Array, "m"]]:
    """Returns (rows to fit on, rows to test on), as ascending row indices into x[order].

    Args:
      held_out: indices of the samples to test on.
      order: a permutation of all n samples.

    Example:
      >>> import jax.numpy as jnp
      >>> fitted, tested = held_out_last(jnp.array([0]), jnp.array([2, 0, 1]))
      >>> fitted.tolist(), tested.tolist()
      ([0, 2], [1])
    """
    n, m = len(order), len(held_out)
    is_held_out = jnp.zeros(n, bool).at[held_out].set(True)
    rows = jnp.argsort(is_held_out[order], stable=True)
    return rows[: n - m], rows[n - m :]


def are_different(held_out: Int[Array, "m"], n: int) -> Bool[Array, ""]:
    """Returns whether the held-out indices lie in [0, n) without duplicates.

    Example:
      >>> import jax.numpy as jnp
      >>> bool(are_different(jnp.array([0, 2]), 3)), bool(are_different(jnp.array([0, 0]), 3))
      (True, False)
    """
    ordered = jnp.sort(held_out)
    return jnp.all(ordered[1:] > ordered[:-1]) & (ordered[0] >= 0) & (ordered[-1] < n)
