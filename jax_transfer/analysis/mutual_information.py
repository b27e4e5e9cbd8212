"""Mutual information between features and labels: the lower bound I_alpha with a trained critic ("Ranking Neural Checkpoints", 3.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import as_count, as_features, as_labels, as_number, as_seed, scored
from jax_transfer.analysis.canonical import canonical
from jax_transfer.analysis.nleep import principal_components
from jax_transfer.numerics import positive
from jax_transfer.records import InputError

FOLDS = 3
WIDTH = 256
LEARNING_RATE = 1e-3
STEPS_PER_SNAPSHOT = 32
BLOCKS = 64  # of K held-out samples, overlapping: more of them lower the variance, and no longer by much


def mutual_information(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    alpha: float = 0.01,
    energy: float | None = None,
    seed: int = 0,
    batch_size: int = 128,
    steps: int = 512,
) -> Float[Array, ""]:
    """Lower bound I_alpha of the mutual information of features and labels, in nats. Higher is better.

    Equation 3 of Poole et al., "On Variational Bounds of Mutual Information", ICML 2019, with a critic f and a baseline q
    that are trained for the data (`interpolated_bound` has the formula). Small alpha: little bias and more variance.

    No sample judges a critic that saw it. The samples fall into thirds; for each, a critic learns from the other two, and
    the bound is taken on the third. As critics over-train, a few stages of each are kept, the one that knows nothing and
    whose bound is 0 among them; half of the third chooses the stage, the other half evaluates it, and the reverse. The
    value is the mean of these six, and at most the mutual information in expectation; with few samples for a class it is
    well below it.

    Args:
      x: features. Neither their unit nor an offset matters.
      y: labels in [0, num_classes); a class that does not occur changes nothing.
      num_classes: C, static.
      alpha: in (0, 1], static; the paper's are 0.01 and 0.5. 1 is InfoNCE, and q plays no part.
      energy: None, or the share of the variance, in (0, 1), that the principal components keep which replace x; static.
      seed: of the thirds, the critic's start and its batches. The set of samples matters, their order does not.
      batch_size: K, static; fewer if a sixth of the samples has no more.
      steps: of Adam for each critic, static; rounded up to whole stages of 32.

    Returns:
      A scalar of x's dtype; NaN if a feature is not finite. A vmapped call runs checkpoint by checkpoint.

    Raises:
      InputError: an argument has the wrong type, shape or range, or n is below 12. Labels that are traced give NaN if
        they are out of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    _check(len(x), alpha, energy)
    batch_size, steps = as_count(batch_size, "batch_size", least=1), as_count(steps, "steps", least=1)
    seed = as_seed(seed)
    static = {"num_classes": num_classes, "alpha": alpha, "energy": energy, "batch_size": batch_size, "steps": steps}
    # One by one, a checkpoint's value has the same rounding alone and among others: training would magnify it.
    score = jax.custom_batching.sequential_vmap(functools.partial(_estimate, **static))
    return scored(lambda x, y: score(x, y, seed), x, y, num_classes)


def interpolated_bound(
    scores: Float[Array, "k c"],
    y: Int[Array, "k"],
    log_q: Float[Array, "c"],
    label_shares: Float[Array, "c"],
    alpha: float,
) -> Float[Array, ""]:
    """I_alpha on one block of K samples, in nats, of which x_i is each in turn the x_1 of the formula.

    1 + mean_i [f(x_i, y_i) - log a(y_i)] - sum_c p(c) mean_i e^f(x_i, c) / a(c),
    a(c) = alpha m(c) + (1 - alpha) q(c),  m(c) = mean_i e^f(x_i, c)

    It is the bound 1 + E_p(X,y)[F] - E_p(X)p(y)[e^F] (NWJ) for F(X, y) = f(x_1, y) - log a(y; X) and the K samples X, of
    which y depends on x_1 alone. Hence m must be the same function of X in both terms, here the one with x_1 among the K
    samples, and the labels of the second term must be independent of X: an x whose label is counted in p(c) may not be in
    m. Leaving x_i out of m in the first term only, or counting the block's own labels in p, is no bound: for 16 classes,
    K = 4, alpha = 0.5, the first gives 3.6 nats of 2.7. (The authors' code leaves out of m the x of the second term's label.)

    A block gives at most log(K / alpha) for the first term, less than 1 + log(K / alpha) in all; for alpha = 1 the second
    term is 1 and the bound at most log K. The paper's limit of log(K / alpha) for every alpha is exceeded where K samples
    contain few of the classes.

    Args:
      scores: f(x_i, c), the critic at each sample and class.
      y: the labels of the samples.
      log_q: log of the baseline q. Adding the same function of the class to it and to the scores changes nothing.
      label_shares: p, shares of the classes among labels that are independent of the block.
      alpha: in (0, 1].
    """
    log_m = jax.nn.logsumexp(scores, axis=0) - np.log(len(y))
    log_a = jnp.logaddexp(jnp.log(alpha) + log_m, jnp.log1p(-alpha) + log_q)
    own = jax.nn.one_hot(y, scores.shape[1], dtype=bool)  # a gather's gradient is a scatter, in no fixed order on a GPU
    joint = jnp.sum(jnp.where(own, scores - log_a, 0)) / len(y)
    return 1 + joint - jnp.sum(label_shares * jnp.exp(log_m - log_a))


