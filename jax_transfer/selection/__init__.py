"""Which pre-training data to reuse: selection of source classes or clusters for a target."""

from jax_transfer.selection.clusters import Clusters, group_means, kmeans
from jax_transfer.selection.select import label_selection, random_selection, shared_names
from jax_transfer.selection.transport import Selection, greedy_ot_selection, recall, uot_selection

__all__ = [
    "Clusters",
    "Selection",
    "greedy_ot_selection",
    "group_means",
    "kmeans",
    "label_selection",
    "random_selection",
    "recall",
    "shared_names",
    "uot_selection",
]
