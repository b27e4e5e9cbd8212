"""Transferability scores: functions of features and labels, and how well they rank checkpoints.

A score is called as SCORES[name](features: records.Features, num_classes: int) -> scalar, higher is better; under
`jax.jit` num_classes is static, under `jax.vmap` the fields of Features are stacked over checkpoints.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_transfer import flops
from jax_transfer.analysis.hscore import h_score, h_score_shrunk
from jax_transfer.analysis.leep import leep, nce
from jax_transfer.analysis.linear import linear_accuracy
from jax_transfer.analysis.logme import logme
from jax_transfer.analysis.mutual_information import mutual_information
from jax_transfer.analysis.nleep import nleep, nleep_gigaflops
from jax_transfer.analysis.ranking import (
    MIN_CHECKPOINTS,
    kendall,
    kendall_interval,
    pearson,
    ranking_row,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.analysis.transrate import transrate
from jax_transfer.records import Features, InputError


def _nce(features, num_classes):
    """NCE at the argmax of the logits; NaN for logits that are NaN or inf, which have an argmax too."""
    logits = features.logits
    value = nce(jnp.argmax(logits, axis=-1), features.labels, logits.shape[-1], num_classes)
    return jnp.where(jnp.isfinite(jnp.max(logits)), value, jnp.nan)


def _mutual_information(**static):
    return lambda features, num_classes: mutual_information(features.features, features.labels, num_classes, **static)


# name -> function(features: records.Features, num_classes) -> scalar: each takes from Features what its formula needs.
SCORES = {
    "logme": lambda features, num_classes: logme(features.features, features.labels, num_classes),
    "leep": lambda features, num_classes: leep(jax.nn.softmax(features.logits), features.labels, num_classes),
    "nce": _nce,
    "nleep": lambda features, num_classes: nleep(features.features, features.labels, num_classes),
    "h_score": lambda features, num_classes: h_score(features.features, features.labels, num_classes),
    "h_score_shrunk": lambda features, num_classes: h_score_shrunk(features.features, features.labels, num_classes),
    "transrate": lambda features, num_classes: transrate(features.features, features.labels, num_classes),
    "linear_1": lambda features, num_classes: linear_accuracy(features.features, features.labels, num_classes),
    "linear_5": lambda features, num_classes: linear_accuracy(features.features, features.labels, num_classes, 5),
    "linear_converged": lambda features, num_classes: linear_accuracy(
        features.features, features.labels, num_classes, None
    ),
    "mi_alpha_0.01": _mutual_information(alpha=0.01, energy=None),
    "mi_alpha_0.5": _mutual_information(alpha=0.5, energy=None),
    "mi_pca_alpha_0.01": _mutual_information(alpha=0.01, energy=0.8),
    "mi_pca_alpha_0.5": _mutual_information(alpha=0.5, energy=0.8),
}

# Scores of the logits of a head over classes: they do not exist for a checkpoint without one.
NEED_HEAD = ("leep", "nce")

# Compiled for the number of dimensions that a checkpoint's features turn out to have, rather than for all there may be.
_ONE_BY_ONE = ("nleep",)


def score_all(name: str, features: Features, num_classes: int) -> np.ndarray:
    """SCORES[name] of k checkpoints at once.

    Args:
      features: its fields stacked: features [k, n, d], logits [k, n, s], labels [k, n].

    Returns:
      Values [k]; NaN where the score is undefined, see `why_undefined`.
    """
    if name not in _ONE_BY_ONE:
        return np.asarray(_compiled(name, num_classes)(features))
    values = []
    for i in range(len(features.labels)):
        try:
            values.append(float(SCORES[name](jax.tree.map(lambda x, i=i: x[i], features), num_classes)))
        except InputError:  # the others have values; `why_undefined` gives its text
            values.append(float("nan"))
    return np.array(values)


@functools.cache
def _compiled(name: str, num_classes: int):
    return jax.jit(jax.vmap(lambda features: SCORES[name](features, num_classes)))


def score_gigaflops(name: str, features: Features, num_classes: int) -> float:
    """Floating point operations / 1e9 of SCORES[name] of one checkpoint, without the forward pass."""
    if name == "nleep":
        return nleep_gigaflops(features.features, features.labels, num_classes)
    return flops.gigaflops(lambda features: SCORES[name](features, num_classes), features)


def why_undefined(name: str, features: Features, num_classes: int) -> str:
    """Why SCORES[name] of one checkpoint has no finite value, in words."""
    try:
        SCORES[name](features, num_classes)
    except InputError as error:
        return str(error)
    return "the score is not a finite number for these features"


__all__ = [
    "MIN_CHECKPOINTS",
    "NEED_HEAD",
    "SCORES",
    "h_score",
    "h_score_shrunk",
    "kendall",
    "kendall_interval",
    "leep",
    "linear_accuracy",
    "logme",
    "mutual_information",
    "nce",
    "nleep",
    "pearson",
    "ranking_row",
    "recall_at_k",
    "regret",
    "relative_accuracy_at_k",
    "score_all",
    "score_gigaflops",
    "transrate",
    "weighted_kendall",
    "why_undefined",
]
