"""Accuracy of a linear classifier on the features as a score ("Ranking Neural Checkpoints", sections 3.2 and 4.1)."""

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
    """Accuracy in [0, 1] on some of the samples of a softmax regression fitted to the others. Higher is better.

    The paper's classifiers are fitted to the training samples and tested on the test samples ("Linear (1 epoch)",
    "(5 epochs)", "(converged)"). A score that is to predict the test accuracy must not see the test samples: here a part of
    the samples given, which should be training samples, is held out for validation in their place. Checkpoints are compared
    on the same images: the part depends on the labels alone, never on the features.

    Args:
      x: features. The classifier sees them centred and divided by one common scale.
      y: labels in [0, num_classes).
      num_classes: C, static; a class without samples changes nothing.
      epochs: of Adam from weights of zero, static; None: the minimum of mean cross-entropy + l2/2 ||w||^2, by L-BFGS.
      seed: of the batches.
      learning_rate, batch_size: of Adam; a set smaller than a batch is one batch, a last batch that is not full is left out.
      l2: of the converged classifier.
      held_out: indices of the samples to test on; the others are fitted. None: `split.stratified_fifth` of the labels.
        Permuting the samples, and held_out with them, changes nothing.

    Returns:
      A scalar float32, a multiple of one over the number of held-out samples: ties between checkpoints are possible. NaN if
      a feature is not finite. A vmapped call runs checkpoint by checkpoint.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels and indices that are traced give NaN if they are out
        of range.
    """
    num_classes, x = as_count(num_classes), as_features(x)
    y = as_labels(y, num_classes, len(x))
    if len(x) < 2:
        raise InputError("x has 1 sample: expected at least 2, one to fit on and one to test on.")
    for name, value in (("epochs", 1 if epochs is None else epochs), ("batch_size", batch_size)):
        as_count(value, name, least=1)
    as_number(learning_rate, "learning_rate", lambda rate: 0 < rate < np.inf, "a positive number, such as 0.01")
    as_number(l2, "l2", lambda l2: 0 < l2 < np.inf, "a positive number, such as 1e-4")
    held_out = stratified_fifth(y) if held_out is None else as_held_out(held_out, len(x))
    static = {"num_classes": num_classes, "epochs": epochs, "batch_size": batch_size}

    def score(x, y):
        return _accuracy(x, y, held_out, as_seed(seed), learning_rate, l2, **static)

    value = scored(score, x, y, num_classes)
    return where_valid(are_different(held_out, len(x)), value) if is_traced(held_out) else value


@functools.partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size"))
def _accuracy(x, y, held_out, seed, learning_rate, l2, *, num_classes, epochs, batch_size):
    @jax.custom_batching.sequential_vmap  # each result is that of a call alone, whatever stands beside it
    def accuracy(x, y, held_out, seed, learning_rate, l2):
        x, y, _, order = canonical(
            x, y, num_classes, held_out
        )  # the batches depend on the set of samples, not on their order
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
