"""Evaluation of a classifier on a data set, compiled once per net, for one model or several in parallel."""

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
    """Compiles the measurement of a net's accuracies on a data set.

    Args:
      net: a net with a classification head.
      preprocessing: preprocessing of the images.
      mesh: devices to use.
      stacked: whether models are stacked on a leading axis, one per row of the `sweep` axis. Otherwise there is a
        single model, and its batches are split over the `data` axis.

    Returns:
      measure(model, feed, batch_size, stop) -> [{"accuracy", "mean_class_accuracy"}], one entry per model, in [0, 1].
      The mean class accuracy is over the classes that occur. Both accuracies are NaN if a logit is not finite. `stop`
      is called after each batch; if it returns True, the result is None.

    Example:
      >>> import types
      >>> from jax_transfer.models.net import Output
      >>> apply = lambda params, stats, images: Output(images.mean((1, 2))[:, :2] * params, None)
      >>> net = types.SimpleNamespace(num_classes=2, apply=apply)
      >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
      >>> images = np.zeros((8, 4, 4, 3), np.uint8)
      >>> images[:7, :, :, 0] = images[7:, :, :, 1] = 255  # the predictions are 0, except for the last image
      >>> feed = types.SimpleNamespace(evaluation_batches=lambda batch_size: [Batch(images, labels, labels >= 0)])
      >>> measure = classification(net, Preprocessing(image_size=4), devices.make_mesh(), stacked=False)
      >>> measure({"params": jnp.ones(()), "stats": {}}, feed, batch_size=8)
      [{'accuracy': 0.875, 'mean_class_accuracy': 0.75}]
    """

    def count_correct(counts, model, batch: Batch):
        output = net.apply(model["params"], model["stats"], augment.evaluation_view(batch.images, preprocessing))
        rows_by_name = {
            "correct": output.logits.argmax(-1) == batch.labels,
            "count": batch.mask,
            "not_finite": ~jnp.isfinite(output.logits).all(-1),
        }
        classes = jnp.eye(net.num_classes, dtype=jnp.int32)[batch.labels]
        return {
            name: counts[name] + (classes * (rows & batch.mask)[:, None]).sum(0) for name, rows in rows_by_name.items()
        }

    def count_correct_of_many(counts, model, batch: Batch):
        def count_correct_of_row(counts, model, batch):
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
            return jax.tree.map(lambda x: x[None], count_correct(first(counts), first(model), batch))

        rows = PartitionSpec("sweep")
        mapped = jax.shard_map(
            count_correct_of_row,
            mesh=mesh,
            in_specs=(rows, rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,
        )
        return mapped(counts, model, batch)

    def count_correct_of_one(counts, model, batch: Batch):
        return devices.on_mesh(count_correct, mesh)(counts, model, devices.constrain(batch, mesh, "data"))

    add = jax.jit(count_correct_of_many if stacked else count_correct_of_one)

    def measure(model: dict, feed: Feed, batch_size: int, stop: Callable[[], bool] = lambda: False):
        zeros = _zero_counts((mesh.shape["sweep"], net.num_classes) if stacked else (net.num_classes,))
        counts = devices.split(zeros, mesh, "sweep") if stacked else devices.replicate(zeros, mesh)
        pending: collections.deque = collections.deque()
        for batch in feed.evaluation_batches(batch_size):
            counts = add(counts, model, batch)
            pending.append(counts)
            if len(pending) > 2:  # keeps the device busy, but not so far ahead that `stop` takes effect late
                jax.block_until_ready(pending.popleft())
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
    """Returns zero counts [..., c] of the correct images, all images and images with a non-finite logit, by class."""
    return {name: np.zeros(shape, np.int32) for name in ("correct", "count", "not_finite")}


def _accuracies(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """Computes the accuracies from counts [c] by class."""
    if counts["not_finite"].any():
        return {"accuracy": float("nan"), "mean_class_accuracy": float("nan")}
    correct, count = counts["correct"], counts["count"]
    occurs = count > 0
    return {
        "accuracy": float(correct.sum() / count.sum()),
        "mean_class_accuracy": float((correct[occurs] / count[occurs]).mean()),
    }
