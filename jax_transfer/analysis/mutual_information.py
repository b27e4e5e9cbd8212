"""Mutual information of features and labels, estimated by the lower bound I_alpha with a trained critic.

"Ranking Neural Checkpoints", section 3.3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, as_seed, scored
from jax_transfer.analysis.canonical import canonical
from jax_transfer.analysis.nleep import principal_components
from jax_transfer.numerics import positive
from jax_transfer.records import InputError

FOLDS = 3
WIDTH = 256  # hidden units of the critic
LEARNING_RATE = 1e-3
STEPS_PER_SNAPSHOT = 32
BLOCKS = 64  # number of overlapping blocks of K held-out samples; more would hardly reduce the variance

Params = dict[str, Array]


def mutual_information(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    alpha: float = 0.01,
    energy: float | None = None,
    seed: int | Int[Array, ""] = 0,
    batch_size: int = 128,
    steps: int = 512,
) -> Float[Array, ""]:
    """Estimates the lower bound I_alpha of the mutual information of features and labels, in nats.

    Poole et al., "On Variational Bounds of Mutual Information", ICML 2019, equation 3; see `interpolated_bound` for
    the formula. The critic f and the baseline q are trained on the data. A small alpha gives low bias and high
    variance. Higher is better.

    A critic is never evaluated on its training samples. The samples are split into thirds. For each third, a critic is
    trained on the other two thirds, and the bound is evaluated on the held-out third. Since critics overfit, snapshots
    are taken during training, starting with the initial critic, whose bound is 0. One half of the held-out third
    selects the best snapshot and the other half evaluates it, and vice versa. The result is the mean of these six
    values. Its expectation is at most the mutual information, and far lower if there are few samples per class.

    Args:
      x: features. Shifting or uniformly scaling them does not change the score.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.
      alpha: a number in (0, 1], static; the paper uses 0.01 and 0.5. alpha = 1 is InfoNCE, which does not depend on q.
      energy: fraction of the variance, in (0, 1), kept by the principal components that replace x, static; None: no
        PCA.
      seed: seed of the split into thirds, the critics' initial weights and the batches. The order of the samples does
        not matter.
      batch_size: K, static; reduced if it is not less than a sixth of the number of samples.
      steps: number of steps of Adam for each critic, static; rounded up to a multiple of 32.

    Returns:
      A scalar of x's dtype; NaN if a feature is not finite. A vmapped call processes the checkpoints one by one.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or n < 12. Traced labels out of range give NaN
        instead.

    Example:
      >>> import jax.numpy as jnp
      >>> y = jnp.arange(96) % 2
      >>> x = 2.0 * y[:, None] - 1
      >>> round(float(mutual_information(x, y, num_classes=2, alpha=0.5, steps=64)), 1)  # I(X; Y) is log 2 = 0.69
      0.6
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    _check(len(x), alpha, energy)
    batch_size, steps = as_count(batch_size, "batch_size", least=1), as_count(steps, "steps", least=1)
    seed = as_seed(seed)
    static = {"num_classes": num_classes, "alpha": alpha, "energy": energy, "batch_size": batch_size, "steps": steps}
    # Sequential, so that a checkpoint alone has the same rounding as in a batch; training would amplify differences.
    score = jax.custom_batching.sequential_vmap(functools.partial(_estimate, **static))
    return scored(lambda x, y: score(x, y, seed), x, y, num_classes)


