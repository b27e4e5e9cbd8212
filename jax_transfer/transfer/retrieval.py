"""Retrieval of captions for images and of images for captions: ranks, recalls, and what chance would give.

The protocol is that of PVSE (Song and Soleymani, "Polysemous Visual-Semantic Embedding for Cross-Modal Retrieval",
CVPR 2019, arXiv:1906.04402, section 4.2) on COCO: all captions are ranked for each image, and all images for each
caption. An image or a caption has k embeddings, and its similarity to another one is that of the best pair.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.records import InputError

CUTOFFS = (1, 5, 10)  # of the recalls
TILE_BYTES = 2**26  # of the inner products that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Direction:
    """How well queries of one kind find their matching items.

    Attributes:
      recalls: cutoff -> share of the queries with a matching item among that many most similar ones, in [0, 1].
      chance: cutoff -> the recall that a random order of the items has on average.
      median_rank: median over the queries of the place of the best matching item, 1 for the most similar item.
    """

    recalls: dict[int, float]
    chance: dict[int, float]
    median_rank: float


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Recalls in both directions, averaged over the folds.

    Attributes:
      image_to_text: images as queries, captions as items.
      text_to_image: captions as queries, images as items.
      folds: number of folds.
      num_images: number of images in each fold.
      num_captions: number of captions in all folds together.
    """

    image_to_text: Direction
    text_to_image: Direction
    folds: int
    num_images: int
    num_captions: int

    @property
    def rsum(self) -> float:
        """Sum of the six recalls, in [0, 6]; the papers print it in percent, 100 times as much."""
        return math.fsum([*self.image_to_text.recalls.values(), *self.text_to_image.recalls.values()])

    @property
    def chance_rsum(self) -> float:
        """The rsum that random orders have on average."""
        return math.fsum([*self.image_to_text.chance.values(), *self.text_to_image.chance.values()])


