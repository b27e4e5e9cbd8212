"""Weight imprinting: a classifier of new classes from a few images of each, without training.

Qi, Brown and Lowe, "Low-Shot Learning with Imprinted Weights", CVPR 2018 (arXiv:1712.07136). A classifier that compares
directions predicts argmax_c w_c . f(x) with embeddings f(x) and weights w_c of the length 1, so the mean direction of a
few images of a new class can serve as its weights at once. The scale by which the paper multiplies these cosines is
positive and the same for all classes: it changes the probabilities but not the prediction, and is left out here.

`draw_episodes` chooses the images of many episodes, `imprint` tests the classifiers of all of them in one compiled
call, and `interval` sums the episodes up. With the weights of a tuned classifier for the seen classes, this is the
protocol of "Towards Inadequately Pre-trained Models in Transfer Learning", table 4. Without, it is a fast protocol for
any checkpoint: every class is imprinted, and the nearest prototype by cosine is predicted.
"""

import dataclasses
import operator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jax_transfer.fields import Count, Few, Listed, OneOf, Rule, check_itself
from jax_transfer.numerics import positive, unit
from jax_transfer.records import InputError, printable

SCORES_AT_A_TIME = 2**22  # similarities of test images, to training images or prototypes, that are in memory
LEAST_IMAGES = 32  # test images that are classified at a time, however many similarities each of them has
READING = 16  # multiplications of a matrix product that take as long as reading one similarity


class Protocol(NamedTuple):
    """Which classes a few-shot classifier imprints, and where the weights of the others come from.

    Attributes:
      has_seen: whether some classes have learned weights; otherwise all classes are imprinted.
      is_tuned: whether the checkpoint is tuned on the seen classes, with a cosine classifier whose weights are theirs.
        Otherwise theirs are the `prototypes` of all their training images.
    """

    has_seen: bool
    is_tuned: bool


PROTOCOLS = {
    "imprinting": Protocol(has_seen=True, is_tuned=True),
    "imprinting_frozen": Protocol(has_seen=True, is_tuned=False),
    "prototypes": Protocol(has_seen=False, is_tuned=False),
}


@dataclasses.dataclass(frozen=True)
class FewShotSettings:
    """The fields of `config.fewshot`. The schedule of "imprinting" is that of `config.finetune`, without its grid."""

    methods: Annotated[tuple[Annotated[str, OneOf(PROTOCOLS, "method")], ...], Listed(True, True)] = tuple(PROTOCOLS)
    # Numbers of training images from which a class is imprinted.
    shots: Annotated[tuple[Few, ...], Listed(True, True)] = (1, 2, 5, 10, 20)
    # Number of random draws of these images; rows hold means over the draws and their 95 % intervals.
    num_episodes: Few = 100
    # Target -> names of the classes that are learned, and of those that are imprinted. By default the first half of the
    # classes is learned and the others are imprinted; with one of the two, the other holds all remaining classes.
    seen: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unseen: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Columns of the embedding layer that "imprinting" adds to a checkpoint; unset: none, the features are compared.
    embedding_dim: Count | None = None
    # Number of copies of each training image, augmented as config.finetune.augment says, whose embeddings are averaged
    # for imprinting; 0: the image as it is.
    augmented_copies: Annotated[int, Rule(lambda x: 0 <= x <= 100, "lie in [0, 100]")] = 0

    def __post_init__(self):
        check_itself(self)


@dataclasses.dataclass(frozen=True)
class ClassSplit:
    """Classes of a target, divided into those that a classifier has learned and those that are imprinted.

    Attributes:
      seen: the b classes whose weights are learned; empty if all classes are imprinted.
      unseen: the u classes that are imprinted.
    """

    seen: Int[np.ndarray, "b"]
    unseen: Int[np.ndarray, "u"]


