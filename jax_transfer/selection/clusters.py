"""Clusters vectors by K-means on the device, and averages vectors by group.

The score x . c - |c|^2 / 2 of a centre orders the centres of a row as the distance does, without the norm of the row.
Scores are computed for a tile of rows at a time, so no array has n x k entries.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_transfer import devices
from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, as_seed, is_traced
from jax_transfer.choose import choose
from jax_transfer.numerics import positive, unit
from jax_transfer.records import InputError
from jax_transfer.selection.vectors import as_vectors

# Number of floats of a tile, [rows, k]; 2**23 are 4,194 rows of 2,000 scores.
TILE = {"cpu": 2**23, "default": 2**26}
# The start chooses each centre among this many candidates, on this many rows a cluster. With many candidates, a sample
# of the rows gives better centres in less time than all rows with the 2 + log k candidates of scikit-learn.
CANDIDATES = 64
START_ROWS = 40
SMALLEST = 1e-10  # squared distance to the nearest centre below which a row equals it, relative to the largest |x|^2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
    """A partition of n vectors into k clusters, none of which is empty.

    Attributes:
      centers: means of the clusters; for the metric cosine, their directions (of length 1).
      labels: index of the nearest centre of each vector.
      inertia: sum of the squared distances of the vectors to their centres; for the metric cosine, of the vectors
        scaled to length 1, which is 2 (1 - cos) each.
      iterations: number of times that the vectors were assigned to centres.
      converged: whether the last iteration lowered the inertia by no more than the tolerance.
    """

    centers: Float[Array, "k d"]
    labels: Int[Array, "n"]
    inertia: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def kmeans(
    x: Float[Array, "n d"],
    num_clusters: int,
    *,
    metric: str = "cosine",
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 5e-5,
) -> Clusters:
    """Clusters vectors by Lloyd's iterations from a greedy k-means++ start on a sample of them.

    Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++", SODA 2007. With the metric
    cosine this is spherical K-means (Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001): vectors and centres have length 1. A cluster that loses all of its vectors continues from the
    vector that is farthest from its centre.

    The peak of memory is three times the size of x, with x itself, and 0.6 GB or less for tiles, labels and the start:
    at most 2.2 GB for a million vectors of 128 dimensions and 2,000 clusters.

    Args:
      x: vectors, of any scale.
      num_clusters: k, static.
      metric: "cosine" or "l2" (Euclidean distance), static.
      seed: seed of the start. The same seed gives the same clusters on the same device.
      max_iterations: maximum number of iterations. More are made while a cluster is empty.
      tolerance: the iterations stop when one lowers the inertia by no more than this fraction of it. At the default,
        the inertia is about a thousandth above that of the fixed point; 0 stops when it no longer falls.

    Returns:
      `Clusters`, whose labels are the nearest centres, and whose inertia is that of both.

    Raises:
      InputError: if x has the wrong type or shape, a row is not finite or, with the metric cosine, 0, there are fewer
        rows, or fewer different rows, than clusters, the metric is unknown, or another argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> clusters = kmeans(jnp.array([[0.0, 1.0], [0.0, 2.0], [3.0, 0.1], [5.0, 0.0]]), 2)
      >>> a, b, c, d = clusters.labels.tolist()
      >>> a == b != c == d, bool(clusters.converged)
      (True, True)
    """
    choose(METRICS, metric, "metric")
    x = as_vectors(x, "x", "n d", metric, "leave such rows out")
    k = as_count(num_clusters, "num_clusters", least=1)
    if k > len(x):
        raise InputError(f"num_clusters = {k:,}, but x has {len(x):,} rows: expected at most as many clusters as rows.")
    max_iterations = as_count(max_iterations, "max_iterations", least=1)
    as_number(tolerance, "tolerance", lambda value: 0 <= value < 1, "a fraction in [0, 1)")
    key = jax.random.key(as_seed(seed))
    clusters = _kmeans(x, key, max_iterations, tolerance, num_clusters=k, metric=metric, **_tiling(len(x), k))
    if not is_traced(x):
        found = len(np.unique(np.asarray(clusters.labels)))
        if found < k:
            rows = "directions" if metric == "cosine" else "rows"
            raise InputError(
                f"num_clusters = {k:,}, but x has only {found:,} different {rows}: use at most {found:,} clusters."
            )
    return clusters


def group_means(
    x: Float[Array, "n d"], labels: Int[Array, "n"], num_groups: int
) -> tuple[Float[Array, "c d"], Int[Array, "c"]]:
    """Computes the mean of the vectors of each group, such as the features of a class or a cluster.

    Args:
      x: vectors.
      labels: group of each vector, in [0, num_groups).
      num_groups: c, static.

    Returns:
      (means [c, d], NaN for a group without vectors; number of vectors of each group [c]).

    Raises:
      InputError: if an argument has the wrong type or shape, or a label is out of range.

    Example:
      >>> means, counts = group_means([[1.0], [3.0], [5.0]], [0, 0, 2], 3)
      >>> means[:, 0].tolist(), counts.tolist()
      ([2.0, nan, 5.0], [2, 0, 1])
    """
    x = as_features(x)
    c = as_count(num_groups, "num_groups", least=1)
    labels = as_labels(labels, c, len(x), "labels", "num_groups")
    return _group_means(x, labels, c=c, **_tiling(len(x), c))


@functools.partial(jax.jit, static_argnames=("c", "rows", "as_product"))
def _group_means(x, labels, *, c: int, rows: int, as_product: bool):
    counts = _counts(labels, c)
    sums = _group_sums(_padded(x, rows, 0), _padded(labels, rows, c), c, as_product)
    return sums / counts[:, None], counts


def _tiling(n: int, k: int, backend: str | None = None) -> dict[str, Any]:
    """Returns how to divide n rows for k clusters on a backend: into tiles of `rows`, which are nearly equal.

    Accelerators add up rows `as_product` with a one-hot matrix, since otherwise the order of the sums is random there.
    """
    is_cpu = (backend or devices.kind()) == "cpu"
    tiles = math.ceil(n * k / TILE["cpu" if is_cpu else "default"])
    return {"rows": math.ceil(n / min(tiles, n)), "as_product": not is_cpu}


def _padded(x: Shaped[Array, "n ..."], rows: int, value) -> Shaped[Array, "tiles rows ..."]:
    """Divides x into tiles of equally many rows; those that are missing from the last are `value`."""
    missing = -len(x) % rows
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
    return x.reshape(-1, rows, *x.shape[1:])


def _counts(labels: Int[Array, "..."], k: int) -> Int[Array, "k"]:
    return jnp.zeros(k, jnp.int32).at[labels.reshape(-1)].add(1, mode="drop")


def _group_sums(
    tiles: Float[Array, "tiles rows d"], labels: Int[Array, "tiles rows"], k: int, as_product: bool
) -> Float[Array, "k d"]:
    """Adds up the rows of each group. The label k marks a row that belongs to none."""

    def add(sums, tile):
        rows, labels = tile
        if as_product:
            return sums + jax.nn.one_hot(labels, k, dtype=rows.dtype, axis=0) @ rows, None
        return sums.at[labels].add(rows, mode="drop"), None

    with jax.default_matmul_precision("float32"):
        return jax.lax.scan(add, jnp.zeros((k, tiles.shape[-1]), tiles.dtype), (tiles, labels))[0]


class _State(NamedTuple):
    """Lloyd's iterations: the last assignment to `centers`, and the `updated` centres for the next."""

    centers: Float[Array, "k d"]
    labels: Int[Array, "tiles rows"]
    inertia: Float[Array, ""]
    updated: Float[Array, "k d"]
    refilled: Bool[Array, ""]  # whether an empty cluster continues from another vector
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def _directions(x, tiles):
    return jax.lax.map(unit, tiles), jnp.ones((), x.dtype), jnp.zeros((), x.dtype)