def _check(n, alpha, energy):
    as_number(alpha, "alpha", lambda alpha: 0 < alpha <= 1, "a number in (0, 1]; the paper's are 0.01 and 0.5")
    if energy is not None:
        expected = "None (no PCA) or a share in (0, 1), such as 0.8"
        as_number(energy, "energy", lambda energy: 0 < energy < 1, expected)
    if n < 4 * FOLDS:
        raise InputError(
            f"x has {n} samples: expected at least {4 * FOLDS} to train and to evaluate on; use more samples."
        )


@functools.partial(jax.jit, static_argnames=("num_classes", "energy", "batch_size", "steps"))
def _estimate(x, y, seed, *, num_classes, alpha, energy, batch_size, steps):
    """The mean over thirds, each evaluated by a critic that learnt from the others."""
    finite = jnp.all(jnp.isfinite(x))
    with jax.default_matmul_precision("float32"):
        x, y, _, _ = canonical(x, y, num_classes)
        x, key = _scaled(x, energy), jax.random.key(seed)
        order = jax.random.permutation(key, len(y))
        half = len(y) // (2 * FOLDS)

        def value(fold):
            rows = jnp.roll(order, -2 * half * fold)
            halves, train = rows[: 2 * half].reshape(2, half), rows[2 * half :]
            fold_key = jax.random.fold_in(key, fold)
            return _value(_train(x, y, train, halves, fold_key, num_classes, alpha, batch_size, steps))

        return jnp.where(finite, jnp.mean(jax.vmap(value)(jnp.arange(FOLDS))), jnp.nan)


def _value(bounds):
    """From bounds [stages + 1, 2] on two halves: each half where the other half is best, their mean."""
    best = jnp.argmax(bounds, axis=0)
    return (bounds[best[0], 1] + bounds[best[1], 0]) / 2


def _scaled(x, energy):
    """x, or its principal components, centred and with mean square 1 over all entries: one scale keeps their proportions."""
    x = x / positive(jnp.max(jnp.abs(x)))  # squares of 1e-30 or 1e30 are no float32
    if energy is None:
        x = x - jnp.mean(x, axis=0)
    else:
        reduced = principal_components(x, energy)
        x = (x - reduced.mean) @ reduced.directions
        x = jnp.where(jnp.arange(x.shape[1]) < reduced.dimension, x, 0)
    x = x / positive(jnp.max(jnp.abs(x)))
    return x / positive(jnp.sqrt(jnp.mean(x**2)))


def _train(x, y, train, halves, key, num_classes, alpha, batch_size, steps):
    """The bound on each of the two halves, [stages + 1, 2], at the start and along the training of a critic on `train`."""
    key_start, key_batches = jax.random.split(key)
    params = _start(key_start, x.shape[1], num_classes, x.dtype)
    adam = optax.adam(LEARNING_RATE)
    shares = _counts(y[train], num_classes, x.dtype) / len(train)
    stages = -(-steps // STEPS_PER_SNAPSHOT)

    def loss(params, rows):
        return -interpolated_bound(_critic(params, x[rows]), y[rows], params["log_q"], shares, alpha)

    def step(carry, rows):
        params, moments = carry
        update, moments = adam.update(jax.grad(loss)(params, rows), moments)
        return (optax.apply_updates(params, update), moments), None

    def stage(carry, key):
        def bound(rows):
            return _held_out_bound(_critic(carry[0], x[rows]), y[rows], carry[0]["log_q"], alpha, batch_size)

        batches = jax.random.choice(key, train, (STEPS_PER_SNAPSHOT, min(batch_size, len(train))))
        return jax.lax.scan(step, carry, batches)[0], jax.vmap(bound)(halves)

    return jax.lax.scan(stage, (params, adam.init(params)), jax.random.split(key_batches, stages + 1))[1]


def _start(key, d, num_classes, dtype):
    """A critic that is 0, so that an unseen class stays 0. It needs no bias per class: log_q is one."""
    return {
        "hidden": jax.random.normal(key, (d, WIDTH), dtype) * (2 / d) ** 0.5,
        "bias": jnp.zeros(WIDTH, dtype),
        "out": jnp.zeros((WIDTH, num_classes), dtype),
        "linear": jnp.zeros((d, num_classes), dtype),
        "log_q": jnp.zeros(num_classes, dtype),
    }


def _critic(params, x):
    """f(x, .) [n, C]: a hidden layer of relu units, and a linear map beside it, which learns from fewer samples."""
    hidden = jax.nn.relu(x @ params["hidden"] + params["bias"])
    return hidden @ params["out"] + x @ params["linear"]


def _held_out_bound(scores, y, log_q, alpha, batch_size):
    """Mean of the bound over blocks of K rows of scores [h, C], with the labels of the other h - K in the second term."""
    h, num_classes = scores.shape
    k, blocks = min(batch_size, h - 1), min(h, BLOCKS)
    counts = _counts(y, num_classes, scores.dtype)

    def block(start):
        rows = (start + jnp.arange(k)) % h
        shares = (counts - _counts(y[rows], num_classes, scores.dtype)) / (h - k)
        return interpolated_bound(scores[rows], y[rows], log_q, shares, alpha)

    return jnp.mean(jax.lax.map(block, jnp.arange(blocks) * h // blocks))


def _counts(y, num_classes, dtype):
    return jnp.zeros(num_classes, dtype).at[y].add(1)