@dataclasses.dataclass(frozen=True)
class FewShotProblem:
    """What a few-shot classifier is made from, and tested on.

    Attributes:
      x: embeddings of the training images, of any scale; or [n, copies, d] of several augmented copies of each.
      y: their labels.
      x_test, y_test: test images of the seen and the unseen classes.
      split: the seen and the unseen classes.
      weights: learned weights of the seen classes, in the order of `split.seen`, of any scale; None if there are none.
        Without tuning, the `prototypes` of all their training images can take their place.
      image_weights: weight of each test image in the accuracies (`cross_validation.image_weights`); None: all equal.
    """

    x: Float[Array | np.ndarray, "n *copies d"]
    y: Int[Array | np.ndarray, "n"]
    x_test: Float[Array | np.ndarray, "m d"]
    y_test: Int[Array | np.ndarray, "m"]
    split: ClassSplit
    weights: Float[Array | np.ndarray, "b d"] | None = None
    image_weights: Float[np.ndarray, "m"] | None = None


@dataclasses.dataclass(frozen=True)
class FewShotResult:
    """Accuracies of the classifiers of all episodes, in [0, 1]; NaN without test images of these classes.

    With `image_weights`, they are weighted means.

    Attributes:
      unseen: of the test images of unseen classes, among all classes.
      seen: of the test images of seen classes, among all classes.
      all: of all test images, among all classes.
      unseen_only: of the test images of unseen classes, among the unseen classes.
      seen_only: of the test images of seen classes, among the seen classes. No episode changes it, so it can choose a
        checkpoint before any class is imprinted.
    """

    unseen: Float[np.ndarray, "episodes"]
    seen: Float[np.ndarray, "episodes"]
    all: Float[np.ndarray, "episodes"]
    unseen_only: Float[np.ndarray, "episodes"]
    seen_only: float


def prototypes(x: Float[Array, "n *copies d"], y: Int[Array, "n"], num_classes: int) -> Float[Array, "c d"]:
    """Computes the weights that imprinting gives each class: the direction of the mean of its directions.

        w_c = v_c / |v_c|,   v_c = mean_{i : y_i = c} x_i / |x_i|

    The average embedding of Qi et al., section 3.2: over several images, and over augmented copies of each.

    Args:
      x: embeddings, of any scale; or [n, copies, d] of several augmented copies of each image. One of zeros adds
        nothing to the sum.
      y: labels in [0, num_classes).
      num_classes: c, static.

    Returns:
      Rows of the length 1. The row of a class without images, or whose directions cancel, is 0; that of a class with an
      embedding that is not finite is NaN.

    Raises:
      InputError: if a shape is wrong, or a concrete label is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[2.0, 0.0], [5.0, 0.0], [0.0, -3.0]])
      >>> prototypes(x, jnp.array([0, 0, 2]), num_classes=3).tolist()
      [[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]
    """
    x, num_classes = _as_embeddings(x, "x", copies=True), _as_count(num_classes, "num_classes")
    if isinstance(y, Tracer):
        labels = y
    else:
        labels = _as_labels(y, "y", len(x))
        if labels.max() >= num_classes:
            raise InputError(f"y holds the label {labels.max()}: expected 0 to {num_classes - 1} (num_classes).")
    return unit(jax.ops.segment_sum(_mean_directions(x), jnp.asarray(labels), num_classes))