def interpolated_bound(
    scores: Float[Array, "k c"],
    y: Int[Array, "k"],
    log_q: Float[Array, "c"],
    label_shares: Float[Array, "c"],
    alpha: float,
) -> Float[Array, ""]:
    """Computes I_alpha in nats on a block of K samples, averaged over which sample serves as x_1.

        1 + mean_i [f(x_i, y_i) - log a(y_i)] - sum_c p(c) mean_i e^f(x_i, c) / a(c)
        a(c) = alpha m(c) + (1 - alpha) q(c),   m(c) = mean_i e^f(x_i, c)

    Poole et al., "On Variational Bounds of Mutual Information", ICML 2019, equation 3. I_alpha is the NWJ bound
    1 + E_p(X,y)[F] - E_p(X)p(y)[e^F] for F(X, y) = f(x_1, y) - log a(y; X), where X are K samples and y depends
    on x_1 alone. Two conditions follow. First, m must be the same function of X in both terms; here it includes x_1.
    Second, the labels of the second term must be independent of X, so m must not contain a sample whose label is
    counted in p(c). If x_i is left out of m in the first term only, or p counts the labels of the block itself, the
    result is not a bound: for 16 classes, K = 4 and alpha = 0.5, the former gives 3.6 nats where the mutual information
    is 2.7. (In the authors' code, m leaves out the sample whose label the second term uses.)

    The first term of a block is at most log(K / alpha), so the total is less than 1 + log(K / alpha). For alpha = 1 the
    second term is 1 and the bound is at most log K. The paper states the limit log(K / alpha) for every alpha, but the
    bound exceeds this limit if the K samples contain few of the classes.

    Args:
      scores: f(x_i, c), the critic's value for each sample and class.
      y: labels of the samples.
      log_q: log of the baseline q. Adding the same function of the class to log_q and the scores does not matter.
      label_shares: p, the relative frequencies of the classes among labels that are independent of the block.
      alpha: a number in (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> critic = 5 * jnp.eye(2)  # a critic that knows the label
      >>> bound = interpolated_bound(critic, jnp.array([0, 1]), jnp.zeros(2), jnp.full(2, 0.5), alpha=1.0)
      >>> round(float(bound), 2)  # close to log 2
      0.69
    """
    log_m = jax.nn.logsumexp(scores, axis=0) - np.log(len(y))
    log_a = jnp.logaddexp(jnp.log(alpha) + log_m, jnp.log1p(-alpha) + log_q)
    own = jax.nn.one_hot(y, scores.shape[1], dtype=bool)  # unlike a gather, its gradient is deterministic on a GPU
    joint = jnp.sum(jnp.where(own, scores - log_a, 0)) / len(y)
    return 1 + joint - jnp.sum(label_shares * jnp.exp(log_m - log_a))


def _check(n, alpha, energy):
    as_number(alpha, "alpha", lambda alpha: 0 < alpha <= 1, "a number in (0, 1]; the paper uses 0.01 and 0.5")
    if energy is not None:
        expected = "None (no PCA) or a fraction in (0, 1), such as 0.8"
        as_number(energy, "energy", lambda energy: 0 < energy < 1, expected)
    if n < 4 * FOLDS:
        raise InputError(
            f"x has {n} samples: expected at least {4 * FOLDS} for training and evaluation. Use more samples."
        )


@functools.partial(jax.jit, static_argnames=("num_classes", "energy", "batch_size", "steps"))
def _estimate(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    seed: Int[Array, ""],
    *,
    num_classes: int,
    alpha: float,
    energy: float | None,
    batch_size: int,
    steps: int,
) -> Float[Array, ""]:
    """Returns the mean bound over the thirds, each evaluated with a critic trained on the other two thirds."""
    finite = jnp.all(jnp.isfinite(x))
    with jax.default_matmul_precision("float32"):
        x, y, _, _ = canonical(x, y, num_classes)
        x, key = _scaled(x, energy), jax.random.key(seed)
        order = jax.random.permutation(key, len(y))
        half = len(y) // (2 * FOLDS)

        def fold_value(fold: Int[Array, ""]) -> Float[Array, ""]:
            rows = jnp.roll(order, -2 * half * fold)
            halves, train = rows[: 2 * half].reshape(2, half), rows[2 * half :]
            fold_key = jax.random.fold_in(key, fold)
            return _cross_selected(_train(x, y, train, halves, fold_key, num_classes, alpha, batch_size, steps))

        return jnp.where(finite, jnp.mean(jax.vmap(fold_value)(jnp.arange(FOLDS))), jnp.nan)


def _cross_selected(bounds: Float[Array, "snapshots 2"]) -> Float[Array, ""]:
    """Returns the mean bound of the two halves, each evaluated at the best snapshot of the other half."""
    best = jnp.argmax(bounds, axis=0)
    return (bounds[best[0], 1] + bounds[best[1], 0]) / 2


