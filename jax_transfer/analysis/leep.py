"""LEEP and NCE: how well a source classifier's predictions determine the target labels, without training.

Both count how often target class c meets source class z, form the conditional distribution P(c | z), and take the mean
log-likelihood per sample of the target labels: LEEP under the mixture of P(c | z) by the source probabilities (Nguyen et
al., ICML 2020), NCE under P(c | z) at one source label a sample, which is minus the conditional entropy H(Y | Z) (Tran
et al., ICCV 2019). There is no epsilon: what is divided by or whose logarithm is taken is positive, or counts as zero.
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
    """Log expected empirical prediction, in nats, at most 0. Higher is better.

    mean_i log sum_z P(y_i | z) p_iz,  P(c | z) = sum_{i: y_i = c} p_iz / sum_i p_iz   (equations 4 and 5 of "Ranking
    Neural Checkpoints").

    Args:
      source_probs: p, probabilities of the source classes; rows sum to 1 (not logits).
      y: labels in [0, num_classes); a class without samples changes nothing.
      num_classes: C, static.

    Returns:
      A scalar of source_probs' dtype. A source class of probability zero everywhere changes nothing; NaN for
      probabilities that are NaN.

    Raises:
      InputError: an argument has the wrong type, shape or range, or a row is no probabilities. What is traced gives NaN.
    """
    num_classes = as_count(num_classes)
    source_probs = as_probabilities(source_probs)
    y = as_labels(y, num_classes, len(source_probs))
    value = scored(functools.partial(leep_of_valid, num_classes=num_classes), source_probs, y, num_classes)
    return where_valid(jnp.all(are_probabilities(source_probs)), value) if is_traced(source_probs) else value


@functools.partial(jax.jit, static_argnames="num_classes")
def leep_of_valid(source_probs: Float[Array, "n s"], y: Int[Array, "n"], num_classes: int) -> Float[Array, ""]:
    """`leep` of arguments that need no check."""
    with jax.default_matmul_precision("float32"):
        joint = jax.nn.one_hot(y, num_classes, dtype=source_probs.dtype).T @ source_probs  # n P(c, z), [C, s]
    marginal = jnp.sum(joint, axis=0)
    conditional = joint / jnp.where(marginal == 0, 1, marginal)
    return jnp.mean(jnp.log(jnp.sum(conditional[y] * source_probs, axis=1)))


def nce(
    source_labels: Int[Array, "n"], y: Int[Array, "n"], num_source_classes: int, num_classes: int
) -> Float[Array, ""]:
    """Negative conditional entropy -H(Y | Z) of the target labels given the source labels, in nats, at most 0.

    sum_{c, z} n_cz / n log(n_cz / n_z)   (Tran et al., equation 3). Higher is better.

    Args:
      source_labels: Z, in [0, num_source_classes); usually the argmax of a source classifier.
      y: Y, in [0, num_classes).
      num_source_classes: s, static.
      num_classes: C, static.

    Returns:
      A scalar of JAX's default float dtype. Classes that do not occur, source or target, change nothing.

    Raises:
      InputError: an argument has the wrong type, shape or range. Labels that are traced give NaN if they are out of range.
    """
    num_classes, num_source_classes = as_count(num_classes), as_count(num_source_classes, "num_source_classes", least=1)
    source_labels = as_labels(source_labels, num_source_classes, None, "source_labels", "num_source_classes")
    y = as_labels(y, num_classes, len(source_labels))
    value = scored(lambda z, y: _nce(z, y, num_source_classes, num_classes), source_labels, y, num_classes)
    return where_valid(in_range(source_labels, num_source_classes), value) if is_traced(source_labels) else value


@functools.partial(jax.jit, static_argnames=("num_source_classes", "num_classes"))
def _nce(source_labels, y, num_source_classes, num_classes):
    counts = jnp.zeros((num_classes, num_source_classes), int).at[y, source_labels].add(1).astype(float)
    others = jnp.sum(counts, axis=0) - counts
    total = jnp.where(counts > 0, counts + others, 1)
    # Of two equal values the one that does not cancel: n_cz / n_z may round to 1.
    log_conditional = jnp.where(others < counts, jnp.log1p(-others / total), jnp.log(jnp.fmax(counts, 1) / total))
    return jnp.sum(jnp.where(counts > 0, counts * log_conditional, 0)) / len(y)
