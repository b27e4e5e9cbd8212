"""Transferability scores: functions of features and labels, and how well they rank checkpoints.

A score is called as SCORES[name](features: records.Features, num_classes: int) -> scalar, higher is better; under
`jax.jit` num_classes is static, under `jax.vmap` the fields of Features are stacked over checkpoints.
"""

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

# name -> function(features: records.Features, num_classes) -> scalar: each takes from Features what its formula needs.
SCORES = {
    "logme": lambda features, num_classes: logme(features.features, features.labels, num_classes),
}

__all__ = [
    "SCORES",
    "kendall",
    "logme",
    "pearson",
    "ranking_row",
    "recall_at_k",
    "regret",
    "relative_accuracy_at_k",
    "weighted_kendall",
]