def retrieval(
    images: Float[Array | np.ndarray, "n k e"],
    captions: Float[Array | np.ndarray, "m l e"],
    owner: Int[Array | np.ndarray, "m"],
    folds: int = 1,
) -> Retrieval:
    """Computes the recalls at 1, 5 and 10 of captions for images and of images for captions.

    Any caption of an image is right for it. Of equally similar items, the right ones come last (`ranks`), so embeddings
    that have collapsed to one point find nothing. Recalls are in [0, 1], where the papers print percent.

    With `folds`, the images are divided into consecutive folds of equal size, each is ranked among its own captions
    alone, and the results are averaged: COCO's 1K protocol is `folds=5` on 5,000 images, the 5K protocol `folds=1`.

    Args:
      images: k embeddings of each image, usually of length 1.
      captions: l embeddings of each caption, usually of length 1, in any order.
      owner: index of the image that each caption belongs to.
      folds: number of folds.

    Returns:
      The `Retrieval`.

    Raises:
      InputError: if shapes or types are wrong, an embedding is not finite, an owner is not an image, an image has no
        caption, or the folds do not divide the images.

    Example:
      >>> images = np.eye(4, dtype=np.float32)[:, None]  # one embedding each
      >>> captions = np.eye(4, dtype=np.float32)[[0, 0, 1, 3, 2, 3], None]  # those of images 2 and 3 are mixed up
      >>> result = retrieval(images, captions, owner=np.array([0, 0, 1, 2, 3, 3]))
      >>> result.image_to_text.recalls[1], round(result.image_to_text.chance[1], 3), result.image_to_text.median_rank
      (0.5, 0.25, 1.5)
    """
    _check(images, captions, owner, folds)
    images, captions = jnp.asarray(images), jnp.asarray(captions)  # once, for both directions and all folds
    _check_finite("images", images)
    _check_finite("captions", captions)
    all_owners, size = np.asarray(owner), len(images) // folds
    results = []
    for fold in range(folds):
        own, texts, owners = images, captions, all_owners
        if folds > 1:
            rows = np.flatnonzero(all_owners // size == fold)
            own, texts, owners = images[fold * size : (fold + 1) * size], captions[rows], all_owners[rows] - fold * size
        numbers = np.arange(size)
        of_images = _direction(ranks(own, texts, numbers, owners), np.bincount(owners, minlength=size), len(owners))
        of_captions = _direction(ranks(texts, own, owners, numbers), np.ones(len(owners), int), size)
        results.append((of_images, of_captions))
    there, back = (_mean(directions) for directions in zip(*results, strict=True))
    return Retrieval(there, back, folds=folds, num_images=size, num_captions=len(all_owners))


@jax.jit
def ranks(
    queries: Float[Array, "n k e"], items: Float[Array, "m l e"], query_ids: Int[Array, "n"], item_ids: Int[Array, "m"]
) -> Int[Array, "n"]:
    """Counts for each query the items that do not match it and are at least as similar as its best matching item.

    An item matches a query with the same id. The similarity of a query and an item is the largest inner product of one
    of the query's embeddings and one of the item's (multi-instance learning, PVSE, section 3.3). A query has a match
    among its r most similar items if its rank is less than r.

    A tie counts against the query: ordered by their index, items that are all equal could have the ranks of good ones.
    Similarities of vectors of length 1 are equal if they differ by at most 1.2e-7 sqrt(e), the rounding error of a sum
    of e numbers in float32 (4e-6 for 1,024). Without this, rounding would decide between equal items: at the edges of a
    matrix, products can be summed up in another order than elsewhere. For vectors of other lengths, it is multiplied
    by the largest ones of the query and of the items.

    Inner products are computed in float32, for a block of queries and all items at a time, which takes about
    1.5 * TILE_BYTES beside the arguments.

    Args:
      queries: k embeddings of each query.
      items: l embeddings of each item.
      query_ids, item_ids: for images as queries, the numbers of the images and the owners of the captions; for captions
        as queries, the other way round.

    Returns:
      Ranks int32, 0 at best; m for a query that no item matches.

    Example:
      >>> captions = jnp.array([[[1.0, 0.0]], [[0.8, 0.6]], [[1.0, 0.0]]])  # the last one equals the first
      >>> ranks(captions[:2], captions, jnp.array([0, 1]), jnp.array([0, 1, 2])).tolist()
      [1, 0]
    """
    n, k, e = queries.shape
    m, l, _ = items.shape
    block = max(1, min(n, TILE_BYTES // (4 * k * m * l)))
    rows = items.astype(jnp.float32).reshape(m * l, e)
    rounding = math.sqrt(e) * jnp.finfo(jnp.float32).eps * jnp.sqrt(jnp.square(rows).sum(1).max())

    def of_block(start) -> Int[Array, "b"]:
        own = jax.lax.dynamic_slice_in_dim(queries, start, block).astype(jnp.float32)
        # The first embeddings of all queries, then the second ones: the maximum below then runs over whole rows.
        columns = own.transpose(2, 1, 0).reshape(e, k * block)
        products = jnp.matmul(rows, columns, precision="float32")
        similarity = products.reshape(m, l, k, block).max((1, 2))
        matches = item_ids[:, None] == jax.lax.dynamic_slice_in_dim(query_ids, start, block)
        # From the same matrix product as the others, since another one may sum up in yet another order.
        best = jnp.where(matches, similarity, -jnp.inf).max(0)
        best -= rounding * jnp.sqrt(jnp.square(own).sum(2).max(1))
        return jnp.sum(~matches & (similarity >= best), 0, dtype=jnp.int32)

    # The last block begins earlier if the queries do not fill it, so that no padded copy of them is needed.
    starts = jnp.minimum(jnp.arange(0, n, block), n - block)
    blocks = jax.lax.map(of_block, starts)
    last = n - block * (len(starts) - 1)
    return jnp.concatenate([blocks[:-1].ravel(), blocks[-1, block - last :]])


def chance_recall(matching: Int[np.ndarray, "n"], num_items: int, cutoff: int) -> float:
    """Returns the recall at a cutoff that a random order of the items has on average.

        mean_i 1 - C(m - r_i, c) / C(m, c),   r_i of m items match query i, c = min(cutoff, m)

    is the probability that one of the first c items matches.

    Args:
      matching: number of items that match each query.
      num_items: number of items, m.
      cutoff: number of items that are looked at.

    Example:
      >>> chance_recall(np.array([1]), 1000, 10), round(chance_recall(np.array([5]), 25_000, 1), 6)
      (0.01, 0.0002)
    """
    cutoff = min(cutoff, num_items)
    counts, times = np.unique(matching, return_counts=True)
    # Whole numbers of any size, since the quotient of two large logarithms would lose the digits of a small chance.
    ways = math.comb(num_items, cutoff)
    found = [(ways - math.comb(num_items - count, cutoff)) / ways for count in counts.tolist()]
    return math.fsum(np.asarray(found) * times) / len(matching)


def shared_captions(texts: Sequence[str], owner: Int[np.ndarray, "m"]) -> int:
    """Counts the captions that another image has too, word for word.

    Their embeddings are equal. For each of these images, the captions of the others tie with its own one and count
    against it, and as a query such a caption can have only one of the images as the most similar one.

    Args:
      texts: the captions.
      owner: index of the image that each caption belongs to.

    Raises:
      InputError: if there are not as many owners as captions.

    Example:
      >>> shared_captions(["a cat", "a cat", "a dog", "a dog"], np.array([0, 0, 1, 2]))
      2
    """
    if len(texts) != len(owner):
        raise InputError(f"{len(texts):,} captions and {len(owner):,} owners: expected the image of each caption.")
    images_with: dict[str, set[int]] = {}
    for text, image in zip(texts, np.asarray(owner).tolist(), strict=True):
        images_with.setdefault(text, set()).add(image)
    return sum(len(images_with[text]) > 1 for text in texts)


def _direction(rank: Int[Array, "n"], matching: Int[np.ndarray, "n"], num_items: int) -> Direction:
    """Summarises the ranks of queries; `matching` of the items match each of them."""
    values = np.asarray(rank)
    return Direction(
        {cutoff: float(np.mean(values < cutoff)) for cutoff in CUTOFFS},
        {cutoff: chance_recall(matching, num_items, cutoff) for cutoff in CUTOFFS},
        float(np.median(values)) + 1,
    )


def _mean(directions: Sequence[Direction]) -> Direction:
    """Averages the results of several folds."""

    def mean(values) -> float:
        return math.fsum(values) / len(directions)

    return Direction(
        {cutoff: mean(each.recalls[cutoff] for each in directions) for cutoff in CUTOFFS},
        {cutoff: mean(each.chance[cutoff] for each in directions) for cutoff in CUTOFFS},
        mean(each.median_rank for each in directions),
    )


def _check(images, captions, owner, folds: int) -> None:
    """Checks the arguments of `retrieval`, but not whether embeddings are finite."""
    for name, x, axes in (("images", images, "n k e"), ("captions", captions, "m l e")):
        if np.ndim(x) != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"{name} holds {x.dtype} of shape {list(np.shape(x))}: expected floating point embeddings of shape "
                f"[{', '.join(axes.split())}], none of them 0; add an axis if there is one embedding each."
            )
    if images.shape[2] != captions.shape[2]:
        raise InputError(
            f"images have embeddings of {images.shape[2]:,} numbers and captions of {captions.shape[2]:,}: expected "
            "the same size, from one model."
        )
    n, indices = len(images), np.asarray(owner)
    if indices.shape != captions.shape[:1] or indices.dtype.kind not in "iu":
        raise InputError(
            f"owner holds {indices.dtype} of shape {list(indices.shape)}: expected the index of an image for each of "
            f"{len(captions):,} captions."
        )
    wrong = np.flatnonzero((indices < 0) | (indices >= n))
    if len(wrong):
        raise InputError(
            f"owner[{wrong[0]}] is {indices[wrong[0]]} ({len(wrong):,} of {len(indices):,} captions are of images that "
            f"are not there): expected 0 to {n - 1}; leave these captions out, or add their images."
        )
    bare = np.flatnonzero(np.bincount(indices, minlength=n) == 0)
    if len(bare):
        raise InputError(
            f"image {bare[0]} has no caption ({len(bare):,} of {n:,} images have none): expected at least one for each "
            "image; leave these images out."
        )
    if folds < 1 or n % folds:
        raise InputError(
            f"folds = {folds} does not divide {n:,} images: use a divisor, such as 5 for the 5,000 images of COCO's 1K "
            "protocol."
        )


def _check_finite(name: str, x: Float[Array, "n k e"]) -> None:
    finite = np.asarray(_finite(x))
    if not finite.all():
        raise InputError(
            f"{name}[{np.argmin(finite)}] has an embedding that is not finite ({np.sum(~finite):,} of {len(finite):,} "
            "have): look for what went wrong in the training of the model."
        )


@jax.jit  # so that no copy of x is made
def _finite(x: Float[Array, "n k e"]) -> Bool[Array, "n"]:
    return jnp.isfinite(x).all((1, 2))