def _centred(x, tiles):
    scale = positive(jnp.max(jnp.abs(x)))  # the squares of large values would overflow
    origin = jnp.full(len(x), 1 / len(x), x.dtype) @ x / scale  # a large common offset would cancel in the scores
    return jax.lax.map(lambda tile: tile / scale - origin, tiles), scale, origin


# Metric -> function (x, its tiles) -> (tiles for Euclidean K-means, scale, origin): x = (tiles + origin) * scale.
METRICS = {"cosine": _directions, "l2": _centred}


@functools.partial(jax.jit, static_argnames=("num_clusters", "metric", "rows", "as_product"))
def _kmeans(
    x: Float[Array, "n d"],
    key: Key[Array, ""],
    max_iterations: int,
    tolerance: float,
    *,
    num_clusters: int,
    metric: str,
    rows: int,
    as_product: bool,
) -> Clusters:
    n, k = len(x), num_clusters
    is_row = _padded(jnp.ones(n, bool), rows, False)
    with jax.default_matmul_precision("float32"):
        tiles, scale, origin = METRICS[metric](x, _padded(x, rows, 0))
        squares = jax.lax.map(lambda tile: jnp.sum(tile**2, axis=1), tiles) * is_row
        smallest, total = SMALLEST * jnp.max(squares), jnp.sum(jnp.sum(squares, axis=1))
        sample = jax.random.permutation(jax.random.fold_in(key, k), n)[: START_ROWS * k]
        start = _start(tiles[sample // rows, sample % rows], k, key)

        def squared_distances(centers, labels):
            """Returns those to the given centres, accurate if they are small; -1 for rows that fill the last tile."""

            def of_tile(tile):
                rows, labels, is_row = tile
                return jnp.where(is_row, jnp.sum((rows - centers[labels]) ** 2, axis=1), -1)

            return jax.lax.map(of_tile, (tiles, labels, is_row))

        def refill(centers, labels, means, is_empty):
            """Moves the centres of empty clusters to the vectors that are farthest from their own centres."""
            distances, farthest = jax.lax.top_k(squared_distances(centers, labels).reshape(-1), k)
            rank = jnp.cumsum(is_empty) - 1
            can_move = is_empty & (distances[rank] > smallest)
            points = tiles[farthest[rank] // rows, farthest[rank] % rows]
            return jnp.where(can_move[:, None], points, means), jnp.any(can_move)

        def iteration(state: _State) -> _State:
            centers = state.updated
            labels, best = _assign(tiles, centers)
            labels = jnp.where(is_row, labels, k)
            inertia = total - 2 * jnp.sum(jnp.sum(jnp.where(is_row, best, 0), axis=1))
            counts = _counts(labels, k)[:, None]
            means, has_mean = _group_sums(tiles, labels, k, as_product) / jnp.maximum(counts, 1), counts > 0
            if metric == "cosine":  # the mean of opposite vectors has no direction
                means, has_mean = unit(means), has_mean & jnp.any(means != 0, axis=1, keepdims=True)
            means = jnp.where(has_mean, means, centers)
            is_empty = counts[:, 0] == 0
            updated, refilled = jax.lax.cond(
                jnp.any(is_empty),
                lambda: refill(centers, labels, means, is_empty),
                lambda: (means, jnp.array(False)),
            )
            rounding = jnp.finfo(x.dtype).eps * total
            converged = ~refilled & (state.inertia - inertia <= jnp.maximum(tolerance * inertia, rounding))
            return _State(centers, labels, inertia, updated, refilled, state.iterations + 1, converged)

        def unfinished(state: _State) -> Bool[Array, ""]:
            within = state.iterations < max_iterations
            return ~state.converged & (within | (state.refilled & (state.iterations < max_iterations + k)))

        labels = jnp.zeros(is_row.shape, jnp.int32)
        infinite, no = jnp.array(jnp.inf, x.dtype), jnp.array(False)
        state = _State(start, labels, infinite, start, no, jnp.array(0), no)
        state = jax.lax.while_loop(unfinished, iteration, state)
        distances = jnp.maximum(squared_distances(state.centers, state.labels), 0)
    inertia = jnp.sum(jnp.sum(distances, axis=1)) * scale**2
    labels = state.labels.reshape(-1)[:n]
    return Clusters((state.centers + origin) * scale, labels, inertia, state.iterations, state.converged)


def _assign(
    tiles: Float[Array, "tiles rows d"], centers: Float[Array, "k d"]
) -> tuple[Int[Array, "tiles rows"], Float[Array, "tiles rows"]]:
    """Returns the nearest centre of each row, and its score x . c - |c|^2 / 2."""
    halves = jnp.sum(centers**2, axis=1) / 2

    def of_tile(rows):
        scores = rows @ centers.T - halves
        return jnp.argmax(scores, axis=1).astype(jnp.int32), jnp.max(scores, axis=1)

    return jax.lax.map(of_tile, tiles)


def _start(x: Float[Array, "m d"], k: int, key: Key[Array, ""]) -> Float[Array, "k d"]:
    """Chooses k rows by greedy k-means++.

    The candidates for a centre are drawn with probabilities proportional to the squared distance to the nearest centre
    so far. Of them, the one that lowers the sum of these distances most is taken.
    """
    squares = jnp.sum(x**2, axis=1)

    def add(nearest: Float[Array, "m"], index):
        cumulative = jnp.cumsum(nearest)
        draws = jax.random.uniform(jax.random.fold_in(key, index), (CANDIDATES,), x.dtype) * cumulative[-1]
        candidates = jnp.minimum(jnp.searchsorted(cumulative, draws, side="right"), len(x) - 1)
        distances = squares[:, None] - 2 * x @ x[candidates].T + squares[candidates]
        reduced = jnp.maximum(jnp.minimum(nearest[:, None], distances), 0)
        best = jnp.argmin(jnp.sum(reduced, axis=0))
        return reduced[:, best], candidates[best]

    first = jnp.sum((x - x[0]) ** 2, axis=1)  # the rows are in a random order
    _, others = jax.lax.scan(add, first, jnp.arange(k - 1))
    return x[jnp.concatenate([jnp.zeros(1, others.dtype), others])]
