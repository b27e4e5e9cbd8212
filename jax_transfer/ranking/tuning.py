"""Fine-tunes the best checkpoints of a ranking, because the order of frozen features may change with fine-tuning."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from jax_transfer import devices, logs
from jax_transfer.checkpoints import Checkpoint, with_classes
from jax_transfer.checkpoints.checkpoint import Model
from jax_transfer.data.batches import Feed, joined
from jax_transfer.data.transforms import Preprocessing
from jax_transfer.logs import log
from jax_transfer.models import Net
from jax_transfer.ranking.result import Ranked, Tuning
from jax_transfer.records import InputError
from jax_transfer.training.objectives import OBJECTIVES
from jax_transfer.training.optimizers import OptimizerSettings
from jax_transfer.transfer.finetune import Candidate, FinetuneSettings, finetune

# One setting that suits most checkpoints. A study can search a grid of settings (`config.finetune.learning_rates`).
SETTINGS = FinetuneSettings(
    epochs=30, batch_size=32, optimizer=OptimizerSettings(learning_rate=0.01, schedule="cosine", weight_decay=1e-4)
)


def finetune_best(
    rows: Sequence[Ranked],
    count: int,
    feeds_of: Callable[[Preprocessing], Sequence[Feed]],
    metric: str,
    seed: int = 0,
    settings: FinetuneSettings = SETTINGS,
) -> tuple[list[Ranked], Tuning | None]:
    """Fine-tunes the first `count` checkpoints that could be evaluated, on the training images of the target.

    Checkpoints with the same net and preprocessing share one compiled program and train side by side on several
    devices. A batch is no larger than the training split.

    Args:
      rows: the rows of a ranking, best first.
      count: number of checkpoints; 0 for none.
      feeds_of: returns the feeds of the training and the test images at the size that a preprocessing needs.
      metric: "accuracy" or "mean_class_accuracy".
      seed: seed of the heads and batches.
      settings: schedule, batch size and optimizer.

    Returns:
      The rows, with the accuracy on the test images in `finetuned`, or the reason in `finetune_error`; and what was
      done, None if nothing.
    """
    best = [row for row in rows if not row.error][:count]
    if not best:
        return list(rows), None
    mesh, tuned = devices.make_mesh(sweep=jax.local_device_count()), {}
    kinds: dict[tuple[Net, Preprocessing], dict[str, Checkpoint]] = {}
    for row in best:
        try:
            loaded = row.load()
        except InputError as error:  # its file was there when its features were extracted
            log.warning("%s cannot be fine-tuned: %s", row.checkpoint, error)
            tuned[row.checkpoint] = {"finetune_error": str(error)}
            continue
        train, _ = feeds_of(loaded.preprocessing)
        net = with_classes(loaded, train.source.num_classes, devices.compute_dtype())
        # Loaded again when its training begins, so that one checkpoint at a time is in memory.
        stored = Checkpoint.stored(
            row.checkpoint, net, functools.partial(_model, row), loaded.preprocessing, settings=loaded.settings
        )
        kinds.setdefault((net, loaded.preprocessing), {})[row.checkpoint] = stored
    for (net, preprocessing), checkpoints in kinds.items():
        tuned |= _finetune(checkpoints, net, preprocessing, feeds_of(preprocessing), mesh, metric, seed, settings)
    changed = [dataclasses.replace(row, **tuned.get(row.checkpoint, {})) for row in rows]
    assert best[0].preprocessing is not None  # it was evaluated
    num_train, num_test = (len(feed.source) for feed in feeds_of(best[0].preprocessing))
    return changed, Tuning(settings.epochs, settings.optimizer.learning_rate, num_train, num_test)


def _model(row: Ranked) -> Model:
    with logs.muted():  # what there is to say about the file has been logged
        return row.load().model


def _batch_size(checkpoint: Checkpoint, most: int) -> int:
    """Returns the largest batch, up to `most` images, that the groups of a net's BatchNorm divide."""
    group = checkpoint.settings.get("batch_norm_group") or 1
    return max(group, most // group * group)


def _finetune(
    checkpoints: Mapping[str, Checkpoint], net: Net, preprocessing: Preprocessing, feeds, mesh, metric, seed, settings
) -> dict[str, dict]:
    """Returns checkpoint -> the fields of its row."""
    train, test = (feed.on(mesh) for feed in feeds)
    names, found = list(checkpoints), {}
    most = min(settings.batch_size, len(train.source))
    settings = dataclasses.replace(settings, batch_size=_batch_size(checkpoints[names[0]], most))
    try:
        for result in finetune(
            checkpoints,
            [Candidate(name, seed) for name in names],
            net,
            functools.partial(OBJECTIVES["supervised"], net, settings.augment),
            joined({"train": (train, settings.batch_size)}),
            test,
            preprocessing,
            settings,
            mesh,
        ):
            name, accuracy = names[result.index], result.metrics[metric]
            log.info("fine-tuned %s: %.2f %% on the test images, %.0f s", name, 100 * accuracy, result.seconds)
            diverged = f"training diverged at step {result.diverged_at}" if math.isnan(accuracy) else ""
            found[name] = {"finetuned": accuracy, "finetune_error": diverged}
    except (InputError, jax.errors.JaxRuntimeError) as error:  # such as a model that does not fit into memory
        reason = str(error).splitlines()[0].rstrip(".")
        log.warning("%s cannot be fine-tuned: %s", " and ".join(names), reason)
        found |= {name: {"finetune_error": reason} for name in names if name not in found}
    return found
