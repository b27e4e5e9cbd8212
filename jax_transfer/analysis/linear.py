"""The held-out accuracy of a linear classifier on the features ("Ranking Neural Checkpoints", sections 3.2 and 4.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import (
    as_count,
    as_features,
    as_held_out,
    as_labels,
    as_number,
    as_seed,
    is_traced,
    scored,
    where_valid,
)
from jax_transfer.analysis.canonical import canonical
from jax_transfer.analysis.split import are_different, held_out_last, stratified_fifth
from jax_transfer.records import InputError
from jax_transfer.transfer.softmax_regression import ProbeSettings, converged, minibatch, standardised, zero_start


def linear_accuracy(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    epochs: int | None = 1,
    seed: int = 0,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    l2: float = 1e-4,
    held_out: Int[Array, "m"] | None = None,
) -> Float[Array, ""]:
    """Computes the accuracy of a softmax regression on held-out samples, fitted to the remaining ones.

    "Ranking Neural Checkpoints" fits classifiers to the training samples and tests them on the test samples ("Linear
    (1 epoch)", "(5 epochs)", "(converged)"). A score that predicts the test accuracy must not see the test samples.
    Pass training samples: this function holds out some of them for testing. By default, the choice of the held-out
    samples depends only on the labels, so that all checkpoints are compared on the same images. Higher is better.

    Args:
      x: features. They are centred and divided by one common scale before fitting.
      y: labels in [0, num_classes).
      num_classes: C, static; a class without samples is ignored.
      epochs: number of epochs of Adam, starting from zero weights, static. None: L-BFGS minimises the mean
        cross-entropy plus l2/2 ||w||^2.
      seed: seed of the order of the batches.
      learning_rate: learning rate of Adam.
      batch_size: batch size of Adam, static. A smaller data set forms one batch; an incomplete last batch is dropped.
      l2: strength of the penalty if `epochs` is None.
      held_out: indices of the samples to test on; the others are used to fit. None: the result of
        `split.stratified_fifth`. Permuting the samples, and held_out with them, does not change the score.

    Returns:
      A float32 scalar in [0, 1]; NaN if a feature is not finite. The accuracy is a multiple of 1 / m, so checkpoints
      can be tied. A vmapped call processes the checkpoints one by one.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels or indices out of range give NaN
        instead.

    Example:
      >>> import jax.numpy as jnp
      >>> x, y = jnp.array([[1.0], [0.9], [1.1], [-1.0], [-0.9], [-1.1]]), jnp.array([0, 0, 0, 1, 1, 1])
      >>> float(linear_accuracy(x, y, num_classes=2, epochs=None, held_out=jnp.array([2, 5])))
      1.0
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    if len(x) < 2:
        raise InputError("x has 1 sample: expected at least 2, one to train on and one to test on.")
    for name, value in (("epochs", 1 if epochs is None else epochs), ("batch_size", batch_size)):
        as_count(value, name, least=1)
    as_number(learning_rate, "learning_rate", lambda rate: 0 < rate < np.inf, "a positive number, such as 0.01")
    as_number(l2, "l2", lambda l2: 0 < l2 < np.inf, "a positive number, such as 1e-4")
    held_out = stratified_fifth(y) if held_out is None else as_held_out(held_out, len(x))
    static = {"num_classes": num_classes, "epochs": epochs, "batch_size": batch_size}

    def score(x: Float[Array, "n d"], y: Int[Array, "n"]) -> Float[Array, ""]:
        return _accuracy(x, y, held_out, as_seed(seed), learning_rate, l2, **static)

    value = scored(score, x, y, num_classes)
    return where_valid(are_different(held_out, len(x)), value) if is_traced(held_out) else value


@functools.partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size"))
def _accuracy(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    held_out: Int[Array, "m"],
    seed: Int[Array, ""],
    learning_rate: float,
    l2: float,
    *,
    num_classes: int,
    epochs: int | None,
    batch_size: int,
) -> Float[Array, ""]:
    @jax.custom_batching.sequential_vmap  # so that a checkpoint's result does not depend on the others in the batch
    def accuracy(x, y, held_out, seed, learning_rate, l2):
        # Sorted canonically, so that the batches depend on the set of samples but not on their order.
        x, y, _, order = canonical(x, y, num_classes, held_out)
        rows, tested = held_out_last(held_out, order)
        _, mean, scale = standardised(x[rows])
        z, key = (x - mean) / scale, jax.random.key(seed)
        if epochs is None:
            weights = converged(z, y, rows, l2, key, num_classes, ProbeSettings())
        else:
            settings = ProbeSettings(epochs=epochs, batch_size=batch_size)
            start = zero_start(x.shape[1], jnp.zeros(num_classes, bool).at[y[rows]].set(True))
            weights = minibatch(z, y, rows, learning_rate, key, num_classes, settings, start)
        predicted = jnp.argmax(z[tested] @ weights["w"] + weights["b"], axis=-1)
        value = jnp.mean(predicted == y[tested], dtype=jnp.float32)
        return jnp.where(jnp.all(jnp.isfinite(x)), value, jnp.nan)

    with jax.default_matmul_precision("float32"):
        return accuracy(*map(jnp.asarray, (x, y, held_out, seed, learning_rate, l2)))
