"""LEEP and NCE: how well the predictions of a source classifier determine the target labels, without training.

Both scores count how often target class c occurs with source class z, form the conditional distribution P(c | z), and
return the mean log-likelihood of the target labels. LEEP averages P(c | z) over the source classes z, weighted by the
source probabilities (Nguyen et al., ICML 2020). NCE uses P(c | z) for a single source label z per sample, which gives
the negative conditional entropy -H(Y | Z) (Tran et al., ICCV 2019). No epsilon is needed: divisors and arguments of
logarithms are positive, or the term is 0.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_transfer.analysis.arguments import (
    are_probabilities,
    as_count,
    as_labels,
    as_probabilities,
    in_range,
    is_traced,
    scored,
    where_valid,
)


def leep(source_probs: Float[Array, "n s"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes LEEP, the log expected empirical prediction, in nats.

        mean_i log sum_z P(y_i | z) p_iz,   P(c | z) = sum_{i: y_i = c} p_iz / sum_i p_iz

    Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned Representations", ICML 2020. Higher is
    better.

    Mean and counts are over the same samples, as in that paper: a study gives the training images of the target, and
    `rank` all its images. In "Ranking Neural Checkpoints", the mean (equation 4) is over the test images, with the
    counts (equation 5) of the training images.

    Args:
      source_probs: p, the probabilities (not logits) of the source classes; each row sums to 1.
      y: labels in [0, num_classes); a class without samples is ignored.
      num_classes: C, static.

    Returns:
      A scalar of source_probs' dtype, at most 0; NaN if a probability is NaN. A source class whose probability is 0 for
      every sample is ignored.

    Raises:
      InputError: if an argument has the wrong type, shape or range, or a row does not hold probabilities. Traced
        arguments with wrong values give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> probs = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
      >>> informative, shuffled = leep(probs, jnp.array([0, 0, 1, 1]), 2), leep(probs, jnp.array([0, 1, 0, 1]), 2)
      >>> round(float(informative), 2), round(float(shuffled), 2)
      (-0.3, -0.69)
    """
    num_classes = as_count(num_classes)
    source_probs = as_probabilities(source_probs)
    y = as_labels(y, num_classes, len(source_probs))
    value = scored(functools.partial(leep_of_valid, num_classes=num_classes), source_probs, y, num_classes)
    return where_valid(jnp.all(are_probabilities(source_probs)), value) if is_traced(source_probs) else value


@functools.partial(jax.jit, static_argnames="num_classes")
def leep_of_valid(source_probs: Float[Array, "n s"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """Computes `leep` without checking the arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(leep_of_valid(jnp.eye(2), jnp.array([0, 1]), 2)), 2)
      0.0
    """
    with jax.default_matmul_precision("float32"):
        joint = jax.nn.one_hot(y, num_classes, dtype=source_probs.dtype).T @ source_probs  # n P(c, z), [C, s]
    marginal = jnp.sum(joint, axis=0)
    conditional = joint / jnp.where(marginal == 0, 1, marginal)
    return jnp.mean(jnp.log(jnp.sum(conditional[y] * source_probs, axis=1)))


def nce(
    source_labels: Int[Array, "n"], y: Int[Array, "n"], num_source_classes: int, num_classes: int
) -> Float[Array, ""]:
    """Computes NCE, the negative conditional entropy of the target labels given the source labels, in nats.

        -H(Y | Z) = sum_{c, z} n_cz / n log(n_cz / n_z)

    Tran et al., "Transferability and Hardness of Supervised Classification Tasks", ICCV 2019, equation 3. Higher is
    better.

    Args:
      source_labels: Z, in [0, num_source_classes); usually the argmax of a source classifier.
      y: Y, in [0, num_classes).
      num_source_classes: s, static.
      num_classes: C, static.

    Returns:
      A scalar of JAX's default float dtype, at most 0. Source and target classes that do not occur are ignored.

    Raises:
      InputError: if an argument has the wrong type, shape or range. Traced labels out of range give NaN instead.

    Example:
      >>> import jax.numpy as jnp
      >>> source_labels, y = jnp.array([0, 0, 1, 1]), jnp.array([0, 0, 0, 1])
      >>> round(float(nce(source_labels, y, num_source_classes=2, num_classes=2)), 2)
      -0.35
    """
    num_classes, num_source_classes = as_count(num_classes), as_count(num_source_classes, "num_source_classes", least=1)
    source_labels = as_labels(source_labels, num_source_classes, None, "source_labels", "num_source_classes")
    y = as_labels(y, num_classes, len(source_labels))
    value = scored(lambda z, y: _nce(z, y, num_source_classes, num_classes), source_labels, y, num_classes)
    return where_valid(in_range(source_labels, num_source_classes), value) if is_traced(source_labels) else value


@functools.partial(jax.jit, static_argnames=("num_source_classes", "num_classes"))
def _nce(
    source_labels: Int[Array, "n"], y: Int[Array, "n"], num_source_classes: int, num_classes: int
) -> Float[Array, ""]:
    counts = jnp.zeros((num_classes, num_source_classes), int).at[y, source_labels].add(1).astype(float)
    others = jnp.sum(counts, axis=0) - counts
    total = jnp.where(counts > 0, counts + others, 1)
    # n_cz / n_z may round to 1, so log1p is used where it avoids cancellation.
    log_conditional = jnp.where(others < counts, jnp.log1p(-others / total), jnp.log(jnp.fmax(counts, 1) / total))
    return jnp.sum(jnp.where(counts > 0, counts * log_conditional, 0)) / len(y)
