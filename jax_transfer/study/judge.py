"""Judges the epochs of a pre-training by the features of test images, as is needed where there are no classes.

Every epoch sees the same test images of the source: each as it is, and two views of it with the augmentations of the
pre-training, which are the same in every epoch. The features are those of the backbone, which is what is transferred,
and not those behind a projector.
"""

import math
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_transfer import devices
from jax_transfer.analysis import alignment, knn_accuracy, rankme, uniformity
from jax_transfer.data.mixing import MIXINGS
from jax_transfer.data.source import subset
from jax_transfer.data.subsets import capped
from jax_transfer.features.views import make_embed
from jax_transfer.logs import log
from jax_transfer.results import PretrainRow
from jax_transfer.study.epochs import Pretraining
from jax_transfer.study.workspace import Workspace

USUAL_IMAGES = 2000
NUM_VIEWS = 3  # of each image: as it is, and two augmented ones
NAMES = {
    "knn_accuracy": "k-NN accuracy",
    "effective_rank": "effective rank",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
# Features have collapsed if they have a smaller effective rank or a larger uniformity. With random weights, ResNets,
# MobileNets and ViTs have a rank above 4 and a uniformity below -0.01, even on 200 digits.
LEAST_RANK = 2.0
MOST_UNIFORMITY = -0.001

Judged = dict[str, float | None]  # columns of PretrainRow


def num_images(work: Workspace, pretraining: Pretraining) -> int:
    """Returns the number of the source's test images by which each epoch is judged; 0 if it is not."""
    most = work.recipe(pretraining).section.judged_images
    if most is None:
        most = 0 if work.objective(pretraining).has_head else USUAL_IMAGES
    number = min(most, len(work.source(pretraining.source, "test")))
    return number if number > 1 else 0  # a single image cannot be compared with others


def make_judge(
    work: Workspace, pretraining: Pretraining, mesh: Mesh
) -> Callable[[dict, Callable[[], bool]], Judged | None]:
    """Reads the images and compiles the forward pass.

    Args:
      mesh: the devices that train, of all processes.

    Returns:
      judge(model, stop) -> the columns of `results.PretrainRow` that `measure` computes; {} if epochs are not judged.
      The model is {"params", "stats"}. `stop` is called after each batch; if it returns True, the result is None. With
      several processes, all of them must call this function and `judge`, and all get the same result.
    """
    n, config, preprocessing = num_images(work, pretraining), work.config, work.preprocessing
    if not n:
        return lambda model, stop: {}
    # An image that is mixed with another one is no view of it.
    augmentations = tuple(name for name in work.recipe(pretraining).section.augment if name not in MIXINGS)
    test = work.source(pretraining.source, "test")
    chosen = subset(test, capped(test.labels, n, config.seed))
    embed = make_embed(
        work.source_net(pretraining),
        chosen,
        ((), augmentations, augmentations),
        lambda source, crops: work.feed_of(source, preprocessing, crops, everywhere=True),
        preprocessing,
        mesh,
        config.seed,
        config.data.eval_batch_size,
    )

    def judge(model: dict, stop: Callable[[], bool]) -> Judged | None:
        embedded = embed(model, stop)
        if embedded is None:
            return None
        plain, first, second = embedded
        return measure(plain, first, second, chosen.labels, chosen.num_classes)

    return judge


def measure(
    plain: Float[np.ndarray, "n d"],
    first: Float[np.ndarray, "n d"],
    second: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
) -> Judged:
    """Computes the numbers by which an epoch is judged from features of images and of two augmented views of each.

    The formulas are in `analysis.representation`. The accuracy is None if there is only one class.

    >>> features = np.eye(4, dtype=np.float32)
    >>> judged = measure(features, features, features, np.array([0, 0, 1, 1]), num_classes=2)
    >>> {name: round(value, 2) for name, value in judged.items()}
    {'knn_accuracy': 0.0, 'effective_rank': 4.0, 'alignment': 0.0, 'uniformity': -4.0}
    """
    x, u, v, y = map(jnp.asarray, (plain, first, second, labels))
    return {
        "knn_accuracy": float(knn_accuracy(x, y, num_classes)) if num_classes > 1 else None,
        "effective_rank": float(rankme(x)),
        "alignment": float(alignment(u, v)),
        "uniformity": float(uniformity(x)),
    }


def words(row: PretrainRow, has_head: bool) -> list[str]:
    """Lists the numbers of a row, other than the loss, for the log.

    Args:
      has_head: whether the objective has classes; otherwise accuracies that are NaN are left out.

    >>> row = PretrainRow(1, 0.5, math.nan, math.nan, 9.0, 1.0, "a", "1", "b", 5, effective_rank=9.04, uniformity=-1.5)
    >>> words(row, has_head=False)
    ['effective rank 9.0', 'uniformity -1.5000']
    """
    accuracies = {"train_accuracy": "train accuracy", "test_accuracy": "test accuracy"}
    shown = {column: name for column, name in accuracies.items() if has_head or not math.isnan(getattr(row, column))}
    values = {name: getattr(row, column) for column, name in {**shown, **NAMES}.items()}
    return [f"{n} {v:.{1 if n == NAMES['effective_rank'] else 4}f}" for n, v in values.items() if v is not None]


def has_collapsed(row: PretrainRow) -> bool:
    """Returns whether nearly all features of test images lie on one line through 0, or have the same direction.

    Random weights do not count as a collapse.

    >>> row = PretrainRow(1, 0.5, 0.0, 0.0, 9.0, 1.0, "a", "1", "b", 5, effective_rank=1.2, uniformity=-0.5)
    >>> import dataclasses
    >>> has_collapsed(row), has_collapsed(dataclasses.replace(row, epoch=0, step=0))
    (True, False)
    """
    if not row.step or row.effective_rank is None or row.uniformity is None:
        return False
    return row.effective_rank < LEAST_RANK or row.uniformity > MOST_UNIFORMITY


def warn_of_collapse(row: PretrainRow, rows: Iterable[PretrainRow], label: str, where: str) -> None:
    """Logs a warning if the representation has collapsed, but only for the first such row of a pre-training.

    Args:
      row: the new row.
      rows: all rows of results/pretrain.jsonl.
      label: the name of the epoch, such as "epoch 3".
      where: the section of the config that holds the settings, see `settings.Recipe`.
    """
    name = row.checkpoint.rpartition("/")[0]
    own = [each for each in rows if each.checkpoint.rpartition("/")[0] == name and (each.step or 0) < (row.step or 0)]
    if devices.is_first_process() and has_collapsed(row) and not any(map(has_collapsed, own)):
        log.warning(
            "%s: the representation has collapsed (effective rank %.1f, uniformity %.4f): the features of test images "
            "are nearly the same or differ in one direction only. Try a lower %s.optimizer.learning_rate, a larger "
            "batch_size, stronger augmentations, or another temperature if the objective has one.",
            label,
            row.effective_rank,
            row.uniformity,
            where,
        )
