"""Which samples a score that learns is tested on, from the labels alone: the same for all checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_transfer.analysis.arguments import as_labels


def stratified_fifth(y: Int[Array, "n"]) -> Int[Array, "m"]:
    """Sorted indices of a fifth of the samples, m = round(n / 5) but at least 1: of each class about a fifth.

    It depends on y and on nothing else, with numpy, JAX and traced labels alike, and not on the numbering of the classes.
    A class of one sample is left to fit on, as long as other classes have enough.

    Args:
      y: labels, whole numbers from 0.

    Raises:
      InputError: y has the wrong type, shape or range.

    `stratified_split` of `jax_transfer.data.subsets` rounds class by class, so that its size depends on the labels, which
    a compiled program does not allow.
    """
    y = as_labels(y, None, None)
    n = len(y)
    drawn = jnp.asarray(np.random.default_rng(0).permutation(n))  # a number for each position
    order = jnp.lexsort((drawn, y))
    grouped = y[order]
    first, last = (jnp.searchsorted(grouped, grouped, side=side) for side in ("left", "right"))
    # Sample r of a class of n_c is held out if (r + 1/2) / n_c lies below a common threshold: round(n_c / 5) of them.
    share = jnp.zeros(n).at[order].set((jnp.arange(n) - first + 0.5) / (last - first))
    return jnp.sort(jnp.lexsort((drawn, share))[: max(1, round(n / 5))])


def held_out_last(held_out: Int[Array, "m"], order: Int[Array, "n"]) -> tuple[Int[Array, "n-m"], Int[Array, "m"]]:
    """(rows to fit on, rows to test on): places in x[order] of the others and of the held-out samples, ascending."""
    n, m = len(order), len(held_out)
    is_held_out = jnp.zeros(n, bool).at[held_out].set(True)
    rows = jnp.argsort(is_held_out[order], stable=True)
    return rows[: n - m], rows[n - m :]


def are_different(held_out: Int[Array, "m"], n: int):
    """Whether held-out indices lie in [0, n) and none is given twice."""
    ordered = jnp.sort(held_out)
    return jnp.all(ordered[1:] > ordered[:-1]) & (ordered[0] >= 0) & (ordered[-1] < n)