def _scaled(x: Float[Array, "n d"], energy: float | None) -> Float[Array, "n m"]:
    """Centres x or its principal components and divides them by one common scale, so that the mean square is 1."""
    x = x / positive(jnp.max(jnp.abs(x)))  # the squares of 1e-30 and 1e30 are not representable in float32
    if energy is None:
        x = x - jnp.mean(x, axis=0)
    else:
        reduced = principal_components(x, energy)
        x = (x - reduced.mean) @ reduced.directions
        x = jnp.where(jnp.arange(x.shape[1]) < reduced.dimension, x, 0)
    x = x / positive(jnp.max(jnp.abs(x)))
    return x / positive(jnp.sqrt(jnp.mean(x**2)))


def _train(
    x: Float[Array, "n m"],
    y: Int[Array, "n"],
    train: Int[Array, "t"],
    halves: Int[Array, "2 h"],
    key: Key[Array, ""],
    num_classes: int,
    alpha: float,
    batch_size: int,
    steps: int,
) -> Float[Array, "snapshots 2"]:
    """Trains a critic on the rows `train`; returns the bound on each half for the initial critic and each snapshot."""
    key_start, key_batches = jax.random.split(key)
    params = _initial_critic(key_start, x.shape[1], num_classes, x.dtype)
    adam = optax.adam(LEARNING_RATE)
    shares = _counts(y[train], num_classes, x.dtype) / len(train)
    stages = -(-steps // STEPS_PER_SNAPSHOT)

    def loss(params: Params, rows: Int[Array, "k"]) -> Float[Array, ""]:
        return -interpolated_bound(_critic(params, x[rows]), y[rows], params["log_q"], shares, alpha)

    def step(carry, rows):
        params, moments = carry
        update, moments = adam.update(jax.grad(loss)(params, rows), moments)
        return (optax.apply_updates(params, update), moments), None

    def stage(carry, key):
        """Evaluates the current critic on both halves, then trains it until the next snapshot."""

        def bound(rows: Int[Array, "h"]) -> Float[Array, ""]:
            return _held_out_bound(_critic(carry[0], x[rows]), y[rows], carry[0]["log_q"], alpha, batch_size)

        batches = jax.random.choice(key, train, (STEPS_PER_SNAPSHOT, min(batch_size, len(train))))
        return jax.lax.scan(step, carry, batches)[0], jax.vmap(bound)(halves)

    return jax.lax.scan(stage, (params, adam.init(params)), jax.random.split(key_batches, stages + 1))[1]


def _initial_critic(key: Key[Array, ""], d: int, num_classes: int, dtype) -> Params:
    """Returns a critic that is 0 everywhere and stays 0 for unseen classes; log_q serves as the output bias."""
    return {
        "hidden": jax.random.normal(key, (d, WIDTH), dtype) * (2 / d) ** 0.5,
        "bias": jnp.zeros(WIDTH, dtype),
        "out": jnp.zeros((WIDTH, num_classes), dtype),
        "linear": jnp.zeros((d, num_classes), dtype),
        "log_q": jnp.zeros(num_classes, dtype),
    }


def _critic(params: Params, x: Float[Array, "k m"]) -> Float[Array, "k c"]:
    """Computes f(x, .): a hidden layer of ReLU units, plus a linear map because it needs fewer samples to learn."""
    hidden = jax.nn.relu(x @ params["hidden"] + params["bias"])
    return hidden @ params["out"] + x @ params["linear"]


def _held_out_bound(
    scores: Float[Array, "h c"], y: Int[Array, "h"], log_q: Float[Array, "c"], alpha: float, batch_size: int
) -> Float[Array, ""]:
    """Returns the mean bound over blocks of K rows; the second term uses the labels of the other h - K rows."""
    h, num_classes = scores.shape
    k, blocks = min(batch_size, h - 1), min(h, BLOCKS)
    counts = _counts(y, num_classes, scores.dtype)

    def block_bound(start: Int[Array, ""]) -> Float[Array, ""]:
        rows = (start + jnp.arange(k)) % h
        shares = (counts - _counts(y[rows], num_classes, scores.dtype)) / (h - k)
        return interpolated_bound(scores[rows], y[rows], log_q, shares, alpha)

    return jnp.mean(jax.lax.map(block_bound, jnp.arange(blocks) * h // blocks))


def _counts(y: Int[Array, "n"], num_classes: int, dtype) -> Float[Array, "c"]:
    """Counts the samples of each class."""
    return jnp.zeros(num_classes, dtype).at[y].add(1)
