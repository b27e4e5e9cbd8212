"""Evaluation of a classifier on a whole data set: compiled once for a net, on one model or on many side by side."""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_transfer import devices
from jax_transfer.data import augment
from jax_transfer.data.batches import Feed
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.models.net import Net
from jax_transfer.records import Batch

Measure = Callable[..., list[dict[str, float]] | None]


def classification(net: Net, preprocessing: Preprocessing, mesh: Mesh, stacked: bool = True) -> Measure:
    """Compiles the accuracies of a net on a data set.

    Args:
      stacked: the models are stacked on a leading axis, one a row of the `sweep` axis; otherwise there is a single one,
        whose batches are split over the `data` axis.

    Returns:
      measure(model, feed, batch_size, stop) -> [{"accuracy", "mean_class_accuracy"}], one entry a model, in [0, 1]; both are
      NaN where a logit is not finite. The mean is over the classes that occur. None if `stop`, asked after each batch,
      returns True.
    """

    def count_correct(counts, model, batch: Batch):
        output = net.apply(model["params"], model["stats"], augment.evaluation_view(batch.images, preprocessing))
        found = {
            "correct": output.logits.argmax(-1) == batch.labels,
            "count": batch.mask,
            "not_finite": ~jnp.isfinite(output.logits).all(-1),
        }
        classes = jnp.eye(net.num_classes, dtype=jnp.int32)[batch.labels]
        return {name: counts[name] + (classes * (rows & batch.mask)[:, None]).sum(0) for name, rows in found.items()}

    def of_many(counts, model, batch: Batch):
        def one(counts, model, batch):
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
            return jax.tree.map(lambda x: x[None], count_correct(first(counts), first(model), batch))

        rows = PartitionSpec("sweep")
        mapped = jax.shard_map(one, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=rows, check_vma=False)
        return mapped(counts, model, batch)

    def of_one(counts, model, batch: Batch):
        return count_correct(counts, model, devices.constrain(batch, mesh, "data"))

    add = jax.jit(of_many if stacked else of_one)

    def measure(model: dict, feed: Feed, batch_size: int, stop: Callable[[], bool] = lambda: False):
        zeros = _zero_counts((mesh.shape["sweep"], net.num_classes) if stacked else (net.num_classes,))
        counts = devices.split(zeros, mesh, "sweep") if stacked else devices.replicate(zeros, mesh)
        under_way: collections.deque = collections.deque()
        for batch in feed.evaluation_batches(batch_size):
            counts = add(counts, model, batch)
            under_way.append(counts)
            if len(under_way) > 2:  # keeps the device busy, and `stop` in time
                jax.block_until_ready(under_way.popleft())
            if stop():
                return None
        counts = jax.device_get(counts)
        each = (
            [{name: n[row] for name, n in counts.items()} for row in range(len(zeros["count"]))]
            if stacked
            else [counts]
        )
        return [_accuracies(one) for one in each]

    return measure


def _zero_counts(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Images of each class [..., c]: those classified correctly, all, and those with a NaN or infinite logit."""
    return {name: np.zeros(shape, np.int32) for name in ("correct", "count", "not_finite")}


def _accuracies(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """The accuracies of per-class counts [c]."""
    if counts["not_finite"].any():
        return {"accuracy": float("nan"), "mean_class_accuracy": float("nan")}
    correct, count = counts["correct"], counts["count"]
    seen = count > 0
    return {
        "accuracy": float(correct.sum() / count.sum()),
        "mean_class_accuracy": float((correct[seen] / count[seen]).mean()),
    }
