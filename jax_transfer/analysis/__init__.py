"""Transferability scores: functions of features and labels, and how well they rank checkpoints.

A score is called as SCORES[name](features: records.Features, num_classes: int) -> scalar, higher is better; under
`jax.jit` num_classes is static, under `jax.vmap` the fields of Features are stacked over checkpoints.
"""

import jax
import jax.numpy as jnp

from jax_transfer.analysis.hscore import h_score, h_score_shrunk
from jax_transfer.analysis.leep import leep, nce
from jax_transfer.analysis.logme import logme
from jax_transfer.analysis.ranking import (
    kendall,
    pearson,
    ranking_row,
    recall_at_k,
    regret,
    relative_accuracy_at_k,
    weighted_kendall,
)
from jax_transfer.analysis.transrate import transrate


def _nce(features, num_classes):
    """NCE at the argmax of the logits; NaN for logits that are NaN or inf, which have an argmax too."""
    logits = features.logits
    value = nce(jnp.argmax(logits, axis=-1), features.labels, logits.shape[-1], num_classes)
    return jnp.where(jnp.isfinite(jnp.max(logits)), value, jnp.nan)


# name -> function(features: records.Features, num_classes) -> scalar: each takes from Features what its formula needs.
SCORES = {
    "logme": lambda features, num_classes: logme(features.features, features.labels, num_classes),
    "leep": lambda features, num_classes: leep(jax.nn.softmax(features.logits), features.labels, num_classes),
    "nce": _nce,
    "h_score": lambda features, num_classes: h_score(features.features, features.labels, num_classes),
    "h_score_shrunk": lambda features, num_classes: h_score_shrunk(features.features, features.labels, num_classes),
    "transrate": lambda features, num_classes: transrate(features.features, features.labels, num_classes),
}

__all__ = [
    "SCORES",
    "h_score",
    "h_score_shrunk",
    "kendall",
    "leep",
    "logme",
    "nce",
    "pearson",
    "ranking_row",
    "recall_at_k",
    "regret",
    "relative_accuracy_at_k",
    "transrate",
    "weighted_kendall",
]
