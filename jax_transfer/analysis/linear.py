"""Accuracy of a linear classifier on the features as a score ("Ranking Neural Checkpoints", sections 3.2 and 4.1)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.canonical import canonical
from jax_transfer.transfer.softmax_regression import ProbeSettings, converged, minibatch, standardised, zero_start

STATIC = ("num_classes", "epochs", "validation_fraction", "batch_size")


@functools.partial(jax.jit, static_argnames=STATIC)
def linear_accuracy(
    x: Float[Array, "n d"],
    y: Int[Array, "n"],
    num_classes: int,
    epochs: int | None = 1,
    seed: int = 0,
    validation_fraction: float = 0.2,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    l2: float = 1e-4,
) -> Float[Array, ""]:
    """Accuracy in [0, 1] on some of the samples of a softmax regression fitted to the others. Higher is better.

    The paper's classifiers are fitted to the training samples and tested on the test samples ("Linear (1 epoch)",
    "(5 epochs)", "(converged)"). A score that is to predict the test accuracy must not see the test samples: here a random
    part of the samples given, which should be training samples, is held out for validation in their place.

    Args:
      x: features. The classifier sees them centred and divided by one common scale.
      y: labels in [0, num_classes).
      num_classes: C, static; a class without samples changes nothing.
      epochs: of Adam from weights of zero, static; None: the minimum of mean cross-entropy + l2/2 ||w||^2, by L-BFGS.
      seed: of the split and of the batches. Neither depends on the order of the samples, as long as their features differ.
      validation_fraction: part of the samples held out, in (0, 1), static; at least one sample, and not all.
      learning_rate, batch_size: of Adam; a set smaller than a batch is one batch, a last batch that is not full is left out.
      l2: of the converged classifier.

    Returns:
      A scalar float32, a multiple of one over the number of held-out samples: ties between checkpoints are possible. NaN if
      a feature is not finite. A vmapped call runs checkpoint by checkpoint.
    """
    num_held_out = min(len(y) - 1, max(1, round(validation_fraction * len(y))))

    @jax.custom_batching.sequential_vmap  # each result is that of a call alone, whatever stands beside it
    def accuracy(x, y, seed, learning_rate, l2):
        x, y, _ = canonical(x, y, num_classes)
        key_split, key_fit = jax.random.split(jax.random.key(seed))
        rows = jax.random.permutation(key_split, len(y))
        held_out, rows = rows[:num_held_out], rows[num_held_out:]
        _, mean, scale = standardised(x[rows])
        z = (x - mean) / scale
        if epochs is None:
            weights = converged(z, y, rows, l2, key_fit, num_classes, ProbeSettings())
        else:
            settings = ProbeSettings(epochs=epochs, batch_size=batch_size)
            start = zero_start(x.shape[1], jnp.zeros(num_classes, bool).at[y[rows]].set(True))
            weights = minibatch(z, y, rows, learning_rate, key_fit, num_classes, settings, start)
        predicted = jnp.argmax(z[held_out] @ weights["w"] + weights["b"], axis=-1)
        value = jnp.mean(predicted == y[held_out], dtype=jnp.float32)
        return jnp.where(jnp.all(jnp.isfinite(x)), value, jnp.nan)

    with jax.default_matmul_precision("float32"):
        return accuracy(*map(jnp.asarray, (x, y, seed, learning_rate, l2)))
