"""Estimates for the plan of a study, before its stages run: a description of the checkpoints, and work in GFLOP.

The estimates cover forward passes and training steps, and come from the compiler's cost analysis. All sources are
treated as if they had the same number of classes as the first one.
"""

import functools
from collections.abc import Mapping

import jax

from jax_transfer.study import settings
from jax_transfer.study.epochs import Snapshot
from jax_transfer.study.workspace import Workspace
from jax_transfer.training.objectives import OBJECTIVES, Objective
from jax_transfer.training.optimizers import OptimizerSettings, make_optimizer
from jax_transfer.training.state import init_state
from jax_transfer.training.steps import make_train_step, train_step_gigaflops


def snapshots_of(work: Workspace, model: str) -> list[Snapshot]:
    """Lists the evaluated checkpoints of a model."""
    return [snapshot for snapshot in work.snapshots if snapshot.pretraining.model == model]


def checkpoints(work: Workspace) -> str:
    """Describes the evaluated checkpoints in words, such as "3 checkpoints (epochs 0, 1, 2)"."""
    many = [kind for kind, names in (("model", work.models), ("source", work.sources)) if len(names) > 1]
    each = f" of each {' and '.join(many)}" if many else ""
    epochs = sorted({snapshot.epoch for snapshot in work.snapshots})
    shown = ", ".join(map(str, epochs)) if len(epochs) <= 12 else f"{epochs[0]}, {epochs[1]}, ... {epochs[-1]}"
    return f"{len(work.snapshots)} checkpoints (epochs {shown}{each})"


def gigaflops_per_image(work: Workspace, model: str) -> float:
    """Computes the work of a forward pass on one image, in GFLOP."""
    return work.gigaflops_per_image(next(p for p in work.pretrainings if p.model == model))


def step_gigaflops(
    work: Workspace, objective: Objective, optimizer: OptimizerSettings, sizes: Mapping[str, tuple[str, int]]
) -> float:
    """Computes the work of one training step, in GFLOP.

    Args:
      sizes: feed -> (data set, number of images in a step).
    """
    transformation = make_optimizer(optimizer, 1, objective.groups)
    sources = {feed: (work.source(dataset, "train"), size) for feed, (dataset, size) in sizes.items()}
    num_classes = {feed: source.num_classes for feed, (source, _) in sources.items()}
    step = make_train_step(objective, transformation, work.preprocessing, num_classes)
    state = jax.eval_shape(functools.partial(init_state, objective, transformation, 0))
    return train_step_gigaflops(step, state, sources, objective.views, work.preprocessing)


def finetune_step_gigaflops(work: Workspace) -> dict[tuple[str, str], float]:
    """Returns (model, target) -> work of one fine-tuning step, in GFLOP.

    Targets with fewer images than one batch are left out; the finetune stage raises an error for them.
    """
    result = {}
    for model in work.models:
        for target in work.config.targets:
            tuning, train = settings.finetune_settings(work.config, target), work.source(target, "train")
            if len(train) >= tuning.batch_size:
                objective = OBJECTIVES["supervised"](work.net(model, train.num_classes), tuning.augment)
                sizes = {"train": (target, tuning.batch_size)}
                result[model, target] = step_gigaflops(work, objective, tuning.optimizer, sizes)
    return result