def split_classes(num_classes: int, seen=None, unseen=None) -> ClassSplit:
    """Divides the classes of a target into seen and unseen ones; by default, the first half is seen.

    Args:
      num_classes: c; of an odd number, the smaller half is seen.
      seen: the classes whose weights are learned; () for none. None: the first half, or all that are not unseen.
      unseen: the classes that are imprinted. None: all that are not seen.

    Raises:
      InputError: if a class is seen as well as unseen, is out of range or listed twice, or none is unseen.

    Example:
      >>> split = split_classes(5)
      >>> split.seen.tolist(), split.unseen.tolist()
      ([0, 1], [2, 3, 4])
      >>> split_classes(5, seen=[0, 1, 2], unseen=[2, 3])
      Traceback (most recent call last):
      jax_transfer.records.InputError: seen and unseen share the class 2 (1 in all): remove it from one of them.
    """
    every = np.arange(_as_count(num_classes, "num_classes", least=2))
    if seen is None:
        seen = every[: len(every) // 2] if unseen is None else np.setdiff1d(every, _as_classes(unseen, "unseen", every))
    seen = _as_classes(seen, "seen", every)
    unseen = _as_classes(np.setdiff1d(every, seen) if unseen is None else unseen, "unseen", every)
    _refuse_overlap(seen, unseen)
    return ClassSplit(seen, unseen)


def draw_episodes(
    labels: Int[Array | np.ndarray, "n"], classes, shots: int, num_episodes: int, seed: int
) -> Int[np.ndarray, "episodes classes shots"]:
    """Draws the training images of each episode: `shots` of each class, without replacement within an episode.

    The draws of a class depend on nothing but the seed, the class and its images. An episode with fewer shots holds the
    first images of one with more, and more episodes begin with the same ones.

    Args:
      labels: labels of the training images.
      classes: the classes to draw from, such as `ClassSplit.unseen`.
      shots: number of images of each class.
      num_episodes: number of episodes.
      seed: a whole number of at least 0.

    Returns:
      Indices into `labels`; those of classes[k] are in [:, k].

    Raises:
      InputError: if a class has fewer images than `shots`; the message names the class and its number of images. Or if
        an argument has the wrong type or range.

    Example:
      >>> import numpy as np
      >>> rows = draw_episodes(np.array([0, 1, 1, 0, 1]), classes=[1, 0], shots=2, num_episodes=3, seed=0)
      >>> rows.shape, np.sort(rows[0]).tolist()[1]
      ((3, 2, 2), [0, 3])
    """
    labels = _as_labels(labels, "labels")
    classes = _as_classes(classes, "classes")
    shots, num_episodes = _as_count(shots, "shots"), _as_count(num_episodes, "num_episodes")
    seed = _as_count(seed, "seed", least=0)
    drawn = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise InputError(
                f"shots = {shots:,}, but class {label} has {len(members):,} training images: use a smaller number of "
                "shots, or leave the class out."
            )
        keys = np.random.default_rng([seed, label]).random((num_episodes, len(members)))
        drawn.append(members[np.argsort(keys, axis=1, kind="stable")[:, :shots]])
    return np.stack(drawn, axis=1)


def imprint(problem: FewShotProblem, rows: Int[np.ndarray, "episodes u shots"]) -> FewShotResult:
    """Tests the classifiers of all episodes, each imprinted from its own training images, in one compiled call.

    The classifier of an episode has the learned weights of the seen classes, followed by the `prototypes` of the unseen
    ones. A test image is assigned to the class with the largest cosine; of equal ones, to the first in this order. So
    an image whose embedding is 0 goes to the first class.

    Prototypes of several episodes share training images. Where this is faster, the similarities of the test images to
    the training images are computed once, and each prototype adds those of its own, since

        w_c . x = sum_i (u_i . x) / |sum_i u_i|   with the directions u_i of its images.

    Args:
      problem: embeddings, labels, classes and learned weights.
      rows: the result of `draw_episodes` for `problem.split.unseen`: indices of training images, [:, k] those of class
        unseen[k].

    Returns:
      The accuracies. All are NaN if an embedding of a test image or of a training image of an unseen class, or a
      learned weight, is not finite.

    Raises:
      InputError: if shapes or numbers of dimensions differ, seen and unseen classes overlap, the weights do not fit the
        seen classes, a row is not an image of its class, or a test image is of neither a seen nor an unseen class.

    Example:
      >>> import numpy as np
      >>> x, y = np.array([[1.0, 0.1], [0.1, 1.0], [3.0, 0.0], [0.0, 0.5]]), np.array([0, 1, 0, 1])
      >>> split = split_classes(2, seen=())
      >>> result = imprint(FewShotProblem(x, y, x, y, split), draw_episodes(y, split.unseen, 1, 4, seed=0))
      >>> result.all.tolist(), result.seen_only
      ([1.0, 1.0, 1.0, 1.0], nan)
    """
    x, x_test = _as_embeddings(problem.x, "x", copies=True), _as_embeddings(problem.x_test, "x_test")
    y, y_test = _as_labels(problem.y, "y", len(x)), _as_labels(problem.y_test, "y_test", len(x_test))
    seen, unseen = _as_classes(problem.split.seen, "seen"), _as_classes(problem.split.unseen, "unseen")
    _refuse_overlap(seen, unseen)
    weights = _as_weights(problem.weights, len(seen), x.shape[-1])
    if x_test.shape[-1] != x.shape[-1]:
        raise InputError(f"x has {x.shape[-1]} dimensions and x_test {x_test.shape[-1]}: expected those of one model.")
    rows = _as_rows(rows, y, unseen)
    # Only these rows are compared. They depend on no draw, so other episodes need no other program.
    pool = np.flatnonzero(np.isin(y, unseen))
    place = _positions(y_test, np.concatenate([seen, unseen]))
    each = _as_image_weights(problem.image_weights, len(place))
    right, finite = _sum_right(x, pool, np.searchsorted(pool, rows), x_test, place, each, weights)
    right = {name: np.asarray(total, np.float64) for name, total in right.items()}
    is_seen, valid = place < len(seen), bool(finite)

    def share(sums, of):
        return np.where(valid and of.any(), sums / max(each[of].sum(dtype=np.float64), 1e-30), np.nan)

    return FewShotResult(
        unseen=share(right["unseen"], ~is_seen),
        seen=share(right["seen"], is_seen),
        all=share(right["unseen"] + right["seen"], np.ones_like(is_seen)),
        unseen_only=share(right["unseen_only"], ~is_seen),
        seen_only=float(share(right["seen_only"], is_seen)),
    )


def interval(values: Float[np.ndarray, "episodes"]) -> tuple[float, float]:
    """Computes the mean over episodes and the half width of its 95 % confidence interval.

        1.96 s / sqrt(n),   s^2 = sum_i (v_i - mean)^2 / (n - 1)

    By the normal approximation, which suits the hundred episodes of a protocol but is too narrow for a handful. It is
    the uncertainty due to the choice of training images; the test images are the same in all episodes.

    Args:
      values: one accuracy an episode.

    Returns:
      (mean, half width), in the unit of the values. The half width of a single episode is NaN; both are NaN if a value
      is.

    Raises:
      InputError: if there are no values, or they are not a list of numbers.

    Example:
      >>> mean, half_width = interval([0.5, 0.7, 0.6])
      >>> round(mean, 2), round(half_width, 3)
      (0.6, 0.113)
    """
    v = np.asarray(values)
    if v.ndim != 1 or not len(v) or v.dtype.kind not in "fiu":
        raise InputError(f"values has the shape {list(v.shape)}: expected one number for each of the episodes.")
    v = v.astype(np.float64)
    half_width = 1.96 * v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else np.nan
    return float(v.mean()), float(half_width)


@jax.jit
def _sum_right(
    x: Float[Array, "n *copies d"],
    pool: Int[Array, "p"],
    rows: Int[Array, "episodes u shots"],
    x_test: Float[Array, "m d"],
    place: Int[Array, "m"],
    each: Float[Array, "m"],
    weights: Float[Array, "b d"],
) -> tuple[dict[str, Float[Array, "*episodes"]], Bool[Array, ""]]:
    """Adds up the weights of the test images that each episode classifies correctly.

    Args:
      pool: rows of x that episodes use.
      rows: positions in `pool`.
      place: position of the class of each test image among the b + u classes.
      each: weight of each test image.

    Returns:
      (sums by name, whether all embeddings are finite).
    """
    (m, d), (episodes, u, shots), b = x_test.shape, rows.shape, len(weights)
    directions, weights = _mean_directions(x[pool]), unit(weights)
    finite = jnp.isfinite(directions).all() & jnp.isfinite(x_test).all() & jnp.isfinite(weights).all()
    # The weights of a classifier are read from its images once, or its similarities from theirs for each test image.
    shares = len(pool) * d + READING * episodes * u * shots < episodes * u * d
    if shares:
        scales = jax.lax.map(lambda rows: 1 / positive(jnp.linalg.norm(_sums(directions, rows), axis=1)), rows)
    else:
        scales = jnp.ones((episodes, u), x.dtype)

    def of_chunk(chunk):
        # Test images are the last axis: a row is read as a whole, and the maximum over classes is one of vectors.
        x, place, each = chunk
        best_seen, right_seen = _best(weights @ x.T, place)
        similarities = directions @ x.T if shares else None

        def of_episode(episode):
            rows, scales = episode
            if similarities is None:
                scores = unit(_sums(directions, rows)) @ x.T
            else:
                scores = _sums(similarities, rows) * scales[:, None]
            best, right = _best(scores, place - b)
            return {
                "unseen": each @ (right & (best > best_seen)),
                "seen": each @ (right_seen & (best_seen >= best)),
                "unseen_only": each @ right,
            }

        return jax.lax.map(of_episode, (rows, scales)) | {"seen_only": each @ right_seen}

    size = min(m, max(LEAST_IMAGES, SCORES_AT_A_TIME // (len(pool) if shares else max(b, u))))
    padding = -m % size
    x_test = jnp.pad(unit(x_test), ((0, padding), (0, 0))).reshape(-1, size, d)
    place = jnp.pad(place, (0, padding), constant_values=-1).reshape(-1, size)
    each = jnp.pad(each, (0, padding)).reshape(-1, size)
    with jax.default_matmul_precision("float32"):
        sums = jax.lax.map(of_chunk, (x_test, place, each))
    return {name: own.sum(0) for name, own in sums.items()}, finite


def _best(scores: Float[Array, "c t"], label: Int[Array, "t"]) -> tuple[Float[Array, "t"], Bool[Array, "t"]]:
    """Returns the largest score of each image, and whether its label is the first class that has it.

    A label outside of [0, c) is never right. Without classes, the largest score is -inf.
    """
    c, t = scores.shape
    if c == 0:
        return jnp.full(t, -jnp.inf, scores.dtype), jnp.zeros(t, bool)
    # Without the barriers, XLA on CPU computes the scores again for each use, and in a loop without vectors. An argmax
    # takes several times as long as these comparisons.
    scores = jax.lax.optimization_barrier(scores)
    own = jax.lax.optimization_barrier(scores[jnp.clip(label, 0, c - 1), jnp.arange(t)])
    before = jnp.arange(c)[:, None] < label
    beaten = jax.lax.optimization_barrier(((scores > own) | ((scores == own) & before)).astype(jnp.int32))
    return scores.max(0), (beaten.max(0) == 0) & (label >= 0) & (label < c)


def _sums(table: Float[Array, "p t"], rows: Int[Array, "u shots"]) -> Float[Array, "u t"]:
    """Returns the sum of the rows of a table for each class."""

    def add(i, total):
        return total + table.at[rows[:, i]].get(mode="promise_in_bounds")

    shots = rows.shape[1]
    return jax.lax.fori_loop(0, shots, add, jnp.zeros((len(rows), table.shape[1]), table.dtype), unroll=min(shots, 8))


def _mean_directions(x: Float[Array, "n *copies d"]) -> Float[Array, "n d"]:
    """Returns the direction of each embedding, averaged over the copies of an image if there are several."""
    return unit(x) if x.ndim == 2 else unit(x).mean(1)


def _refuse_overlap(seen: Int[np.ndarray, "b"], unseen: Int[np.ndarray, "u"]) -> None:
    """Raises an error if a class is seen as well as unseen, or none is unseen."""
    if len(both := np.intersect1d(seen, unseen)):
        raise InputError(
            f"seen and unseen share the class {both[0]} ({len(both):,} in all): remove it from one of them."
        )
    if not len(unseen):
        raise InputError("No class is unseen: expected at least one to imprint.")


def _as_embeddings(x, name: str, copies: bool = False) -> Float[Array, "n *copies d"]:
    """Converts embeddings to float32.

    Raises:
      InputError: if they are not real numbers, or their shape is not [n, d] or, with `copies`, [n, copies, d].
    """
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.ndim not in ((2, 3) if copies else (2,)) or 0 in x.shape:
        expected = "[n, d] or [n, copies, d]" if copies else "[n, d]"
        raise InputError(f"{name} has the shape {list(x.shape)}: expected {expected} without an empty axis.")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or np.dtype(x.dtype).kind in "iu"):
        raise InputError(f"{name} holds {x.dtype}: expected real numbers, such as float32.")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and the accuracies NaN
        return jnp.asarray(x.astype(np.float32))


def _as_integers(values, name: str, ndim: int = 1) -> np.ndarray:
    """Converts whole numbers of at least 0 to an array of int64; an empty list may have any type."""
    values = np.asarray(values)
    if values.ndim != ndim or (values.size and values.dtype.kind not in "iu"):
        raise InputError(
            f"{name} holds {values.dtype} of shape {list(values.shape)}: expected whole numbers with {ndim} "
            f"{'axis' if ndim == 1 else 'axes'}."
        )
    if values.size and values.min() < 0:
        raise InputError(f"{name} holds {values.min()}: expected whole numbers of at least 0.")
    return values.astype(np.int64)


def _as_labels(labels, name: str, n: int | None = None) -> Int[np.ndarray, "n"]:
    """Converts labels, one for each of n images; None allows any number except 0."""
    labels = _as_integers(labels, name)
    if not len(labels) or (n is not None and len(labels) != n):
        expected = "at least one" if n is None else f"{n:,}, one for each image"
        raise InputError(f"{name} holds {len(labels):,} labels: expected {expected}.")
    return labels


def _as_classes(classes, name: str, every: Int[np.ndarray, "c"] | None = None) -> Int[np.ndarray, "k"]:
    """Converts classes, of which none may occur twice, nor be missing in `every`."""
    classes = _as_integers(classes, name)
    different, counts = np.unique(classes, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{name} lists the class {different[counts > 1][0]} more than once: list it once.")
    if every is not None and len(classes) and classes.max() >= len(every):
        raise InputError(f"{name} holds the class {classes.max()}: expected 0 to {len(every) - 1}.")
    return classes


def _as_weights(weights, b: int, d: int) -> Float[Array, "b d"]:
    """Converts the learned weights of b seen classes; None becomes [0, d]."""
    if weights is None:
        if b:
            raise InputError(
                f"weights is None, but {b:,} classes are seen: give their learned weights [{b}, {d}], or imprint every "
                "class with seen=()."
            )
        return jnp.zeros((0, d), jnp.float32)
    if np.shape(weights) != (b, d):
        raise InputError(
            f"weights has the shape {list(np.shape(weights))}: expected [{b}, {d}], one row of the d dimensions of x "
            "for each seen class."
        )
    return _as_embeddings(weights, "weights") if b else jnp.zeros((0, d), jnp.float32)


def _as_image_weights(each, m: int) -> Float[np.ndarray, "m"]:
    """Converts the weights of m test images; None becomes ones."""
    if each is None:
        return np.ones(m, np.float32)
    if np.shape(each) != (m,) or not (np.isfinite(each) & (np.asarray(each) > 0)).all():
        raise InputError(
            f"image_weights has the shape {list(np.shape(each))}: expected {m:,} positive numbers, one for each test "
            "image."
        )
    return np.asarray(each, np.float32)


def _as_rows(rows, y: Int[np.ndarray, "n"], unseen: Int[np.ndarray, "u"]) -> Int[np.ndarray, "episodes u shots"]:
    """Converts the rows of episodes, and checks that they are images of their classes."""
    rows = _as_integers(rows, "rows", ndim=3)
    if not rows.size or rows.shape[1] != len(unseen):
        raise InputError(
            f"rows has the shape {list(rows.shape)}: expected [episodes, {len(unseen)}, shots] for {len(unseen)} "
            "unseen classes."
        )
    if rows.max() >= len(y):
        raise InputError(f"rows holds the index {rows.max():,}: expected 0 to {len(y) - 1:,}, a training image.")
    wrong = np.argwhere(y[rows] != unseen[:, None])
    if len(wrong):
        episode, k, shot = wrong[0]
        row = rows[episode, k, shot]
        raise InputError(
            f"rows[{episode}, {k}, {shot}] is an image of class {y[row]}, not {unseen[k]}: draw the episodes from the "
            "labels y and the unseen classes of this problem."
        )
    return rows


def _positions(labels: Int[np.ndarray, "m"], classes: Int[np.ndarray, "c"]) -> Int[np.ndarray, "m"]:
    """Returns the position of each label in `classes`."""
    order = np.argsort(classes)
    place = order[np.minimum(np.searchsorted(classes, labels, sorter=order), len(classes) - 1)]
    wrong = classes[place] != labels
    if wrong.any():
        raise InputError(
            f"y_test holds the class {labels[wrong][0]} ({wrong.sum():,} of {len(labels):,} images), which is neither "
            "seen nor unseen: leave these images out."
        )
    return place.astype(np.int32)


def _as_count(value, name: str, least: int = 1) -> int:
    """Converts a whole number of at least `least` to a Python int."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise InputError(f"{name} is {printable(repr(value))}: expected a whole number of at least {least}.")
    return number
